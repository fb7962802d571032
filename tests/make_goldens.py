"""Write the golden artifacts of `tests/goldens`: small valid files, and broken ones that readers must refuse.

    python tests/make_goldens.py [directory]

Deterministic: no clock, no random generator but the one written out below. `expected.json` beside the files says
what every valid file decodes to and which error every invalid one raises. `tiny.bcap` is the worked example of
docs/format.md.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import brotli
import numpy as np

from bytecap import artifact, sidefiles
from bytecap.artifact import FILE, INDEX, PADDING, TABLES, UNIT, Contents, FileSection, UnitSection
from bytecap.coders import Shared, leb
from bytecap.coders.exact import CODER as EXACT
from bytecap.coders.grid import CODER as GRID
from bytecap.coders.grid import GridCode, weight_classes
from bytecap.coders.packed import BROTLI, Quantized
from bytecap.coders.packed import CODER as PACKED
from bytecap.coders.vector import CODER as VECTOR
from bytecap.core import Unit
from bytecap.decode import decode_units
from bytecap.entropy import encode, zigzag_bytes
from bytecap.frequencies import Table, Tables, integer_frequencies
from bytecap.tables import dump_shared

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


def vector(values, step=0.125):
    return VECTOR.encode(np.asarray(values, np.float32), step, SHARED).data


def stored_zlib(data: bytes) -> bytes:
    """Zlib data without compression, so that no library's version matters."""
    body = b"\x01" + struct.pack("<HH", len(data), 65535 - len(data)) + data
    return b"\x78\x01" + body + struct.pack(">I", zlib.adler32(data))


def packed_zlib(codes: bytes, scales: Sequence[float], width=1) -> bytes:
    side = stored_zlib(np.array(scales, "<f2").tobytes())
    return bytes([0, width]) + leb(len(side)) + side + stored_zlib(codes)


def unit(name, shape, tag, data, dtype="F32", aliases=(), *, transposed=False, linear=False):
    return UnitSection(Unit(name, tuple(shape), dtype, tuple(aliases), transposed, linear), tag, data)


def pack(*units, files=(), about=None, padding=0, tables=True):
    section = dump_shared(SHARED) if tables else b""
    return artifact.serialize(Contents(units, section, tuple(files), about or {}, padding))


def tiny() -> bytes:
    """The worked example of docs/format.md."""
    symbols = np.array([[0, 1, -1], [0, 0, -7]])
    zero = np.zeros((1, 3), int)
    code = GridCode(0.5, symbols, np.array([[0, 4, 0]]), zero + 18, np.array([0, -4]), np.zeros(2, int))
    data = GRID.encode(code, TINY).data
    return artifact.serialize(Contents((unit("w", (2, 3), 1, data),), dump_shared(TINY), (), {}))


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


def _grids() -> Iterator[tuple[str, bytes]]:
    yield "tiny", tiny()
    yield "grid", pack(unit("a.weight", (24, 40), 1, grid((24, 40)), linear=True))
    yield (
        "grid_groups",
        pack(*(unit(f"g{n}", (n + 6, 12), 1, grid((n + 6, 12), seed=n, groups=n)) for n in range(1, 5))),
    )
    wide = [13, -13, 1023, -1024, 70_000, 2**31 - 1, 1 - 2**31, 64]
    yield "grid_escapes", pack(unit("a", (9, 9), 1, grid((9, 9), seed=3, wide=wide)))
    sparse = (Numbers(4).below(12, 8281) == 0) * np.array([-1, 1, 2] * 2761)[:8281]
    yield "grid_lanes", pack(unit("a", (91, 91), 1, grid((91, 91), seed=4, wide=sparse, varied=False, base=8)))
    yield "grid_constant_sides", pack(unit("a", (6, 7), 1, grid((6, 7), seed=8, varied=False)))
    yield (
        "transposed",
        pack(
            unit("conv1d", (30, 8), 1, grid((8, 30), seed=6), transposed=True, linear=True),
            unit("deep", (4, 3, 5), 1, grid((15, 4), seed=7), transposed=True),
            unit("plain", (4, 3, 5), 1, grid((4, 15), seed=7)),
            unit("v", (2, 3), 2, vector(np.arange(6)), transposed=True),
        ),
    )


def _others() -> Iterator[tuple[str, bytes]]:
    r = Numbers(2)
    values = r.around(40, 300) / 64
    yield "vector", pack(unit("norm", (300,), 2, vector(values)), unit("bias", (12, 25), 2, vector(values, 0.0078125)))
    yield "vector_constant", pack(unit("ones", (64,), 2, vector(np.ones(64))), tables=False)
    yield "exact", pack(*exact_units(), tables=False)
    codes = r.around(30, 6, 10)
    codes[2, 3] = -9000
    scales = (r.below(200, 6) / 64).astype(np.float16)
    yield (
        "packed",
        pack(
            unit("zlib", (2, 3), 4, packed_zlib(bytes([1, 255, 2, 254, 3, 128]), [0.5, -3.0])),
            unit("zlib2", (1, 2), 4, packed_zlib(bytes([1, 255, 2, 254]), [0.25], 2)),
            unit("brotli", (6, 10), 4, PACKED.encode(Quantized(codes, scales), BROTLI)),
            unit("turned", (10, 6), 4, PACKED.encode(Quantized(codes // 999, scales), BROTLI), transposed=True),
            tables=False,
        ),
    )
    yield (
        "tied",
        pack(
            unit(
                "embed.weight",
                (10, 6),
                1,
                grid((10, 6), seed=9),
                aliases=("head.weight", "ähnlich.weight"),
                linear=True,
            ),
            unit("b", (5,), 2, vector([1, 2, 3, 4, 9]), aliases=("c",)),
        ),
    )
    none = np.zeros(0)
    yield (
        "empty_tensors",
        pack(
            unit("v", (0,), 2, vector(none)),
            unit("rows", (0, 5), 1, grid((0, 0), varied=False)),
            unit("cols", (5, 0), 1, grid((5, 0), seed=4)),
            unit("exact", (0, 7), 3, b"", "BF16"),
            unit("turned", (3, 0, 2), 1, grid((0, 3), seed=4), transposed=True),
            unit("packed", (0,), 4, packed_zlib(b"", [1.0])),
        ),
    )
    yield (
        "one_element",
        pack(
            unit("scalar", (), 2, vector([2.5])),
            unit("one", (1,), 2, vector([-3.0])),
            unit("steps", (1, 1), 3, exact(np.array([[7]]), "I64"), "I64"),
            unit("grid", (1, 1), 1, grid((1, 1), seed=11, wide=[5])),
            unit("packed", (1, 1, 1), 4, packed_zlib(b"\x85", [0.5])),
        ),
    )
    yield "no_units", pack(tables=False)
    config = b'{\n  "model_type": "llama",\n  "hidden_size": 64\n}\n'
    token = b'{"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}'
    yield (
        "files",
        pack(
            unit("a", (4, 6), 1, grid((4, 6), seed=12)),
            files=[
                FileSection(n, sidefiles.pack(n, c)) for n, c in (("config.json", config), ("tokenizer.json", token))
            ],
            about={"method": "default", "budget": 4096, "note": None, "ratio": 0.5},
            padding=33,
        ),
    )
    minor = bytearray(tiny())
    minor[9] = 7
    yield "newer_minor", sealed(bytes(minor))


def valid() -> dict[str, bytes]:
    """Small artifacts by name."""
    return dict([*_grids(), *_others()])


# --------------------------------------------------------------------------------------------------- broken files


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
    head = artifact.MAGIC + struct.pack("<BBHIQ", 1, 0, 0, len(directory), 28 + len(directory) + len(body))
    return sealed(head + bytes(4) + directory + body)


def index(*units, files=(), **more) -> bytes:
    fields = {"about": {}, "files": list(files), "units": [list(u) for u in units]} | more
    return b"\x00" + json.dumps({k: v for k, v in fields.items() if v is not None}).encode()


def one(data: bytes, shape=(2,), tag=2, dtype="F32", flags=0, aliases=(), tables: bytes | None = None) -> bytes:
    """A file with a single unit of any bytes."""
    shared = dump_shared(SHARED) if tables is None else tables
    sections = [(INDEX, index(("a", list(shape), dtype, tag, flags, list(aliases)))), (TABLES, shared), (UNIT, data)]
    return build([s for s in sections if s[0] != TABLES or s[1]])


def _containers() -> Iterator[tuple[str, bytes, str]]:
    good = tiny()
    corrupt = "CorruptError"
    yield "nothing", b"", "NotAnArtifact"
    yield "short_magic", good[:7], "NotAnArtifact"
    yield "magic", b"\x88" + good[1:], "NotAnArtifact"
    yield "text_mode", good.replace(b"\r\n", b"\n", 1), "NotAnArtifact"
    yield "short_header", good[:20], corrupt
    yield "major", sealed(good[:8] + b"\x02" + good[9:]), "VersionError"
    yield "major_zero", sealed(good[:8] + b"\x00" + good[9:]), corrupt
    yield "reserved", sealed(good[:11] + b"\x80" + good[12:]), corrupt
    yield "truncated", good[:-1], corrupt
    yield "appended", good + b"\x00", corrupt
    yield "header_checksum", good[:24] + bytes([good[24] ^ 1]) + good[25:], corrupt
    yield "section_checksum", good[:-1] + bytes([good[-1] ^ 128]), corrupt
    yield "directory_length", sealed(good[:12] + b"\xff\xff\xff\x7f" + good[16:]), corrupt
    yield "directory_left_over", build([(INDEX, index())], b"\x00"), corrupt
    yield "no_sections", build([]), corrupt
    yield "no_index", build([(FILE, b"\x00")]), corrupt
    yield "unknown_section", build([(INDEX, index()), (9, b"")]), corrupt
    yield "code_section", build([(INDEX, index()), (5, b"print()")]), corrupt
    yield "sections_out_of_order", build([(INDEX, index(files="a")), (PADDING, b""), (FILE, b"\x00")]), corrupt
    yield "missing_file", build([(INDEX, index(files="ab")), (FILE, b"\x00")]), corrupt
    yield "padding", build([(INDEX, index()), (PADDING, b"\x00\x01\x00")]), corrupt
    more = leb(2**62) + b"\x01\x00"
    head = artifact.MAGIC + struct.pack("<BBHIQ", 1, 0, 0, len(more), 28 + len(more))
    yield "section_count", sealed(head + bytes(4) + more), corrupt


def _indexes() -> Iterator[tuple[str, bytes]]:
    flat = vector([1.0])

    def file(raw, *sections):
        return build([(INDEX, raw), *sections])

    def shaped(shape, flags=0, aliases=()):
        return one(flat, shape, flags=flags, aliases=aliases, tables=b"")

    yield "index_packing", file(b"\x02{}")
    yield "index_empty", file(b"")
    packed = artifact._pack_index(Contents((), b"", (), {"note": "a" * 100}))
    yield "index_lzma_truncated", file(packed[:-2])
    yield "index_lzma_left_over", file(packed + b"\x00")
    yield "index_lzma_damaged", file(b"\x01\xff" + packed[2:])
    yield "index_not_json", file(index() + b"}")
    yield "index_not_utf8", file(index(files=["a"]).replace(b"a", b"\xff"))
    yield "index_field_missing", file(index(about=None))
    yield "index_field_unknown", file(index(later=1))
    yield "index_nan", file(index(about={"a": 1.5}).replace(b"1.5", b"NaN"))
    deep: list = []
    for _ in range(200):
        deep = [deep]
    nested = index(about={"a": deep}).replace(b"[]", b"[" * 99_800 + b"]" * 99_800, 1)[1:]
    yield "index_too_deep", file(b"\x01" + lzma.compress(nested, lzma.FORMAT_RAW, filters=artifact._LZMA))
    yield "index_unit_too_long", file(index(("a", [1], "F32", 2, 0, [], 1)), (UNIT, flat))
    yield "index_float_shape", shaped([1.0])
    yield "index_bool_shape", shaped([True])
    yield "index_negative_shape", shaped([-1, -1])
    yield "index_huge_shape", shaped([2**31, 2**31])
    yield "index_huge_empty_shape", shaped([0, 2**62])
    yield "index_many_dimensions", shaped([1] * 40)
    yield "index_flags", shaped([1], 4)
    yield "index_name_twice", shaped([1], 0, ["b", "a"])
    for name, files in {"up": "..", "slash": "a/b", "backslash": "a\\b", "nul": "a\0", "empty": ""}.items():
        yield f"index_file_{name}", file(index(files=[files]), (FILE, b"\x00"))
    yield "index_file_twice", file(index(files=["a", "a"]), (FILE, b"\x00"), (FILE, b"\x00"))
    yield "unknown_coder", one(flat, tag=99)


def _streams() -> Iterator[tuple[str, bytes]]:
    symbols = np.array([0, 1, -1, 4, 0, 2])
    stream = encode(symbols, np.full(6, 20, np.uint8), SHARED.tables)  # one lane: word count, state, words
    head = struct.pack("<ffB", 0, 1, 20)
    assert stream[0] % 2 == 0, "an even zigzag number"

    def file(data, n=6):
        return one(head + data, (n,))

    wide = encode(np.array([0, 10**6]), np.full(2, 20, np.uint8), SHARED.tables)
    escape = len(zigzag_bytes([10**6]))
    yield "stream_empty", file(b"")
    yield "stream_word_count", file(b"\xff" * 9 + b"\x01" + stream[1:])
    yield "stream_negative_count", file(bytes([stream[0] + 1]) + stream[1:])
    yield "stream_truncated", file(stream[:-1])
    yield "stream_left_over", file(stream + b"\x00")
    yield "stream_unused_word", file(bytes([stream[0] + 2]) + stream[1:] + b"\x00\x00")
    yield "stream_low_state", file(b"\x00" + struct.pack("<I", 65535), 1)
    yield "stream_final_state", file(stream[:1] + struct.pack("<I", 2**32 - 1) + stream[5:])
    yield "stream_no_end", file(b"\x00" + struct.pack("<I", 2**31), 1)
    yield "stream_for_nothing", file(stream, 0)
    yield "escape_missing", file(wide[:-escape], 2)
    yield "escape_truncated", file(wide[:-1], 2)
    yield "escape_left_over", file(wide + b"\x00", 2)
    yield "escape_too_large", file(wide[:-escape] + zigzag_bytes([2**31]), 2)
    yield "escape_far_too_large", file(wide[:-escape] + zigzag_bytes([-(2**50)]), 2)


def _tables() -> Iterator[tuple[str, bytes]]:
    flat = vector([1.0, 1.0])

    def file(raw):
        return one(flat, tables=b"\x00" + raw)

    good = leb(63) + leb(1) + leb(8000) + leb(4000) + b"\x05"
    yield "tables_packing", one(flat, tables=b"\x02" + good)
    yield "tables_lzma", one(flat, tables=b"\x01" + good)
    yield "tables_too_many_classes", file(good + leb(1) + good[1:])
    yield "tables_no_classes", file(leb(0) + good[1:])
    yield "tables_too_wide", file(leb(1) + leb(1024) + leb(1) * 1025 + bytes(16))
    yield "tables_sum", file(leb(63) + leb(1) + leb(8384) + leb(4000) + b"\x05")
    yield "tables_zero", file(leb(63) + leb(1) + leb(0) + leb(4000) + b"\x05")
    yield "tables_truncated", file(good[:-1])
    yield "tables_truncated_integer", file(good[:2] + b"\x80")
    yield "tables_missing", one(struct.pack("<ffB", 0, 1, 20) + vector([1, 2])[9:], tables=b"")


def _coders() -> Iterator[tuple[str, bytes]]:
    def grid_file(shape=(2, 3), groups=1, step=1.0, pairs=(0, 0, 0, 0, 0, 0, 0, 0), tail=b"\x00"):
        return one(struct.pack("<Bf8B", groups, step, *pairs) + tail, shape, 1)

    one_lane = b"\x00" + struct.pack("<I", 65536)
    yield "grid_short", one(bytes(12), (2, 3), 1)
    yield "grid_no_groups", grid_file(groups=0)
    yield "grid_too_many_groups", one(grid((9, 4), groups=1)[:0] + b"\x05" + grid((9, 4))[1:], (9, 4), 1)
    yield "grid_more_groups_than_rows", grid_file((2, 3), 3)
    for name, step in {"zero": 0.0, "negative": -1.0, "infinite": np.inf, "nan": np.nan}.items():
        yield f"grid_step_{name}", grid_file(step=step)
    yield "grid_class", grid_file(pairs=(0, 64, 0, 0, 0, 0, 0, 0))
    yield "grid_side_length", grid_file(tail=b"\x7f")
    yield "grid_side_unused", grid_file(tail=b"\x05" + one_lane + one_lane)
    shape, pairs = (1, 1), (0, 20, 0, 0, 0, 0, 0, 0)
    for name, z in {"step": 501, "huge_step": 2**31 - 1}.items():
        side = encode(np.array([z]), np.full(1, 20, np.uint8), SHARED.tables)
        yield f"grid_column_{name}", grid_file(shape, pairs=pairs, tail=leb(len(side)) + side + one_lane)
    payload = encode(np.array([10**6]), np.full(1, 20, np.uint8), SHARED.tables)
    yield "grid_overflow", grid_file(shape, step=3e38, tail=b"\x00" + payload)
    overflow = encode(np.array([1, 1]), np.full(2, 20, np.uint8), SHARED.tables)
    yield "vector_short", one(bytes(8))
    yield "vector_class", one(struct.pack("<ffB", 0, 1, 64))
    yield "vector_infinite", one(struct.pack("<ffB", np.inf, 1, 0))
    yield "vector_nan_step", one(struct.pack("<ffB", 0, np.nan, 0))
    yield "vector_constant_with_stream", one(struct.pack("<ffB", 0, 1, 0) + b"\x00")
    yield "vector_overflow", one(struct.pack("<ffB", 3e38, 3e38, 20) + overflow)
    yield "exact_dtype", one(b"\x00\x01\x00\x02", tag=3, dtype="F8_E4M3")
    yield "exact_mode", one(b"\x02\x01", tag=3, dtype="U8")
    yield "exact_truncated", one(b"\x00\x01", tag=3, dtype="U8")
    yield "exact_left_over", one(b"\x00\x01\x02\x03", tag=3, dtype="U8")
    yield "exact_truth", one(b"\x00\x01\x02", tag=3, dtype="BOOL")
    plane = Tables({1: Table(255, np.array([8192, 8192]))})
    coded = encode(np.array([255, 256]), np.ones(2, np.uint8), plane)
    head = leb(255) + leb(1)
    yield "exact_byte_range", one(b"\x01" + head + leb(8192) + leb(len(coded)) + coded, tag=3, dtype="U8")
    yield "exact_symbols", one(b"\x01" + leb(255) + leb(2) + leb(1) * 2 + b"\x00", tag=3, dtype="U8")
    yield "exact_frequencies", one(b"\x01" + head + leb(16384) + leb(len(coded)) + coded, tag=3, dtype="U8")
    huge = b"\x01" + leb(0) + leb(4) + leb(2**62) * 4 + leb(len(coded)) + coded
    yield "exact_frequencies_wrap", one(huge, tag=3, dtype="U8")
    good = packed_zlib(b"\x01\x02", [1.0, 2.0])
    yield "packed_short", one(b"\x00", (2, 1), 4)
    yield "packed_compression", one(b"\x02" + good[1:], (2, 1), 4)
    yield "packed_width", one(b"\x00\x03" + good[2:], (2, 1), 4)
    yield "packed_left_over", one(good + b"\x00", (2, 1), 4)
    yield "packed_too_few", one(good, (2, 2), 4)
    yield "packed_scale_length", one(good[:2] + b"\x7f" + good[3:], (2, 1), 4)
    yield "packed_nan_scale", one(packed_zlib(b"\x01\x02", [1.0, np.nan]), (2, 1), 4)
    side = brotli.compress(np.ones(2, "<f2").tobytes())
    head = bytes([1, 1]) + leb(len(side)) + side
    yield "packed_bomb", one(head + brotli.compress(bytes(4_000_000)), (2, 1), 4)
    yield "packed_brotli_left_over", one(head + brotli.compress(bytes(2)) + b"\x00", (2, 1), 4)
    yield "packed_brotli_cut", one(head + brotli.compress(bytes(2))[:-1], (2, 1), 4)


def invalid() -> dict[str, tuple[bytes, str]]:
    """Broken artifacts and the name of the error each must raise, by name."""
    found = {name: (data, error) for name, data, error in _containers()}
    parts: tuple[Callable[[], Iterator[tuple[str, bytes]]], ...] = (_indexes, _streams, _tables, _coders)
    for part in parts:
        found |= {name: (data, "CorruptError") for name, data in part()}
    return found


def digest(values: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of decoded tensors."""
    state = hashlib.sha256()
    for name in sorted(values):
        array = values[name]
        kind = array.dtype.newbyteorder("<").str.replace("|", "")
        state.update(f"{name}\n{kind}\n{list(array.shape)}\n".encode())
        state.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    return state.hexdigest()


def files() -> dict[str, bytes]:
    """Every file of the directory by name."""
    good, bad = valid(), invalid()
    out = {f"{name}.bcap": data for name, data in good.items()}
    out |= {f"bad_{name}.bcap": data for name, (data, _) in bad.items()}
    expected = {
        "valid": {f"{name}.bcap": digest(decode_units(artifact.parse(data))) for name, data in sorted(good.items())},
        "invalid": {f"bad_{name}.bcap": error for name, (_, error) in sorted(bad.items())},
    }
    return out | {"expected.json": (json.dumps(expected, indent=1) + "\n").encode()}


def main(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for name, data in files().items():
        (directory / name).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY)
