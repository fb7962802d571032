"""Units without input statistics, such as norms and biases: one uniform step each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bytecap.format.coders import Shared
from bytecap.format.coders.vector import CODER as VECTOR
from bytecap.quantization.quantizer import ON_BASE
from bytecap.types import Unit

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class VectorUnit:
    """A unit without input statistics: its values and mean squared gradient per token.

    Attributes:
        below: (rows, cols), values of the base of an update, to which `values` are the difference; None without.
    """

    unit: Unit
    values: FloatArray
    fisher: npt.NDArray[np.float64]
    below: FloatArray | None = None

    def rate(self, c: float, shared: Shared) -> float:
        """Estimated bytes at step `c`."""
        if self.as_in_base(c):
            return 0.0
        return VECTOR.rate(self.values, self.step(c), shared) + (0 if self.below is None else ON_BASE)

    def decode(self, c: float) -> FloatArray:
        """Decoded (rows, cols) values at step `c`."""
        centre, symbols = VECTOR.quantize(self.values, self.step(c))
        found: FloatArray = VECTOR.dequantize(centre, self.step(c), symbols)[None, :]
        return found if self.below is None else self.below + found.reshape(self.below.shape)

    def as_in_base(self, c: float) -> bool:
        """Whether nothing is added to the base at step `c`, so that nothing is stored."""
        if self.below is None:
            return False
        centre, symbols = VECTOR.quantize(self.values, self.step(c))
        return not centre and not symbols.any()

    def step(self, c: float) -> float:
        """Return the uniform step whose slope is that of a grid at `c`: above 0, at most half the values' spread."""
        energy = float(self.fisher.mean()) if self.fisher.size else 0.0
        spread = float(self.values.std()) / 2 if self.values.size else 0.0
        widest = max(spread, float(np.abs(self.values).max(initial=0.0)) * 2**-8, 1e-30)
        wanted = min(c / math.sqrt(energy), widest) if energy > 0 else widest
        return max(wanted, float(np.ptp(self.values)) * 2**-15 if self.values.size else 0.0, 1e-30)

    def distortion(self, c: float) -> float:
        """Return the distortion at step `c`, in nats per token."""
        centre, symbols = VECTOR.quantize(self.values, self.step(c))
        error = VECTOR.dequantize(centre, self.step(c), symbols).astype(np.float64) - self.values.reshape(-1)
        return float(0.5 * (self.fisher.reshape(-1) * error**2).sum())
