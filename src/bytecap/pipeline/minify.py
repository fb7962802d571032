"""Minify Python source with the library python-minifier (extra `golf`)."""

from __future__ import annotations

import ast
import re
from typing import Any

from bytecap.errors import CodeError, UsageError

_USES_DOCSTRINGS = re.compile(r"__doc__|\b(getdoc|doctest|typer|click|fire|docopt)\b")


def parse(source: bytes, name: str) -> tuple[str, ast.Module]:
    """Read a Python file; returns its text and syntax tree.

    Raises:
        CodeError: it is not UTF-8 or does not parse; the message has file and line.
    """
    try:
        text = source.decode("utf-8-sig")
        return text, ast.parse(text)
    except UnicodeDecodeError as exc:
        line = source.count(b"\n", 0, exc.start) + 1
        raise CodeError(f"{name}, line {line}: not UTF-8 (byte {source[exc.start]:#04x})") from None
    except (SyntaxError, ValueError) as exc:  # ValueError: a NUL byte
        line, why = getattr(exc, "lineno", None) or 1, getattr(exc, "msg", None) or exc
        raise CodeError(f"{name}, line {line}: does not parse: {why}") from None
    except RecursionError:
        raise CodeError(f"{name}, line 1: nested too deeply to be parsed") from None


def minified(source: str, name: str) -> str:
    """Drop comments, docstrings and needless space from a program that is not ours.

    Names and annotations stay: kernels, schemas and command lines are made from them. Docstrings stay where they may
    be read.
    """
    unread = not _USES_DOCSTRINGS.search(source)
    return _minify(source, name, remove_annotations=False, rename_locals=False, remove_literal_statements=unread)


def crushed(source: str, keep: str) -> str:
    """Return the shortest form of our own code, in which every name but `keep` may change."""
    options = {"rename_locals": True, "rename_globals": True, "preserve_globals": [keep]}
    return _minify(source, keep, remove_literal_statements=True, **options)


def _minify(source: str, name: str, **options: Any) -> str:
    try:
        import python_minifier
    except ModuleNotFoundError as exc:
        raise UsageError("the package python-minifier is missing: pip install 'bytecap[golf]'") from exc
    try:
        found = python_minifier.minify(source, name, hoist_literals=False, **options)
    except (python_minifier.UnstableMinification, RecursionError) as exc:
        raise CodeError(f"{name}, line 1: cannot be minified: {type(exc).__name__}") from exc
    return str(found)
