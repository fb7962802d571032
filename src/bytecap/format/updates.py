"""Read a file that is an update: it names another file, its base, and holds only what differs from it.

The base is named by the SHA-256 of its bytes, so an update means the same values everywhere, and nothing is decoded on
another file. A base may be an update itself; then all files of the chain are given, in any order. Units that an update
does not list are as in its base, and so are side files and code files that it neither holds nor leaves out.

>>> whole = Contents((), b"", (), {})
>>> attached(whole, {}, "a.bcap") is whole
True
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bytecap.errors import BaseError, CorruptError
from bytecap.format import container
from bytecap.format.container import CODE, FILE, Contents
from bytecap.types import Unit

Bases = Path | str | Sequence[Path | str] | None


@dataclass(frozen=True)
class BaseFile:
    """A file that may be somebody's base: the bytes of a file and its name for messages."""

    name: str
    data: bytes


def paths_of(base: Bases) -> list[Path]:
    """Return paths that were given as one, as several, or not at all.

    >>> paths_of(None), paths_of("a.bcap") == [Path("a.bcap")]
    ([], True)
    """
    return [] if base is None else [Path(base)] if isinstance(base, Path | str) else [Path(p) for p in base]


def read(path: Path | str, base: Bases = None) -> Contents:
    """Read and check an artifact file, and the files that it is an update of.

    Args:
        path: `.bcap` file.
        base: the file it is an update of, and if that is an update itself, its base as well, in any order.

    Raises:
        ArtifactError: a file cannot be trusted. BaseError: a base is missing, another file, or not needed.
    """
    return attached(container.read(path), found(paths_of(base)), str(path))


def last(paths: Sequence[Path]) -> tuple[str, str, Contents]:
    """Return name, SHA-256 and contents of the file, among those given, that stands on all others.

    Raises:
        ArtifactError: a file cannot be trusted. BaseError: one is missing, or not needed.
    """
    files = found(paths)
    parsed = {sha256: container.parse(f.data, f.name) for sha256, f in files.items()}
    stood_on = {c.base.sha256 for c in parsed.values() if c.base is not None}
    top = next((sha256 for sha256 in parsed if sha256 not in stood_on), next(iter(parsed)))
    name = files.pop(top).name
    return name, top, attached(parsed[top], files, name)


def found(paths: Iterable[Path]) -> dict[str, BaseFile]:
    """Read files that may be bases, by the SHA-256 of their bytes."""
    files = [BaseFile(str(path), container.read_bytes(path)) for path in paths]
    return {hashlib.sha256(f.data).hexdigest(): f for f in files}


def attached(contents: Contents, bases: Mapping[str, BaseFile], name: str) -> Contents:
    """Return an update with the contents of its base, and those of that one's; a whole file as it is.

    Args:
        contents: of the file.
        bases: files by the SHA-256 of their bytes; all of them must be needed.
        name: of the file, for messages.

    Raises:
        BaseError: a base is missing, another file, or not needed.
        CorruptError: the update lists units or files that its base does not have.
    """
    left = dict(bases)
    chain = [(name, contents)]
    while (base := chain[-1][1].base) is not None:
        if base.sha256 not in left:
            raise BaseError(_missing(chain[-1][0], base.sha256, left))
        file = left.pop(base.sha256)
        chain.append((file.name, container.parse(file.data, file.name)))
    if left:
        raise BaseError(f"{chain[-1][0]} is no update: it needs no base, and {next(iter(left.values())).name} is none")
    below = chain.pop()[1]
    for above, update in reversed(chain):
        _check(update, below, above)
        assert update.base is not None  # noqa: S101 (only the last of a chain has none)
        below = replace(update, base=replace(update.base, contents=below))
    return below


def _missing(name: str, wanted: str, given: Mapping[str, BaseFile]) -> str:
    if not given:
        return f"{name} is an update of the file with SHA-256 {wanted}: give that file as its base (--base FILE)"
    sha256, other = next(iter(given.items()))
    return f"{name} is an update of the file with SHA-256 {wanted}, and {other.name} has SHA-256 {sha256}"


def _check(update: Contents, base: Contents, name: str) -> None:
    """Refuse an update that does not fit its base, which no writer makes."""
    known = {u.name: u for u in units_of(base)}
    for u in (section.unit for section in update.units):
        if u.name not in known or form(u) != form(known[u.name]):
            raise CorruptError(f"{name} changes the unit {u.name}, which its base has not, or in another shape")
    files = names_of(base)
    dropped = update.base.dropped if update.base is not None else ()
    if strange := [n for n in dropped if n not in files]:
        raise CorruptError(f"{name} leaves out {strange[0]!r}, which its base does not hold")


def form(unit: Unit) -> tuple[object, ...]:
    """Return everything of a unit that its update must share; the source's dtype may be another."""
    return unit.shape, unit.aliases, unit.transposed, unit.linear, unit.stacked


def below(contents: Contents, name: str = "the artifact") -> Contents | None:
    """Return the contents of the base of an update; None for a whole file.

    Raises:
        BaseError: the base was not given.
    """
    if contents.base is not None and contents.base.contents is None:
        raise BaseError(_missing(name, contents.base.sha256, {}))
    return None if contents.base is None else contents.base.contents


def chain(contents: Contents) -> list[Contents]:
    """Return the files that a file stands on, the one without a base first, and the file itself last.

    Raises:
        BaseError: a base was not given.
    """
    files = [contents]
    while (base := below(files[-1])) is not None:
        files.append(base)
    return files[::-1]


def units_of(contents: Contents) -> list[Unit]:
    """Return all units that a file decodes to, those of its base among them, in the order of the first base."""
    own = {u.unit.name: u.unit for u in contents.units}
    base = below(contents)
    return list(own.values()) if base is None else [own.get(u.name, u) for u in units_of(base)]


def names_of(contents: Contents, kinds: Collection[int] = (FILE, CODE)) -> list[str]:
    """Return the names of the side and code files that come with a file, those of its base that it keeps in front."""
    base = below(contents)
    own = [f.name for f in contents.files if f.kind in kinds]
    return [*(n for n in (names_of(base, kinds) if base else ()) if n not in replaced(contents)), *own]


def replaced(contents: Contents) -> set[str]:
    """Return the names of side and code files that an update does not take over from its base."""
    return {*(contents.base.dropped if contents.base else ()), *(f.name for f in contents.files)}
