"""Golden artifacts with code inside: version 1.2."""

from __future__ import annotations

import lzma
from collections.abc import Iterator

import brotli

from bytecap.format import codefiles
from bytecap.format.container import CODE, FILE, INDEX, PADDING, FileSection
from golden_parts import build, grid, index, pack, unit

SOURCE = b"def main():\n    raise SystemExit('never run by a reader')\n\n\nmain()\n"


def valid() -> Iterator[tuple[str, bytes]]:
    """Every packing of code; with side files and without units."""
    packings = {
        "stored.py": b"\0" + SOURCE,
        "brotli.py": b"\1" + brotli.compress(SOURCE),
        "lzma.py": b"\2" + lzma.compress(SOURCE, lzma.FORMAT_RAW, filters=codefiles._FILTERS),
    }
    code = [FileSection(name, data, CODE) for name, data in packings.items()]
    yield "code", pack(unit("a", (4, 6), 1, grid((4, 6), seed=12)), files=code)
    side = FileSection("config.json", b"\0{}")
    yield "code_and_files", pack(files=[side, code[0]], about={"budget": 999}, padding=3, tables=False)


def invalid() -> Iterator[tuple[str, bytes]]:
    """Names that are no names, and sections where they do not belong."""
    one = (CODE, b"\0pass")
    for name, code in {
        "up": [".."], "slash": ["a/b.py"], "backslash": ["a\\b.py"], "nul": ["a\0"], "empty": [""], "hidden": [".py"],
        "twice": ["a.py", "a.py"], "none": [], "null": 0, "text": "a", "number": [1],
    }.items():  # fmt: skip
        raw = index(code=code).replace(b'"code": 0', b'"code": null')
        yield f"code_name_{name}", build([(INDEX, raw), *([one] * len(code) if isinstance(code, list) else [])])
    yield "code_named_as_file", build([(INDEX, index(files=["a.py"], code=["a.py"])), (FILE, b"\0"), one])
    yield "code_missing", build([(INDEX, index(code=["a.py"]))])
    yield "code_missing_padded", build([(INDEX, index(code=["a.py"])), (PADDING, b"\0")])
    yield "code_left_over", build([(INDEX, index(code=["a.py"])), one, one])
    yield "code_before_files", build([(INDEX, index(files=["b"], code=["a.py"])), one, (FILE, b"\0")])
    yield "code_as_file", build([(INDEX, index(code=["a.py"])), (FILE, b"\0pass")])
    yield "code_behind_padding", build([(INDEX, index(code=["a.py"])), (PADDING, b"\0"), one])
