"""Standard errors of measured means; numpy alone, so that finished runs are judged without torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def ratio_stderr(total: np.ndarray[Any, Any], weight: np.ndarray[Any, Any]) -> float:
    """Standard error of the ratio sum(total) / sum(weight) over windows (linearised); NaN where it has none."""
    n = len(total)
    if n < 2 or not weight.any():
        return float("nan")
    residual = total - total.sum() / weight.sum() * weight
    return float(math.sqrt(n / (n - 1) * float((residual**2).sum())) / weight.sum())
