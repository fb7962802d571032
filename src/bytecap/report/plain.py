"""Values as JSON can hold them.

>>> finite({"a": float("nan"), "b": (1.0, float("inf"))})
{'a': None, 'b': [1.0, None]}
"""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """NaN and infinity become null: JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
