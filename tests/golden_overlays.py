"""Goldens of `stack` and its layers: sound ones over several bases, and broken ones."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import brotli
import numpy as np

from bytecap.format.coders import leb
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.overlays.channels import BOTH, COLUMNS, ROWS
from bytecap.format.overlays.channels import CODER as CHANNELS
from bytecap.format.overlays.columns import CODER as COLUMNS_LAYER
from bytecap.format.overlays.groups import CODER as GROUPS
from bytecap.format.overlays.lowrank import CODER as LOWRANK
from bytecap.format.overlays.outliers import CODER as OUTLIERS
from bytecap.format.overlays.rows import CODER as ROWS_LAYER
from golden_parts import Numbers, exact, grid, one, pack, packed_zlib, unit, vector


def constant(value):
    """A base of nine bytes for a matrix of any size."""
    return 2, struct.pack("<ffB", value, 0, 0)


def packed(shape, seed=1):
    r = Numbers(seed)
    codes = r.around(50, shape[1], shape[0]).astype(np.int8)
    return 4, packed_zlib(codes.tobytes(), (r.below(99, shape[0]) / 32).tolist())


def halves(seed, *shape):
    return (Numbers(seed).around(3000, *shape) / 512).astype(np.float16)


def codes(seed, *shape):
    return Numbers(seed).around(60, *shape).clip(-127, 127).astype(np.int8)


def scales(seed, count):
    return (Numbers(seed).below(500, count) / 4096).astype(np.float16)


def stacked(name, shape, base, *layers, **more):
    return unit(name, shape, 5, STACK.encode(base, layers), **more)


def _lines() -> Iterator[tuple[str, bytes]]:
    shape, wide = (6, 10), (3, 700)
    few, many = np.array([2, 7]), np.array([0, 1, 3, 5, 6, 8, 9])
    far = np.array([31, 180, 181, 333, 512, 699])  # Rice codes are smallest
    part = COLUMNS_LAYER
    yield (
        "layer_columns",
        pack(
            stacked("grid", shape, (1, grid(shape)), (32, part.encode(few, halves(1, 2, 6), 10))),
            stacked("packed", shape, packed(shape), (32, part.encode(many, codes(2, 7, 6), 10, scales(2, 7)))),
            stacked("far", wide, constant(0.5), (32, part.encode(far, halves(3, 6, 3), 700))),
            stacked("dull", wide, constant(0.5), (32, part.encode(far, codes(3, 6, 3) * 0, 700, scales(3, 6)))),
            stacked("none", wide, constant(0.5), (32, part.encode(far[:0], halves(3, 0, 3), 700))),
            stacked("turned", (10, 6), (1, grid(shape)), (32, part.encode(few, halves(1, 2, 6), 10)), transposed=True),
        ),
    )
    part, shape = ROWS_LAYER, (12, 5)
    yield (
        "layer_rows",
        pack(
            stacked("grid", shape, (1, grid(shape)), (33, part.encode(few, halves(1, 2, 5), 12))),
            stacked("packed", shape, packed(shape), (33, part.encode(many, codes(2, 7, 5), 12, scales(2, 7)))),
            stacked("all", (2, 3), constant(1.5), (33, part.encode(np.arange(2), halves(4, 2, 3), 2))),
        ),
    )


def _others() -> Iterator[tuple[str, bytes]]:
    shape, few = (9, 9), np.array([4, 8, 30, 31, 80])
    yield (
        "layer_outliers",
        pack(
            stacked("grid", shape, (1, grid(shape)), (34, OUTLIERS.encode(few, halves(1, 5), 81))),
            stacked("packed", shape, packed(shape), (34, OUTLIERS.encode(few, codes(2, 5), 81, scales(2, 1)))),
            stacked("far", (91, 91), constant(1), (34, OUTLIERS.encode(np.array([4000, 8200]), halves(3, 2), 8281))),
            stacked("flat", (8,), constant(1), (34, OUTLIERS.encode(np.arange(0, 8, 2), halves(5, 4), 8))),
        ),
    )
    left, right = Numbers(6).around(3, 3, 9).clip(-8, 7), Numbers(7).around(3, 3, 9).clip(-8, 7)
    long, small = left[:1, :1].repeat(99, 1), (-left[:2, :2] % 2, right[:2, :2] % 2)
    steps = np.array([0.125, 3e-5, -1.7], np.float32)
    yield (
        "layer_lowrank",
        pack(
            stacked("grid", shape, (1, grid(shape)), (35, LOWRANK.encode(left, right, steps, 4))),
            stacked("packed", shape, packed(shape), (35, LOWRANK.encode(left * 9, right * 7, steps, 8))),
            stacked("odd", (5, 9), constant(1), (35, LOWRANK.encode(left[:1, :5] * 2, right[:1], steps[:1], 5))),
            stacked("even", (9, 99), constant(1), (35, LOWRANK.encode(left[:1], long, steps[:1], 7))),
            stacked("coarse", (2, 2), constant(0), (35, LOWRANK.encode(*small, steps[1:], 2))),
        ),
    )
    shape, powers = (7, 20), np.arange(-128, 128).reshape(16, 16).astype(np.int8)
    yield (
        "layer_groups",
        pack(
            stacked("grid", shape, (1, grid(shape)), (36, GROUPS.encode(codes(1, 7, 5), 4))),
            stacked("packed", shape, packed(shape), (36, GROUPS.encode(halves(2, 7, 3), 8))),
            stacked("powers", (16, 16), constant(1), (36, GROUPS.encode(powers, 1))),
            stacked("whole", (16, 20), constant(1), (36, GROUPS.encode(np.full((16, 1), 3, np.int8), 20))),
        ),
    )
    shape, few, bytewise = (7, 8), np.array([1, 3]), (codes(2, 26), (7, 8), scales(2, 4))
    yield (
        "layer_channels",
        pack(
            stacked("grid", shape, (1, grid(shape)), (37, CHANNELS.encode(BOTH, few, halves(1, 26), shape))),
            stacked("packed", shape, packed(shape), (37, CHANNELS.encode(BOTH, few, *bytewise))),
            stacked("columns", shape, constant(1), (37, CHANNELS.encode(COLUMNS, few, halves(3, 14), shape))),
            stacked("rows", shape, constant(1), (37, CHANNELS.encode(ROWS, few, halves(4, 16), shape))),
        ),
    )


def _stacks() -> Iterator[tuple[str, bytes]]:
    shape, few = (6, 10), np.array([2, 7])
    layers = [
        (36, GROUPS.encode(codes(1, 6, 3) // 4, 4)),
        (35, LOWRANK.encode(codes(2, 2, 6), codes(3, 2, 10), np.array([0.01, -0.003], np.float32), 8)),
        (32, COLUMNS_LAYER.encode(few, halves(1, 2, 6), 10)),
        (34, OUTLIERS.encode(np.array([7, 59]), halves(3, 2), 60)),
        (34, OUTLIERS.encode(np.array([7, 11]), halves(4, 2), 60)),
    ]
    huge = np.full(shape, 2.0**127)
    twice = (36, GROUPS.encode(np.full((6, 1), 32, np.int8), 10))
    every = (33, ROWS_LAYER.encode(np.arange(6), halves(1, 6, 10), 6))
    none = ROWS_LAYER.encode(few[:0], halves(1, 0), 0)
    yield (
        "stack",
        pack(
            stacked("grid", shape, (1, grid(shape)), *layers),
            stacked("vector", shape, (2, vector(np.arange(60).reshape(shape))), *layers),
            stacked("f64", shape, (3, exact(Numbers(5).around(10**9, *shape) / 3, "F64")), *layers, dtype="F64"),
            stacked("i64", shape, (3, exact(Numbers(5).around(10**12, *shape), "I64")), *layers[:1], dtype="I64"),
            stacked("packed", shape, packed(shape), *layers[::-1]),
            stacked("over", shape, (3, exact(huge.astype(np.float32), "F32")), twice, every),
            stacked("empty", (0, 5), constant(1), (33, none), (34, none), (36, GROUPS.encode(halves(1, 0, 5), 1))),
        ),
    )


def valid() -> Iterator[tuple[str, bytes]]:
    yield from _lines()
    yield from _others()
    yield from _stacks()


# --------------------------------------------------------------------------------------------------- broken files


def _bad_stacks() -> Iterator[tuple[str, bytes]]:
    shape = (2, 3)
    base = constant(1.0)
    rows = (33, ROWS_LAYER.encode(np.array([1]), halves(1, 3), 2))
    good = STACK.encode(base, [rows])

    def file(data):
        return one(data, shape, 5)

    yield "stack_short", file(b"\x02")
    yield "stack_no_layer", file(STACK.encode(base, []))
    yield "stack_on_stack", file(STACK.encode((5, good), [rows]))
    yield "stack_on_layer", file(STACK.encode((33, rows[1]), [rows]))
    yield "stack_unknown_base", file(STACK.encode((9, base[1]), [rows]))
    yield "stack_unknown_layer", file(STACK.encode(base, [(99, b"")]))
    yield "stack_coder_as_layer", file(STACK.encode(base, [base]))
    yield "stack_cut", file(good[:-1])
    yield "stack_layer_missing", file(good[:1] + b"\x02" + good[2:])
    yield "stack_left_over", file(good + b"\x00")
    yield "stack_long_base", file(good[:2] + leb(2**60) + good[3:])
    most = (36, GROUPS.encode(np.full((2, 1), 127, np.int8), 3))
    yield "stack_overflow", file(STACK.encode(constant(4.0), [most] * 16))
    yield "stack_many_layers", file(STACK.encode(base, [rows] * 17))
    nan = exact(np.full(shape, np.nan, np.float32), "F32")
    yield "stack_nan", file(STACK.encode((3, nan), [rows]))


def _bad_positions() -> Iterator[tuple[str, bytes]]:
    def file(block, count, size=10):
        return one(STACK.encode(constant(1.0), [(34, block + b"\x00\x00" + bytes(2 * count))]), (size,), 5)

    yield "positions_count", file(leb(11) + b"\x01" + bytes(11), 11)
    yield "positions_huge_count", file(leb(2**62) + b"\x02\x00", 0)
    yield "positions_mode", file(b"\x01\x04\x00", 1)
    yield "positions_bitmap_count", file(b"\x01\x00\x03\x00", 1)
    yield "positions_bitmap_tail", file(b"\x02\x00\x01\x04", 2)
    yield "positions_gap", file(b"\x02\x01\x08\x01", 2)
    yield "positions_huge_gap", file(b"\x02\x01" + leb(2**63 - 1) + b"\x00", 2)
    yield "positions_cut", one(STACK.encode(constant(1.0), [(34, b"\x02\x01\x80")]), (10,), 5)
    yield "positions_rice_bits", file(b"\x01\x02\x05\x00\x01", 1)
    yield "positions_rice_low_tail", file(b"\x01\x02\x02\xfc\x01", 1)
    yield "positions_rice_high_tail", file(b"\x01\x02\x02\x00\x03", 1)
    yield "positions_rice_beyond", file(b"\x01\x02\x02\x03\x08", 1)
    yield "positions_rice_endless", file(b"\x01\x02\x00" + bytes(9), 1)
    yield "positions_numbers_fall", file(b"\x02\x03\x13", 2)
    yield "positions_numbers_twice", file(b"\x02\x03\x11", 2)
    yield "positions_numbers_beyond", file(b"\x01\x03\x0a", 1)
    yield "positions_numbers_tail", file(b"\x01\x03\x13", 1)


def _bad_layers() -> Iterator[tuple[str, bytes]]:
    def file(tag, part, shape=(2, 3)):
        return one(STACK.encode(constant(1.0), [(tag, part)]), shape, 5)

    middle, half = b"\x01\x01\x01", np.array([1.0, 2.0, 3.0], np.float16)
    nan = np.array([1.0, np.nan, 3.0], np.float16)
    good = ROWS_LAYER.encode(np.array([1]), half, 2)
    assert good[:3] == middle
    yield "columns_of_rows", file(32, good)
    yield "columns_nan", file(32, COLUMNS_LAYER.encode(np.array([1]), nan[:2], 3))
    yield "columns_short", file(32, COLUMNS_LAYER.encode(np.array([1]), half[:1], 3))
    yield "columns_nothing", file(32, b"")
    yield "rows_precision", file(33, middle + b"\x02\x00" + bytes(6))
    yield "rows_packing", file(33, middle + b"\x00\x02" + bytes(6))
    yield "rows_left_over", file(33, good + b"\x00")
    yield "rows_bomb", file(33, middle + b"\x00\x01" + brotli.compress(bytes(4_000_000)))
    yield "rows_brotli_cut", file(33, middle + b"\x00\x01" + brotli.compress(bytes(6))[:-1])
    yield "rows_infinite_scale", file(33, middle + b"\x01\x00" + b"\x00\x7c" + bytes(3))
    yield "rows_no_scale", file(33, middle + b"\x01\x00\x00")
    yield "outliers_nan", file(34, OUTLIERS.encode(np.arange(3), nan, 6))
    yield "outliers_beyond", file(34, OUTLIERS.encode(np.array([6]), half[:1], 7))
    yield "outliers_left_over", file(34, OUTLIERS.encode(np.arange(3), half, 6) + b"\x00")
    step = struct.pack("<f", 0.5)
    yield "lowrank_no_rank", file(35, b"\x00\x04\x00")
    yield "lowrank_rank", file(35, b"\x03\x04\x00" + step * 3 + bytes(8))
    yield "lowrank_bits", file(35, b"\x01\x09\x00" + step + bytes(6))
    yield "lowrank_one_bit", file(35, b"\x01\x01\x00" + step + bytes(1))
    yield "lowrank_packing", file(35, b"\x01\x08\x02" + step + bytes(5))
    yield "lowrank_nan", file(35, b"\x01\x08\x00" + struct.pack("<f", np.nan) + bytes(5))
    yield "lowrank_short", file(35, b"\x01\x08\x00" + step + bytes(4))
    yield "lowrank_left_over", file(35, b"\x01\x08\x00" + step + bytes(6))
    yield "lowrank_tail", file(35, b"\x01\x04\x00" + step + b"\x88\x88\x18")
    yield "lowrank_code", file(35, b"\x01\x04\x01" + step + brotli.compress(bytes([0, 7, 8, 0, 0])))
    yield "lowrank_overflow", file(35, b"\x01\x08\x00" + struct.pack("<f", 3e38) + bytes(5))
    yield "groups_no_size", file(36, b"\x00\x01\x00" + bytes(6))
    yield "groups_size", file(36, b"\x04\x01\x00" + bytes(2))
    yield "groups_precision", file(36, b"\x03\x02\x00" + bytes(2))
    yield "groups_packing", file(36, b"\x03\x01\x02" + bytes(2))
    yield "groups_short", file(36, b"\x02\x01\x00" + bytes(3))
    yield "groups_left_over", file(36, b"\x02\x01\x00" + bytes(5))
    yield "groups_nan", file(36, GROUPS.encode(nan[:2, None], 3))
    yield "channels_mode", file(37, b"\x04" + good)
    yield "channels_no_mode", file(37, b"\x00" + good)
    yield (
        "channels_beyond",
        file(37, b"\x03\x01\x01\x02\x00\x00" + bytes(8)),
    )
    yield "channels_short", file(37, CHANNELS.encode(BOTH, np.array([1]), half, (2, 3)))
    yield "channels_nothing", file(37, b"")


def invalid() -> Iterator[tuple[str, bytes]]:
    yield from _bad_stacks()
    yield from _bad_positions()
    yield from _bad_layers()
