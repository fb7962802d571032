"""Compute standard errors of measured means with numpy alone, so that finished runs are judged without torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_ERRORS = 2.0  # standard errors of a difference that chance does not explain
_FEWEST = 8  # windows whose spread says what chance does


def ratio_stderr(total: np.ndarray[Any, Any], weight: np.ndarray[Any, Any]) -> float:
    """Return the linearised standard error of the ratio sum(total) / sum(weight) over windows; NaN if it has none."""
    n = len(total)
    if n < 2 or not weight.any():
        return float("nan")
    residual = total - total.sum() / weight.sum() * weight
    return float(math.sqrt(n / (n - 1) * float((residual**2).sum())) / weight.sum())


def surely_worse(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any], weight: np.ndarray[Any, Any]) -> bool:
    """Return whether a change that ought to pay raises a cost by more than chance explains, window by window.

    For changes that other tokens speak for already: a few thousand tokens are no reason to refuse them unless the
    paired difference is above two standard errors. Below eight windows nobody knows these, and any rise refuses.

    Args:
        before: cost of every window, summed over its tokens, shape (windows,).
        after: the same with the change; one that is not a number is worse.
        weight: tokens of every window.
    """
    change = float((after - before).sum() / weight.sum())
    allowed = _ERRORS * ratio_stderr(after - before, weight) if len(weight) >= _FEWEST else 0.0
    return not change <= allowed
