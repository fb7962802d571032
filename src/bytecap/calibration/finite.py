"""Refuse statistics that are not finite once, where they are made, and name the unit and the token window.

A loss can be finite and its gradient not: a square root at zero, a row whose tokens are all masked, squares beyond
float32. Nothing that follows would notice: a matrix of NaN has no Cholesky factor at any damping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from bytecap.calibration.collectors import Use
from bytecap.calibration.sums import Statistics
from bytecap.errors import CheckpointError
from bytecap.model.checkpoint import Model
from bytecap.model.texts import Window
from bytecap.system.ranks import ALONE, Ranks


def first_bad(found: Statistics) -> str | None:
    """Return the name of a unit whose statistics hold an infinity or a NaN; None if there is none."""
    for name, uses in found.uses.items():
        if not all(u.is_finite() for u in uses):
            return name
    return next((n for n, d in found.diagonal.items() if not np.isfinite(d).all()), None)


def check(
    found: Statistics,
    model: Model,
    windows: Sequence[Window],
    again: Callable[[Sequence[Window]], Statistics],
    ranks: Ranks = ALONE,
) -> None:
    """Refuse statistics that are not finite.

    Args:
        found: of all windows.
        model: that they are of.
        windows: what they were made from.
        again: the statistics of some of the windows, all on this rank.
        ranks: processes that have the statistics.

    Raises:
        CheckpointError: the unit, the window and the model's largest weight are named.
    """
    name = next((n for n in ranks.all(first_bad(found)) if n is not None), None)
    if name is None:
        return
    low, high = 0, len(windows)
    while high - low > 1:  # one half of what is bad is bad, or only their sum is
        middle = (low + high) // 2
        first, second = first_bad(again(windows[low:middle])), None
        if first is None:
            second = first_bad(again(windows[middle:high]))
        if first is None and second is None:
            break
        low, high, name = (low, middle, first) if first is not None else (middle, high, second or name)
    where = f"window {low} of {len(windows)}" if high - low == 1 else f"windows {low} to {high - 1} together"
    start = ", ".join(map(str, windows[low].tokens[:6]))
    tokens = f" (its tokens begin with {start})" if start and high - low == 1 else ""
    raise CheckpointError(
        f"the gradients of {name} are not finite on {where} of the calibration{tokens}, though the loss is; "
        f"{largest(model)}"
    )


def check_uses(name: str, uses: Sequence[Use]) -> None:
    """Refuse a unit's statistics that are not finite, where finding the token window would take more passes.

    Raises:
        CheckpointError: the unit is named.
    """
    if not all(u.is_finite() for u in uses):
        raise CheckpointError(f"the gradients of {name} are not finite on the calibration")


def check_arrays(square: Mapping[str, torch.Tensor], model: Model) -> None:
    """Refuse mean squared gradients that are not finite.

    Raises:
        CheckpointError: the unit and the model's largest weight are named.
    """
    for name, values in square.items():
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"the gradients of {name} are not finite on the calibration; {largest(model)}")


def largest(model: Model) -> str:
    """Describe the model's largest weight, the first thing to look at."""
    sizes = {u.name: float(model.tensor(u).detach().abs().max()) for u in model.units if u.parameters}
    name = max(sizes, key=lambda n: sizes[n])
    return f"the largest weight of the model is {sizes[name]:.3g} in {name}"
