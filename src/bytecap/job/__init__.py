"""Define the contract between the rooms: a method is a function from a `Job` to an `Outcome`.

Calibration, allocation, recovery and every method take a `Job`; methods return an `Outcome` of `Section`s, which the
pipeline writes into a file. Nothing is computed here, and torch is not imported.

>>> Section(tag=1, data=b"abc")
Section(tag=1, data=b'abc')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bytecap.job.base import Installed
from bytecap.job.effort import Effort
from bytecap.job.section import Section
from bytecap.system.cache import Store
from bytecap.system.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from bytecap.job.config import FitConfig
    from bytecap.model.checkpoint import Model
    from bytecap.model.texts import TokenSets
    from bytecap.progress import Reporter

__all__ = ["Job", "Method", "Outcome", "Section"]


@dataclass(frozen=True)
class Job:
    """The input of a method: model, tokens, budget and options.

    Attributes:
        model: the model, on `device`.
        sets: the three disjoint token sets.
        budget: cap on the whole file in bytes.
        size: file size for given sections, tables section, and shared objects if there are any.
        device: torch device.
        reporter: told about progress.
        config: the options that were asked for.
        paths: overlays to choose from, see `bytecap.allocation.overlay_menu`.
        recover: how long to tune what was coded, or None.
        store: where statistics and finished steps are kept: for other jobs on the same tokens, and for a killed run's
            successor, see `bytecap.recovery.checkpointing`.
        base: the file that an update stands on, or None.
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
    base: Installed | None = None

    @property
    def seed(self) -> int:
        """Seed of every random choice."""
        return self.config.seed

    @property
    def ranks(self) -> Ranks:
        """The processes that share the job."""
        return self.config.ranks or ALONE

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method."""
        return dict(self.config.options or {})

    @property
    def dry_run(self) -> bool:
        """Return whether only to predict; sections may be left out then."""
        return self.config.dry_run

    @property
    def given(self) -> Mapping[str, Section]:
        """Sections of units that are coded already, see `bytecap.methods.preencoded`; empty when a method runs."""
        return self.config.given or {}


@dataclass(frozen=True)
class Outcome:
    """The output of a method: sections, tables and the plan behind them.

    Attributes:
        sections: of every unit.
        tables: shared tables section, may be empty.
        predicted: predicted KL to the original in nats per token (NaN where a method predicts nothing, None where that
            of the file on the correction tokens is to stand here).
        slope: nats per token that a byte buys at the margin.
        gap: duality gap of the plan in nats per token.
        plan: which plan was shipped.
        objects: shared objects.
        margin: what more or fewer bytes would do, see `bytecap.allocation.budget_curve`; empty where nothing is
            planned.
        recovery: what recovery did, stage by stage; empty without.
        before: sections and tables without recovery, where it was of use.
        targets: whether targets that follow the coded prefix were kept (`kept`), and the cost in nats per token with
            and without them: KL on the correction tokens and bytes at the slope, and the paired standard error of the
            difference (`change_stderr`); empty where none were tried.
    """

    sections: dict[str, Section]
    tables: bytes
    predicted: float | None
    slope: float
    gap: float
    plan: str
    objects: tuple[bytes, ...] = ()
    margin: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    before: tuple[dict[str, Section], bytes] | None = None
    targets: dict[str, Any] = field(default_factory=dict)


Method = Callable[[Job], Outcome]
