"""Find the temperature at which a model predicts a text best, from its loss at a few of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.25)


def best_temperature(nats: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the best temperature and its loss: the minimum of a parabola through the three best sampled ones.

    Args:
        nats: mean loss at every one of `TEMPERATURES`.
    """
    if not np.isfinite(nats).all():
        return math.nan, math.nan
    i = int(np.clip(np.argmin(nats), 1, len(nats) - 2))
    x, y = np.array(TEMPERATURES[i - 1 : i + 2]), nats[i - 1 : i + 2]
    a, b, c = np.polyfit(x, y, 2)
    if a <= 0:
        j = int(np.argmin(nats))
        return float(TEMPERATURES[j]), float(nats[j])
    best = float(np.clip(-b / (2 * a), x[0], x[2]))
    return best, float(a * best**2 + b * best + c)
