"""Compute dense weights from the tensors that quantized checkpoints store, by the formula of each scheme.

All arithmetic is float32, an operation after the other. Sources of the layouts: DeepSeek-V3 (block scales), the OCP
microscaling formats (E2M1 codes, E8M0 scales), bitsandbytes (code books with blockwise maxima, LLM.int8),
compressed-tensors (packed integers), MLX (affine groups), GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978) as
AutoGPTQ and AutoAWQ pack them. Omitted: layouts that a kernel has shuffled for itself, such as Marlin's.

>>> import torch
>>> block_scaled(torch.ones(3, 2), torch.tensor([[2.0], [4.0]]), (2, 2)).tolist()
[[2.0, 2.0], [2.0, 2.0], [4.0, 4.0]]
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_WORD = 32
_INT8_TOP = 127.0
GPTQ_BITS = (2, 3, 4, 8)
_AWQ_BITS = 4
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # in a word, of eight outputs that follow one another


class Misfit(ValueError):  # noqa: N818 (a reason, which the caller turns into its error)
    """Why stored tensors do not make up a weight."""


def factors(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of two (E8M0)."""
    if scales.dtype == torch.uint8:
        return (scales.to(torch.float32) - 127.0).exp2()
    return scales.to(torch.float32)


def block_scaled(codes: Tensor, scales: Tensor, block: Sequence[int] | None = None) -> Tensor:
    """Multiply blocks of a matrix, or of a stack of them, by a scale each.

    Args:
        codes: (..., rows, cols) of any dtype.
        scales: (..., block rows, block columns), one for every row, or a single one.
        block: rows and columns of a block, the last of which may be cut off; by default the scales divide the matrix
            evenly.

    Raises:
        Misfit: the scales do not cover the matrix.
    """
    values, scale = codes.to(torch.float32), factors(scales)
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.ndim == values.ndim - 1 and scale.shape == values.shape[:-1]:
        return values * scale[..., None]
    if values.ndim < 2 or scale.ndim != values.ndim or scale.shape[:-2] != values.shape[:-2]:
        raise Misfit(f"scales of shape {list(scale.shape)} for a weight of {list(values.shape)}")
    for axis in (-2, -1):
        size, count = values.shape[axis], scale.shape[axis]
        side = block[axis] if block else 0
        if not side or -(-size // side) != count:
            if not count or size % count:
                raise Misfit(f"scales of shape {list(scale.shape)} for a weight of {list(values.shape)}")
            side = size // count
        scale = scale.repeat_interleave(min(side, size), axis).narrow(axis, 0, size)
    return values * scale


def nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """The two codes of every byte, along the last axis."""
    low, high = (packed.view(torch.uint8) & 15).to(torch.int64), (packed.view(torch.uint8) >> 4).to(torch.int64)
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def e2m1(packed: Tensor) -> Tensor:
    """Values of four-bit floats, two in a byte."""
    return torch.tensor(_E2M1)[nibbles(packed)]


def experts(blocks: Tensor, scales: Tensor) -> Tensor:
    """A stack of matrices from MXFP4 blocks.

    Args:
        blocks: (experts, rows, groups, bytes), as checkpoints of gpt-oss store them.
        scales: (experts, rows, groups), exponents of two.

    Returns:
        (experts, columns, rows), which is how the model reads them.

    Raises:
        Misfit: the shapes do not belong together.
    """
    if blocks.ndim != 4 or blocks.shape[:-1] != scales.shape:
        raise Misfit(f"scales of shape {list(scales.shape)} for blocks of {list(blocks.shape)}")
    stacked = torch.empty(blocks.shape[0], blocks.shape[2] * blocks.shape[3] * 2, blocks.shape[1])
    for matrix, packed, exponents in zip(stacked, blocks, scales, strict=True):  # one at a time: they may be many
        values = torch.ldexp(e2m1(packed), exponents.to(torch.int32)[..., None] - 127)
        matrix.copy_(values.flatten(-2).T)
    return stacked


def global_scaled(packed: Tensor, scales: Tensor, whole: Tensor | None) -> Tensor:
    """Four-bit floats with a scale for every group, whose own scale divides them (NVFP4; MXFP4 has none)."""
    scale = factors(scales)
    if whole is not None:
        scale = scale / whole.to(torch.float32).reshape(())
    return block_scaled(e2m1(packed), scale)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes that lie one after the other in the words of each row, the lowest bits first; signed, around their middle.

    Args:
        words: (rows, words), int32.
        bits: of a code, 1 to 8; a code may begin in one word and end in the next.
        count: of codes in a row.

    Raises:
        Misfit: there are more or fewer words than that takes.
    """
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != -(-count * bits // _WORD):
        raise Misfit(f"words of shape {list(words.shape)} for {count} codes of {bits} bits in a row")
    return fields(words, bits)[:, :count] - (1 << (bits - 1))


def fields(words: Tensor, bits: int) -> Tensor:
    """All codes in the words of each row, the lowest bits first; a code may begin in one word and end in the next.

    Args:
        words: (rows, words), int32.
        bits: of a code.

    Returns:
        (rows, words * 32 // bits), int32, from 0.
    """
    if _WORD % bits == 0:
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
        return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)
    at = torch.arange(words.shape[-1] * _WORD // bits) * bits
    first, shift = at // _WORD, at % _WORD
    wide = words.to(torch.int64) & ((1 << _WORD) - 1)
    pairs = wide | (torch.nn.functional.pad(wide[..., 1:], (0, 1)) << _WORD)  # each word with the next one above it
    return ((pairs[..., first] >> shift) & ((1 << bits) - 1)).to(torch.int32)


def gptq(words: Tensor, zeros: Tensor, scales: Tensor, order: Tensor | None, group: int | None, off: int) -> Tensor:
    """A matrix as GPTQ checkpoints hold it: `scale * (code - zero)`, with a scale and a zero for a group of inputs.

    Args:
        words: (inputs * bits / 32, outputs), int32; codes of 2, 3, 4 or 8 bits, packed along the inputs.
        zeros: (groups, outputs * bits / 32), int32, packed along the outputs.
        scales: (groups, outputs).
        order: (inputs,), the group of each; None, or zeros alone, where they follow one another.
        group: inputs in a group, the last of which may be smaller; None if the groups divide the inputs evenly.
        off: what is added to stored zeros, 1 in the first version of the format and 0 in the second.

    Returns:
        (outputs, inputs), float32.

    Raises:
        Misfit: the shapes do not belong together.
    """
    if words.ndim != 2 or zeros.ndim != 2 or scales.ndim != 2 or words.shape[1] != scales.shape[1]:
        raise Misfit(f"words of shape {list(words.shape)} with scales of {list(scales.shape)}")
    _check_kinds(zeros, scales)
    groups, outputs = scales.shape
    bits = _WORD * zeros.shape[1] // max(outputs, 1)
    if bits not in GPTQ_BITS or zeros.shape != (groups, outputs * bits // _WORD) or outputs * bits % _WORD:
        raise Misfit(f"zeros of shape {list(zeros.shape)} for scales of {list(scales.shape)}")
    if words.shape[0] * _WORD % bits:
        raise Misfit(f"words of shape {list(words.shape)} for codes of {bits} bits")
    codes = fields(words.T.contiguous(), bits)  # (outputs, inputs)
    member = _groups(codes.shape[1], groups, order, group)
    offsets = fields(zeros, bits).T + off
    return (codes - offsets[:, member]).to(torch.float32) * scales.to(torch.float32).T[:, member]


def _check_kinds(zeros: Tensor, scales: Tensor) -> None:
    if zeros.dtype != torch.int32 or not scales.is_floating_point():
        raise Misfit(f"zeros of {str(zeros.dtype)[6:]} and scales of {str(scales.dtype)[6:]}")


def _groups(inputs: int, groups: int, order: Tensor | None, group: int | None) -> Tensor:
    """The group of every input.

    Raises:
        Misfit: there are others, or fewer of them.
    """
    if order is not None and (groups == 1 or bool(order.any())):
        whole = order.shape == (inputs,) and not order.is_floating_point()
        if not whole or int(order.min()) < 0 or int(order.max()) >= groups:
            raise Misfit(f"an order of shape {list(order.shape)} for {inputs} inputs in {groups} groups")
        return order.to(torch.int64)
    side = group or (inputs // groups if groups and inputs % groups == 0 else 0)
    if side < 1 or -(-inputs // side) != groups:
        raise Misfit(f"{groups} groups for {inputs} inputs" + (f", {group} in each" if group else ""))
    return torch.arange(inputs) // side


def awq(words: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """A matrix as AWQ checkpoints of the version `gemm` hold it: `scale * (code - zero)` for groups of inputs.

    Args:
        words: (inputs, outputs / 8), int32; eight codes of 4 bits in a word, even outputs before odd ones.
        zeros: (groups, outputs / 8), int32, likewise.
        scales: (groups, outputs).

    Returns:
        (outputs, inputs), float32.

    Raises:
        Misfit: the shapes do not belong together.
    """
    fit = words.ndim == zeros.ndim == scales.ndim == 2 and words.shape[1] == zeros.shape[1]
    if not fit or zeros.shape[0] != scales.shape[0] or scales.shape[1] != words.shape[1] * len(_AWQ_PLACES):
        raise Misfit(f"words of shape {list(words.shape)} with scales of {list(scales.shape)}")
    _check_kinds(zeros, scales)
    member = _groups(words.shape[0], scales.shape[0], None, None)
    codes, offsets = _in_order(words), _in_order(zeros)
    value: Tensor = (codes - offsets[member]).to(torch.float32) * scales.to(torch.float32)[member]
    return value.T.contiguous()


def _in_order(words: Tensor) -> Tensor:
    """The codes in words of AWQ, output after output."""
    return fields(words, _AWQ_BITS).reshape(len(words), -1, len(_AWQ_PLACES))[..., _AWQ_PLACES].flatten(-2)


def packed_integers(
    words: Tensor,
    scales: Tensor,
    shape: Tensor,
    zeros: Tensor | None,
    widths: Sequence[int],
    order: Tensor | None = None,
) -> Tensor:
    """A matrix of packed integers with a scale for every group of columns, and perhaps a zero point.

    Args:
        words: (rows, words), codes packed along the columns without gaps.
        scales: (rows, groups).
        shape: of the matrix, two numbers.
        zeros: (packed rows, groups), packed along the rows.
        widths: bits that a code may have, one of which fits.
        order: (columns,), the group of each; None where they follow one another.

    Raises:
        Misfit: the shapes do not belong together.
    """
    rows, cols = (int(n) for n in shape.reshape(-1)) if shape.numel() == 2 else (-1, -1)
    fitting = [b for b in widths if words.ndim == 2 and words.shape[1] == -(-cols * b // _WORD)]
    if rows < 1 or cols < 1 or words.shape[0] != rows or len(fitting) != 1:
        raise Misfit(f"words of shape {list(words.shape)} for a weight of {[rows, cols]} at {list(widths)} bits")
    bits = fitting[0]
    if _WORD % bits and words.shape[1] == -(-cols // (_WORD // bits)):  # early versions left a gap in every word
        raise Misfit(f"{cols} codes of {bits} bits take as many words with gaps as without")
    if zeros is not None and zeros.ndim != 2:
        raise Misfit(f"zeros of shape {list(zeros.shape)} for a weight of {[rows, cols]}")
    values = unpack_words(words, bits, cols)
    offsets = None if zeros is None else unpack_words(zeros.T.contiguous(), bits, rows).T
    return integers(values, scales, offsets, order)


def integers(codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None = None) -> Tensor:
    """Plain codes with scales and perhaps zero points of the same shape; `order` as in `packed_integers`."""
    values, member = codes.to(torch.float32), None if order is None else _in_any_order(order, codes, scales)
    if zeros is not None:
        if member is not None and zeros.shape != scales.shape:
            raise Misfit(f"zeros of shape {list(zeros.shape)} for scales of {list(scales.shape)}")
        values = values - _spread(zeros if member is None else zeros[:, member], values.shape)
    return block_scaled(values, scales if member is None else scales[:, member])


def _in_any_order(order: Tensor, codes: Tensor, scales: Tensor) -> Tensor | None:
    """The group of every column where columns were grouped by activations (compressed-tensors' `actorder: group`).

    An order that was never set is -1, and means columns that follow one another: None.

    Raises:
        Misfit: it names other groups than there are scales for, or groups of several sizes.
    """
    if order.is_floating_point() or codes.ndim != 2 or order.shape != codes.shape[1:]:
        raise Misfit(f"g_idx of shape {list(order.shape)} for a weight of {list(codes.shape)}")
    if bool((order == -1).all()):
        return None
    if scales.shape[:-1] != codes.shape[:1] or scales.ndim != 2:
        raise Misfit(f"scales of shape {list(scales.shape)} with g_idx for a weight of {list(codes.shape)}")
    found, counts = order.to(torch.int64).unique(return_counts=True)
    if not found.equal(torch.arange(scales.shape[1])) or int(counts.min()) != int(counts.max()):
        raise Misfit(f"g_idx does not divide {codes.shape[1]} columns evenly into {scales.shape[1]} groups")
    return order.to(torch.int64)


def _spread(offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """Zero points, one for every weight."""
    return block_scaled(torch.ones(tuple(shape)), offsets.to(torch.float32))


def affine(words: Tensor, scales: Tensor, biases: Tensor, group: int, bits: int) -> Tensor:
    """A matrix as MLX packs it: `scale * code + bias`, with a scale and a bias for every group of columns.

    Args:
        words: (rows, words), uint32, codes packed along the columns without gaps.
        scales: (rows, groups).
        biases: (rows, groups).
        group: columns in a group.
        bits: of a code.

    Raises:
        Misfit: the shapes do not belong together.
    """
    fit = words.ndim == scales.ndim == 2 and biases.shape == scales.shape and len(words) == len(scales)
    if not fit or words.shape[1] * _WORD != scales.shape[1] * group * bits or not scales.is_floating_point():
        shapes = ", ".join(f"{list(t.shape)}" for t in (words, scales, biases))
        raise Misfit(f"words, scales and biases of shape {shapes} for {bits} bits in groups of {group}")
    codes = fields(words.view(torch.int32), bits).to(torch.float32)
    scale, bias = (t.to(torch.float32).repeat_interleave(group, 1) for t in (scales, biases))
    return codes * scale + bias


def rows_of_int8(codes: Tensor, maxima: Tensor) -> Tensor:
    """LLM.int8: rows with the largest magnitude of each."""
    return block_scaled(codes, maxima.reshape(-1) / _INT8_TOP)


def code_book(
    packed: Tensor, maxima: Tensor, book: Tensor, state: Mapping[str, Any], inner: Sequence[Tensor]
) -> Tensor:
    """bitsandbytes: indices of four bits into a code book, times the largest magnitude of each block.

    Args:
        packed: two indices in a byte, the first one high.
        maxima: of the blocks; bytes are indices into a code book of their own (`inner`).
        book: 16 values.
        state: shape, block size and the inner book's, as the checkpoint says them.
        inner: maxima and book of the maxima; empty where these are floats.

    Raises:
        Misfit: sizes do not belong together.
    """
    shape, block = [int(n) for n in state["shape"]], int(state["blocksize"])
    count = math.prod(shape)
    if book.numel() != 16 or min(shape, default=0) < 1 or block < 1 or packed.numel() != -(-count // 2):
        raise Misfit(f"{packed.numel()} bytes and a book of {book.numel()} values for a weight of {shape}")
    if inner:
        tops, inner_book = inner
        size = int(state["nested_blocksize"])
        if inner_book.numel() != 256 or size < 1 or tops.numel() != -(-maxima.numel() // size):
            raise Misfit(f"{tops.numel()} inner maxima for {maxima.numel()} blocks")
        indices = maxima.view(torch.uint8).to(torch.int64).reshape(-1)
        maxima = inner_book.float().reshape(-1)[indices] * _each(tops, size, indices.numel())
        maxima = maxima + float(state["nested_offset"])
    if maxima.numel() != -(-count // block):
        raise Misfit(f"{maxima.numel()} maxima for {count} weights in blocks of {block}")
    values = book.float().reshape(-1)[nibbles(packed.reshape(-1), high_first=True)[:count]]
    return (values * _each(maxima, block, count)).reshape(shape)


def _each(values: Tensor, times: int, count: int) -> Tensor:
    return values.float().reshape(-1).repeat_interleave(min(times, count))[:count]


def parse_state(content: Tensor) -> dict[str, Any]:
    """The JSON object that bitsandbytes stores as a tensor of bytes.

    Raises:
        Misfit: it is none, or lacks what a weight needs.
    """
    try:
        state = json.loads(bytes(content.to(torch.uint8).reshape(-1).tolist()))
        [int(n) for n in state["shape"]]
        int(state["blocksize"])
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise Misfit("its quant_state is not what bitsandbytes writes") from exc
    return dict(state)
