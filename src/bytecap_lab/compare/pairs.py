"""Pair figures of runs on the same tokens, document by document.

A run's sums are folded from windows to documents (to windows, where a text has fewer than eight documents), because
windows of one document err together. A figure is a ratio of sums over tokens; over several texts it is their
unweighted mean. Runs of several calibration seeds are averaged; the standard error then adds what the documents say
of the averaged run to what the seeds say (two crossed random effects). With one seed the noise of
calibration is not in it.

>>> tokens = np.array([10.0, 10.0, 10.0, 10.0])
>>> a, b = (np.array([[1.0, 5.0, 2.0, 4.0]]) + s for s in (0.0, 1.0))
>>> found = estimate([Sums(b - a, tokens)])  # a constant difference has no error, whatever the documents are like
>>> round(found.mean, 6), found.stderr
(0.1, 0.0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.model.uncertainty import ratio_stderr

FloatArray = npt.NDArray[np.float64]
ENOUGH = 8  # documents, or windows stand in for them
METRICS = ("kl", "loss")


@dataclass(frozen=True)
class Sums:
    """Sums of one text: values (seeds, clusters) over weights (clusters,)."""

    values: FloatArray
    weights: FloatArray


@dataclass(frozen=True)
class Figure:
    """A mean with its standard error, and the two parts of that.

    Attributes:
        mean: nats per token.
        stderr: of documents and seeds together.
        documents: over documents (or windows).
        seeds: over calibration seeds; NaN for one seed.
    """

    mean: float
    stderr: float
    documents: float
    seeds: float

    def as_dict(self) -> dict[str, float]:
        """Return a plain dictionary for JSON."""
        return {"mean": self.mean, "stderr": self.stderr, "documents": self.documents, "seeds": self.seeds}


def estimate(texts: Sequence[Sums]) -> Figure:
    """Unweighted mean over texts of values over weights."""
    by_seed = np.mean([t.values.sum(1) / t.weights.sum() for t in texts], axis=0)
    errors = [ratio_stderr(t.values.mean(0), t.weights) for t in texts]
    documents = math.sqrt(sum(e * e for e in errors)) / len(texts)
    n = len(by_seed)
    seeds = float(by_seed.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    both = math.hypot(documents, seeds) if n > 1 else documents
    return Figure(float(by_seed.mean()), both, documents, seeds)


def clusters(text: Mapping[str, Any]) -> tuple[npt.NDArray[np.int64], str]:
    """Return the cluster of every window of a text's record, and the kind of clusters."""
    documents = np.array(text["documents"])
    if (documents >= 0).all() and len(set(documents.tolist())) >= ENOUGH:
        return np.unique(documents, return_inverse=True)[1], "documents"
    return np.arange(len(documents)), "windows"


def fold(values: npt.ArrayLike, of: npt.NDArray[np.int64]) -> FloatArray:
    """Sums (..., windows) to sums (..., clusters)."""
    array = np.asarray(values, dtype=float)
    found = np.zeros((*array.shape[:-1], int(of.max(initial=-1)) + 1))
    for i, cluster in enumerate(of):
        found[..., cluster] += array[..., i]
    return found


@dataclass(frozen=True)
class Entry:
    """All seeds of a method under a budget on one model.

    Attributes:
        method: name, or that of an external.
        budget: bytes asked for.
        bytes: mean file size.
        seeds: calibration seeds in order; (None,) for an external.
        sums: metric -> text -> sums, the seeds in order.
        records: of the runs.
    """

    method: str
    budget: int
    bytes: float
    seeds: tuple[int | None, ...]
    sums: Mapping[str, Mapping[str, Sums]]
    records: Sequence[Mapping[str, Any]]

    @property
    def texts(self) -> list[str]:
        """Names of the texts."""
        return list(self.sums[METRICS[0]])


def entry(records: Sequence[Mapping[str, Any]], texts: Mapping[str, Any]) -> Entry:
    """From the records of one method, budget and model, one for each seed, and their texts' record."""
    ordered = sorted(records, key=lambda r: -1 if r["seed"] is None else r["seed"])
    sums: dict[str, dict[str, Sums]] = {m: {} for m in METRICS}
    for i, text in enumerate(texts["texts"]):
        of, _ = clusters(text)
        weights, original = fold(text["tokens"], of), np.array(text["original"])
        sums["kl"][text["name"]] = Sums(fold([r["texts"][i]["kl"] for r in ordered], of), weights)
        lost = np.array([r["texts"][i]["nats"] for r in ordered]) - original
        sums["loss"][text["name"]] = Sums(fold(lost, of), weights)
    size = float(np.mean([r["file_bytes"] for r in ordered]))
    first = ordered[0]
    return Entry(first["method"], first["budget_bytes"], size, tuple(r["seed"] for r in ordered), sums, ordered)


def figure(one: Entry, metric: str, texts: Sequence[str]) -> Figure:
    """Compute the figure of one entry over texts."""
    return estimate([one.sums[metric][t] for t in texts])


def difference(one: Entry, other: Entry, metric: str, texts: Sequence[str]) -> Figure:
    """`one` minus `other`, seed by seed where both have seeds, document by document."""
    a, b = _common(one, other)
    return estimate([
        Sums(one.sums[metric][t].values[a] - other.sums[metric][t].values[b], one.sums[metric][t].weights)
        for t in texts
    ])  # fmt: skip


def _common(one: Entry, other: Entry) -> tuple[list[int], list[int]]:
    """Rows of the seeds that both have; an external's one row stands beside every seed."""
    if one.seeds == (None,) or other.seeds == (None,):
        return list(range(len(one.seeds))), list(range(len(other.seeds)))
    both = [s for s in one.seeds if s in other.seeds]
    if not both:  # nothing to pair but the tokens
        return [0], [0]
    return [one.seeds.index(s) for s in both], [other.seeds.index(s) for s in both]
