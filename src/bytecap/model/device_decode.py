"""Decode units on a CUDA device, from their coded bytes to tensors of the type that is asked for.

The processor parses sections and decodes their side information; what takes time, streams and paths of matrices, goes
to the device as it is stored, and `bytecap.model.decode_programs` decodes all matrices of a batch side by side. A batch
keeps its bytes on the device and can be decoded again and again.

What the device does not do is decoded on the processor as ever: other coders, stacks, updates, classes with large
tables, matrices whose values might be out of range. So is a matrix that the device finds damaged, which makes the
processor's refusal the only one. triton is imported when a batch is made.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.errors import CorruptError
from bytecap.format import updates
from bytecap.format.coders import Shared, coder
from bytecap.format.coders.direct import NONE, Direct
from bytecap.format.coders.grid import CODER as GRID
from bytecap.format.coders.long_trellis import CODER as LONG_TRELLIS
from bytecap.format.coders.trellis import CODER as TRELLIS
from bytecap.format.container import Contents, UnitSection
from bytecap.format.decoder import Units
from bytecap.format.decoder import decode_each as decode_on_processor
from bytecap.format.entropy import jit, rans
from bytecap.format.entropy.frequencies import TOTAL
from bytecap.model.staging import Parts, sent
from bytecap.sizes import in_groups
from bytecap.system.transfers import to_device
from bytecap.types import Bytes, Unit

_TAGS = (GRID.tag, TRELLIS.tag, LONG_TRELLIS.tag)
_TOGETHER = 2**30  # values of a batch, which take two bytes each while it is decoded
_LARGEST = 2**30  # values of a matrix; the programs count with 32 bits
_LANES = 2048  # of a stream that a program holds in registers; half of it takes twice the time on an H200
_SIZES = {"ROWS": 64, "COLS": 256, "ABOVE": 8}  # of a tile; rows above it whose path bits matter
_ENTRY = 264  # entries of a subset's table in `bytecap.format.coders.direct.Model`
_WAITING = 8  # part of a file's values that the processor's threads may decode before they are taken
_PARSERS = 4  # threads that parse sections: more of them wait for one another
_WARPS = 8  # of a program that decodes a stream

Array = npt.NDArray[Any]


def usable(device: torch.device) -> bool:
    """Return whether programs can be run for a device: a GPU, and triton is installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def decode_each(
    contents: Contents, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Unit, Array]] | Iterator[tuple[Unit, Tensor]]:
    """Yield units and their values in stored layout: tensors on the device where it decodes, else arrays.

    Args:
        contents: of an artifact.
        device: that the values are for.
        dtype: of floating-point tensors; arrays keep float32.

    Raises:
        CorruptError: a section cannot be decoded; the message names the unit.
    """
    if not usable(device):
        waiting = sum(u.unit.parameters for u in contents.units) // _WAITING
        return decode_on_processor(contents, threads=jit.cores(), ahead=waiting)
    return _decode_each(contents, device, dtype)


def _decode_each(contents: Contents, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Unit, Tensor]]:
    decoder = DeviceUnits(contents, device)
    for group in in_groups(decoder.units.sections, lambda s: s.unit.parameters, _TOGETHER):
        found = decoder.batch(group, dict.fromkeys((s.unit.name for s in group), dtype)).decode()
        yield from ((s.unit, found[s.unit.name]) for s in group)
    decoder.units.check_used()


class DeviceUnits:
    """Make batches of an artifact's units.

    Args:
        contents: of the artifact.
        device: that decodes.

    Attributes:
        units: decoder of the processor.
        device: that decodes.
    """

    def __init__(self, contents: Contents, device: torch.device) -> None:
        self.units, self.device = Units(contents), device
        self._alone = len(updates.chain(contents)) == 1
        model = self.units.shared.model
        self.model = (
            torch.from_numpy(model.symbols).to(device), torch.from_numpy(model.entries.view(np.int32)).to(device),
        )  # fmt: skip

    def batch(self, sections: Sequence[UnitSection], dtypes: dict[str, torch.dtype]) -> Batch:
        """Make a batch of sections, whose floating-point values will have these types by unit."""
        with ThreadPoolExecutor(min(_PARSERS, jit.cores())) as pool:
            found = list(pool.map(self._matrix, sections)) if self._alone else [None] * len(sections)
        served = [(s, m) for s, m in zip(sections, found, strict=True) if m is not None]
        return Batch(self, [s for s, m in zip(sections, found, strict=True) if m is None], served, dtypes)

    def _matrix(self, section: UnitSection) -> _Matrix | None:
        """Parse a section and decode its side information; None where the processor has to decode it."""
        if section.tag not in _TAGS or not 0 < section.unit.parameters <= _LARGEST:
            return None
        try:
            direct = _direct(section, self.units.shared)
            groups = direct.groups_of(self.units.shared.model)  # one model serves all matrices here
            if all((g < NONE).all() for g in groups):
                return _Matrix(direct, groups, *rans.split(direct.payload, section.unit.parameters))
        except CorruptError:
            pass
        return None


def on_processor(units: Units, section: UnitSection, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a unit's value on a device, decoded on the processor, floating-point values in a dtype."""
    array = units([section])[0][1]
    found = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return to_device(found, device, dtype if found.is_floating_point() else None)


def _direct(section: UnitSection, shared: Shared) -> Direct:
    """Run a section's reader until it asks for the values of its matrix."""
    reader = coder(section.tag).decode(section.data, section.unit.matrix_shape, section.unit.dtype, shared)
    asked = next(reader)
    while not isinstance(asked, Direct):
        asked = reader.send(rans.decode(asked))
    return asked


@dataclass(frozen=True)
class _Matrix:
    """A matrix to decode: what its reader asks for, groups of its columns, states, words and escapes of its stream."""

    direct: Direct
    groups: list[npt.NDArray[np.uint16]]
    states: npt.NDArray[np.uint32]
    words: npt.NDArray[np.uint16]
    tail: Bytes


class _Packed:
    """Matrices as the programs take them.

    Attributes:
        matrices: weights, lanes, steps and words of each, and where its words, states and weights begin.
        runs: of each run of rows its matrix, first row and the one behind the last, rows and columns of the matrix,
            dependent columns, and where these begin: path in bits, groups, columns, rows, weights; the masks of
            the trellis, whether the unit is transposed, where escapes begin and how many there may be.
        tiles: run, first row and first column of each.
        weights, escapes: in all.
    """

    def __init__(self) -> None:
        self.matrices: list[list[int]] = []
        self.runs: list[list[int]] = []
        self.tiles = Parts(np.int32)
        self.weights = self.escapes = 0
        self.words, self.states, self.path = Parts(np.int16), Parts(np.int32), Parts(np.uint8)
        self.rank, self.groups, self.kinds = Parts(np.int32), Parts(np.int16), Parts(np.int32)
        self.row_scale, self.scale = Parts(np.float32), Parts(np.float32)

    def add(self, matrix: _Matrix, *, transposed: bool) -> None:
        """Append a matrix."""
        d, lanes, words, room = matrix.direct, len(matrix.states), len(matrix.words), len(matrix.tail)
        count = d.shape[0] * d.shape[1]
        at = self.words.add(matrix.words.view(np.int16)), self.states.add(matrix.states.view(np.int32))
        self.matrices.append([count, lanes, -(-count // lanes), words, *at, self.weights])
        bit, row = 8 * self.path.add(np.frombuffer(d.path, np.uint8)), self.kinds.add(d.kinds[1])
        self.row_scale.add(d.row_scale)
        for fine, scale, groups, rows in zip(d.fine, d.scale, matrix.groups, d.runs, strict=True):
            first = np.meshgrid(rows[:: _SIZES["ROWS"]], np.arange(0, d.shape[1], _SIZES["COLS"]), indexing="ij")
            self.tiles.add(np.stack([np.full(first[0].size, len(self.runs)), *(f.reshape(-1) for f in first)], 1))
            width, column = int(fine.sum()), self.scale.add(scale)
            self.rank.add(np.where(fine, np.cumsum(fine) - 1, -1))
            self.runs.append([
                len(self.matrices) - 1, rows.start, rows.stop, *d.shape, width, bit, self.groups.add(groups), column,
                row, self.weights, *d.masks, int(transposed), self.escapes, room,
            ])  # fmt: skip
            bit += width * len(rows)
        self.weights, self.escapes = self.weights + count, self.escapes + room

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """Return all arrays on a device, by name."""
        parts = {n: p for n, p in vars(self).items() if isinstance(p, Parts)}
        for name in ("matrices", "runs"):
            parts[name] = Parts(np.int64)
            parts[name].add(np.array(getattr(self, name), np.int64))
        found = dict(zip(parts, sent(list(parts.values()), device), strict=True))
        widths = {"matrices": len(self.matrices[0]), "runs": len(self.runs[0]), "tiles": 3}
        return found | {n: found[n][:-1].view(-1, width) for n, width in widths.items()}


class Batch:
    """Units that are decoded together, whose coded bytes stay on the device.

    Args:
        decoder: of their file.
        others: units that the processor decodes.
        served: units that the device decodes, and what it takes for that.
        dtypes: of floating-point values, by unit.
    """

    def __init__(
        self, decoder: DeviceUnits, others: list[UnitSection], served: list[tuple[UnitSection, _Matrix]],
        dtypes: dict[str, torch.dtype],
    ) -> None:  # fmt: skip
        self._decoder, self._others, self._dtypes = decoder, others, dtypes
        self._launches = [
            _Launch(decoder, [(s, m) for s, m in served if (dtypes[s.unit.name] is torch.bfloat16) == half], kind)
            for half, kind in ((False, torch.float32), (True, torch.bfloat16))
        ]

    def decode(self) -> dict[str, Tensor]:
        """Return all values in stored layout, by unit.

        Raises:
            CorruptError: a section cannot be decoded; the message names the unit.
        """
        found = self.on_device()
        with ThreadPoolExecutor(jit.cores()) as pool:
            units, device = self._decoder.units, self._decoder.device
            own = pool.map(lambda s: on_processor(units, s, device, self._dtypes[s.unit.name]), self.others)
            return found | {s.unit.name: t for s, t in zip(self.others, own, strict=True)}

    def on_device(self) -> dict[str, Tensor]:
        """Return the values of units that the device decodes; the first time it finds out which ones it cannot."""
        found = {n: t for launch in self._launches for n, t in launch.decode().items()}
        return {n: t.to(self._dtypes[n]) for n, t in found.items()}

    @property
    def others(self) -> list[UnitSection]:
        """Units that the processor decodes."""
        return [*self._others, *(s for launch in self._launches for s in launch.refused)]

    @property
    def served(self) -> int:
        """Number of units that the device decodes."""
        return sum(len(launch.sections) - len(launch.refused) for launch in self._launches)


class _Launch:
    """Matrices that the same launches of programs decode to float32 or bfloat16.

    Attributes:
        sections: of the matrices.
        refused: those that are damaged, or hold values that might be out of range, as the first launch shows.
    """

    def __init__(self, decoder: DeviceUnits, served: list[tuple[UnitSection, _Matrix]], dtype: torch.dtype) -> None:
        served = sorted(served, key=lambda s: -len(s[1].states))  # what takes longest begins first
        self.sections, self.refused = [s for s, _ in served], list[UnitSection]()
        self._device, self._model, self._dtype = decoder.device, decoder.model, dtype
        self._matrices: list[_Matrix] | None = [m for _, m in served]
        self._put: list[tuple[Tensor, Tensor]] = []
        if not served:
            return
        packed = _Packed()
        for section, matrix in served:
            packed.add(matrix, transposed=section.unit.transposed)
        self._weights, self._room = packed.weights, packed.escapes
        rooms = [len(m.tail) for _, m in served]
        self._begun = np.cumsum(rooms) - rooms
        there = packed.to(self._device)
        self._tiles, self._runs, self._numbers = there["tiles"], there["runs"], there["matrices"]
        self._words, self._states = there["words"], there["states"]
        self._sides = [there[n] for n in ("path", "rank", "groups", "kinds", "row_scale", "scale")]

    def decode(self) -> dict[str, Tensor]:
        """Return the values by unit."""
        if not self.sections:
            return {}
        outs = [torch.empty(s.unit.shape, dtype=self._dtype, device=self._device) for s in self.sections]
        found = self._run(outs)
        if self._matrices is not None:
            self._settle(self._matrices, *(t.cpu().numpy() for t in found))
            self._matrices = None
        for out, (at, values) in zip(outs, self._put, strict=True):
            if len(at):
                out.view(-1)[at] = values
        return {s.unit.name: out for s, out in zip(self.sections, outs, strict=True) if s not in self.refused}

    def _run(self, outs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Launch the programs; returns escapes of every matrix, ends of streams (matrices, 2), places of escapes."""
        from bytecap.model.decode_programs import streams, tiles

        count, device = len(outs), self._device
        scratch = torch.empty(self._weights + 1, dtype=torch.int16, device=device)
        escapes = torch.empty(self._room + 1, dtype=torch.int64, device=device)
        found = torch.zeros(count, dtype=torch.int32, device=device)
        ends = torch.empty(count, 2, dtype=torch.int32, device=device)
        to = torch.tensor([o.data_ptr() for o in outs], device=device)
        symbols, entries = self._model
        lookup = {"ENTRY": _ENTRY, "WIDE": self._dtype is torch.float32, "FIELDS": self._runs.shape[1], **_SIZES}
        arguments = (self._tiles, self._runs, to, *self._sides, entries, scratch, found, escapes)
        with torch.cuda.device_of(scratch):
            tiles[(len(self._tiles),)](*arguments, PUT=False, **lookup)
            streams[(count,)](
                self._numbers, self._states.clone(), self._words, scratch, symbols, entries, ends,
                FIELDS=self._numbers.shape[1], LANES=_LANES, SLOTS=TOTAL, ENTRY=_ENTRY, num_warps=_WARPS,
            )  # fmt: skip
            tiles[(len(self._tiles),)](*arguments, PUT=True, **lookup)
        return found, ends, escapes

    def _settle(self, matrices: Sequence[_Matrix], found: Array, ends: Array, escapes: Array) -> None:
        """Check how streams ended, and find the values of escapes, which stay on the device."""
        for i, matrix in enumerate(matrices):
            direct, section = matrix.direct, self.sections[i]
            own = np.sort(escapes[self._begun[i] : self._begun[i] + min(int(found[i]), len(matrix.tail))])
            at, values, sound = own >> 2, np.zeros(0, np.float32), False
            if ends[i].tolist() == [len(matrix.words), 0] and found[i] <= len(matrix.tail):
                try:
                    values, largest = direct.escaped(at, own & 3, matrix.tail)
                    sound = direct.safe(largest)
                except CorruptError:
                    pass
            if not sound:
                self.refused.append(section)
                at, values = at[:0], values[:0]
            if section.unit.transposed:
                row, column = np.divmod(at, direct.shape[1])
                at = column * direct.shape[0] + row
            self._put.append((
                torch.from_numpy(at).to(self._device), torch.from_numpy(values).to(self._device, self._dtype)
            ))  # fmt: skip
