"""Put together what a file holds beside its units, also where it is an update of a file that the receiver has.

An update lists no unit that is as in its base, and no side file that the base holds too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bytecap.errors import UsageError
from bytecap.format import codefiles
from bytecap.format.coders.base import CODER as BASE
from bytecap.format.container import CODE, Base, Contents, FileSection, StoredUnit, UnitSection
from bytecap.format.sidefiles import names
from bytecap.job import Section
from bytecap.job.base import Installed
from bytecap.job.config import FitConfig
from bytecap.job.section import StoredSection
from bytecap.pipeline.artifact import Artifact
from bytecap.types import Unit

AS_IN_BASE = Section(BASE.tag, b"")  # of a unit that an update does not list


@dataclass(frozen=True)
class Frame:
    """All of a file but its units, tables and shared objects.

    Attributes:
        files: side and code files as they are stored.
        about: remarks on its making.
        base: the file that it is an update of, or None.
    """

    files: tuple[FileSection, ...]
    about: dict[str, Any]
    base: Base | None = None

    def contents(
        self, units: Sequence[Unit], sections: Mapping[str, Section], tables: bytes, objects: tuple[bytes, ...] = ()
    ) -> Contents:
        """Put a file together."""
        listed = ((u, sections[u.name]) for u in units)
        stored = tuple(_unit(u, s) for u, s in listed if s != AS_IN_BASE)
        return Contents(stored, tables, self.files, self.about, objects=objects, base=self.base)


def _unit(unit: Unit, section: Section) -> UnitSection:
    if isinstance(section, StoredSection):
        return StoredUnit(unit, section.tag, section.length, section.read)
    return UnitSection(unit, section.tag, section.data)


def frame(files: Sequence[FileSection], about: dict[str, Any], base: Installed | None) -> Frame:
    """Return the frame of a file, with only those files in it that its base does not hold.

    Args:
        files: side and code files as they would be stored; without bytes where a side file is as in the base.
        about: remarks.
        base: what the file is an update of.

    Raises:
        UsageError: a code file has a name that no reader writes beside the side files.
    """
    if said := names.problem(f.name for f in files):
        raise UsageError(f"{said}: rename the code file")
    if base is None:
        return Frame(tuple(files), about)
    known = base.files
    stored = [
        f for f in files
        if (f.data if f.kind != CODE else known.get(f.name) != codefiles.unpack(f.name, f.data))
    ]  # fmt: skip
    return Frame(tuple(stored), about, base.below([f.name for f in files]))


def base_of(config: FitConfig) -> Installed | None:
    """Return the base that a config asks for.

    Raises:
        UsageError: another option cannot be had with it. ArtifactError: the base cannot be trusted.
    """
    if config.base is None:
        return None
    if config.method != "bytecap":
        raise UsageError(f"method {config.method} makes no updates: base is for method bytecap")
    for name, value in (("paths", config.paths), ("given", config.given)):
        if value:
            raise UsageError(f"the option {name} cannot be had with base: an update is planned without it")
    return Installed.read(config.base)


def report(base: Installed, result: Artifact) -> dict[str, Any]:
    """Return what the job's report says of the base."""
    units = len(result.contents.units) if result.data else None
    return {"base": {"file": base.name, "sha256": base.sha256, "changed_units": units}}
