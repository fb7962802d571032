"""Keep old module names working for scripts that import them; a `DeprecationWarning` names the new one.

>>> import importlib, warnings
>>> with warnings.catch_warnings(record=True) as said:
...     warnings.simplefilter("always")
...     importlib.import_module("bytecap.unpack").__name__, said[-1].category.__name__
('bytecap.pipeline.export', 'DeprecationWarning')
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {  # modules that scripts outside the project are known to import
    "bytecap.artifact": "bytecap.format.container",
    "bytecap.decode": "bytecap.format.decoder",
    "bytecap.unpack": "bytecap.pipeline.export",
}


class _Alias(Loader):
    """Puts the module that another name stands for in its place."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Ask for an ordinary module, which is replaced at once."""

    def exec_module(self, module: ModuleType) -> None:
        """Import the new module, which the old name then shares."""
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


class _Finder(MetaPathFinder):
    """Finds modules by their old names, after all others have failed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old name, and warn."""
        del path, target
        if fullname not in MOVED:
            return None
        warnings.warn(f"{fullname} is {MOVED[fullname]} now", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _Alias())


def install() -> None:
    """Make the old names importable, once."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.append(_Finder())
