"""Wrap units under an overlay in the shape in which the planner rounds all units.

A `OverlaidUnit` unit holds the base's problem where a plain unit holds its own (protected weights are zero, the Hessian
knows what they will absorb), so rounding, search and trimming need not know of it. After every rounding the overlay is
made anew over the values a reader decodes: `Coded.overlay` is the overlay, `Coded.distortion` that of both.

Asymmetric targets change the unit's own weights; the base's problem and the overlay follow from the changed ones, with
the same positions protected.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytecap.allocation.decoded import decode_grid
from bytecap.calibration.metric import Metric
from bytecap.format.coders import Shared
from bytecap.quantization.options import Options
from bytecap.quantization.overlays import Overlay, UnitProblem
from bytecap.quantization.quantizer import Coded, Prepared, prepare


def problem_of(item: Prepared) -> UnitProblem:
    """Return the problem whose damped Hessian was factored, with columns in stored order."""
    if item.hessian is not None:
        hessian = item.hessian.double().cpu()
    else:
        order, lower = item.order.cpu(), item.lower.whole().double().cpu()
        hessian = torch.empty_like(lower)
        hessian[order[:, None], order[None, :]] = lower @ lower.T
    return UnitProblem(item.unit, item.weight.cpu().contiguous(), hessian, item.rows.double().cpu())


@dataclass(frozen=True, kw_only=True)
class OverlaidUnit(Prepared):
    """A unit under an overlay; its inherited fields are the base's problem.

    Attributes:
        plain: the unit without an overlay.
        problem: what base and overlay together approximate.
        path, setting: the path and its amount.
        options: with which the base is prepared.
    """

    plain: Prepared
    problem: UnitProblem
    path: Overlay
    setting: Any
    options: Options

    @property
    def same_base(self) -> bool:
        """Return whether the base codes the unit as it would without the overlay."""
        return self.lower is self.plain.lower

    @property
    def target(self) -> Tensor:
        """See `Prepared`."""
        return self.plain.weight

    def moved(self, change: Tensor) -> Prepared:
        """See `Prepared`; the same positions stay protected."""
        plain = self.plain.moved(change)
        problem = replace(self.problem, weight=plain.weight.cpu().contiguous())
        return overlaid(plain, problem, self.path, self.setting, self.options)

    def complete(self, coded: Coded, shared: Shared) -> Coded:
        """Fit the overlay to the decoded base; returns it with the remaining distortion."""
        base = torch.from_numpy(np.array(decode_grid(coded.code, shared), np.float32, order="C"))
        applied = self.path.after(self.problem, base, self.setting)
        return replace(
            coded, distortion=self.problem.distortion(applied.values), overlay=(applied.tag, applied.data)
        )  # fmt: skip

    def emptied(self) -> Prepared:
        """See `Prepared`; a plain unit, since nothing is rounded any more."""
        return self.plain.emptied()


def overlaid(plain: Prepared, problem: UnitProblem, path: Overlay, setting: Any, options: Options) -> OverlaidUnit:
    """Put a unit under an overlay.

    Args:
        plain: the unit without it.
        problem: the unit's, see `problem_of`.
        path: the path.
        setting: one of the overlay's.
        options: of the planner.
    """
    changed = path.before(problem, setting)
    below = plain
    if changed is not problem:
        device = plain.weight.device
        metric = Metric(changed.hessian.to(device), changed.rows.to(device))
        # the problem's Hessian is damped already
        below = prepare(plain.unit, changed.weight.to(device), metric, replace(options, damping=0.0))
    held = {f.name: getattr(below, f.name) for f in fields(Prepared)}
    return OverlaidUnit(**held, plain=plain, problem=problem, path=path, setting=setting, options=options)
