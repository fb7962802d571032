"""Define the nouns of bytecap as frozen dataclasses, almost without logic.

`Unit` is a stored tensor, `Point` one way to store it, `Curve` all measured ways, `Plan` the choice made for
every unit, `Score` what an evaluation found. Everything else in the package turns one of these into another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

_Values = TypeVar("_Values", bound=Any)  # an array or a tensor

Bytes = bytes | memoryview
"""Bytes of a file that are read, not kept: a view spares the copy."""


@dataclass(frozen=True)
class Unit:
    """One stored tensor. A tied or repeated tensor is ONE unit, whatever number of names it has.

    Attributes:
        name: first name in the state dict.
        shape: stored shape.
        dtype: source dtype, in safetensors' spelling (`BF16`, `F32`, ...).
        aliases: its other names.
        transposed: the stored layout is (in, out) instead of (out, in).
        linear: it is the weight of a linear map or an embedding: a matrix with one row per output or token.
        stacked: a stack of matrices (experts): rows run over all dimensions but the last.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()
    transposed: bool = False
    linear: bool = False
    stacked: bool = False

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, cols) as coders see it: rows are outputs or tokens; vectors are one row."""
        if len(self.shape) < 2:
            return 1, self.parameters
        one = self.shape[-1 if self.stacked else 0]
        other = self.parameters // one if one else 0
        return (other, one) if self.stacked != self.transposed else (one, other)


def as_matrix(unit: Unit, values: _Values) -> _Values:
    """Return a stored array or tensor as coders see it, (rows, cols)."""
    rows, cols = unit.matrix_shape
    turned = unit.transposed and len(unit.shape) >= 2
    found: _Values = values.reshape(cols, rows).T if turned else values.reshape(rows, cols)
    return found


@dataclass(frozen=True)
class Point:
    """One way to store a unit: rate in bytes against distortion in nats per token."""

    rate: float
    distortion: float
    setting: float


@dataclass(frozen=True)
class Curve:
    """Measured points of one unit, by rising rate."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Plan:
    """One point per unit under a byte budget.

    Attributes:
        choice: chosen point by unit name.
        rate: sum of the rates in bytes.
        distortion: sum of the distortions in nats per token.
        slope: the one exchange rate, nats per token a byte buys at the margin (a positive number).
        gap: duality gap in nats per token: how far the plan can be from the best possible one.
    """

    choice: Mapping[str, Point]
    rate: float
    distortion: float
    slope: float
    gap: float


@dataclass(frozen=True)
class Score:
    """The scores of an evaluation, over one text or as a mean over several.

    Attributes:
        name: the text.
        tokens: number of predicted tokens.
        bytes: UTF-8 bytes those tokens stand for.
        nats: mean negative log-likelihood in nats per token.
        bpb: bits per byte.
        bpb_stderr: its standard error, over windows.
    """

    name: str
    tokens: int
    bytes: int
    nats: float
    bpb: float
    bpb_stderr: float

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {
            "name": self.name, "tokens": self.tokens, "bytes": self.bytes, "nats_per_token": self.nats,
            "bpb": self.bpb, "bpb_stderr": self.bpb_stderr,
        }  # fmt: skip
