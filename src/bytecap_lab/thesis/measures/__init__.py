"""Find the measurements that experiments ask of a bench, each the members of one JSON line.

A module here, or an experiment's own module, offers `MEASURES`: a name, and a function from a `Bench` to a dictionary.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from bytecap_lab.thesis import experiments
from bytecap_lab.thesis.bench import Bench

Measure = Callable[[Bench], dict[str, Any]]


@cache
def measures() -> dict[str, Measure]:
    """All measurements by name."""
    names = [f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__)]
    modules = [*map(importlib.import_module, names), *experiments.found().values()]
    return {k: v for m in modules for k, v in getattr(m, "MEASURES", {}).items()}
