"""Keep source files inside an artifact, as small as possible, charged to the cap, and never executed by a reader.

The first byte of packed data names the packing, and `squeeze` keeps the smallest: 0 stored, 1 brotli (quality 11),
2 raw LZMA1. Python files are minified before (`bytecap.pipeline.pack_code`), so what comes back is the same program,
not the same text.

>>> unpack("a.py", squeeze(b"print(1)"))
b'print(1)'
"""

from __future__ import annotations

import lzma
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import brotli

from bytecap.errors import BudgetError, CorruptError
from bytecap.format import updates
from bytecap.format.container import CODE, Contents, FileSection
from bytecap.format.sidefiles import packing

ACCOUNTING = ("packed", "raw")
_STORED, _BROTLI, _LZMA = range(3)
_FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}
]
_LIMIT = 1 << 24


@dataclass(frozen=True)
class Code:
    """Code files that are packed and ready for an artifact.

    Attributes:
        sections: packed.
        raw: bytes of the files as they were given.
        accounting: `packed`, or `raw` if the raw bytes have to meet the cap.
    """

    sections: tuple[FileSection, ...] = ()
    raw: int = 0
    accounting: str = "packed"

    @property
    def packed(self) -> int:
        """Bytes that the sections take."""
        return sum(len(s.data) for s in self.sections)

    @property
    def reserve(self) -> int:
        """Bytes of the cap that the file must leave free because its code counts for more than it takes."""
        return max(0, self.raw - self.packed) if self.accounting == "raw" else 0

    def report(self, budget: int) -> dict[str, Any]:
        """Entries for the job's report; empty if there is no code."""
        if not self.sections:
            return {}
        return {
            "budget_bytes": budget, "code_raw_bytes": self.raw, "code_packed_bytes": self.packed,
            "code_accounting": self.accounting, "code_files": [s.name for s in self.sections],
        }  # fmt: skip

    @contextmanager
    def floor(self, budget: int) -> Iterator[None]:
        """Add the code's share, and that of the rest, to an error that refuses the budget."""
        try:
            yield
        except BudgetError as exc:
            if not self.sections:
                raise
            code = self.packed + self.reserve
            floor = exc.floor - self.packed
            raise BudgetError(
                f"a budget of {budget:,} bytes is below code ({code:,} bytes, counted {self.accounting}) plus the "
                f"smallest file without it ({floor:,} bytes)", floor + code,
            ) from exc  # fmt: skip


def squeeze(content: bytes) -> bytes:
    """Return the smallest packing of some bytes."""
    tries: list[bytes] = [
        bytes([_STORED]) + content,
        bytes([_BROTLI]) + brotli.compress(content, quality=11),
        bytes([_LZMA]) + lzma.compress(content, lzma.FORMAT_RAW, filters=_FILTERS),
    ]
    return min((t for t in tries if len(content) <= packing.most(t, _LIMIT)), key=len, default=tries[0])


def unpack(name: str, data: bytes, allowance: packing.Allowance | None = None) -> bytes:
    """Invert `squeeze`; never more than 2^24 bytes, nor more than the artifact's allowance has left.

    Raises:
        CorruptError: the data is damaged.
    """
    allowance = packing.Allowance.of([data]) if allowance is None else allowance
    if data[:1] != bytes([_LZMA]):
        if data[:1] not in {bytes([_STORED]), bytes([_BROTLI])}:
            raise CorruptError(f"{name}: its packing does not exist")
        return packing.unpack(name, data, limit=packing.most(data, _LIMIT), allowance=allowance)
    machine = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    limit = min(packing.most(data, _LIMIT), allowance.content)
    try:
        content = machine.decompress(data[1:], limit + 1)
    except lzma.LZMAError as exc:
        raise CorruptError(f"{name}: damaged ({exc})") from exc
    if not machine.eof or machine.unused_data or len(content) > limit:
        raise CorruptError(f"{name}: its LZMA data does not end where it should, or is more than {limit} bytes")
    allowance.content -= len(content)
    return content


def files(contents: Contents, kinds: Collection[int] = (CODE,)) -> dict[str, bytes]:
    """Code files of an artifact, or files of other kinds, unpacked within one allowance for all of them.

    Those of the base of an update come first, unpacked within the base's own allowance.
    """
    base, gone = updates.below(contents), updates.replaced(contents)
    found = {n: data for n, data in files(base, kinds).items() if n not in gone} if base is not None else {}
    allowance = packing.Allowance.of(f.data for f in contents.files)
    return found | {
        f.name: unpack(f.name, f.data, allowance)
        if f.kind == CODE
        else packing.unpack(f.name, f.data, allowance=allowance)
        for f in contents.files
        if f.kind in kinds
    }
