"""Model directories for other programs: `config.json`, one safetensors file, the tokenizer's files.

A `Family` says which layouts its runtimes read, which tensors hold a matrix in one, and how `config.json` names them;
there is one file a family. `tensors` reads and writes safetensors, `menu` measures and rounds, `contents` puts a
directory together and takes it apart again.

>>> family("mlx").schemes()[:3]
('w2g128', 'w2g64', 'w2g32')
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bytecap.errors import UsageError
from bytecap.runtimes.blocks import BlockFormat, Codes

FAMILIES = {
    "mlx": "bytecap.runtimes.directory.mlx",
    "compressed-tensors": "bytecap.runtimes.directory.compressed_tensors",
}


@dataclass(frozen=True)
class Scheme:
    """A way to store matrices.

    Attributes:
        bits: of a code.
        group: columns that share a scale; 0 for a whole row.
        symmetric: there is no zero point and no minimum.
        floating: codes are floating-point numbers, not integers.
    """

    bits: int
    group: int
    symmetric: bool
    floating: bool = False

    def width(self, cols: int) -> int:
        """Columns that share a scale, in rows of so many."""
        return self.group or cols


@dataclass(frozen=True)
class Spec:
    """A tensor that holds a part of a matrix: what is put behind the module's name, dtype, shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


class Arrays:
    """Contents of a matrix's tensors, each made when it is asked for, so that nobody packs codes to write scales.

    >>> made = Arrays(lambda: np.zeros(2), lambda: np.ones(3)); made[1].shape, len(list(made))
    ((3,), 2)
    """

    def __init__(self, *makers: Callable[[], npt.NDArray[Any]]) -> None:
        self._makers = makers

    def __getitem__(self, number: int) -> npt.NDArray[Any]:
        return self._makers[number]()

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (make() for make in self._makers)


class Family(Protocol):
    """The schemes and file layout that runtimes of a family read.

    Attributes:
        name: of the family.
        tables: embeddings, and heads tied to them, may be stored in a scheme.
        heads: output heads of their own may.
        bound: matrices of one module that are given the same input must share a scheme.
        mark: the `format` in the metadata of a safetensors file.
    """

    name: str
    tables: bool
    heads: bool
    bound: bool
    mark: str

    def schemes(self) -> tuple[str, ...]:
        """Names of all schemes, the default menu first."""
        ...

    def menu(self) -> tuple[str, ...]:
        """Names of the schemes that compete if nothing else is said."""
        ...

    def scheme(self, name: str) -> Scheme:
        """The scheme of a name."""
        ...

    def layout(self, name: str, cols: int, float_type: str) -> BlockFormat | None:
        """The block format for rows of so many columns, or None where the scheme cannot hold them."""
        ...

    def specs(self, form: BlockFormat, rows: int, cols: int) -> tuple[Spec, ...]:
        """Tensors of a matrix."""
        ...

    def arrays(self, codes: Codes) -> Arrays:
        """Contents of these tensors, in the same order; floating-point numbers as float32."""
        ...

    def codes(self, form: BlockFormat, arrays: Sequence[npt.NDArray[Any]]) -> Codes:
        """A matrix from the contents of its tensors."""
        ...

    def config(self, model: Mapping[str, Any], schemes: Mapping[str, str], plain: Sequence[str]) -> dict[str, Any]:
        """`config.json`.

        Args:
            model: the model's own, without quantization.
            schemes: scheme of every module stored in one.
            plain: modules of linear maps that are not.
        """
        ...

    def read(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Scheme of every module, from a parsed `config.json`."""
        ...

    def check(self, directory: Path) -> str:
        """Load a directory with the family's own program where it is installed; returns what was found.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        ...


def family(name: str) -> Family:
    """The family of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in FAMILIES:
        raise UsageError(f"unknown format {name!r}: there are {', '.join(FAMILIES)}")
    found: Family = importlib.import_module(FAMILIES[name]).FAMILY
    return found


def split(codes: npt.NDArray[np.uint8], form: BlockFormat) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    """Sub-scales and room for sub-minimums of codes (rows, cols) with one scale a block."""
    shape = (len(codes), codes.shape[1] // form.block)
    return np.ones(shape, np.int8), np.zeros(shape, form.integer)
