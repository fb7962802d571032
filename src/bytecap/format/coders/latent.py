"""`latent` stores codewords that a small decoder turns into weights, plus a low-rank part.

    W = D(latent) + L1 L2^T

A row is cut into patches of `g` weights, and a patch's latent has `e <= g` numbers: `e / d` codewords of `d`. The
decoder is the same for all patches of the tensor: a linear map, and one hidden layer of `h` rectified units beside it.
Without decoder a latent *is* its patch (`g = e = d`), which is plain vector quantization. Codewords and decoder may be
the tensor's own or shared by many tensors (`format/wire/shared_objects.py`), whose scales then are the tensor's own.

Section (format.md, 6.17): form u8 | d u8 | LEB128 n | LEB128 rank | codewords | decoder | L1 | L2 | indices.
Source: ReALLM (arXiv:2405.13155). Its decoder is a deep convolutional one; here it is small, since its bytes count.
Arithmetic is written out operation by operation, so that two readers agree in every bit. Omitted: training
(`methods/baselines/reallm.py`, `methods/baselines/shared_codewords.py`).

>>> plain = Latent(np.array([[0.5], [-1.0]], np.float32), np.array([0, 1, 1]))
>>> section = CODER.encode(plain, (1, 3))
>>> from bytecap.format.coders import run
>>> run([CODER.decode(section, (1, 3), "F32", Shared())])[0].tolist()
[[0.5, -1.0, -1.0]]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bytecap.errors import CorruptError
from bytecap.format.coders import Continuous, Decoding, FloatArray, Shared, leb, like, read_leb, run
from bytecap.format.coders.codebook import MAX_DIMENSION, shared_words, vectors_in
from bytecap.format.entropy.frequencies import IntArray
from bytecap.format.wire.bits import pack_bits, packed_size, unpack_bits
from bytecap.format.wire.indices import (
    MAX_CODEWORDS,
    SharedTable,
    by_use,
    index_kinds,
    numbers_size,
    read_indices,
    read_numbers,
    write_indices,
    write_numbers,
)

MAX_PATCH = 64
_ARRAYS = ("skip", "inner", "bias", "outer")  # of a decoder, in file order
_CHUNK = 1 << 14  # patches decoded at a time, which bounds the memory of the hidden layer
_BYTE_WORDS, _DECODER, _BYTE_FACTORS, _SHARED_DECODER, _SHARED_WORDS = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class Decoder:
    """A decoder of patches, `w = S z + B max(0, A z + a)`.

    Attributes:
        skip: S, float32 (g, e).
        inner: A, float32 (h, e).
        bias: a, float32 (h,).
        outer: B, float32 (g, h).
    """

    skip: FloatArray
    inner: FloatArray
    bias: FloatArray
    outer: FloatArray

    def arrays(self) -> tuple[FloatArray, ...]:
        """The arrays in file order."""
        return self.skip, self.inner, self.bias, self.outer

    def stored(self, bits: int) -> Decoder:
        """The decoder as a file returns it that stores it at `bits` bits a weight."""
        return read_decoder(write_decoder(self, bits))[0]


@dataclass(frozen=True)
class Link:
    """A shared object that takes the place of a matrix's own codewords or decoder.

    Attributes:
        number: of the object.
        scale: that its values, or the patches it gives, are multiplied by; stored as f16.
    """

    number: int
    scale: float

    def stored(self) -> bytes:
        """Serialise the object's number (LEB128) and scale (f16)."""
        return leb(self.number) + np.array([self.scale], "<f2").tobytes()


@dataclass(frozen=True)
class Latent:
    """A matrix (rows, cols) as stored.

    Attributes:
        words: float32 (n, d).
        indices: (rows * patches * e / d,), in the order of rows, patches and codewords.
        decoder: None for plain vector quantization.
        left, right: float32 (rows, rank) and (cols, rank), or None for rank 0.
    """

    words: FloatArray
    indices: IntArray
    decoder: Decoder | None = None
    left: FloatArray | None = None
    right: FloatArray | None = None


def add_low_rank(base: FloatArray, left: FloatArray, right: FloatArray) -> FloatArray:
    """Add one outer product after the other to `base` (rows, cols), in the format's arithmetic and perhaps in place."""
    for k in range(left.shape[1]):
        base += left[:, k, None] * right[None, :, k]
    return base


def decode_patches(decoder: Decoder, z: FloatArray) -> FloatArray:
    """Decode latents (patches, e) to weights (patches, g), one multiplication and one addition at a time."""
    out = np.empty((len(z), len(decoder.skip)), np.float32)
    for start in range(0, len(z), _CHUNK):
        part = z[start : start + _CHUNK]
        w = np.zeros((len(part), len(decoder.skip)), np.float32)
        for k in range(part.shape[1]):
            w += part[:, k, None] * decoder.skip[None, :, k]
        t = np.repeat(decoder.bias[None], len(part), axis=0)
        for k in range(part.shape[1]):
            t += part[:, k, None] * decoder.inner[None, :, k]
        t = np.maximum(t, np.float32(0))
        for j in range(t.shape[1]):
            w += t[:, j, None] * decoder.outer[None, :, j]
        out[start : start + _CHUNK] = w
    return out


def _write_weights(values: FloatArray, bits: int) -> bytes:
    top = 2 ** (bits - 1) - 1
    scale = np.float16(np.abs(values).max(initial=0) / top)
    codes = np.rint(values / np.float32(scale)) if scale > 0 else np.zeros(values.shape)
    return np.array([scale], "<f2").tobytes() + pack_bits(np.clip(codes, -top, top).astype(np.int64) + top + 1, bits)


def _read_weights(data: bytes, shape: tuple[int, ...], bits: int) -> FloatArray:
    codes = unpack_bits(data[2:], int(np.prod(shape)), bits) - 2 ** (bits - 1)
    scale = np.frombuffer(data, "<f2", 1).astype(np.float32)
    if not np.isfinite(scale).all():
        raise CorruptError("a latent section holds a decoder that is not finite")
    values: FloatArray = (codes.astype(np.float32) * scale).reshape(shape)
    return values


def write_decoder(decoder: Decoder, bits: int) -> bytes:
    """Serialise a decoder at 6 to 8 bits a weight."""
    (g, e), h = decoder.skip.shape, len(decoder.bias)
    return bytes([g, e, h, bits]) + b"".join(_write_weights(a, bits) for a in decoder.arrays())


def decoder_bytes(g: int, e: int, h: int, bits: int) -> int:
    """Return the number of bytes that `write_decoder` returns."""
    return 4 + sum(2 + packed_size(n, bits) for n in (g * e, h * e, h, g * h))


def read_decoder(data: bytes) -> tuple[Decoder, int]:
    """Read a decoder from the front of `data`; returns (decoder, bytes used)."""
    if len(data) < 4:
        raise CorruptError("a latent section ends in front of its decoder")
    g, e, h, bits = data[:4]
    if not (1 <= e <= g <= MAX_PATCH and h <= MAX_PATCH and 6 <= bits <= 8):
        raise CorruptError(f"a decoder declares {e} numbers, {h} units and {g} weights of {bits} bits")
    if decoder_bytes(g, e, h, bits) > len(data):
        raise CorruptError(f"a decoder of {decoder_bytes(g, e, h, bits)} bytes is cut off")
    arrays, at = [], 4
    for shape in ((g, e), (h, e), (h,), (g, h)):
        end = at + 2 + packed_size(int(np.prod(shape)), bits)
        arrays.append(_read_weights(data[at:end], shape, bits))
        at = end
    return Decoder(*arrays), at


@dataclass(frozen=True)
class _Parsed:
    form: int
    n: int
    d: int
    g: int
    e: int
    rank: int
    ends: tuple[int, int, int, int]  # of header, codewords, decoder and factors
    links: tuple[int, int]  # numbers of shared codewords and decoder, -1 for none

    def count(self, shape: tuple[int, int]) -> int:
        """The number of indices."""
        return vectors_in(shape, self.g) * (self.e // self.d)


class LatentCoder:
    """Reader and writer of `latent` sections."""

    id: ClassVar[str] = "latent"
    tag: ClassVar[int] = 7

    def encode(
        self,
        matrix: Latent,
        shape: tuple[int, int],
        *,
        byte_words: bool = False,
        byte_factors: bool = False,
        bits: int = 8,
        coded: bool = True,
        words: Link | None = None,
        decoder: Link | None = None,
        table: SharedTable | None = None,
    ) -> bytes:
        """Encode a section.

        Args:
            matrix: what to store; codewords of its own are written by falling use.
            shape: (rows, cols).
            byte_words: store codewords as signed bytes.
            byte_factors: store the low-rank part as signed bytes.
            bits: of a decoder's weight, 6 to 8.
            coded: allow entropy-coded indices.
            words: shared codewords, which are `matrix.words` before their scale; indices are theirs.
            decoder: shared decoder, which is `matrix.decoder` before its scale.
            table: shared one for the indices.
        """
        n, d = matrix.words.shape
        rank = matrix.left.shape[1] if matrix.left is not None else 0
        if n > MAX_CODEWORDS or d > min(MAX_DIMENSION, max(1, shape[1])) or rank > min(shape):
            raise ValueError(f"{n} codewords of {d} dimensions and rank {rank} cannot code {shape}")
        form = _BYTE_WORDS * byte_words | _DECODER * (matrix.decoder is not None) | _BYTE_FACTORS * byte_factors
        form |= _SHARED_DECODER * (decoder is not None) | _SHARED_WORDS * (words is not None)
        out, indices = bytes([form, d]) + leb(n) + leb(rank), matrix.indices
        if words is not None:
            out += words.stored()
        else:
            order, indices = by_use(matrix.indices, n)
            out += write_numbers(matrix.words[order], byte=byte_words)
        if matrix.decoder is not None:
            own = write_decoder(matrix.decoder, bits)
            out += own if decoder is None else own[:2] + decoder.stored()
        if matrix.left is not None and matrix.right is not None and rank:
            out += b"".join(write_numbers(f.T, byte=byte_factors) for f in (matrix.left, matrix.right))
        return out + write_indices(indices, n, coded=coded, shared=table)

    def with_factors(self, data: bytes, shape: tuple[int, int], left: FloatArray, right: FloatArray) -> bytes:
        """Replace the low-rank part of a section by factors (rows, rank) and (cols, rank) of the same rank."""
        ends = self._parse(data, shape).ends
        new = b"".join(write_numbers(f.T, byte=bool(data[0] & _BYTE_FACTORS)) for f in (left, right))
        return data[: ends[2]] + new + data[ends[3] :]

    def _parse(self, data: bytes, shape: tuple[int, int]) -> _Parsed:
        if len(data) < 2:
            raise CorruptError(f"a latent section of {len(data)} bytes is shorter than its header")
        form, d = data[0], data[1]
        n, at = read_leb(data, 2)
        rank, head = read_leb(data, at)
        wide = max(1, shape[1])
        if form > 31 or not 1 <= d <= min(MAX_DIMENSION, wide) or not 1 <= n <= MAX_CODEWORDS or rank > min(shape):
            raise CorruptError(f"a latent section declares form {form}, {n} codewords of {d}, rank {rank}")
        if form & _BYTE_FACTORS and not rank:
            raise CorruptError("a latent section declares the form of factors it does not have")
        if (form & _SHARED_WORDS and form & _BYTE_WORDS) or (form & _SHARED_DECODER and not form & _DECODER):
            raise CorruptError("a latent section declares the form of codewords or of a decoder it does not have")
        words = decoder = -1
        if form & _SHARED_WORDS:
            words, head = read_leb(data, head)
        at = head + (2 if form & _SHARED_WORDS else numbers_size(n * d, byte=bool(form & _BYTE_WORDS)))
        end, g, e = at, d, d
        if form & _DECODER:
            if at + 4 > len(data):
                raise CorruptError("a latent section ends in front of its decoder")
            g, e = data[at], data[at + 1]
            if form & _SHARED_DECODER:
                decoder, end = read_leb(data, at + 2)
                end += 2
            else:
                end += decoder_bytes(*data[at : at + 4])
            if not 1 <= g <= wide or not 1 <= e <= g or e % d:
                raise CorruptError(f"a latent section has patches of {g} weights and {e} numbers, codewords of {d}")
        stop = end + sum(numbers_size(k * rank, byte=bool(form & _BYTE_FACTORS)) for k in shape if rank)
        if stop > len(data):
            raise CorruptError(f"a latent section of {len(data)} bytes should have {stop} in front of its indices")
        return _Parsed(form, n, d, g, e, rank, (head, at, end, stop), (words, decoder))

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Header; codewords, decoder and low-rank part as side information; then indices."""
        del dtype
        p = self._parse(data, shape)
        head, *_, stop = p.ends
        return (("header", head), ("side", stop - head), *index_kinds(data[stop:], p.count(shape), p.n))

    def _words(self, data: bytes, p: _Parsed, shared: Shared) -> tuple[FloatArray, FloatArray | None]:
        """Read the codewords, and the scale of shared ones."""
        part = data[p.ends[0] : p.ends[1]]
        if p.form & _SHARED_WORDS:
            return shared_words(shared, p.links[0], p.n, p.d), read_numbers(part, 1, byte=False)
        return read_numbers(part, p.n * p.d, byte=bool(p.form & _BYTE_WORDS)).reshape(p.n, p.d), None

    def _decoder(self, data: bytes, p: _Parsed, shared: Shared) -> tuple[Decoder | None, FloatArray | None]:
        """Read the decoder, and the scale of a shared one."""
        if not p.form & _SHARED_DECODER:
            return (read_decoder(data[p.ends[1] : p.ends[2]])[0] if p.form & _DECODER else None), None
        found: Decoder = shared.objects.get(p.links[1], "decoder")
        if found.skip.shape != (p.g, p.e):
            raise CorruptError(f"the shared decoder {p.links[1]} makes {found.skip.shape}, not ({p.g}, {p.e})")
        return found, read_numbers(data[p.ends[2] - 2 : p.ends[2]], 1, byte=False)

    def _factors(self, data: bytes, p: _Parsed, shape: tuple[int, int]) -> list[FloatArray]:
        byte, at, found = bool(p.form & _BYTE_FACTORS), p.ends[2], []
        for size in shape if p.rank else ():
            found.append(read_numbers(data[at:], size * p.rank, byte=byte).reshape(p.rank, size).T)
            at += numbers_size(size * p.rank, byte=byte)
        return found

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Decode to float32 (rows, cols)."""
        del dtype
        p = self._parse(data, shape)
        words, words_scale = self._words(data, p, shared)
        decoder, scale = self._decoder(data, p, shared)
        factors = self._factors(data, p, shape)
        indices = yield from read_indices(data[p.ends[3] :], p.count(shape), p.n, shared.objects)
        z = words.take(indices, axis=0).reshape(-1, p.e)
        if words_scale is not None:
            z *= words_scale
        wide = z if decoder is None else decode_patches(decoder, z)
        if scale is not None:
            wide *= scale
        values = np.ascontiguousarray(wide.reshape(shape[0], -(-shape[1] // p.g) * p.g)[:, : shape[1]])
        # finite without being asked: no codeword exceeds 127 x 65504, no patch 64 weights of 128 x 65504, twice
        return add_low_rank(values, *factors) if factors else values

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return the section's own codewords, decoder and low-rank part, and the scales of shared ones."""
        p = self._parse(data, shape)
        indices = run([read_indices(data[p.ends[3] :], p.count(shape), p.n, shared.objects)])[0].reshape(-1)
        words, words_scale = self._words(data, p, shared)
        decoder, decoder_scale = self._decoder(data, p, shared)
        arrays = {"words": words} if words_scale is None else {"words scale": words_scale}
        if decoder is not None:
            own = dict(zip(_ARRAYS, decoder.arrays(), strict=True))
            arrays |= own if decoder_scale is None else {"decoder scale": decoder_scale}
        arrays |= dict(zip(("left", "right"), self._factors(data, p, shape), strict=False))

        def matrix(a: Mapping[str, Any], _: Any) -> Any:
            kind = next(iter(a.values()))
            z = a["words"] if words_scale is None else like(kind, words) * a["words scale"]
            z = wide = z[indices].reshape(-1, p.e)
            if decoder is not None:
                skip, inner, bias, outer = (a[k] if k in a else like(kind, own[k]) for k in _ARRAYS)
                wide = z @ skip.T + (z @ inner.T + bias).clip(min=0) @ outer.T
                wide = wide if decoder_scale is None else wide * a["decoder scale"]
            values = wide.reshape(shape[0], -1)[:, : shape[1]]
            return values + a["left"] @ a["right"].T if "left" in a else values

        return Continuous(arrays, matrix, lambda a: self._with_arrays(data, p, a))

    def _with_arrays(self, data: bytes, p: _Parsed, arrays: Mapping[str, FloatArray]) -> bytes:
        """Replace the continuous arrays of a section; its length stays."""
        head, at, end, stop = p.ends
        if "words" in arrays:
            first = write_numbers(arrays["words"], byte=bool(p.form & _BYTE_WORDS))
        else:
            first = arrays["words scale"].astype("<f2").tobytes()
        second = data[at:end]
        if "skip" in arrays:
            second = write_decoder(Decoder(*(arrays[k] for k in _ARRAYS)), data[at + 3])
        elif "decoder scale" in arrays:
            second = data[at : end - 2] + arrays["decoder scale"].astype("<f2").tobytes()
        factors = [arrays[k].T for k in ("left", "right") if k in arrays]
        third = b"".join(write_numbers(f, byte=bool(p.form & _BYTE_FACTORS)) for f in factors)
        return data[:head] + first + second + third + data[stop:]


CODER = LatentCoder()
