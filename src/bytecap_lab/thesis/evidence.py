"""Read the measurements of one model on one base from the lines, as resampled arrays of recoveries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from bytecap_lab.thesis.amounts import PRIMARY
from bytecap_lab.thesis.statistics import Draw, FloatArray, Missing

SHOWS_ONLY = "module"

Record = Mapping[str, Any]


@dataclass
class Evidence:
    """A model on a base.

    Attributes:
        model: as given.
        base: `grid` or `golf`.
        recipe: it was trained by, empty where nothing is known.
        seed: of its training.
        registration: it was trained under.
        lines: measurement -> its record.
        texts: record of the evaluation texts; None where nothing was measured.
    """

    model: str
    base: str
    recipe: str
    seed: int
    registration: str
    lines: dict[str, Record]
    texts: Record | None
    _curves: dict[str, tuple[FloatArray, FloatArray]] = field(default_factory=dict)

    def line(self, what: str) -> Record:
        """A measurement.

        Raises:
            Missing: it was not made, or the budget was refused.
        """
        if what not in self.lines:
            raise Missing(f"{what} was not measured")
        found = self.lines[what]
        if "refused" in found:
            raise Missing(f"the base cannot get below the budget: {found['refused']}")
        return found

    @cached_property
    def draw(self) -> Draw:
        """Resamples of the texts' documents."""
        if self.texts is None:
            raise Missing("nothing was measured")
        return Draw(self.texts["texts"])

    @property
    def bytes(self) -> float:
        """Matrix bytes of the base."""
        return float(self.line("base")["bytes"])

    @property
    def acted(self) -> float:
        """Those of the matrices that arms act on; the same where they act on all."""
        return float(self.line("base").get("acted_bytes", self.bytes))

    @property
    def primary(self) -> float:
        """The primary amount in bytes."""
        return PRIMARY * self.acted

    def points(self, arm: str) -> Sequence[Record]:
        """An arm's points that cost something, by rising bytes."""
        return sorted((p for p in self.line(f"arm {arm}")["points"] if p["bytes"] > 0), key=lambda p: float(p["bytes"]))

    def curve(self, arm: str, *, without: str = "") -> tuple[FloatArray, FloatArray]:
        """(points,) bytes and (points, 1 + RESAMPLES) recoveries of an arm, from (0, 0).

        Args:
            arm: its name.
            without: member of the points that is taken off their bytes.
        """
        key = f"{arm} {without}"
        if key not in self._curves:
            points = self.points(arm)
            size = np.array([0.0, *(max(1.0, p["bytes"] - (p[without] if without else 0)) for p in points)])
            size = np.maximum.accumulate(size)
            self._curves[key] = size, np.stack([np.zeros(len(self.draw.counts[0])), *map(self._mean, points)])
        return self._curves[key]

    def _mean(self, point: Record) -> FloatArray:
        return self.draw.mean(point["kl"])

    def reach(self, arm: str) -> float:
        """Most bytes an arm spent.

        Raises:
            Missing: it spent none.
        """
        size = float(self.curve(arm)[0][-1])
        if size <= 0:
            raise Missing(f"{arm} found nothing to spend a byte on")
        return size

    def recovery(self, arm: str, size: float, *, without: str = "") -> FloatArray:
        """KL taken away for so many bytes, (1 + RESAMPLES,): linear between points, never beyond the last."""
        at, values = self.curve(arm, without=without)
        i = int(np.clip(np.searchsorted(at, size), 1, len(at) - 1))
        width = at[i] - at[i - 1]
        share = min(1.0, max(0.0, (size - at[i - 1]) / width)) if width > 0 else 1.0
        found: FloatArray = values[i - 1] + share * (values[i] - values[i - 1])
        return found

    def over(self, values: FloatArray, size: float) -> FloatArray:
        """Values over what `global` recovers for so many bytes; NaN in resamples where that is not above 0."""
        rival = self.recovery("global", size)
        if not rival[0] > 0:
            raise Missing("finer steps everywhere recover nothing")
        return np.where(rival > 0, values / np.where(rival > 0, rival, 1.0), np.nan)

    def q(self, arm: str, size: float) -> FloatArray:
        """An arm's recovery over that of `global` at equal bytes."""
        return self.over(self.recovery(arm, size), size)

    def amount(self, *arms: str) -> float:
        """The primary amount, or the bytes that the shortest of some arms and `global` has."""
        return min(self.primary, *(self.reach(a) for a in (*arms, "global")))


def read(records: Sequence[Record]) -> list[Evidence]:
    """Evidence of every model and base in records, in their order; later lines replace earlier ones."""
    texts = {r["key"]: r for r in records if r["record"] == "texts"}
    found: dict[tuple[str, str], Evidence] = {}
    for r in records:
        if r["record"] != "measure":
            continue
        one = found.setdefault(
            (r["model"], r["base"]),
            Evidence(r["model"], r["base"], r["recipe"], r["training_seed"], r["registration"], {}, None),
        )
        if "texts_key" in r:
            now = texts.get(r["texts_key"])
            if now is not one.texts:  # other tokens: what was measured on the ones before cannot stand beside it
                one.lines, one.texts = {}, now
        one.lines[r["what"]] = r
    return list(found.values())
