"""Code a group of matrices along a walk, so that what comes later makes up for what the group's coding did.

Between two groups Adam moves what is not coded yet, along a gradient of few tokens. Behind a coding there is a better
first step: the matrices of a stage (those fed by one tensor) get the least-squares targets for what they are fed now in
place of what they were fed before, in the rest of the group, whose stages are coded one after another, and in the
stages behind it. That is a walk for targets (`bytecap.allocation.asymmetric_targets`), whose original is the model as
it was tuned before the group was coded. Targets made for an earlier coding are of no use in a recovery, since all
errors are drawn anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bytecap.allocation.asymmetric_targets import walk_stages
from bytecap.allocation.shared_inputs import LostError
from bytecap.allocation.target_fit import Moments
from bytecap.job import Job
from bytecap.model.quantized_copy import Values, copy_of, load_values
from bytecap.model.texts import leading

_TOKENS = {"cpu": 8192, "cuda": 32_768}  # walked for every group, in one round: targets move as they are found
AHEAD = 3  # groups behind the one that was coded


class TunedUnits(Protocol):
    """The units of a recovery, as a walk needs them. Values that are returned are in stored layout."""

    def waits(self, name: str) -> bool:
        """Return whether a unit is a matrix that is not coded yet."""

    def trial(self, name: str) -> tuple[Tensor, Tensor]:
        """Return rows to try a fit on, (some, cols), and the weight of each one's error (some,)."""

    def times(self, name: str, matrix: Tensor) -> Tensor:
        """Return a unit's present target times a matrix (cols, cols)."""

    def round(self, names: Sequence[str], changes: Mapping[str, Tensor]) -> Values:
        """Round and freeze units at their targets, some of which are changed, (rows, cols); return their values."""

    def move(self, changes: Mapping[str, Tensor]) -> Values:
        """Change targets of units that are not coded yet, (rows, cols); return their values."""


class GroupWalk:
    """The walks of one recovery.

    Args:
        job: whose statistics tokens are walked.
        order: units that can be given targets, stage by stage in calling order.
        strength: of targets, at most.
        tokens: of a pass.
        most: tokens to walk, at most.
    """

    def __init__(
        self, job: Job, order: Sequence[Sequence[str]], *, strength: float, tokens: int, most: int | None = None
    ) -> None:
        self._job, self._order, self._strength, self._tokens = job, order, strength, tokens
        own = _TOKENS[torch.device(job.device).type]
        self._windows = leading(job.sets.statistics, min(own, most or own))

    def code(self, tuned: nn.Module, names: Collection[str], units: TunedUnits) -> None:
        """Code a group, and move what comes next.

        Args:
            tuned: a copy of the model that holds the present values of all units.
            names: of the group.
            units: codes and moves units.
        """
        staged = {n for stage in self._order for n in stage if n in names}
        rest = units.round([n for n in names if n not in staged], {})
        order = self._behind(staged, units)
        if not order:
            return
        coded = copy_of(tuned)
        load_values(coded, rest)

        def stage(some: Sequence[str], inputs: Moments, *_: int) -> Values:
            fit = inputs.fit([units.trial(n) for n in some], self._strength)
            changes = {n: units.times(n, fit.fix * fit.strength) for n in some}
            here = [n for n in some if n in staged]
            moved = units.move({n: change for n, change in changes.items() if n not in staged})
            return {**moved, **(units.round(here, changes) if here else {})}

        try:
            walk_stages(
                order, tuned, coded, self._windows, stage, tokens=self._tokens, device=self._job.device,
                advance=lambda _: None, rough=True, round_tokens=sum(w.predicted for w in self._windows) + 1,
            )  # fmt: skip
        except LostError:  # the order of calls depends on the data
            self._order = ()
            units.round([n for n in names if units.waits(n)], {})

    def _behind(self, staged: set[str], units: TunedUnits) -> list[list[str]]:
        """Return the stages from the first of a group on, without units that are coded: its own, and those to move."""
        group = [at for at, stage in enumerate(self._order) if not staged.isdisjoint(stage)]
        first, last = (group[0], group[-1]) if group else (0, -1)
        end = last + 1 + AHEAD * max(1, len(group))
        found = [[n for n in stage if n in staged or units.waits(n)] for stage in self._order[first:end]]
        return [stage for stage in found if stage]
