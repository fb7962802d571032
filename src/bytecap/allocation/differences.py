"""Matrices of an update: what is rounded is the difference to what the receiver already has.

A `DifferenceUnit` holds the difference of the model's weights to the decoded values of the base where a plain unit
holds weights, so rounding, search and trimming need not know of it. The metric is the model's, and so are distortions:
they are those of the sum, since base and model stay as they are. A difference of which nothing is left costs no byte.

The target is the model, not what has changed in it: where the base's own rounding hurts, it is made up for, and where
it does not, no byte is spent on it. One slope decides (docs/updates.md has the measurements).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders import Shared
from bytecap.quantization import Shrink
from bytecap.quantization.descent import FINER, descend
from bytecap.quantization.quantizer import Coded, Prepared, Sparse, coded_of, rate

_FEW = 0.5  # bits a weight below which descent is better than feedback


@dataclass(frozen=True, kw_only=True)
class DifferenceUnit(Prepared):
    """A unit of an update; its `weight` is the difference to `below`.

    Attributes:
        below: (rows, cols) float32, values that the unit has in the base.
    """

    below: npt.NDArray[np.float32]

    @property
    def target(self) -> Tensor:
        """See `Prepared`."""
        return self.weight + torch.from_numpy(self.below).to(self.weight.device)

    def sparse(self, step: float, shrink: Shrink, shared: Shared) -> Sparse | None:
        """See `Prepared`."""
        lower = self.lower.whole()
        found = descend(self.weight[:, self.order], lower @ lower.T, self.rows.float(), FINER * step, shrink, shared)
        coded = coded_of(self, found, FINER * step)
        return (coded, found.centres) if 8 * rate(coded, shared) < _FEW * self.unit.parameters else None

    def complete(self, coded: Coded, shared: Shared) -> Coded:
        """Let what was rounded stand on the base."""
        del shared
        return replace(coded, below=self.below)


def over(plain: Prepared, below: npt.NDArray[np.float32]) -> DifferenceUnit:
    """Return a unit, prepared with the difference as its weight, on the base's values (rows, cols)."""
    held = {f.name: getattr(plain, f.name) for f in fields(Prepared)}
    return DifferenceUnit(**held, below=below)
