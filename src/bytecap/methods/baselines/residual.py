"""Store golf's low-rank residual: rank 4 on the three tensors that lost most, as in the Parameter Golf record.

After GPTQ, the linear layers with the largest output error `tr(E H E^T)` get a `lowrank` layer over their base: the
best residual of rank 4 under the Hessian, factors rounded to 2 or 4 bits. Its bytes are set aside before `k` is sought.

Omitted: the record's two different precisions for the two factors of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bytecap.format.coders.packed import Quantized, dequantize
from bytecap.format.coders.stack import CODER as STACK
from bytecap.job import Section
from bytecap.quantization.overlays import Problem
from bytecap.quantization.overlays.lowrank import PATH, Rank
from bytecap.types import Unit

_DAMPING = 0.01
_OVERHEAD = 16  # bytes of a stack and a layer beyond scales and factors


@dataclass(frozen=True)
class Residual:
    """A low-rank residual on some tensors.

    Attributes:
        bits: of a factor's values, 2 to 8.
        rank: of a residual.
        tensors: how many get one.
    """

    bits: int
    rank: int = 4
    tensors: int = 3

    def bytes(self, units: Sequence[Unit], hessians: Mapping[str, Tensor]) -> int:
        """Return an upper bound on the bytes of all residuals, whichever tensors get them."""
        shapes = [u.matrix_shape for u in units if u.name in hessians and min(u.matrix_shape) >= self.rank]
        sizes = sorted(((r + c) * self.rank * self.bits + 7) // 8 + 4 * self.rank + _OVERHEAD for r, c in shapes)
        return sum(sizes[-self.tensors :])

    def over(
        self,
        sections: Mapping[str, Section],
        units: Sequence[Unit],
        weights: Mapping[str, Tensor],
        coded: Mapping[str, Quantized],
        hessians: Mapping[str, Tensor],
    ) -> dict[str, Section]:
        """Replace the sections of the tensors with the largest error by stacks.

        Args:
            sections: bases by unit name.
            units: of the model.
            weights: float32 (rows, cols).
            coded: integers of the linear layers.
            hessians: float64 (cols, cols) of the linear layers, on one scale.
        """
        problems = {}
        for u in units:
            if u.name in coded and min(u.matrix_shape) >= self.rank:
                hessian = hessians[u.name].cpu().double().clone()
                hessian.diagonal().add_(max(_DAMPING * float(hessian.diagonal().mean()), 1e-30))
                ones = torch.ones(len(weights[u.name]), dtype=torch.float64)
                problems[u.name] = Problem(u, weights[u.name], hessian, ones)
        bases = {n: torch.from_numpy(dequantize(coded[n])) for n in problems}
        worst = sorted(problems, key=lambda n: problems[n].distortion(bases[n]))[-self.tensors :]
        found = {}
        for n in worst:
            layer = PATH.after(problems[n], bases[n], Rank(self.rank, self.bits))
            base = sections[n]
            found[n] = Section(STACK.tag, STACK.encode((base.tag, base.data), [(layer.tag, layer.data)]))
        return found
