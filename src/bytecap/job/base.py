"""Define `Installed`, the file that a receiver has already, of which an update stores only the differences.

It is read before the model and decoded when its values are first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from bytecap.errors import BaseError
from bytecap.format import codefiles, updates
from bytecap.format.container import CODE, FILE, Base, Contents
from bytecap.format.decoder import decode_units
from bytecap.types import Unit, as_matrix

_LISTED = 8  # names in a message


@dataclass(frozen=True)
class Installed:
    """A file on which an update stands.

    Attributes:
        name: of the file.
        sha256: of its bytes.
        contents: what is in it, on its own bases.
    """

    name: str
    sha256: str
    contents: Contents

    @staticmethod
    def read(base: Installed | updates.Bases) -> Installed | None:
        """Read the file, or the last one of several that stand on one another.

        Raises:
            ArtifactError: a file cannot be trusted. BaseError: one of its own bases is missing, or not needed.
        """
        if base is None or isinstance(base, Installed):
            return base
        paths = updates.paths_of(base)
        return Installed(*updates.last(paths)) if paths else None

    @cached_property
    def values(self) -> dict[str, npt.NDArray[Any]]:
        """Decoded values in stored layout, by first name."""
        return decode_units(self.contents, aliases=False)

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Side and code files by name."""
        return codefiles.files(self.contents, (FILE, CODE))

    def matrix(self, unit: Unit) -> npt.NDArray[Any]:
        """Values of a unit as coders see them, (rows, cols)."""
        return as_matrix(unit, self.values[unit.name])

    def has(self, unit: Unit, matrix: npt.NDArray[Any]) -> bool:
        """Whether a unit has these values (rows, cols) already, bit for bit."""
        own = self.matrix(unit)
        return own.dtype == matrix.dtype and own.shape == matrix.shape and own.tobytes() == matrix.tobytes()

    def below(self, files: Sequence[str]) -> Base:
        """Return the reference of an update that comes with files of these names."""
        return Base(self.sha256, tuple(n for n in self.files if n not in files), self.contents)

    def on(self, contents: Contents) -> Contents:
        """Contents of an update that were read by themselves, on this file."""
        assert contents.base is not None  # noqa: S101 (made by us)
        return replace(contents, base=replace(contents.base, contents=self.contents))

    def check(self, units: Sequence[Unit], model: str) -> None:
        """Refuse a model of other tensors.

        Raises:
            BaseError: units are missing, too many, or of other shapes; they are listed.
        """
        own, wanted = ({u.name: u for u in each} for each in (updates.units_of(self.contents), units))
        wrong = [f"{n} is missing in the base" for n in wanted if n not in own]
        wrong += [f"{n} is missing in the model" for n in own if n not in wanted]
        wrong += [
            f"{n} is {list(own[n].shape)} in the base and {list(u.shape)} in the model"
            if own[n].shape != u.shape else f"{n} is tied or laid out in another way"
            for n, u in wanted.items()
            if n in own and updates.form(own[n]) != updates.form(u)
        ]  # fmt: skip
        if wrong:
            more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
            raise BaseError(f"{self.name} is no base for {model}: {'; '.join(wrong[:_LISTED])}{more}")

    def __repr__(self) -> str:
        return f"Installed({Path(self.name).name!r}, {self.sha256[:12]})"
