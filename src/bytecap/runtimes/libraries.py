"""Packages that only files of other programs need, imported when they are first asked for."""

from __future__ import annotations

import importlib
from typing import Any

from bytecap.errors import UsageError


def library(name: str = "gguf") -> Any:
    """The package gguf, or a module of it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise UsageError("GGUF files need one more package: pip install 'bytecap[gguf]'") from exc
