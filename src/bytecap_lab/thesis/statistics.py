"""Compute resampled sums, intervals, and the rules of docs/thesis.md.

Every array that carries an effect has 1 + RESAMPLES values: the sample itself, then its resamples. Documents are drawn
anew text by text, the same draw for whatever is measured on that text.

>>> lead = Interval.of(np.concatenate([[0.2], np.linspace(0.1, 0.3, 101)]))
>>> standard(lead)
('supported', '')
>>> standard(Interval(0.01, -0.01, 0.03, 0.01)), standard(Interval(0.08, -0.1, 0.2, 0.08))[0]
(('falsified', ''), 'undecided')
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SHOWS_ONLY = "module"

FloatArray = npt.NDArray[np.float64]
RESAMPLES = 2000
THRESHOLD = 0.05
POWER = 2.8  # standard errors: 80% power at 5%, two-sided
SUPPORTED, FALSIFIED, UNDECIDED = "supported", "falsified", "undecided"
Verdict = tuple[str, str]  # word, reason


class Missing(Exception):  # noqa: N818 (no error: the verdict's reason)
    """A measurement that an experiment needs is missing; the message is the reason for an undecided verdict."""


class NotApplicable(Missing):
    """An experiment says nothing of this kind of model."""


@dataclass(frozen=True)
class Interval:
    """An effect with its 95% interval.

    Attributes:
        mean: of the sample.
        low: 2.5th percentile of the resamples.
        high: 97.5th.
        stderr: their standard deviation.
    """

    mean: float
    low: float
    high: float
    stderr: float

    @classmethod
    def of(cls, values: FloatArray) -> Interval:
        """From the sample and its resamples; resamples without a value are left out."""
        drawn = values[1:][np.isfinite(values[1:])]
        if not np.isfinite(values[0]) or len(drawn) < 0.9 * (len(values) - 1):
            raise Missing("the figure has no value in many resamples: what it is divided by is not surely above 0")
        low, high = np.percentile(drawn, [2.5, 97.5])
        return cls(float(values[0]), float(low), float(high), float(drawn.std()))

    @property
    def detectable(self) -> float:
        """The smallest effect the run could have seen."""
        return POWER * self.stderr

    def as_dict(self) -> dict[str, float]:
        """Plain dictionary for JSON."""
        return {"effect": self.mean, "low": self.low, "high": self.high, "stderr": self.stderr,
                "detectable": self.detectable}  # fmt: skip


def standard(effect: Interval, threshold: float = THRESHOLD) -> Verdict:
    """The standard rule: supported, falsified or undecided."""
    if effect.mean >= threshold and effect.low > 0:
        return SUPPORTED, ""
    if effect.high < threshold:
        return FALSIFIED, ""
    return UNDECIDED, "the interval holds both"


def all_of(parts: Sequence[Verdict]) -> Verdict:
    """Every part must be supported; one that is falsified decides."""
    for word in (FALSIFIED, UNDECIDED):
        for found, why in parts:
            if found == word:
                return found, why
    return SUPPORTED, ""


class Draw:
    """Counts of every cluster in every resample, (1 + RESAMPLES, clusters) of each text; the first row is one each."""

    def __init__(self, texts: Sequence[Mapping[str, Any]], seed: int = 0) -> None:
        self.tokens = [np.array(t["tokens"], float) for t in texts]
        self.counts = []
        for i, tokens in enumerate(self.tokens):
            n, rng = len(tokens), np.random.default_rng([seed, i])
            self.counts.append(np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)]))

    def mean(self, sums: Sequence[float]) -> FloatArray:
        """Nats per token, texts weighing equally, (1 + RESAMPLES,), from sums over the clusters of all texts."""
        found: FloatArray = self.means([sums])[:, 0]
        return found

    def means(
        self, rows: Sequence[Sequence[float]], halves: Sequence[npt.NDArray[np.bool_]] | None = None
    ) -> FloatArray:
        """Draw for several rows at once, (1 + RESAMPLES, rows).

        Args:
            rows: sums over the clusters of all texts, one text after the other.
            halves: which clusters of each text count; all.
        """
        values, at, used = np.array(rows, float), 0, 0
        total = np.zeros((1 + RESAMPLES, len(rows)))
        for i, (tokens, counts) in enumerate(zip(self.tokens, self.counts, strict=True)):
            mine = values[:, at : at + len(tokens)]
            at += len(tokens)
            mask = np.ones(len(tokens)) if halves is None else halves[i].astype(float)
            if not mask.any():
                continue
            weight = counts @ (mask * tokens)
            with np.errstate(invalid="ignore", divide="ignore"):
                total += np.where(weight[:, None] > 0, counts @ (mask * mine).T / weight[:, None], math.nan)
            used += 1
        return total / max(1, used)


def pooled(values: Sequence[FloatArray], seed: int = 1) -> FloatArray:
    """Mean over models; resamples draw models too, their deviations scaled by sqrt(n / (n - 1))."""
    table = np.stack(values)
    n = len(table)
    found: FloatArray = table.mean(0)
    if n < 2:
        return found
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, n, (table.shape[1] - 1, n))
    moved = np.take_along_axis(table[:, 1:].T, drawn, axis=1).mean(1)
    found[1:] += math.sqrt(n / (n - 1)) * (moved - found[1:])
    return found


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of two lists; NaN where one is constant.

    >>> kendall([1, 2, 3], [1, 3, 2]), kendall([1, 2], [2, 1])
    (0.3333333333333333, -1.0)
    """
    a, b = (np.sign(np.subtract.outer(np.array(v, float), np.array(v, float))) for v in (x, y))
    scale = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / scale if scale else math.nan


def taken(worth: FloatArray, size: FloatArray, room: float) -> FloatArray:
    """Share of each item that is taken, best first, until the room is full; the last one in part.

    Args:
        worth: (..., items); items are taken by falling worth.
        size: (items,), positive.
        room: for all.

    >>> taken(np.array([2.0, 1.0, 3.0]), np.array([4.0, 4.0, 2.0]), 4.0).tolist()
    [0.5, 0.0, 1.0]
    """
    order = np.argsort(-worth, axis=-1, kind="stable")
    sizes = size[order]
    before = np.cumsum(sizes, axis=-1) - sizes
    found = np.empty(np.shape(worth))
    np.put_along_axis(found, order, np.clip((room - before) / sizes, 0.0, 1.0), axis=-1)
    return found
