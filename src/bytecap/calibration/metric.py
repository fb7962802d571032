"""Turn raw statistics into the one metric that a coder minimises, in nats per token.

Every unit gets `H` and `G` such that an error `E = W^ - W` of shape (rows, cols) costs::

    D = 1/2 * sum_i G_i * E_i H E_i^T      with mean(G) = 1

Several uses of one tensor (a tied embedding and head) are joined by a shared column metric and row factors
from per-row traces. Rows that calibration never touched get the energy of half a token, not zero.
Units without a known use (norms, biases) have a diagonal Fisher only.

Most rows of a vocabulary are rare, and what a few thousand tokens say about the energy of one is whether it came up.
Where a table is head and embedding at once, the head knows better: its row energies are the model's own predictions of
how often a token comes, summed over all positions. Rows of lookups that came up seldom are drawn towards these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bytecap.calibration.collectors import Use
from bytecap.calibration.sums import Statistics
from bytecap.calibration.triangle import Triangle, factor_in_place
from bytecap.errors import CheckpointError
from bytecap.types import Unit

_UNSEEN_TOKENS = 0.5  # tokens' worth of gradient energy given to every row
_PREDICTED_TOKENS = 0.02  # the same where every row is predicted
_TEMPER = 0.6  # power of predicted frequencies: text to come is less like the text at hand than that is like itself
_PRIOR = 5.0  # occurrences that the prediction counts for


@dataclass(frozen=True)
class Metric:
    """The quadratic form of a matrix unit.

    Attributes:
        hessian: float64, shape (cols, cols); already holds the gradient scale.
        rows: float64, shape (rows,), mean 1.
    """

    hessian: Tensor
    rows: Tensor

    def scaled(self, factor: float) -> Metric:
        """Return this form times a correction factor."""
        return replace(self, hessian=self.hessian * factor)

    def distortion(self, error: Tensor) -> float:
        """Return `1/2 sum_i G_i e_i H e_i^T` of an error (rows, cols), in nats per token."""
        e = error.double()
        return float(((e @ self.hessian) * e).sum(1) @ self.rows) / 2


def _looked_up(use: Use) -> bool:
    """Return whether a use is a lookup, whose weight is its whole energy."""
    weight = float(use.weight)
    return weight > 0 and math.isclose(weight, float(use.rows.sum()), rel_tol=1e-5)


def _expected(uses: Sequence[Use], tokens: int) -> tuple[list[Use], float]:
    """Draw the rows of lookups towards the frequencies that a head over the same rows predicts.

    Of `n` occurrences where `m` were expected, `(n n + c m) / (n + c)` are believed in: what comes up often is what it
    is, also where no model predicts it, such as the token in front of every document.

    Returns:
        The uses, and the tokens' worth of energy that every row is given besides.
    """
    heads = [u.rows / u.rows.sum() for u in uses if not _looked_up(u) and float(u.rows.sum()) > 0]
    if len(heads) in {0, len(uses)} or not all(len(h) == len(uses[0].rows) for h in heads):
        return list(uses), _UNSEEN_TOKENS
    frequency = torch.stack(heads).mean(0) ** _TEMPER
    expected = tokens * frequency / frequency.sum()
    return [u.with_rows(_believed(u.rows, expected)) if _looked_up(u) else u for u in uses], _PREDICTED_TOKENS


def _believed(rows: Tensor, expected: Tensor) -> Tensor:
    """Return row energies (rows,) drawn towards expected occurrences (rows,); their sum stays."""
    total = rows.sum()
    seen = rows * (expected.sum() / total)
    believed = (seen * seen + _PRIOR * expected) / (seen + _PRIOR)
    return believed * (total / believed.sum())


def _normal_form(use: Use, tokens: int, unseen: float) -> tuple[Tensor, Tensor]:
    """Return (H, G) of one use with smoothed rows; H carries the scale and G has mean 1."""
    rows = use.rows + unseen * float(use.rows.sum()) / max(1, tokens)
    mean = float(rows.mean())
    scale = mean / max(float(use.weight), 1e-300) / tokens
    return use.moment * scale, rows / max(mean, 1e-300)


def join(uses: Sequence[Use], tokens: int) -> Metric:
    """Join all uses of a tensor into one metric.

    Args:
        uses: statistics of each use.
        tokens: number of predicted tokens behind them.
    """
    expected, unseen = _expected(uses, tokens)
    forms = [_normal_form(u, tokens, unseen) for u in expected]
    hessian = forms[0][0] if len(forms) == 1 else torch.stack([h for h, _ in forms]).sum(0)
    traces = [float(h.diagonal().mean()) for h, _ in forms]
    total = max(sum(traces), 1e-300)
    rows = torch.stack([g * (t / total) for (_, g), t in zip(forms, traces, strict=True)]).sum(0)
    return Metric(hessian, rows)


def metrics(units: Sequence[Unit], statistics: Statistics) -> dict[str, Metric]:
    """Return the metric of every matrix unit that the probe saw in use."""
    return {u.name: join(statistics.uses[u.name], statistics.tokens) for u in units if u.name in statistics.uses}


def diagonal(unit: Unit, statistics: Statistics) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the mean squared gradient per token of a unit without a known use, in stored layout; or zeros."""
    found = statistics.diagonal.get(unit.name)
    return found if found is not None else np.zeros(unit.shape)


def factor(metric: Metric, damping: float, order: bool = True) -> tuple[Triangle, Tensor]:
    """Factor the damped Hessian by Cholesky.

    Args:
        metric: of the unit.
        damping: added to the diagonal, as a fraction of its mean.
        order: put columns of large diagonal last, so that they are rounded first and the rest absorbs their error.

    Returns:
        L, float32 (cols, cols), of the permuted Hessian; and the permutation (cols,). The decoder needs neither.

    Raises:
        CheckpointError: the Hessian is not finite.
    """
    h = metric.hessian
    diag = h.diagonal()
    mean = float(diag.mean())
    perm = torch.argsort(diag, stable=True) if order else torch.arange(len(h), device=h.device)
    if not math.isfinite(mean):
        raise CheckpointError("the statistics of a unit are not finite: there is no error to weigh")
    ridge = max(damping * mean, 1e-30)
    while True:
        damped = h.mT[perm[:, None], perm].mT
        damped.diagonal().add_(ridge)
        lower, positive = factor_in_place(damped)
        del damped
        if positive:
            lower = lower.float()
            return Triangle.of(lower), perm
        ridge *= 10  # numerically singular: more damping until it factors
