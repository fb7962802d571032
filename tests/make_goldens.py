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
from collections.abc import Callable, Iterator
from pathlib import Path

import brotli
import numpy as np

import golden_bands
import golden_code
import golden_codebooks
import golden_overlays
import golden_shared
import golden_trellis
import golden_updates
from bytecap.format import container
from bytecap.format.coders import leb
from bytecap.format.coders.packed import BROTLI, Quantized
from bytecap.format.coders.packed import CODER as PACKED
from bytecap.format.container import FILE, INDEX, PADDING, UNIT, Contents, FileSection
from bytecap.format.decoder import decode_units
from bytecap.format.entropy.frequencies import Table, Tables
from bytecap.format.entropy.rans import encode, zigzag_bytes
from bytecap.format.sidefiles import packing
from golden_parts import (
    DIRECTORY,
    SHARED,
    Numbers,
    build,
    exact,
    exact_units,
    fixed_broken,
    fixed_units,
    grid,
    index,
    one,
    pack,
    packed_zlib,
    sealed,
    stacked_units,
    tiny,
    trellis,
    unit,
    vector,
)


def _grids() -> Iterator[tuple[str, bytes]]:
    yield "tiny", tiny()
    yield "grid", pack(unit("a.weight", (24, 40), 1, grid((24, 40)), linear=True))
    yield (
        "grid_groups",
        pack(*(unit(f"g{n}", (n + 6, 12), 1, grid((n + 6, 12), seed=n, groups=n)) for n in range(1, 5))),
    )
    yield (
        "trellis",
        pack(
            unit("t.weight", (24, 40), 9, trellis((24, 40)), linear=True),
            unit("groups", (11, 6), 9, trellis((11, 6), seed=2, groups=4)),
            unit("all", (5, 9), 9, trellis((5, 9), seed=3, first=1)),
            unit("none", (5, 9), 9, trellis((5, 9), seed=4, first=64)),
            unit("short", (2, 9), 9, trellis((2, 9), seed=5, first=1)),
            unit("one", (1, 4), 9, trellis((1, 4), seed=6)),
        ),
    )
    wide = [13, -13, 1023, -1024, 70_000, 2**31 - 1, 1 - 2**31, 64]
    yield "grid_stacked", pack(*stacked_units())
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


def _bare() -> Iterator[tuple[str, bytes]]:
    """Files without units, and one of a newer minor version."""
    yield "no_units", pack(tables=False)
    config = b'{\n  "model_type": "llama",\n  "hidden_size": 64\n}\n'
    token = b'{"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}'
    yield (
        "files",
        pack(
            unit("a", (4, 6), 1, grid((4, 6), seed=12)),
            files=[FileSection(n, packing.pack(n, c)) for n, c in (("config.json", config), ("tokenizer.json", token))],
            about={"method": "default", "budget": 4096, "note": None, "ratio": 0.5},
            padding=33,
        ),
    )
    minor = bytearray(tiny())
    minor[9] = 7
    yield "newer_minor", sealed(bytes(minor))
    yield "fixed", pack(*fixed_units(), tables=False)


def valid() -> dict[str, bytes]:
    """Small artifacts by name."""
    others = (golden_overlays, golden_codebooks, golden_bands, golden_code, golden_shared, golden_trellis)
    return dict([*_grids(), *_others(), *_bare(), *(one for module in others for one in module.valid())])


# --------------------------------------------------------------------------------------------------- broken files


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
    head = container.MAGIC + struct.pack("<BBHIQ", 1, 0, 0, len(more), 28 + len(more))
    yield "section_count", sealed(head + bytes(4) + more), corrupt


def _indexes() -> Iterator[tuple[str, bytes]]:
    flat = vector([1.0])

    def file(raw, *sections):
        return build([(INDEX, raw), *sections])

    def shaped(shape, flags=0, aliases=()):
        return one(flat, shape, flags=flags, aliases=aliases, tables=b"")

    yield "index_packing", file(b"\x02{}")
    yield "index_empty", file(b"")
    packed = container._pack_index(Contents((), b"", (), {"note": "a" * 100}))
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
    yield "index_too_deep", file(b"\x01" + lzma.compress(nested, lzma.FORMAT_RAW, filters=container._LZMA))
    yield "index_unit_too_long", file(index(("a", [1], "F32", 2, 0, [], 1)), (UNIT, flat))
    yield "index_float_shape", shaped([1.0])
    yield "index_bool_shape", shaped([True])
    yield "index_negative_shape", shaped([-1, -1])
    yield "index_huge_shape", shaped([2**31, 2**31])
    yield "index_huge_empty_shape", shaped([0, 2**62])
    yield "index_many_dimensions", shaped([1] * 40)
    yield "index_flags", shaped([1], 8)
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
    parts: tuple[Callable[[], Iterator[tuple[str, bytes]]], ...] = (
        _indexes, _streams, _tables, _coders, golden_overlays.invalid, fixed_broken, golden_code.invalid,
    )  # fmt: skip
    for part in parts:
        found |= {name: (data, "CorruptError") for name, data in part()}
    for module in (golden_codebooks, golden_bands, golden_shared, golden_trellis):
        found |= {name: (data, "CorruptError") for name, data in module.invalid()}
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
        "valid": {f"{name}.bcap": digest(decode_units(container.parse(data))) for name, data in sorted(good.items())},
        "invalid": {f"bad_{name}.bcap": error for name, (_, error) in sorted(bad.items())},
    }
    return out | {"expected.json": (json.dumps(expected, indent=1) + "\n").encode()}


def main(directory: Path) -> None:
    for place, made in ((directory, files()), (directory / "updates", golden_updates.files(digest))):
        place.mkdir(exist_ok=True)
        for name, data in made.items():
            (place / name).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY)
