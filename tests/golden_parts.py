"""Building blocks of the golden artifacts: small sections, whole files, and files put together wrongly."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bytecap.format import container
from bytecap.format.coders import Shared, leb
from bytecap.format.coders.companded import CODER as COMPANDED
from bytecap.format.coders.companded import CompandedCode
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.coders.fixed import CODER as FIXED
from bytecap.format.coders.fixed import FixedCode
from bytecap.format.coders.grid import CODER as GRID
from bytecap.format.coders.grid import GridCode, weight_classes
from bytecap.format.coders.long_trellis import CODER as LONG_TRELLIS
from bytecap.format.coders.trellis import CODER as TRELLIS
from bytecap.format.coders.trellis import dependent, subsets
from bytecap.format.coders.vector import CODER as VECTOR
from bytecap.format.container import INDEX, TABLES, UNIT, Contents, UnitSection
from bytecap.format.entropy.frequencies import Table, Tables, integer_frequencies
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.types import Unit

DIRECTORY = Path(__file__).parent / "goldens"


class Numbers:
    """A linear congruential generator: the same integers on every machine."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n, *shape):
        out = np.empty(int(np.prod(shape)), np.int64)
        for i in range(len(out)):
            self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
            out[i] = (self.state >> 33) % n
        return out.reshape(shape)

    def around(self, spread, *shape):
        """Integers around zero: a sum of four even distributions."""
        return sum(self.below(2 * spread + 1, *shape) - spread for _ in range(4)) // 2


def example_shared() -> Shared:
    """Three tables: classes 1 to 12, 13 to 24 and 25 to 63."""
    table, offset = {}, np.zeros((64, 17), np.float32)
    for first, last, half in ((1, 12, 1), (13, 24, 4), (25, 63, 12)):
        z = np.abs(np.arange(-half, half + 1))
        freq = integer_frequencies(np.append((2.0 * half + 1 - z) ** 3, 1.0), symmetric=True)
        one = Table(-half, freq)
        values = (7 * np.arange(1, half + 1) - 20) / 256
        for k in range(first, last + 1):
            table[k] = one
            offset[k, 1 : half + 1] = values
            offset[k, half + 1 :] = values[-1]
    return Shared(Tables(table), offset)


def tiny_shared() -> Shared:
    """Two tables, easy to follow by hand: classes 1 to 19, and 20 to 63."""
    narrow = Table(-1, np.array([2000, 12000, 2000, 384]))
    wide = Table(-2, np.array([1000, 3000, 8000, 3000, 1000, 384]))
    offset = np.zeros((64, 17), np.float32)
    offset[1:20, 1:] = 16 / 256
    offset[20:, 1], offset[20:, 2:] = 8 / 256, -4 / 256
    return Shared(Tables({k: narrow if k < 20 else wide for k in range(1, 64)}), offset)


SHARED, TINY = example_shared(), tiny_shared()


def grid(shape, *, seed=1, groups=1, wide=(), varied=True, base=18):
    """A grid section: symbols that suit their classes but begin with `wide`, which may need escapes."""
    rows, cols = shape
    r = Numbers(seed)
    column_step = r.around(3 * varied, groups, cols)
    column_class = base + r.around(6 * varied, groups, cols)
    row_step, row_class = r.around(2 * varied, rows), r.around(2 * varied, rows)
    classes = weight_classes(column_class, row_class).astype(int)
    symbols = r.around(9, rows, cols) * classes // 32
    symbols.reshape(-1)[: len(wide)] = wide
    return GRID.encode(GridCode(0.0625, symbols, column_step, column_class, row_step, row_class), SHARED).data


def trellis(shape, *, seed=1, groups=1, first=18, memory=3):
    """A section of arbitrary paths: `trellis`, or `long_trellis` where the memory is longer."""
    rows, cols = shape
    r = Numbers(seed)
    column_step, column_class = r.around(3, groups, cols), 18 + r.around(8, groups, cols)
    row_step, row_class = r.around(2, rows), r.around(3, rows)
    mask = dependent(column_class, first, rows)
    bits = r.below(2, rows, cols).astype(np.uint8) * mask
    symbols = r.around(6, rows, cols)
    symbols.reshape(-1)[:3] = [0, 70_000, -70_000]
    points = np.where(mask, 4 * symbols + subsets(bits, groups, memory), symbols)
    code = GridCode(0.0625, points, column_step, column_class, row_step, row_class, first, memory)
    return (TRELLIS if memory == 3 else LONG_TRELLIS).encode(code, SHARED).data


def vector(values, step=0.125):
    return VECTOR.encode(np.asarray(values, np.float32), step, SHARED).data


def stored_zlib(data: bytes) -> bytes:
    """Zlib data without compression, so that no library's version matters."""
    body = b"\x01" + struct.pack("<HH", len(data), 65535 - len(data)) + data
    return b"\x78\x01" + body + struct.pack(">I", zlib.adler32(data))


def packed_zlib(codes: bytes, scales: Sequence[float], width=1) -> bytes:
    side = stored_zlib(np.array(scales, "<f2").tobytes())
    return bytes([0, width]) + leb(len(side)) + side + stored_zlib(codes)


def unit(name, shape, tag, data, dtype="F32", aliases=(), *, transposed=False, linear=False, stacked=False):
    return UnitSection(Unit(name, tuple(shape), dtype, tuple(aliases), transposed, linear, stacked), tag, data)


def stacked_units() -> Iterator[UnitSection]:
    """Stacks of matrices, flag 4, and what it changes nothing of."""
    for seed, (name, shape, rows, cols, transposed) in enumerate([
        ("experts", (3, 8, 10), 24, 10, False), ("turned", (3, 8, 10), 10, 24, True), ("matrix", (6, 10), 6, 10, False),
        ("vector", (7,), 1, 7, False), ("none", (3, 8, 0), 0, 0, False),
    ], 11):  # fmt: skip
        yield unit(name, shape, 1, grid((rows, cols), seed=seed), stacked=True, transposed=transposed)


def pack(*units, files=(), about=None, padding=0, tables=True, objects=()):
    section = dump_shared(SHARED) if tables else b""
    return container.serialize(Contents(units, section, tuple(files), about or {}, padding, tuple(objects)))


def tiny() -> bytes:
    """The worked example of docs/format.md."""
    symbols = np.array([[0, 1, -1], [0, 0, -7]])
    zero = np.zeros((1, 3), int)
    code = GridCode(0.5, symbols, np.array([[0, 4, 0]]), zero + 18, np.array([0, -4]), np.zeros(2, int))
    data = GRID.encode(code, TINY).data
    return container.serialize(Contents((unit("w", (2, 3), 1, data),), dump_shared(TINY), (), {}))


def exact(values, dtype):
    return EXACT.encode(np.asarray(values), dtype)


def exact_units() -> Iterator[UnitSection]:
    r = Numbers(5)
    bf16 = (np.uint32(0x3C00) + r.below(700, 20, 30).astype(np.uint32) << 16).view(np.float32)
    yield unit("bf16", (20, 30), 3, exact(bf16, "BF16"), "BF16")
    f16 = (r.around(300, 150) / 256).astype(np.float16).astype(np.float32)
    yield unit("f16", (150,), 3, exact(f16, "F16"), "F16")
    f32 = r.around(10**8, 40).astype(np.float32) * np.float32(1.1)
    f32[:4] = [np.inf, -0.0, np.float32(2**-149), np.nan]
    yield unit("f32", (5, 8), 3, exact(f32, "F32"), "F32")
    yield unit("f64", (7,), 3, exact(r.around(10**9, 7) / 3, "F64"), "F64")
    for dtype, span in (("I64", 10**9), ("I32", 10**6), ("I16", 10**4), ("I8", 30)):
        values = r.around(span // 2, 9).astype(f"<i{dtype[1:]}" if dtype == "I8" else f"<i{int(dtype[1:]) // 8}")
        yield unit(dtype.lower(), (3, 3), 3, exact(values, dtype), dtype)
    yield unit("u8", (9300,), 3, exact((r.below(16, 9300) == 0).astype(np.uint8), "U8"), "U8")
    yield unit("bool", (100,), 3, exact(r.below(9, 100) == 0, "BOOL"), "BOOL")


def sealed(data: bytes) -> bytes:
    """The file with the header's checksum made right again."""
    length = struct.unpack_from("<I", data, 12)[0]
    crc = zlib.crc32(data[:24] + data[28 : 28 + length])
    return data[:24] + struct.pack("<I", crc) + data[28:]


def build(sections: Sequence[tuple[int, bytes]], extra: bytes = b"") -> bytes:
    """A container of any sections, its checksums right; `extra` goes behind the directory's last entry."""
    directory = leb(len(sections)) + b"".join(
        bytes([kind]) + leb(len(d)) + struct.pack("<I", zlib.crc32(d)) for kind, d in sections
    )
    directory += extra
    body = b"".join(d for _, d in sections)
    head = container.MAGIC + struct.pack("<BBHIQ", 1, 0, 0, len(directory), 28 + len(directory) + len(body))
    return sealed(head + bytes(4) + directory + body)


def index(*units, files=(), **more) -> bytes:
    fields = {"about": {}, "files": list(files), "units": [list(u) for u in units]} | more
    return b"\x00" + json.dumps({k: v for k, v in fields.items() if v is not None}).encode()


def one(data: bytes, shape=(2,), tag=2, dtype="F32", flags=0, aliases=(), tables: bytes | None = None) -> bytes:
    """A file with a single unit of any bytes."""
    shared = dump_shared(SHARED) if tables is None else tables
    sections = [(INDEX, index(("a", list(shape), dtype, tag, flags, list(aliases)))), (TABLES, shared), (UNIT, data)]
    return build([s for s in sections if s[0] != TABLES or s[1]])


def fixed_units() -> Iterator[UnitSection]:
    """Coders 10 and 11, as published and coded."""
    r = Numbers(10)
    kept = (r.around(300, 12, 2) / 64).astype(np.float16)
    scales = (r.below(200, 12) / 512).astype(np.float16)
    code = FixedCode(3, r.below(8, 12, 8), scales, r.below(8, 12), [2, 9], kept)
    plain = FixedCode(1, r.below(2, 5, 7), scales[:5], r.below(2, 5), [], np.zeros((5, 0), np.float16))
    steep = FixedCode(8, np.minimum(r.below(9, 12, 8) * r.below(9, 12, 8), 60), scales, r.below(256, 12), [0, 1], kept)
    for name, value, shape in (("a", code, (12, 10)), ("b", plain, (5, 7)), ("c", steep, (12, 10))):
        yield unit(f"fixed.{name}", shape, 10, FIXED.encode(value, coded=False))
        yield unit(f"fixed.{name}.coded", shape, 10, FIXED.encode(value, coded=True))
    depths = r.below(9, 3, 8)
    sets = r.below(3, 14)
    codes = r.below(256, 14, 8) % (1 << depths[sets])
    offsets, steps = ((r.around(99, 3, 8) / 128).astype(np.float16) for _ in range(2))
    many = CompandedCode(sets, depths, offsets, np.where(depths > 0, steps, 0).astype(np.float16), codes)
    one = CompandedCode(np.zeros(4, int), depths[:1], offsets[:1], steps[:1], r.below(256, 4, 8) % (1 << depths[:1]))
    for name, value, rows in (("a", many, 14), ("b", one, 4)):
        yield unit(f"companded.{name}", (rows, 8), 11, COMPANDED.encode(value, coded=False))
        yield unit(f"companded.{name}.coded", (8, rows), 11, COMPANDED.encode(value, coded=True), transposed=True)


def fixed_broken() -> Iterator[tuple[str, bytes]]:
    """Files with a broken section of coder 10 or 11."""
    half = np.ones(2, "<f2").tobytes()
    good = bytes([0, 2, 1]) + b"\1\0" + half + b"\2\1" + half + b"\2\1"
    deep = bytes([0, 1, 8, 1, 0, 0, 1]) + half
    for name, data in {
        "mode": b"\2" + good[1:], "width": b"\0\x09" + good[2:], "no_width": b"\0\0" + good[2:],
        "columns": good[:2] + b"\3" + good[3:], "column": good[:3] + b"\2" + good[4:],
        "infinite": good[:5] + np.full(2, np.inf, "<f2").tobytes() + good[9:], "padding": good[:-1] + b"\x81",
        "short": good[:-1], "left_over": good + b"\0",
    }.items():  # fmt: skip
        yield f"fixed_{name}", one(data, (2, 2), 10)
    for name, data in {
        "mode": b"\2" + deep[1:], "no_sets": b"\0\0" + deep[2:], "sets": b"\0\2" + deep[2:], "depth": deep,
        "length": deep[:2] + b"\x7f" + deep[3:], "left_over": bytes([0, 1, 6, 0, 0, 0, 0]) + half[:2] + b"\0",
    }.items():  # fmt: skip
        yield f"companded_{name}", one(data, (1, 1), 11)
