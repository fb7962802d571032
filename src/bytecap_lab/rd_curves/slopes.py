"""Expand the KL around the operating point to second order, for a part of the prediction `OverlayCandidate.alone`.

A unit coded anew has a new rounding error in place of the old one. What that gains is the small difference of a slope
and a curvature that are each ten times as large, so 5% of either decides the sign of most predictions. Correction
factors (`bytecap.allocation.correction`) do not serve: they are measured at the original and on other tokens, where
errors cost about 10% more than on those that the rounding has seen. Here slope and curvature are measured at the
operating point on the
same tokens, and the metric of each role is scaled to the curvature along what new rounding errors look like: the units'
own errors with a random sign for each row, and the opposite of it, so that slopes and all odd terms cancel.

Cost: one backward pass, and two forward passes for each role.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bytecap.allocation.correction import role_name
from bytecap.calibration.kl_gradient import gradient
from bytecap.format.decoder import from_matrix
from bytecap.job import Job
from bytecap.model.evaluation import kl_each
from bytecap.model.forward import pass_tokens
from bytecap.model.quantized_copy import Values
from bytecap.model.texts import Window, leading
from bytecap.system.cache import Store, digest
from bytecap.types import as_matrix
from bytecap_lab.rd_curves.base import Base

_TOKENS = 131_072  # at most; of the statistics
_SIZE = math.sqrt(2)  # of the perturbation, in errors: that of a difference of two independent ones

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Slopes:
    """The KL's expansion at the base.

    Attributes:
        gradients: nats per token, (rows, cols) by unit name.
        factors: curvature over that of the unit's metric, by unit name; the same for all units of a role.
    """

    gradients: Mapping[str, Tensor]
    factors: Mapping[str, float]


def measure_slopes(job: Job, base: Base, quantized_copy: nn.Module, store: Store, key: str) -> Slopes:
    """Return the expansion at the base, from the cache if it is there.

    Args:
        job: model and texts.
        base: the operating point.
        quantized_copy: a module that holds it.
        store: looked into first.
        key: hash of model, texts and base.
    """
    key = digest(key, "slopes", _TOKENS, _SIZE)
    kept, factors = store.arrays(key), store.get(key)
    if kept is None or factors is None:
        kept, factors = _measure(job, base, quantized_copy)
        store.put_arrays(key, kept)
        store.put(key, factors)
    return Slopes({n: as_matrix(p.unit, torch.from_numpy(kept[n])) for n, p in base.problems.items()}, factors)


def _measure(job: Job, base: Base, quantized_copy: nn.Module) -> tuple[dict[str, Array], dict[str, float]]:
    windows = leading(job.sets.statistics, _TOKENS)
    with job.reporter.step("slopes", sum(w.predicted for w in windows)) as advance:
        _, slopes = gradient(
            job.model.module, quantized_copy, list(base.problems), windows, device=job.device,
            batch=pass_tokens(job.model.module, torch.device(job.device)), progress=advance,
        )  # fmt: skip
    moves = {n: _SIZE * _signed(base, n, job.seed) for n in base.problems}
    return {n: g.cpu().numpy() for n, g in slopes.items()}, factors_along(job, base, quantized_copy, windows, moves)


def factors_along(
    job: Job, base: Base, quantized_copy: nn.Module, windows: Sequence[Window], moves: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return measured over expected curvature of each role, or the correction factor where a role has none.

    Args:
        job: the model.
        base: the operating point.
        quantized_copy: a module that holds it.
        windows: tokens to measure on.
        moves: perturbation of every unit, (rows, cols).
    """
    roles: dict[str, list[str]] = {}
    for n in base.problems:
        roles.setdefault(role_name(n), []).append(n)

    def moved(sign: int, names: Sequence[str]) -> Values:
        return {n: from_matrix(base.problems[n].unit, (base.units[n].values + sign * moves[n]).numpy()) for n in names}

    variants: dict[str, Values] = {
        f"{role} {sign}": moved(sign, names) for role, names in roles.items() for sign in (1, -1)
    }
    with job.reporter.step("curvatures", 1 + len(variants)) as advance:
        measured = kl_each(
            job.model.module, quantized_copy, variants | {"": {}}, windows, device=job.device, advance=advance
        )
    found: dict[str, float] = {}
    for role, names in roles.items():
        real = (measured[f"{role} 1"][0] + measured[f"{role} -1"][0]) / 2 - measured[""][0]
        metric = sum(p.distortion(p.weight + moves[n]) for n in names for p in [base.problems[n]])
        found |= {n: real / metric if metric > 0 and real > 0 else base.kappa.get(n, 1.0) for n in names}
    return found


def _signed(base: Base, name: str, seed: int) -> Tensor:
    """Return a unit's error (rows, cols) with a random sign for each row."""
    error = base.units[name].values - base.problems[name].weight
    rng = np.random.default_rng(int(digest("signs", name, seed), 16))
    return error * torch.from_numpy(rng.choice(np.array([-1, 1], np.float32), (len(error), 1)))
