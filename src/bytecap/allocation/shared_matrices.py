"""Factor matrices on the ranks that have their statistics, and give the factors to all ranks.

Afterwards every rank holds all units, as one process would, so that any of them can round any unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from bytecap.calibration.triangle import Triangle
from bytecap.job import Job
from bytecap.quantization.quantizer import Prepared
from bytecap.types import Unit, as_matrix


def shared_matrices(
    job: Job, owner: Mapping[str, int], factored: Callable[[Unit], Prepared | None]
) -> dict[str, Prepared]:
    """Return all matrix units by name, the same on every rank.

    Args:
        job: the model and its ranks.
        owner: rank that has the statistics of a unit.
        factored: a unit of this rank with its factor; None for what is no matrix.
    """
    units = [u for u in job.model.units if u.name in owner]
    own = {u.name: factored(u) for u in units if owner[u.name] == job.ranks.rank}
    found: dict[str, Prepared] = {}
    for unit in units:
        weight = partial(_weight, job, unit)
        prepared = shared_factor(job, unit, own.pop(unit.name, None), owner[unit.name], weight)
        if prepared is not None:
            found[unit.name] = prepared
    return found


def _weight(job: Job, unit: Unit) -> Tensor:
    return as_matrix(unit, job.model.tensor(unit).detach()).float()


def shared_factor(
    job: Job, unit: Unit, own: Prepared | None, source: int, weight: Callable[[], Tensor]
) -> Prepared | None:
    """Return one unit of rank `source` on every rank.

    Args:
        job: its ranks, and the device that the unit goes to.
        unit: the unit.
        own: on rank `source`, the unit with its factor; None for what is no matrix.
        source: the rank that has factored it.
        weight: gives the weights (rows, cols) on other ranks.
    """
    if job.ranks.size == 1:
        return own
    tensors = None
    if source == job.ranks.rank:
        tensors = [] if own is None else [own.rows, own.row_step, own.order, own.lower.values]
        tensors += [own.hessian] if own is not None and own.hessian is not None else []
    arrived = job.ranks.spread(tensors, source, job.device)
    if source == job.ranks.rank:
        return own
    if not arrived:
        return None
    rows, row_step, order, lower, *hessian = arrived
    return Prepared(unit, weight(), rows, row_step, Triangle(lower, len(order)), order, *hessian)
