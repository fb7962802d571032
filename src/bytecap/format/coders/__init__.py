"""Find the coders, one file each, by their tags on disk.

A coder turns a tensor into the bytes of one section and back. To add one, put a file here that defines a class
with the members of `Coder` and a module-level `CODER` instance; the reader, the conformance tests, the ledger
and the command line find it (CONTRIBUTING.md walks through it).

Decoding is written as a *generator*: a coder yields the entropy-coded streams it needs decoded and is sent the
symbols, so that the reader can advance the streams of all units of a file together. No coder imports torch
when it decodes.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format import overlays
from bytecap.format.coders.direct import Direct, Model
from bytecap.format.entropy.frequencies import TOTAL, Table, Tables
from bytecap.format.entropy.rans import Stream, decode
from bytecap.types import Bytes

FloatArray = npt.NDArray[np.float32]
Decoding = Generator[list[Stream] | Direct, Any, npt.NDArray[Any]]
"""A coder yields streams, for which it is sent their symbols, or a `Direct`, for which values or None."""


@dataclass(frozen=True)
class Objects:
    """Shared objects that sections refer to by number; see `format/wire/shared_objects.py`.

    Attributes:
        items: (kind, value) in file order.
        used: numbers that were referred to.
    """

    items: tuple[tuple[str, Any], ...] = ()
    used: set[int] = field(default_factory=set)

    def get(self, number: int, kind: str) -> Any:
        """Return the object of a number.

        Raises:
            CorruptError: there is none, or it is of another kind.
        """
        if number >= len(self.items):
            raise CorruptError(f"a section refers to the shared object {number}, the file has {len(self.items)}")
        found, value = self.items[number]
        if found != kind:
            raise CorruptError(f"a section takes the shared object {number} for a {kind}, it is a {found}")
        self.used.add(number)
        return value

    def check_used(self) -> None:
        """Refuse a file whose units, all of them decoded, leave an object unused."""
        spare = set(range(len(self.items))) - self.used
        if spare:
            raise CorruptError(f"no unit uses the shared object {min(spare)}")


@dataclass(frozen=True)
class Shared:
    """The data that all units of a file share: tables, offsets and objects.

    Attributes:
        tables: frequency tables by class.
        offset: reconstruction offsets (64, 17) in steps, see `bytecap.quantization`.
        objects: shared objects.
        below: (rows, cols), values that the unit has in the base of an update; None where there is no base.
    """

    tables: Tables = field(default_factory=lambda: Tables({}))
    offset: FloatArray = field(default_factory=lambda: np.zeros((64, 17), np.float32))
    objects: Objects = field(default_factory=Objects)
    below: npt.NDArray[Any] | None = None

    @property
    def model(self) -> Model:
        """Tables and offsets as machine code takes them, made once for the tables."""
        return self._model(dependent=True)

    @property
    def independent(self) -> Model:
        """The model of matrices without dependent columns, for which no table is split."""
        return self._model(dependent=False)

    def wide(self, *, dependent: bool) -> Model:
        """Return the model, or the one without dependent columns, for tables of any size."""
        return self._model(dependent=dependent, wide=True)

    def _model(self, *, dependent: bool, wide: bool = False) -> Model:
        key = bytes([dependent, wide]) + self.offset.tobytes()
        return self.tables.kept(key, lambda: Model.of(self.tables, self.offset, dependent=dependent, wide=wide))


@dataclass(frozen=True)
class Encoded:
    """The bytes of one section and their kinds in the ledger.

    Attributes:
        data: the section.
        kinds: (kind, bytes) in file order; the sum is `len(data)`.
    """

    data: bytes
    kinds: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Continuous:
    """Arrays of a section or overlay that may be tuned while the rest of its bytes stay as they are.

    Attributes:
        arrays: stored values by name, float32.
        matrix: values (rows, cols) from arrays like these and, for a layer, from its base. It is written with
            operators that numpy arrays and torch tensors share, so that gradients pass and no coder needs torch.
        encode: the section with arrays like these, at the precision it has; about as long.
    """

    arrays: dict[str, FloatArray]
    matrix: Callable[[Mapping[str, Any], Any], Any]
    encode: Callable[[Mapping[str, FloatArray]], bytes]


class Tunable(Protocol):
    """A coder or overlay that names the continuous values of a section.

    Sections of other coders are not tuned.
    """

    def continuous(self, data: bytes, shape: tuple[int, int], shared: Shared) -> Continuous:
        """Return the arrays of a section that may be tuned."""
        ...


class Coder(Protocol):
    """The interface that every coder offers to the reader."""

    id: ClassVar[str]
    tag: ClassVar[int]

    def decode(self, data: bytes, shape: tuple[int, int], dtype: str, shared: Shared) -> Decoding:
        """Yield streams, be sent their symbols, return the (rows, cols) matrix."""
        ...

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Return the ledger kinds of a section in file order, from its bytes alone."""
        ...


class OverlayCoder(Protocol):
    """An overlay, which changes the matrix that a base coder decoded.

    Its tag is 32 or above; the coder `stack` runs it.
    """

    id: ClassVar[str]
    tag: ClassVar[int]

    def apply(self, data: bytes, base: FloatArray, shared: Shared) -> Decoding:
        """Yield streams, be sent their symbols, return the changed float32 (rows, cols) matrix.

        `base` belongs to the layer, which may change it in place.
        """
        ...

    def kinds(self, data: bytes, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, int], ...]:
        """Return the ledger kinds of the overlay's bytes, in file order."""
        ...


_FIRST_OVERLAY = 32  # tags from here on are layers


@cache
def _found() -> dict[int, Any]:
    """All coders and overlays by on-disk tag."""
    found: dict[int, Any] = {}
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for package in (sys.modules[__name__], overlays) for info in pkgutil.iter_modules(package.__path__)
    ]  # fmt: skip
    for coder in (getattr(module, "CODER", None) for module in modules):
        if coder is not None:
            if coder.tag in found:
                raise RuntimeError(f"coders {coder.id} and {found[coder.tag].id} share the tag {coder.tag}")
            found[coder.tag] = coder
    return found


def registry() -> dict[int, Coder]:
    """Return all coders by on-disk tag."""
    return {tag: c for tag, c in _found().items() if tag < _FIRST_OVERLAY}


def overlay_coders() -> dict[int, OverlayCoder]:
    """Return all overlays by on-disk tag."""
    return {tag: c for tag, c in _found().items() if tag >= _FIRST_OVERLAY}


def coder(tag: int) -> Coder:
    """Return the coder with an on-disk tag.

    Raises:
        CorruptError: no such coder.
    """
    if tag not in _found() or tag >= _FIRST_OVERLAY:
        raise CorruptError(f"the file names coder {tag}, which does not exist")
    found: Coder = _found()[tag]
    return found


def overlay_coder(tag: int) -> OverlayCoder:
    """Return the overlay with an on-disk tag.

    Raises:
        CorruptError: no such layer.
    """
    if tag not in _found() or tag < _FIRST_OVERLAY:
        raise CorruptError(f"the file names layer {tag}, which does not exist")
    found: OverlayCoder = _found()[tag]
    return found


Observer = Callable[[Stream, npt.NDArray[np.int32]], None]


class Counting(Protocol):
    """An observer that does without the symbols of matrices decoded straight to values."""

    def __call__(self, stream: Stream, symbols: npt.NDArray[np.int32]) -> None:
        """See a stream with its symbols."""
        ...

    def counted(self, size: int, bits: float) -> None:
        """Hear of a stream's bytes without those of escapes, and of the ideal code length of its symbols in bits."""
        ...


def run(decodings: Sequence[Decoding], observe: Observer | Counting | None = None) -> list[npt.NDArray[Any]]:
    """Run several coders' generators together, decoding all their pending streams at once.

    Args:
        decodings: what coders' `decode` gave.
        observe: shown every stream with its symbols, or of matrices decoded straight to values what `Counting` says.
    """
    results: list[npt.NDArray[Any]] = [np.zeros(0)] * len(decodings)
    pending: dict[int, list[Stream]] = {}

    def advance(i: int, symbols: list[npt.NDArray[np.int32]] | None) -> None:
        try:
            asked = next(decodings[i]) if symbols is None else decodings[i].send(symbols)
            while not isinstance(asked, list):
                asked = decodings[i].send(_straight(asked, observe))
            pending[i] = asked
        except StopIteration as stop:
            results[i] = stop.value

    for i in range(len(decodings)):
        advance(i, None)
    while pending:
        asked, pending = pending, {}
        streams = [s for group in asked.values() for s in group]
        symbols = decode(streams)
        if observe is not None:
            for stream, z in zip(streams, symbols, strict=True):
                observe(stream, z)
        decoded = iter(symbols)
        for i, group in asked.items():
            advance(i, [next(decoded) for _ in group])
    return results


def _straight(asked: Direct, observe: Observer | Counting | None) -> FloatArray | None:
    """Decode a matrix straight to values, unless it has to be decoded by its symbols."""
    told = getattr(observe, "counted", None)
    if (observe is not None and told is None) or not asked.served():
        return None
    if told is None:
        return asked.values()
    values, size, bits = asked.counted()
    told(size, bits)
    return values


def like(tensor: Any, array: npt.NDArray[Any]) -> Any:
    """Convert a numpy array to the kind and device of `tensor`, which may be a numpy array too."""
    return array if isinstance(tensor, np.ndarray) else tensor.new_tensor(array)


def read_leb(data: Bytes, at: int) -> tuple[int, int]:
    """Read an unsigned LEB128 integer of at most 9 bytes; returns (value, next position)."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 56:
            raise CorruptError("a section ends inside an integer")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7


def read_frequencies(data: bytes, at: int, low: int, size: int, owner: str) -> tuple[Table, int]:
    """Read LEB128 frequencies of the symbols from `low` on; returns (table, next position).

    The escape takes the rest of the sum.
    """
    freq = np.zeros(size + 1, np.int64)
    for i in range(size):
        value, at = read_leb(data, at)
        freq[i] = min(value, TOTAL)  # anything larger is refused below, and must not overflow the sum
    freq[-1] = TOTAL - int(freq.sum())
    if freq.min() < 1:
        raise CorruptError(f"the frequencies of {owner} do not add up to {TOTAL}")
    return Table(low, freq), at


def leb(value: int) -> bytes:
    """Encode an unsigned integer as LEB128.

    >>> leb(300).hex(), read_leb(leb(300), 0)
    ('ac02', (300, 2))
    """
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
