"""Make source files ready for an artifact: Python is minified, everything is compressed.

How they are stored, and how they count against the cap, is `bytecap.format.codefiles`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bytecap.errors import CodeError, UsageError
from bytecap.format import codefiles
from bytecap.format.codefiles import Code
from bytecap.format.container import CODE, FileSection
from bytecap.format.sidefiles import names
from bytecap.pipeline.minify import minified, parse
from bytecap.system.atomic import open_regular


def pack(paths: Sequence[Path | str], accounting: str = "packed") -> Code:
    """Read, minify and compress source files.

    Args:
        paths: files; Python by its suffix `.py`, anything else is only compressed.
        accounting: `packed` or `raw`.

    Raises:
        CodeError: a file cannot be read or does not parse. UsageError: two files share a name, or one has a name under
            which some system could not write it out again.
    """
    if accounting not in codefiles.ACCOUNTING:
        raise UsageError(f"unknown code accounting {accounting!r}: use {' or '.join(codefiles.ACCOUNTING)}")
    sections, raw = dict[str, FileSection](), 0
    for path in map(Path, paths):
        content = read(path)
        raw += len(content)
        if path.name in sections or path.name.startswith("."):
            raise UsageError(f"{path}: code files are stored by name, and {path.name} is hidden or given twice")
        if path.suffix == ".py":
            content = minified(parse(content, str(path))[0], str(path)).encode()
        sections[path.name] = FileSection(path.name, codefiles.squeeze(content), CODE)
    if said := names.problem(sections):
        raise UsageError(f"{said}: rename it")
    return Code(tuple(sections.values()), raw, accounting)


def read(path: Path) -> bytes:
    """Read the bytes of a source file."""
    try:
        with open_regular(path, os.O_RDONLY, follow=True) as f:
            return f.read()
    except OSError as exc:
        raise CodeError(f"cannot read the code file {path}: {exc.strerror}") from exc
