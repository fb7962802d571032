"""Protect channels with one list for all matrices on a residual stream or inside an MLP.

A channel of a stream is a column of every matrix that reads it and a row of every matrix that writes it
(`bytecap.calibration.residual_streams`). What it is worth is the sum of what its columns and rows are worth to all of
them, corrected by each matrix's factor; since every channel of a stream costs the same bytes, that is the order of
return per byte. All matrices protect the first k of ONE order, so the file stores one list for them
(`bytecap.format.wire.shared_objects`). The allocator chooses k for the whole stream, and which matrices join
(`bytecap.allocation.shared_channels`, `bytecap_lab.rd_curves.choose`).

Rows are stored as they are; columns absorb the errors of the others, as in `columns`. A matrix on two streams offers
both, and takes one. Its reader is `bytecap.format.overlays.channels`. Where streams are not known, a square matrix
is taken for one that lies between two residual streams of the same channels, and others have no settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.overlays.channels import BOTH, CODER, COLUMNS, ROWS
from bytecap.quantization.overlays import Applied, Ranking, UnitProblem, thinned
from bytecap.quantization.overlays.protect import (
    Amount,
    Score,
    absorbed,
    apply,
    ladder,
    round_vector,
    row_scores,
    scores,
    store,
    without_columns,
    without_rows,
)

if TYPE_CHECKING:
    from bytecap.calibration.residual_streams import ResidualStream

_MOST = 16  # one in so many channels at most, since each costs vectors in many matrices
_RUNGS = 4  # amounts for each stream
ALONE = -1  # the number of a stream that no other matrix is known to be on


def channel_worth(problem: UnitProblem, base: Tensor | None, mode: int, score: Score = "measured") -> Tensor:
    """Return the worth of every channel to one matrix in nats per token, (channels,) float64."""
    columns = scores(problem, base, score).sum(0) if mode & COLUMNS else 0
    rows = row_scores(problem, base, score) if mode & ROWS else 0
    return torch.as_tensor(columns + rows)


def _order(worth: Tensor) -> npt.NDArray[np.int64]:
    found: npt.NDArray[np.int64] = worth.argsort(descending=True, stable=True).numpy().astype(np.int64)
    return found


def rank(
    streams: Sequence[ResidualStream], known: Iterable[tuple[UnitProblem, Tensor | None]], factors: Mapping[str, float]
) -> dict[str, tuple[Ranking, ...]]:
    """Rank channels: one order for each stream, by the summed worth to all matrices on it.

    Args:
        streams: of the model.
        known: every matrix with its base's decoded values, one at a time.
        factors: correction factor of every matrix's nats.
    """
    total = [torch.zeros(s.width, dtype=torch.float64) for s in streams]
    names = []
    for problem, base in known:
        name = problem.unit.name
        names.append(name)
        for i, stream in enumerate(streams):
            if mode := stream.sides.get(name, 0):
                total[i] += factors.get(name, 1.0) * channel_worth(problem, base, mode)
    orders = [_order(w) for w in total]
    return {n: tuple(Ranking(i, s.sides[n], orders[i]) for i, s in enumerate(streams) if n in s.sides) for n in names}


class Channels:
    """The overlay; a setting is an `Amount` with its mode."""

    id: ClassVar[str] = "channels"
    charge: ClassVar[int] = 0

    def settings(self, problem: UnitProblem, base: Tensor | None = None, score: Score = "measured") -> Sequence[Amount]:
        """Return powers of two up to a sixteenth of the channels of each stream, the same for all its matrices."""
        rankings = problem.rankings
        if rankings is None:
            square = problem.weight.shape[0] == problem.weight.shape[1]
            rankings = (Ranking(ALONE, BOTH, _order(channel_worth(problem, base, BOTH, score))),) if square else ()
        return [
            replace(a, stream=r.stream)
            for r in rankings
            for a in thinned(list(ladder(torch.from_numpy(r.order), len(r.order) // _MOST, mode=r.mode)), _RUNGS)
        ]

    def before(self, problem: UnitProblem, setting: Amount) -> UnitProblem:
        """Put zeros in place of protected rows and columns; the Hessian loses the errors that columns will absorb."""
        index = setting.index
        changed = without_columns(problem, index) if setting.mode & COLUMNS else problem
        return without_rows(changed, index) if setting.mode & ROWS else changed

    def after(self, problem: UnitProblem, base: Tensor, setting: Amount) -> Applied:
        """Fit the columns to the decoded base, and store them and the rows."""
        index, mode = setting.index, setting.mode
        shape = (problem.weight.shape[0], problem.weight.shape[1])
        others = np.delete(np.arange(shape[0]), index if mode == BOTH else [])
        vectors = []
        if mode & COLUMNS:
            chosen = torch.from_numpy(index)
            best = absorbed(problem, base, index)[:, torch.from_numpy(others)]
            stored = store(best, setting.bits, problem.hessian[chosen][:, chosen])
            ones = np.ones(len(index), np.float16)
            vectors += list(zip(stored.values, ones if stored.scales is None else stored.scales, strict=True))
        if mode & ROWS:
            vectors += [round_vector(problem.weight[i].double(), setting.bits)[:2] for i in index]
        values = np.concatenate([v for v, _ in vectors])
        scales = None if setting.bits == 16 else np.array([s for _, s in vectors], np.float16)
        size = sum(len(v) for v, _ in vectors)
        return apply(CODER, CODER.encode(mode, index, values, shape, scales), base, size / (shape[0] * shape[1]))


OVERLAY = Channels()
