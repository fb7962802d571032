"""Code a group of matrices along a walk, so that later ones make up for what earlier ones of the same group did.

Between two groups Adam moves what is not coded yet, so it makes up for the groups before. Inside a group nothing has
moved in between: the matrices of a stage (those fed by one tensor) get targets, from what the stages before them in the
group deliver now that they are coded, in place of what they delivered before. That is a walk for targets
(`bytecap.allocation.asymmetric_targets`), whose original is the model as it is tuned: what is coded is the same in
both, what is not has its present values. A target made for an earlier coding is of no use here, since its errors have
been drawn anew.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bytecap.allocation.asymmetric_targets import tokens_of, walk_stages
from bytecap.allocation.planner import Planner
from bytecap.allocation.target_fit import Moments, trial_of
from bytecap.job import Job
from bytecap.model.quantized_copy import Values, copy_of, load_values
from bytecap.model.texts import leading
from bytecap.quantization.quantizer import Prepared

AHEAD = int(os.environ.get("AHEAD", "1"))  # groups whose targets make up for the one that was coded
_TOKENS = {"cpu": 8192, "cuda": 65_536}  # walked for every group


class TunedUnits(Protocol):
    """The units of a recovery, as a walk needs them. Values that are returned are in stored layout."""

    def waits(self, name: str) -> bool:
        """Return whether a unit is a matrix that is not coded yet."""

    def item(self, name: str) -> Prepared:
        """Return a unit with its present target."""

    def round(self, names: Sequence[str], changes: Mapping[str, Tensor]) -> Values:
        """Round and freeze units at their targets, some of which are changed, (rows, cols); return their values."""

    def move(self, changes: Mapping[str, Tensor]) -> Values:
        """Change targets of units that are not coded yet, (rows, cols); return their values."""


class GroupWalk:
    """The walks of one recovery."""

    def __init__(self, job: Job, planner: Planner, order: Sequence[Sequence[str]]) -> None:
        """Prepare walks over `order`, the units that can be given targets, stage by stage; none if it is empty."""
        self._job, self._planner, self._order = job, planner, order
        most = min(_TOKENS[torch.device(job.device).type], planner.options.drift_tokens)
        self._windows = leading(job.sets.statistics, most)

    def code(self, tuned: nn.Module, names: Collection[str], units: TunedUnits) -> None:
        """Code a group, with targets where an earlier stage of it has changed what they are fed; move what comes next.

        Args:
            tuned: a copy of the model that holds the present values of all units.
            names: of the group.
            units: codes and moves units.
        """
        order = [some for names_ in self._order if (some := [n for n in names_ if n in names])]
        staged = {n for stage in order for n in stage}
        rest = units.round([n for n in names if n not in staged], {})
        ahead = [some for stage in self._order if (some := [n for n in stage if n not in names and units.waits(n)])]
        ahead = ahead[: AHEAD * max(1, len(order))]
        if not order and not ahead:
            return
        coded = copy_of(tuned)
        load_values(coded, rest)

        def stage(some: Sequence[str], inputs: Moments, rounds_before: int, count: int) -> Values:
            del rounds_before, count
            items = [units.item(n) for n in some]
            fit = inputs.fit([trial_of(p) for p in items], self._planner.options.drift)
            changes = {p.unit.name: p.times(fit.fix * fit.strength) for p in items}
            return units.round(some, changes) if some[0] in names else units.move(changes)

        walk_stages(
            [*order, *ahead], tuned, coded, self._windows, stage, device=self._job.device, advance=lambda _: None,
            tokens=tokens_of(self._planner, self._job.device, self._windows), rough=True,
        )  # fmt: skip
