"""Golden artifacts of the coder bands and the layer order."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import brotli
import numpy as np

from bytecap.format.coders import leb
from bytecap.format.coders.bands import CODER
from bytecap.format.coders.packed import Quantized
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.overlays.order import CODER as ORDER
from golden_parts import Numbers, one, pack, packed_zlib, unit


def bands(shape, seed=1, growth=0):
    r = Numbers(seed)
    codes = r.around(3, *shape) * (1 + growth * np.arange(shape[1]) // max(1, shape[1]))
    if codes.size:
        codes[0, 0] = -700
    return CODER.encode(Quantized(codes, ((1 + r.below(200, shape[0])) / 64).astype(np.float16)))


def place(rows):
    return np.argsort(Numbers(rows).below(1000, rows), kind="stable")


def valid() -> Iterator[tuple[str, bytes]]:
    """Sound files."""
    yield (
        "bands",
        pack(
            unit("one", (40, 30), 14, bands((40, 30)), linear=True),
            unit("several", (60, 41), 14, bands((60, 41), 2, 30)),
            unit("turned", (20, 50), 14, bands((50, 20), 3), transposed=True),
            unit("empty", (3, 0), 14, bands((3, 0))),
            tables=False,
        ),
    )
    yield (
        "layer_order",
        pack(
            *(
                unit(f"rows{n}", (n, 9), 5, STACK.encode((14, bands((n, 9), n)), [(40, ORDER.encode(place(n)))]))
                for n in (1, 2, 33)
            ),
            unit(
                "zlib",
                (5, 4),
                5,
                STACK.encode((4, packed_zlib(bytes(range(20)), [0.5, 1, 2, 3, 4])), [(40, ORDER.encode(place(5)))]),
            ),
            tables=False,
        ),
    )


def invalid() -> Iterator[tuple[str, bytes]]:
    """Broken files; every reader must call them corrupt."""
    scale = brotli.compress(struct.pack("<e", 0.5))
    even = leb(1) + leb(5000) * 3
    stream = b"\x00" + struct.pack("<I", 1 << 16)

    def section(count=1, side=scale, columns=b"", tables=even, body=stream):
        return one(bytes([count]) + leb(len(side)) + side + columns + tables + body, (1, 3), 14, tables=b"")

    yield "bands_short", one(b"", (1, 3), 14, tables=b"")
    yield "bands_none", section(0)
    yield "bands_many", section(64)
    yield "bands_scales_cut", section(side=scale[:-1])
    yield "bands_scale_nan", section(side=brotli.compress(b"\x00\x7e"))
    yield "bands_spare_bits", section(2, columns=b"\x08", tables=even * 2)
    yield "bands_no_such_band", section(3, columns=b"\x03", tables=even * 3)
    yield "bands_half", section(tables=leb(1024) + leb(1) * 2049)
    yield "bands_frequencies", section(tables=leb(1) + leb(6000) * 3)
    yield "bands_zero", section(tables=leb(1) + leb(0) * 3)
    yield "bands_truncated", section(tables=leb(1), body=b"")
    yield "bands_left_over", section(body=stream + b"\x00")

    def ordered(part):
        base = struct.pack("<ffB", 0.5, 0, 0)
        return one(STACK.encode((2, base), [(40, part)]), (3, 2), 5, tables=b"")

    yield "order_short", ordered(b"")
    yield "order_twice", ordered(b"\x14")
    yield "order_beyond", ordered(b"\x34")
    yield "order_spare_bits", ordered(b"\x64")
    yield "order_left_over", ordered(b"\x24\x00")
