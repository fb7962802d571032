"""Golden artifacts of the coders codebook, latent and binary."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from bytecap.format.coders import leb
from bytecap.format.coders.binary import CODER as BINARY
from bytecap.format.coders.binary import Binary
from bytecap.format.coders.codebook import CODER as CODEBOOK
from bytecap.format.coders.codebook import Codebook
from bytecap.format.coders.latent import CODER as LATENT
from bytecap.format.coders.latent import Decoder, Latent
from golden_parts import Numbers, one, pack, unit


def book(shape, n, g, seed=1):
    r = Numbers(seed)
    words = (r.around(40, n, g) / 32).astype(np.float32)
    indices = np.minimum(r.below(n, shape[0], -(-shape[1] // g)), r.below(n, shape[0], -(-shape[1] // g)))
    return Codebook(words, indices)


def latent(shape, n=5, d=2, patch=0, rank=0, seed=1, hidden=3):
    r = Numbers(seed)
    e = max(d, patch // 2 // d * d)
    count = shape[0] * (-(-shape[1] // patch) * (e // d) if patch else -(-shape[1] // d))
    decoder = None
    if patch:
        shapes = ((patch, e), (hidden, e), (hidden,), (patch, hidden))
        decoder = Decoder(*((r.around(40, *s) / 64).astype(np.float32) for s in shapes))
    factors = [(r.around(30, k, rank) / 64).astype(np.float32) if rank else None for k in shape]
    return Latent((r.around(40, n, d) / 32).astype(np.float32), r.below(n, count), decoder, *factors)


def signs(shape, levels, form, seed=1, rare=1):
    r = Numbers(seed)
    codes = np.minimum(r.below(levels * rare, *shape), levels - 1)
    means = (r.around(9, (0, 1, shape[0])[form]) / 64).astype(np.float16)
    return Binary(codes, levels, (r.below(200, shape[0]) / 64).astype(np.float16), means, form)


def valid() -> Iterator[tuple[str, bytes]]:
    """Sound files."""
    yield (
        "codebook",
        pack(
            unit("bytes", (12, 20), 6, CODEBOOK.encode(book((12, 20), 16, 2), (12, 20), byte=True), linear=True),
            unit("halves", (12, 21), 6, CODEBOOK.encode(book((12, 21), 11, 4), (12, 21), coded=False)),
            unit("turned", (30, 40), 6, CODEBOOK.encode(book((40, 30), 40, 1), (40, 30)), transposed=True),
            unit("one", (3, 7), 6, CODEBOOK.encode(book((3, 7), 1, 3), (3, 7))),
            unit("none", (0, 7), 6, CODEBOOK.encode(book((0, 0), 2, 1), (0, 0))),
            unit("empty", (7, 0), 6, CODEBOOK.encode(book((7, 0), 2, 1), (7, 0))),
            tables=False,
        ),
    )
    yield (
        "latent",
        pack(
            unit("plain", (9, 11), 7, LATENT.encode(latent((9, 11)), (9, 11))),
            unit("rank", (9, 11), 7, LATENT.encode(latent((9, 11), rank=2), (9, 11), byte_factors=True)),
            unit("patch", (9, 23), 7, LATENT.encode(latent((9, 23), 7, 2, 8, 1), (9, 23), byte_words=True, bits=6)),
            unit("linear", (9, 23), 7, LATENT.encode(latent((9, 23), 7, 1, 6, hidden=0), (9, 23), bits=7)),
            unit("turned", (12, 5), 7, LATENT.encode(latent((5, 12), 3, 4, 12), (5, 12)), transposed=True),
            unit("empty", (0, 6), 7, LATENT.encode(latent((0, 6), 2, 1), (0, 6))),
            tables=False,
        ),
    )
    yield (
        "binary",
        pack(
            *(
                unit(f"b{k}{f}{rare}", (13, 17), 8, BINARY.encode(signs((13, 17), k, f, rare=rare)), linear=True)
                for k in (2, 3)
                for f in (0, 1, 2)
                for rare in (1, 40)
            ),
            unit("empty", (3, 0), 8, BINARY.encode(signs((3, 0), 3, 1))),
            tables=False,
        ),
    )


def invalid() -> Iterator[tuple[str, bytes]]:
    """Broken files; every reader must call them corrupt."""
    words = np.array([1.0, 2.0, 3.0], "<f2").tobytes()

    def codebook(head=b"\x01\x00\x03", body=words, tail=b"\x00\x24", shape=(1, 3)):
        return one(head + body + tail, shape, 6, tables=b"")

    yield "codebook_short", one(b"\x01\x00", (1, 3), 6, tables=b"")
    yield "codebook_no_dimension", codebook(b"\x00\x00\x03")
    yield "codebook_wide", codebook(b"\x04\x00\x01", bytes(8), b"\x00")
    yield "codebook_form", codebook(b"\x01\x02\x03")
    yield "codebook_no_words", codebook(b"\x01\x00\x00", b"", b"\x00")
    yield "codebook_too_many", codebook(b"\x01\x00" + leb(65537))
    yield "codebook_truncated", codebook(b"\x01\x00" + leb(65536))
    yield "codebook_nan", codebook(body=words[:4] + b"\x00\x7e")
    yield "codebook_no_such_word", codebook(tail=b"\x00\x34")
    yield "codebook_spare_bits", codebook(tail=b"\x00\x64")
    yield "codebook_left_over", codebook(tail=b"\x00\x24\x00")
    yield "codebook_no_indices", codebook(tail=b"")
    yield "codebook_mode", codebook(tail=b"\x03\x24")
    yield "codebook_frequencies", codebook(tail=b"\x01" + leb(8000) * 3 + b"\x00")
    yield "codebook_stream_length", codebook(tail=b"\x01" + leb(5000) * 3 + b"\x7f")
    yield "codebook_low_parts", codebook(tail=b"\x02" + leb(5000) * 2 + b"\x00")

    def latents(head=b"\x00\x01\x03\x00", body=words, tail=b"\x00\x24", shape=(1, 3)):
        return one(head + body + tail, shape, 7, tables=b"")

    small = bytes([2, 1, 0, 8]) + (struct.pack("<e", 0.5) + b"\x81\x82") + bytes(6)
    yield "latent_short", one(b"\x00", (1, 3), 7, tables=b"")
    yield "latent_form", latents(b"\x08\x01\x03\x00")
    yield "latent_dimension", latents(b"\x00\x04\x03\x00", words * 4)
    yield "latent_rank", latents(b"\x00\x01\x03\x02", words + bytes(16))
    yield "latent_no_factors", latents(b"\x04\x01\x03\x00")
    yield "latent_factor_cut", latents(b"\x00\x01\x03\x01", words + bytes(6), b"")
    yield "latent_factor_nan", latents(b"\x00\x01\x03\x01", words + bytes(6) + b"\x00\x7e")
    yield "latent_decoder_cut", latents(b"\x02\x01\x03\x00", words + small[:9], b"")
    yield "latent_decoder_wide", latents(b"\x02\x01\x03\x00", words + b"\x04" + small[1:], b"\x00\x00")
    yield "latent_decoder_bits", latents(b"\x02\x01\x03\x00", words + small[:3] + b"\x05" + small[4:], b"\x00\x00")
    yield "latent_decoder_nan", latents(b"\x02\x01\x03\x00", words + small[:4] + b"\x00\x7c" + small[6:], b"\x00\x00")
    yield "latent_decoder_odd", latents(b"\x02\x02\x03\x00", words * 2 + small, b"\x00\x00")
    yield "latent_left_over", latents(tail=b"\x00\x24\x00")

    def binaries(head, tail, shape=(1, 3)):
        return one(head + struct.pack("<e", 0.5) + tail, shape, 8, tables=b"")

    yield "binary_short", one(b"\x02\x00", (1, 3), 8, tables=b"")
    yield "binary_levels", binaries(b"\x04\x00\x00", b"\x05")
    yield "binary_means", binaries(b"\x02\x03\x00", b"\x05")
    yield "binary_packing", binaries(b"\x02\x00\x02", b"\x05")
    yield "binary_spare_bits", binaries(b"\x02\x00\x00", b"\x0d")
    yield "binary_left_over", binaries(b"\x02\x00\x00", b"\x05\x00")
    yield "binary_no_mean", binaries(b"\x02\x01\x00", b"\x05")
    yield "binary_nan", binaries(b"\x02\x01\x00", b"\x00\x7e\x05")
    yield "binary_trits", binaries(b"\x03\x00\x00", b"\xf3")
    yield "binary_spare_trits", binaries(b"\x03\x00\x00", bytes([27]))
    yield "binary_frequencies", binaries(b"\x02\x00\x01", leb(9000) * 2)
