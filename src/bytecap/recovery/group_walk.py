"""Code a group of matrices along a walk, so that later ones make up for what earlier ones of the same group did.

Between two groups Adam moves what is not coded yet, so it makes up for the groups before. Inside a group nothing has
moved in between: the matrices of a stage (those fed by one tensor) get targets, from what the stages before them in the
group deliver now that they are coded, in place of what they delivered before. That is a walk for targets
(`bytecap.allocation.asymmetric_targets`), whose original is the model as it is tuned: what is coded is the same in
both, what is not has its present values. A target made for an earlier coding is of no use here, since its errors have
been drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from bytecap.allocation.asymmetric_targets import tokens_of, walk_stages
from bytecap.allocation.planner import Planner
from bytecap.allocation.target_fit import Moments, trial_of
from bytecap.job import Job
from bytecap.model.quantized_copy import Values, copy_of, load_values
from bytecap.model.texts import leading
from bytecap.quantization.quantizer import Prepared

_TOKENS = {"cpu": 8192, "cuda": 65_536}  # walked for every group

Code = Callable[[Sequence[Prepared]], Values]
"""Codes some units, and returns their values in stored layout."""


class GroupWalk:
    """The walks of one recovery."""

    def __init__(self, job: Job, planner: Planner, order: Sequence[Sequence[str]]) -> None:
        """Prepare walks over `order`, the units that can be given targets, stage by stage; none if it is empty."""
        self._job, self._planner, self._order = job, planner, order
        most = min(_TOKENS[torch.device(job.device).type], planner.options.drift_tokens)
        self._windows = leading(job.sets.statistics, most)

    def code(self, items: Mapping[str, Prepared], tuned: nn.Module, code: Code) -> None:
        """Code the units of a group, with targets where an earlier stage of the group has changed what they are fed.

        Args:
            items: the units by name, with their present targets.
            tuned: a copy of the model that holds the present values of all units.
            code: codes units, called stage by stage.
        """
        order = [some for names in self._order if (some := [n for n in names if n in items])]
        staged = {n for names in order for n in names}
        rest = code([item for n, item in items.items() if n not in staged]) if len(staged) < len(items) else {}
        if not order:
            return
        coded = copy_of(tuned)
        load_values(coded, rest)

        def stage(names: Sequence[str], inputs: Moments, rounds_before: int, count: int) -> Values:
            del rounds_before, count
            some = [items[n] for n in names]
            fit = inputs.fit([trial_of(p) for p in some], self._planner.options.drift)
            return code([p.moved(p.times(fit.fix * fit.strength)) for p in some])

        walk_stages(
            order, tuned, coded, self._windows, stage, device=self._job.device, advance=lambda _: None,
            tokens=tokens_of(self._planner, self._job.device, self._windows), rough=True,
        )  # fmt: skip
