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
        seed: of every random choice.
        reporter: told about progress.
        options: ingredients of the default coder.
        dry_run: predict only; sections may be left out.
        paths: exception paths to choose from, see `bytecap.allocation.overlay_menu`.
        recover: how long to tune what was coded, or None.
        store: where statistics and finished steps are kept: for other jobs on the same tokens, and for a killed run's
            successor, see `bytecap.recovery.checkpointing`.
        given: sections of units that are coded already, see `bytecap.methods.preencoded`; empty when a method runs.
    """

    model: Model
    sets: TokenSets
    budget: int
    size: Callable[..., int]
    device: str
    seed: int
    reporter: Reporter
    options: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    paths: tuple[str, ...] = ()
    recover: Effort | None = None
    store: Store = field(default_factory=Store)
    given: Mapping[str, Section] = field(default_factory=dict)


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
        near = difflib.get_close_matches(name, METHODS, 1, 0.0)
        raise UsageError(f"unknown method {name!r}, did you mean {near[0]}? (there are {', '.join(METHODS)})")
    module, function = METHODS[name]
    method: Method = getattr(importlib.import_module(module), function)
    return method


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
