"""Add up the second moments of one weight, batch by batch, here or on the rank that owns it.

What a batch says about a weight is first made into *parts* (inputs, output energies), small beside the products that
they go into. A sink takes parts up at once; where ranks share a job, `deliver` is replaced by what sends them to the
rank that takes them up, in the order of the batches (`bytecap.calibration.divided`), so that sums are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from bytecap.calibration.moments import Moment


class Use:
    """The accumulated statistics of one use of a weight.

    Args:
        moment: see the property.
        rows: summed squared output gradient of each row, shape (rows,).
        weight: what divides `moment * rows` (linear: summed token weights; embedding: summed energy), shape ().
    """

    def __init__(self, moment: Tensor | Moment, rows: Tensor, weight: Tensor) -> None:
        self._moment, self.rows, self.weight = moment, rows, weight

    @property
    def moment(self) -> Tensor:
        """Guided sum of `x x^T` (linear) or of `g g^T` (embedding), shape (cols, cols).

        Made from its half where only that is held: all sums of a model are there at once, and in whole for a moment.
        """
        return self._moment.whole() if isinstance(self._moment, Moment) else self._moment

    @moment.setter
    def moment(self, found: Tensor) -> None:
        self._moment = found

    def with_rows(self, rows: Tensor) -> Use:
        """Return the same use with other row energies."""
        return Use(self._moment, rows, self.weight)

    def is_finite(self) -> bool:
        """Return whether no sum holds an infinity or a NaN."""
        parts = self._moment.parts if isinstance(self._moment, Moment) else [self._moment]
        return all(bool(torch.isfinite(t).all()) for t in (*parts, self.rows, self.weight))


class Sink(Protocol):
    """A receiver of the parts that batches say about a weight."""

    deliver: Callable[..., None]

    @property
    def take(self) -> Callable[..., None]:
        """Adds the parts of one call."""
        ...


class Collector:
    """The second moments of one weight, filled by hooks where the module is linear.

    Args:
        rows, cols: of the weight.
        guided: weight tokens by output gradient energy.
        device: where sums are.
        owned: False where another rank has the sums.
    """

    def __init__(self, rows: int, cols: int, guided: bool, device: torch.device, *, owned: bool = True) -> None:
        self.moment = Moment(cols if owned else 0, device)
        self.rows = torch.zeros(rows, dtype=torch.float64, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.guided = guided
        self.deliver: Callable[..., None] = self.take

    def use(self) -> Use:
        """Return the statistics added so far and give them up; to be called once."""
        return Use(self.moment.handed_over(), self.rows, self.weight)

    def add_gradient(self, square: Tensor, g: Tensor) -> None:
        """Add a weight's own gradient: its rows' energy (rows,), and g (n, cols), the rows where it is not 0."""
        self.deliver(square, g)

    def forward_hook(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Have the gradient at the output, once it is known, added with the input."""
        x = args[0].detach()
        if output.requires_grad:
            output.register_hook(lambda g: self.add(x, g))

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add tokens: inputs x (..., cols), output gradients g (..., rows)."""
        square = g.reshape(-1, g.shape[-1]).float().square()  # out of place: float32 gradients still flow on
        w = square.mean(1) if self.guided else (square.amax(1) > 0).float()  # padding has no gradient
        self.deliver(square.sum(0, dtype=torch.float64), x.reshape(-1, x.shape[-1]), w)

    def take(self, energy: Tensor, x: Tensor, w: Tensor | None = None) -> None:
        """Add row energies (rows,) and inputs x (n, cols) weighted by w (n,), or rows of a gradient (n, cols)."""
        self.rows += energy.double()
        self.weight += (energy if w is None else w).sum(dtype=torch.float64)
        self.moment.add(x if w is None else x.float() * w.sqrt()[:, None])


class Diagonal:
    """The summed squared gradients of one weight, float64 in its own shape."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.deliver: Callable[..., None] = self.take

    def add(self, g: Tensor) -> None:
        """Add a gradient."""
        self.deliver(g)

    def take(self, g: Tensor) -> None:
        """Add its squares."""
        self.total += g.double().square()
