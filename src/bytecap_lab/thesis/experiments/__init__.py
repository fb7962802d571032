"""Find the registered experiments, one file each; docs/thesis.md is their law.

A module has

- `ORDER`, `TITLE`, `KIND` (`support` or `falsifier`), `HYPOTHESIS`, `STATISTIC`: for readers;
- `NEEDS`: measurements, see `bytecap_lab.thesis.measures`; `MEASURES`, if it makes some of its own;
- `effects(one, others)`: figures of a model on a base as resampled arrays, raising `Missing` with the reason where
  there are none; `others` is all evidence there is;
- `decide(found)`: the verdict on their intervals, of one model or of a group;
- `MAIN`: the effect that is shown first, `LINE`: where its threshold is;
- `details(one, others)`, if there is more to see: rows of (what, figure) for the page.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from types import ModuleType

from bytecap.errors import UsageError

SHOWS_ONLY = "package"


@cache
def found() -> dict[str, ModuleType]:
    """All experiments by name, in order."""
    modules = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
    return dict(sorted(modules.items(), key=lambda item: int(item[1].ORDER)))


def chosen(names: Sequence[str] | None) -> dict[str, ModuleType]:
    """Experiments of these names or numbers; all by default.

    Raises:
        UsageError: there is no such experiment.
    """
    every = found()
    by = {**every, **{str(m.ORDER): m for m in every.values()}}
    for name in names or ():
        if name not in by:
            raise UsageError(
                f"unknown experiment {name!r}: there are {', '.join(f'{m.ORDER} {n}' for n, m in every.items())}"
            )
    wanted = {by[n] for n in names} if names else set(every.values())
    return {n: m for n, m in every.items() if m in wanted}
