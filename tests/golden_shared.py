"""Golden artifacts with shared objects, and with entropy-coded low-rank factors."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from bytecap.format.coders import leb
from bytecap.format.coders.codebook import CODER as CODEBOOK
from bytecap.format.coders.latent import CODER as LATENT
from bytecap.format.coders.latent import Link
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.container import INDEX, SHARED, UNIT
from bytecap.format.entropy.frequencies import Table, Tables, integer_frequencies
from bytecap.format.entropy.rans import encode
from bytecap.format.overlays.channels import CODER as CHANNELS
from bytecap.format.overlays.channels import COLUMNS, ROWS
from bytecap.format.overlays.columns import CODER as COLUMNS_LAYER
from bytecap.format.overlays.lowrank import CODER as LOWRANK
from bytecap.format.overlays.outliers import CODER as OUTLIERS
from bytecap.format.overlays.rows import CODER as ROWS_LAYER
from bytecap.format.wire.indices import SharedTable
from bytecap.format.wire.shared_objects import (
    share_lists,
    write_codebook,
    write_list,
    write_shared_decoder,
    write_table,
)
from golden_codebooks import book, latent
from golden_overlays import constant, halves, packed
from golden_parts import Numbers, build, index, pack, unit

SHAPE = (12, 10)


def table(m) -> np.ndarray:
    return integer_frequencies(np.append(np.arange(m, 0, -1.0) ** 2, 0.0))


def lists() -> tuple[list, tuple[bytes, ...]]:
    """Units whose layers protect the same channels of 200, and the list they share."""
    few = np.flatnonzero(Numbers(8).below(5, 200) == 0)
    k = len(few)
    stacks = {
        "columns": ((2, 200), packed((2, 200)), (32, COLUMNS_LAYER.encode(few, halves(2, k, 2), 200))),
        "rows": ((200, 2), constant(0.5), (33, ROWS_LAYER.encode(few, halves(3, k, 2), 200))),
        "read": ((3, 200), constant(2.0), (37, CHANNELS.encode(COLUMNS, few, halves(4, 3 * k), (3, 200)))),
        "written": ((200, 1), constant(2.0), (37, CHANNELS.encode(ROWS, few, halves(5, k), (200, 1)))),
        "places": ((10, 20), constant(1.0), (34, OUTLIERS.encode(few, halves(6, k), 200))),
    }
    encoded = {n: (shape, STACK.encode(base, [overlay])) for n, (shape, base, overlay) in stacks.items()}
    sections, objects = share_lists(encoded)
    assert sum(map(len, sections.values())) + len(objects[0]) < sum(len(data) for _, data in encoded.values()) - 7
    return [unit(n, stacks[n][0], 5, data) for n, data in sections.items()], objects


def valid() -> Iterator[tuple[str, bytes]]:
    """Sound files."""
    own = book(SHAPE, 40, 2)
    freq = SharedTable(1, table(20), 1)
    objects = [write_codebook(own.words, byte=True), write_table(freq.freq)]

    def coded(seed, scale, **more):
        return CODEBOOK.encode_shared(book(SHAPE, 40, 2, seed).indices, (40, 2), 0, scale, **more)

    yield (
        "shared_codebook",
        pack(
            unit("a", SHAPE, 6, coded(1, 0.5, table=freq)),
            unit("b", SHAPE, 6, coded(2, -3.0, coded=False)),
            unit("c", SHAPE[::-1], 6, coded(3, 0.1, table=freq), transposed=True),
            unit("long", (60, 60), 6, CODEBOOK.encode_shared(
                book((60, 60), 40, 2, 4).indices, (40, 2), 0, 1.0, table=freq)),
            unit("over", SHAPE, 5, STACK.encode((6, coded(5, 1.5)), [(32, COLUMNS_LAYER.encode(
                np.array([4]), halves(1, 1, 12), 10))])),
            tables=False, objects=objects,
        ),
    )  # fmt: skip
    whole = latent((9, 23), 7, 2, 8)
    objects = [write_codebook(whole.words, byte=False), write_shared_decoder(whole.decoder, 7)]
    plain = latent((9, 23), 7, 2, seed=3, rank=1)
    yield (
        "shared_latent",
        pack(
            unit("both", (9, 23), 7, LATENT.encode(whole, (9, 23), words=Link(0, 0.75), decoder=Link(1, 3.0))),
            unit("decoder", (9, 23), 7, LATENT.encode(whole, (9, 23), byte_words=True, decoder=Link(1, -0.25))),
            unit("words", (9, 23), 7, LATENT.encode(plain, (9, 23), byte_factors=True, words=Link(0, 2.0))),
            tables=False, objects=objects,
        ),
    )  # fmt: skip
    units, objects = lists()
    assert len(objects) == 1
    yield "shared_list", pack(*units, tables=False, objects=objects)
    left, right = (Numbers(s).around(9, 2, n) for s, n in ((6, 2), (7, 700)))
    steps = np.array([0.5, -0.1], np.float32)
    body = STACK.encode(constant(1.0), [(35, LOWRANK.encode(left // 3, right // 3, steps, 8))])
    other = STACK.encode(packed((2, 700)), [(35, LOWRANK.encode(left // 3, right // 3, steps, 4))])
    assert STACK.parts(body)[1][2][2] == STACK.parts(other)[1][2][2] == 2
    yield "layer_lowrank_coded", pack(unit("a", (2, 700), 5, body), unit("b", (2, 700), 5, other), tables=False)


def _file(objects, data, tag=6, shape=(1, 3)) -> bytes:
    """A file of one unit and any shared objects."""
    first = (INDEX, index(("a", list(shape), "F32", tag, 0, [])))
    return build([first, *((SHARED, o) for o in objects), (UNIT, data)])


def _bad_objects() -> Iterator[tuple[str, bytes]]:
    words = np.array([1.0, 2.0, 3.0], "<f2").tobytes()
    good = b"\x01\x01\x00\x03" + words
    section = b"\x01\x02\x03\x00" + struct.pack("<e", 0.5) + b"\x00\x24"
    assert _file([good], section)

    def file(*objects):
        return _file(objects, section)

    yield "shared_unused", file(good, good)
    yield "shared_missing", file()
    yield "shared_empty", file(b"")
    yield "shared_unknown", file(b"\x05" + good[1:])
    yield "shared_wrong_kind", file(b"\x04\x03" + leb(4000) * 3)
    yield "shared_short", file(b"\x01\x01")
    yield "shared_left_over", file(good + b"\x00")
    yield "shared_truncated", file(good[:-1])
    yield "shared_form", file(b"\x01\x01\x02\x03" + words)
    yield "shared_no_dimension", file(b"\x01\x00\x00\x03")
    yield "shared_wide", file(b"\x01\x11\x00\x01" + bytes(34))
    yield "shared_no_words", file(b"\x01\x01\x00\x00")
    yield "shared_many_words", file(b"\x01\x01\x00" + leb(2**60))
    yield "shared_nan", file(good[:-1] + b"\x7e")
    yield "shared_dimensions", file(b"\x01\x01\x00\x02" + words[:4])
    yield "shared_decoder_bits", file(good, bytes([2, 2, 1, 0, 9]))
    yield "shared_list_limit", file(good, b"\x03" + leb(2**31 + 1) + b"\x00\x01")
    yield "shared_list_huge", file(good, b"\x03" + leb(2**31) + leb(2**30) + b"\x02\x00" + bytes(9))
    yield "shared_list_of_list", file(good, b"\x03\x06\x01\x04\x00")
    yield "shared_table_sum", file(good, b"\x04\x03" + leb(8000) * 3)
    yield "shared_table_empty", file(good, b"\x04\x00")
    yield "shared_table_many", file(good, b"\x04" + leb(4097) + b"\x01" * 9)
    first = index(("a", [1, 3], "F32", 6, 0, []))
    yield "shared_behind_units", build([(INDEX, first), (UNIT, section), (SHARED, good)])
    yield "codebook_shared_scale", _file([good], section[:4] + b"\x00\x7c" + section[6:])
    yield "codebook_shared_cut", _file([good], section[:5])


def _bad_references() -> Iterator[tuple[str, bytes]]:
    words = b"\x01\x01\x00\x03" + np.array([1.0, 2.0, 3.0], "<f2").tobytes()
    half, indices = struct.pack("<e", 0.5), b"\x00\x24"
    own = b"\x01\x00\x03" + words[4:]
    good = b"\x04\x02" + leb(4000) * 2
    yield "shared_table_size", _file([good], own + b"\x80\x00\x00")
    yield "shared_table_missing", _file([], own + b"\x80\x00\x00")
    yield "shared_table_low", _file([good], own + b"\x82\x00" + b"\x00\x00")
    small = bytes([2, 2, 1, 0, 8]) + half + b"\x81\x82" + bytes(6)

    def latents(form, head, objects, tail=indices):
        return _file(objects, bytes([form, 1, 3, 0]) + head + tail, 7)

    yield "latent_shared_no_decoder", latents(8, words[4:] + b"\x02\x01\x00" + half, [small])
    yield "latent_shared_both_words", latents(17, b"\x00" + half, [words])
    yield "latent_shared_form", latents(48, b"\x00" + half, [words])
    yield "latent_shared_words_cut", latents(16, b"\x00", [words], b"")
    yield "latent_shared_decoder_kind", latents(10, words[4:] + b"\x02\x01\x00" + half, [words], b"\x00\x04")
    yield "latent_shared_decoder_size", latents(10, words[4:] + b"\x03\x01\x00" + half, [small], b"\x00\x00")
    yield "latent_shared_decoder_wide", latents(10, words[4:] + b"\x04\x01\x00" + half, [small], b"\x00\x00")
    yield "latent_shared_scale", latents(16, b"\x00\x00\x7e", [words])
    listed = write_list(np.array([1, 2]), 3)

    def layers(part, objects=(listed,)):
        return _file(objects, STACK.encode(constant(1.0), [(32, part)]), 5, (2, 3))

    values = b"\x00\x00" + bytes(8)
    yield "positions_shared_count", layers(b"\x01\x04\x00" + b"\x00\x00" + bytes(4))
    yield "positions_shared_limit", layers(b"\x02\x04\x00" + values, [write_list(np.array([1, 2]), 4)])
    yield "positions_shared_missing", layers(b"\x02\x04\x01" + values)
    yield "positions_shared_kind", layers(b"\x02\x04\x00" + values, [words])
    step = struct.pack("<f", 0.5)
    block = leb(0) * 2 + leb(0)
    yield (
        "lowrank_coded_short",
        _file([], STACK.encode(constant(1.0), [(35, b"\x01\x04\x02" + step + block)]), 5, (2, 3)),
    )
    stream = encode(np.full(5, 8), np.full(5, 4, np.uint8), Tables({4: Table(8, np.array([16383, 1]))}))
    coded = b"\x01\x04\x02" + step + b"\x08\x01" + leb(16383) + leb(len(stream)) + stream
    yield "lowrank_coded_end", _file([], STACK.encode(constant(1.0), [(35, coded + b"\x00")]), 5, (2, 3))


def invalid() -> Iterator[tuple[str, bytes]]:
    """Broken files; every reader must call them corrupt."""
    yield from _bad_objects()
    yield from _bad_references()
