"""Decode a file to arrays; the streams of many units are decoded together.

torch is never imported here.

Units are decoded in groups of a few million values, so that memory stays near the size of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError
from bytecap.format import codefiles, container, updates
from bytecap.format.coders import Observer, Shared, coder, run
from bytecap.format.container import FILE, Contents, UnitSection
from bytecap.format.entropy import jit
from bytecap.format.entropy.rans import Stream, escape_bytes
from bytecap.format.entropy.shared_tables import load_shared
from bytecap.format.wire.shared_objects import load_objects
from bytecap.sizes import in_groups
from bytecap.types import Unit, as_matrix

_GROUP_VALUES = 2**25
_SMALL_GROUP = 2**22  # where memory matters more than time
AHEAD = 2**28  # values that several threads decode before they are asked for
_UNIT_VALUES = 2**16  # what a small unit costs at least: its tables and lanes take memory too
_NOTHING: Mapping[str, Any] = {}

Array = npt.NDArray[Any]


def from_matrix(unit: Unit, matrix: Array) -> Array:
    """Turn a matrix (rows, cols), as coders see it, into the unit's stored layout."""
    return np.ascontiguousarray(matrix.T if unit.transposed else matrix).reshape(unit.shape)


def side_files(contents: Contents) -> dict[str, bytes]:
    """Config and tokenizer files of an artifact, those of its base among them."""
    return codefiles.files(contents, (FILE,))


def decode_units(
    contents: Contents,
    *,
    aliases: bool = True,
    progress: Callable[[int], None] | None = None,
    observe: Observer | None = None,
) -> dict[str, Array]:
    """Decode every unit; returns values in stored layout by name.

    Args:
        contents: of an artifact.
        aliases: also list tied names (the same array).
        progress: called with the number of values decoded.
        observe: shown every entropy-coded stream with its symbols.

    Raises:
        CorruptError: a section cannot be decoded; the message names the unit.
        BaseError: the contents are an update, and were read without its base.
    """
    values: dict[str, Array] = {}
    compiled = observe is None and jit.worth(sum(u.unit.parameters for u in contents.units))
    size, threads = (_SMALL_GROUP, jit.cores()) if compiled else (_GROUP_VALUES, 1)
    for unit, array in decode_each(contents, observe, values=size, threads=threads, ahead=None):
        values.update(dict.fromkeys((unit.name, *(unit.aliases if aliases else ())), array))
        if progress is not None:
            progress(unit.parameters)
    return values


def decode_each(
    contents: Contents,
    observe: Observer | None = None,
    *,
    values: int = _SMALL_GROUP,
    threads: int = 1,
    ahead: int | None = _SMALL_GROUP,
) -> Iterator[tuple[Unit, Array]]:
    """Yield units and their values in stored layout.

    Args:
        contents: of an artifact.
        observe: shown every entropy-coded stream with its symbols, or their counts.
        values: to decode together, about.
        threads: that decode; with several, units are decoded before they are asked for.
        ahead: values that may wait to be asked for, or the largest group; None for all of them.

    Raises:
        CorruptError: a section cannot be decoded; the message names the unit.
    """
    decoded = Units(contents, observe)
    groups = list(in_groups(decoded.sections, _weight, values))
    for found in _ahead(decoded, groups, threads, ahead):
        yield from found
    decoded.check_used()


class Units:
    """Decode units of an artifact, some at a time, in any order and on any thread.

    Of an update units of the first base are decoded, and then what each file above changes of them.

    Args:
        contents: of the artifact.
        observe: shown every entropy-coded stream of this file with its symbols.

    Attributes:
        sections: what can be asked for.
        shared: what these share, or the file's that has them.
    """

    def __init__(self, contents: Contents, observe: Observer | None = None) -> None:
        self._first, *self._updated = [_File(c, observe if c is contents else None) for c in updates.chain(contents)]
        self.sections, self.shared = self._first.contents.units, self._first.shared
        if jit.worth(sum(u.unit.parameters for u in self.sections)):
            jit.kernel("weights")  # once it is imported it pays for the smallest unit, too

    def __call__(self, group: Sequence[UnitSection]) -> list[tuple[Unit, Array]]:
        """Return units and their values in stored layout.

        Raises:
            CorruptError: a section cannot be decoded; the message names the unit.
        """
        found = self._first.decode(group, _NOTHING)
        for file in self._updated:
            found = file.over(found)
        return found

    def check_used(self) -> None:
        """Refuse files with shared objects that no unit uses, once all units are decoded."""
        for file in (self._first, *self._updated):
            file.shared.objects.check_used()


class _File:
    """One file of a chain of updates, or the only one, while its units are decoded."""

    def __init__(self, contents: Contents, observe: Observer | None) -> None:
        self.contents, self.observe = contents, observe
        self.listed = {u.unit.name: u for u in contents.units}
        self.shared = replace(load_shared(contents.tables), objects=load_objects(contents.objects))

    def decode(self, group: Sequence[UnitSection], below: Mapping[str, Array]) -> list[tuple[Unit, Array]]:
        """Decode some units together, given the values of theirs in the base, in stored layout."""

        def shared(unit: Unit) -> Shared:
            held = below.get(unit.name)
            return self.shared if held is None else replace(self.shared, below=as_matrix(unit, held))

        try:
            matrices = run(
                [coder(u.tag).decode(u.data, u.unit.matrix_shape, u.unit.dtype, shared(u.unit)) for u in group],
                self.observe,
            )
        except CorruptError as exc:
            names = f"{group[0].unit.name} .. {group[-1].unit.name}" if len(group) > 1 else group[0].unit.name
            raise CorruptError(f"units {names}: {exc}") from exc
        return [(u.unit, from_matrix(u.unit, matrix)) for u, matrix in zip(group, matrices, strict=True)]

    def over(self, found: list[tuple[Unit, Array]]) -> list[tuple[Unit, Array]]:
        """Change what this update lists of some decoded units of its base."""
        below = {unit.name: array for unit, array in found if unit.name in self.listed}
        changed = self.decode([self.listed[n] for n in below], below) if below else []
        own = {unit.name: (unit, array) for unit, array in changed}
        return [own.get(unit.name, (unit, array)) for unit, array in found]


def _weight(section: UnitSection) -> int:
    """Values of a unit, those for tables and lanes included."""
    return max(section.unit.parameters, _UNIT_VALUES)


def _ahead(
    work: Units, groups: Sequence[Sequence[UnitSection]], threads: int, most: int | None
) -> Iterator[list[tuple[Unit, Array]]]:
    """Yield `work(group)` in order, computed by threads while not more than `most` values wait."""
    if threads <= 1 or len(groups) <= 1:
        yield from map(work, groups)
        return
    sizes = [sum(map(_weight, group)) for group in groups]
    room = sum(sizes) if most is None else max(most, *sizes)
    order = sorted(range(len(groups)), key=lambda i: -sizes[i]) if most is None else range(len(groups))
    with ThreadPoolExecutor(threads) as pool:
        waiting: dict[int, Future[list[tuple[Unit, Array]]]] = {}
        begun = iter(order)
        following = next(begun, None)
        try:
            for i in range(len(groups)):
                while following is not None and (
                    not waiting or sum(sizes[j] for j in waiting) + sizes[following] <= room
                ):
                    waiting[following] = pool.submit(work, groups[following])
                    following = next(begun, None)
                yield waiting.pop(i).result()
        finally:
            for future in waiting.values():
                future.cancel()


def load(path: Path | str, base: updates.Bases = None) -> dict[str, Array]:
    """Decode an artifact file; returns values by name, and tied names share one array.

    Args:
        path: `.bcap` file.
        base: the file that it is an update of; several where that is an update as well.

    Returns:
        float32 arrays in stored layout (integer and float64 tensors keep their dtype).

    Raises:
        ArtifactError: the file cannot be trusted, or its base is missing or another.
    """
    below = updates.found(updates.paths_of(base))
    return decode_units(updates.attached(container.open_file(path), below, str(path)))


class Decoded(Mapping[str, Array]):
    """The values of an artifact's units in stored layout, each decoded whenever it is asked for.

    Args:
        contents: of the artifact.
        observe: shown the entropy-coded streams of every unit, once.
        threads: that decode; with several, the units behind the one that is asked for are decoded meanwhile.
    """

    def __init__(self, contents: Contents, observe: Observer | None = None, threads: int = 1) -> None:
        self._shared = replace(load_shared(contents.tables), objects=load_objects(contents.objects))
        self._units, self._observe = {u.unit.name: u for u in contents.units}, observe
        self._order = {n: i for i, n in enumerate(self._units)}
        self._seen: set[str] = set()
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._ahead: dict[str, Future[Array]] = {}

    def __getitem__(self, name: str) -> Array:
        """Decode one unit.

        Raises:
            CorruptError: its section cannot be decoded.
        """
        if self._pool is None:
            return self._decoded(name, self._units[name])
        self._ahead = {n: f for n, f in self._ahead.items() if self._order[n] >= self._order[name]}
        room = AHEAD
        for n in list(self._units)[self._order[name] :]:
            room -= self._units[n].unit.parameters
            if n not in self._ahead and (n == name or room > 0):
                self._ahead[n] = self._pool.submit(self._decoded, n, self._units[n])
            if room <= 0:
                break
        return self._ahead.pop(name).result()

    def _decoded(self, name: str, u: UnitSection) -> Array:
        watch = None if name in self._seen else self._observe
        self._seen.add(name)
        try:
            found = run([coder(u.tag).decode(u.data, u.unit.matrix_shape, u.unit.dtype, self._shared)], watch)
        except CorruptError as exc:
            raise CorruptError(f"unit {name}: {exc}") from exc
        return from_matrix(u.unit, found[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)


class Ideal:
    """An observer of decoding that sums the ideal code length of every stream under its own tables.

    Escapes count as they are.
    """

    def __init__(self) -> None:
        self._excess: list[float] = []

    def __call__(self, stream: Stream, symbols: npt.NDArray[np.int32]) -> None:
        """Add a stream and its symbols."""
        if len(stream.data):
            self.counted(len(stream.data) - escape_bytes(stream), stream.tables.bits(symbols, stream.classes))

    def counted(self, size: int, bits: float) -> None:
        """Add a stream by its bytes without those of escapes, and its ideal code length in bits."""
        self._excess.append(size - bits / 8)

    def bytes(self, size: int) -> int:
        """Ideal size of a file whose streams were all seen, given its real size in bytes."""
        return round(size - math.fsum(self._excess))
