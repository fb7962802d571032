"""Registered amounts of bytes and of finer steps (docs/thesis.md).

They stand apart from the bench, so that lines are judged without torch.
"""

from __future__ import annotations

AMOUNTS = (0.005, 0.01, 0.02, 0.04, 0.08)  # of the base's matrix bytes
PRIMARY = 0.04
GLOBAL = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)  # octaves finer, everywhere
