"""The contract between the rooms: a method is a function from a `Job` to an `Outcome`.

Calibration, allocation, recovery and every method take a `Job`; methods return an `Outcome` of `Section`s, which the
pipeline writes into a file. Nothing is computed here, and torch is not imported.

>>> Section(tag=1, data=b"abc")
Section(tag=1, data=b'abc')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bytecap.job.effort import Effort
from bytecap.system.cache import Store

if TYPE_CHECKING:
    from bytecap.model.checkpoint import Model
    from bytecap.model.texts import TokenSets
    from bytecap.progress import Reporter


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
