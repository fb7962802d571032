"""Search the step whose bytes meet a capacity, by secants in the logarithm of the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def next_log_step(seen: Sequence[tuple[float, float]], capacity: float, parameters: int) -> float:
    """Return the next log c of a secant search; bytes fall by about n/8 * log2(e) per unit of log c.

    Args:
        seen: log c and bytes of the rounds so far.
        capacity: bytes to meet.
        parameters: number of weights.
    """
    x, r = seen[-1]
    slope = steepest = -parameters / 8 * 1.2
    below = [s for s in seen if s[1] <= capacity]
    above = [s for s in seen if s[1] > capacity]
    one, two = seen[-1], seen[max(0, len(seen) - 2)]
    if below and above:
        one, two = min(below, key=lambda s: s[0]), max(above, key=lambda s: s[0])
    apart = one[0] - two[0]
    if abs(apart) > 0.01 and (one[1] - two[1]) * apart < 0:  # refitted tables can turn close points round
        slope = float(np.clip((one[1] - two[1]) / apart, 2 * steepest, steepest / 20))
    reach = 2.0 if below else 2.0 * min(max(1, len(above) - 4), 8)
    return x + float(np.clip((capacity - r) / slope, -reach, reach))
