"""Store objects once that several units of a file refer to by number (docs/format.md, 5.3).

Four kinds: a `codebook` (`format/coders/codebook.py`, `latent.py`), a `decoder` of latents, a `list` of positions
(layers over one residual stream), a `table` of indices. Each is a section of its own, so each has its checksum and its
owner in the ledger. A section that refers to an object repeats its dimensions, and both must agree: its ledger needs no
other section, and a wrong number is noticed. Sections of a file may still be decoded in any order.

>>> load_objects([write_list(np.array([1, 4]), 6)]).get(0, "list")[1].tolist()
[1, 4]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format.coders import FloatArray, Objects, leb, read_frequencies, read_leb
from bytecap.format.coders.codebook import MAX_DIMENSION
from bytecap.format.coders.latent import Decoder, read_decoder, write_decoder
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.overlays.channels import CODER as CHANNELS
from bytecap.format.overlays.channels import places
from bytecap.format.overlays.columns import CODER as COLUMNS
from bytecap.format.overlays.outliers import CODER as OUTLIERS
from bytecap.format.overlays.rows import CODER as ROWS
from bytecap.format.wire.indices import MAX_CODEWORDS, MAX_TABLE, numbers_size, read_numbers, write_numbers
from bytecap.format.wire.positions import LISTED, IntArray, read_positions, refer_positions, write_positions

_NAMES = {1: "codebook", 2: "decoder", 3: "list", 4: "table"}
_KINDS = {"codebook": "side", "decoder": "side", "list": "index", "table": "table"}
_MAX_PLACES = 1 << 31
_MOST = 128  # objects whose number takes a byte
LIST_ENTRY = 7  # bytes of a shared list's section in the directory
REFERENCE = 3  # bytes of a layer's reference to a list of less than 128 positions


def write_codebook(words: FloatArray, *, byte: bool) -> bytes:
    """Write an object of codewords (n, g), as f16 or signed bytes."""
    return bytes([1, words.shape[1], byte]) + leb(len(words)) + write_numbers(words, byte=byte)


def write_shared_decoder(decoder: Decoder, bits: int) -> bytes:
    """Write an object that holds a decoder of latents, at 6 to 8 bits a weight."""
    return b"\x02" + write_decoder(decoder, bits)


def write_list(index: npt.NDArray[np.integer[Any]], size: int) -> bytes:
    """Write an object of rising positions below `size`."""
    return b"\x03" + leb(size) + write_positions(index, size)


def write_table(freq: npt.NDArray[np.int64]) -> bytes:
    """Write an object of frequencies (m + 1,) with sum 2^14; the last one, the escape's, is not stored."""
    return b"\x04" + leb(len(freq) - 1) + b"".join(leb(int(f)) for f in freq[:-1])


def _codebook(data: bytes) -> tuple[FloatArray, int]:
    if len(data) < 3 or data[2] > 1 or not 1 <= data[1] <= MAX_DIMENSION:
        raise CorruptError("a shared codebook has an impossible header")
    g, byte = data[1], data[2] == 1
    n, at = read_leb(data, 3)
    if not 1 <= n <= MAX_CODEWORDS:
        raise CorruptError(f"a shared codebook declares {n} codewords")
    return read_numbers(data[at:], n * g, byte=byte).reshape(n, g), at + numbers_size(n * g, byte=byte)


def _list(data: bytes) -> tuple[tuple[int, IntArray], int]:
    size, at = read_leb(data, 1)
    if size > _MAX_PLACES:
        raise CorruptError(f"a shared list of positions below {size}")
    index, at = read_positions(data, at, size, Objects())
    return (size, index), at


def read_object(data: bytes) -> tuple[str, Any]:
    """Read a shared object's section; returns (kind, value).

    The value is codewords (n, g), a `Decoder`, (limit, positions), or a `Table`.

    Raises:
        CorruptError: unknown kind, impossible dimensions, bytes missing or left over.
    """
    kind = _NAMES.get(data[0] if data else 0)
    value: Any
    if kind == "codebook":
        value, end = _codebook(data)
    elif kind == "decoder":
        value, end = read_decoder(data[1:])
        end += 1
    elif kind == "list":
        value, end = _list(data)
    elif kind == "table":
        size, at = read_leb(data, 1)
        if not 1 <= size <= MAX_TABLE:
            raise CorruptError(f"a shared table declares {size} symbols")
        value, end = read_frequencies(data, at, 0, size, "a shared table")
    else:
        raise CorruptError("a shared object is of an unknown kind")
    if end != len(data):
        raise CorruptError(f"{len(data) - end} bytes are left over behind a shared {kind}")
    return kind, value


def load_objects(sections: Sequence[bytes]) -> Objects:
    """Read all shared objects of a file; an error's message names the object."""
    items = []
    for number, data in enumerate(sections):
        try:
            items.append(read_object(data))
        except CorruptError as exc:
            raise CorruptError(f"shared object {number}: {exc}") from exc
    return Objects(tuple(items))


def describe(data: bytes) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Return (kind, ledger kinds) of a shared object's section."""
    kind, _ = read_object(data)
    return kind, (("header", 1), (_KINDS[kind], len(data) - 1))


# ------------------------------------------------------------------------------------------ lists that layers share


def _place(tag: int, part: bytes, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Return where an overlay's own list begins, and its limit; None for overlays without a list."""
    begin, size = {
        COLUMNS.tag: (0, shape[1]), ROWS.tag: (0, shape[0]), OUTLIERS.tag: (0, shape[0] * shape[1]),
    }.get(tag, (-1, 0))  # fmt: skip
    if tag == CHANNELS.tag:
        begin, size = 1, places(CHANNELS.mode(part), shape)
    if begin < 0 or part[read_leb(part, begin)[1]] == LISTED:
        return None
    return begin, size


def _referring(data: bytes, shape: tuple[int, int], numbers: dict[bytes, int]) -> bytes:
    """Make a stack's overlays refer to the lists in `numbers`, which gives an object's number by its bytes."""
    (base, _, body), *layers = STACK.parts(data)
    found = []
    for tag, _, part in layers:
        place, changed = _place(tag, part, shape), part
        if place is not None:
            made = write_list(read_positions(part, *place, Objects())[0], place[1])
            if made in numbers:
                block, end = refer_positions(part, *place, numbers[made])
                changed = part[: place[0]] + block + part[end:]
        found.append((tag, changed))
    return STACK.encode((base, body), found)


def share_lists(
    stacks: Mapping[str, tuple[tuple[int, int], bytes]], objects: Sequence[bytes] = ()
) -> tuple[dict[str, bytes], tuple[bytes, ...]]:
    """Store lists of positions that several overlays have in common once, where that is smaller.

    Args:
        stacks: (rows, cols) and `stack` section by unit name.
        objects: of the file so far.

    Returns:
        The sections, and the objects with the new ones at their end.
    """
    uses: dict[bytes, int] = {}
    saved: dict[bytes, int] = {}
    for shape, data in stacks.values():
        for tag, _, part in STACK.parts(data)[1:]:
            if (place := _place(tag, part, shape)) is not None:
                index, end = read_positions(part, *place, Objects())
                made = write_list(index, place[1])
                uses[made] = uses.get(made, 0) + 1
                saved[made] = end - place[0] - len(leb(len(index))) - 2
    fresh = [made for made in uses if uses[made] * saved[made] > len(made) + LIST_ENTRY][: _MOST - len(objects)]
    numbers = {made: len(objects) + i for i, made in enumerate(fresh)}
    changed = {n: _referring(data, shape, numbers) for n, (shape, data) in stacks.items()}
    return changed, (*objects, *fresh)
