"""Methods: ways to turn a model into sections that fit a cap. All share container, ledger and evaluation.

A method is a function from a `Job` to an `Outcome`. `bytecap` is the default; `golf`, `uniform`, `owq`
and `radio` are what it is measured against.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bytecap.errors import UsageError
from bytecap.system.cache import Store
from bytecap.types import Unit

if TYPE_CHECKING:
    from bytecap.job.config import FitConfig
    from bytecap.model.checkpoint import Model
    from bytecap.model.texts import TokenSets
    from bytecap.progress import Reporter
    from bytecap.recovery.tuning import Effort

METHODS = {
    "bytecap": ("bytecap.methods.bytecap", "run"),
    "golf": ("bytecap.methods.baselines.runs", "run_golf"),
    "uniform": ("bytecap.methods.baselines.runs", "run_uniform"),
    "owq": ("bytecap.methods.baselines.owq", "run"),
    "radio": ("bytecap.methods.baselines.radio", "run"),
    "cluscomp": ("bytecap.methods.baselines.cluscomp", "run"),
    "reallm": ("bytecap.methods.baselines.reallm", "run"),
}

RELATED = {  # beginnings of other programs' names: the method that does the same or comes nearest, and why
    ("gptq", "autogptq"): ("golf", "It is GPTQ with entropy coded integers."),
    ("rtn", "int", "absmax", "minmax", "hqq", "gguf", "q4", "q8", "nf4", "fp4", "bnb", "bitsandbytes"): (
        "uniform", "It rounds to nearest without calibration."),
    ("awq", "autoawq", "smoothquant", "imatrix", "exl"): (
        "bytecap", "It weighs every weight by what calibration says about it; awq itself is not here."),
    ("spqr", "squeezellm", "llm.int8", "llmint8"): ("owq", "It keeps the weights that suffer most in 16 bit."),
    ("aqlm", "vptq", "quip", "kmeans", "vq"): ("cluscomp", "It codes vectors of weights by codebooks."),
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One unit as stored: the coder's on-disk tag and its bytes."""

    tag: int
    data: bytes


@dataclass(frozen=True)
class Job:
    """What a method works on.

    Attributes:
        model: the model, on `device`.
        sets: the three disjoint token sets.
        budget: cap on the whole file in bytes.
        size: file size for given sections, tables section, and shared objects if there are any.
        device: torch device.
        reporter: told about progress.
        config: the options that were asked for.
        paths: exception paths to choose from, see `bytecap.allocation.overlay_menu`.
        recover: how long to tune what was coded, or None.
        store: where statistics and finished steps are kept: for other jobs on the same tokens, and for a killed run's
            successor, see `bytecap.recovery.checkpointing`.
    """

    model: Model
    sets: TokenSets
    budget: int
    size: Callable[..., int]
    device: str
    reporter: Reporter
    config: FitConfig
    paths: tuple[str, ...] = ()
    recover: Effort | None = None
    store: Store = field(default_factory=Store)

    @property
    def seed(self) -> int:
        """Seed of every random choice."""
        return self.config.seed

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method."""
        return dict(self.config.options or {})

    @property
    def dry_run(self) -> bool:
        """Predict only; sections may be left out."""
        return self.config.dry_run

    @property
    def given(self) -> Mapping[str, Section]:
        """Sections of units that are coded already, see `bytecap.methods.preencoded`; empty when a method runs."""
        return self.config.given or {}


@dataclass(frozen=True)
class Outcome:
    """What a method found.

    Attributes:
        sections: of every unit.
        tables: shared tables section, may be empty.
        predicted: predicted KL to the original in nats per token (NaN where a method predicts nothing).
        slope: nats per token that a byte buys at the margin.
        gap: duality gap of the plan in nats per token.
        plan: which plan was shipped.
        objects: shared objects.
        margin: what more or fewer bytes would do, see `bytecap.allocation.budget_curve`; empty where nothing is
            planned.
        recovery: what recovery did, stage by stage; empty without.
        before: sections and tables without recovery, where it was of use.
    """

    sections: dict[str, Section]
    tables: bytes
    predicted: float
    slope: float
    gap: float
    plan: str
    objects: tuple[bytes, ...] = ()
    margin: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    before: tuple[dict[str, Section], bytes] | None = None


Method = Callable[[Job], Outcome]


def find(name: str) -> Method:
    """The method of a name.

    Args:
        name: one of `METHODS`, or `FILE.py:CALLABLE`, a `Method` in a file of the user's. That file is run.

    Raises:
        UsageError: unknown; the message suggests the nearest one.
    """
    if name.partition(":")[0].endswith(".py"):
        from bytecap.model.factory import load_callable

        own: Method = load_callable(name)[0]
        return own
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}: {_suggestion(name)} (there are {', '.join(METHODS)})")
    module, function = METHODS[name]
    method: Method = getattr(importlib.import_module(module), function)
    return method


def _suggestion(name: str) -> str:
    """What somebody who types the name of another quantizer may want, or of which name it is a misspelling."""
    plain = name.lower().replace("_", "").replace("-", "")
    for words, (method, reason) in RELATED.items():
        if any(plain.startswith(word) for word in words):
            return f"did you mean {method}? {reason}"
    return f"did you mean {difflib.get_close_matches(name, METHODS, 1, 0.0)[0]}?"


def menu_of(names: Sequence[str] | None, method: str) -> tuple[str, ...]:
    """The exception paths that a method may choose from.

    Raises:
        UsageError: an unknown path, or a method that chooses none.
    """
    from bytecap.allocation import overlay_menu

    if names and method != "bytecap":
        raise UsageError(f"method {method} chooses no exception paths: --paths is for --method bytecap")
    return overlay_menu.known(names) if method == "bytecap" else ()


def smallest_section(unit: Unit) -> tuple[int, bytes]:
    """(tag, bytes) of the least a unit can take: every value at its centre."""
    import numpy as np

    from bytecap.format.coders import Shared
    from bytecap.format.coders.exact import CODER as EXACT
    from bytecap.format.coders.vector import CODER as VECTOR

    if not unit.dtype.startswith(("F", "BF")):
        return EXACT.tag, EXACT.encode(np.zeros(unit.matrix_shape), unit.dtype)
    return VECTOR.tag, VECTOR.encode(np.zeros(min(1, unit.parameters), np.float32), 1.0, Shared()).data  # any number
