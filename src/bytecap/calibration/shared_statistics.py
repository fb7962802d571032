"""Keep statistics that are divided among ranks in the store of rank 0, and divide what is found there.

One process and several keep the same arrays under the same name, so either goes on from the other's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bytecap.calibration.collectors import Use
from bytecap.calibration.sums import Statistics
from bytecap.job import Job
from bytecap.system.ranks import owners

Arrays = dict[str, npt.NDArray[Any]]
PARTS = ("moment", "rows", "weight")


def flat(found: Statistics) -> Arrays:
    """Return statistics as named arrays, and use them up: halves of moments are let go of one by one."""
    arrays: Arrays = {"tokens": np.array(found.tokens)}
    for name in list(found.uses):
        arrays |= _flat_uses(name, found.uses.pop(name))
    return arrays | {f"diagonal {n}": a for n, a in found.diagonal.items()}


def whole(kept: Arrays, device: str, owner: dict[str, int] | None = None) -> Statistics:
    """Read what `flat` returned."""
    uses: dict[str, list[Use]] = {}
    diagonal: dict[str, Any] = {}
    for name, array in kept.items():
        kind, _, unit = name.partition(" ")
        if kind == "diagonal":
            diagonal[unit] = array
        elif kind == "moment":
            number, _, of = unit.partition(" ")
            parts = [torch.from_numpy(kept[f"{k} {number} {of}"]).to(device) for k in PARTS]
            uses.setdefault(of, []).append(Use(*parts))
    return Statistics(uses, diagonal, int(kept["tokens"]), owner or {})


def shared(job: Job, key: Callable[[], str], make: Callable[[], Statistics]) -> Statistics:
    """Return divided statistics, which are made and kept where rank 0 does not find them.

    Args:
        job: its ranks, and their store.
        key: makes their name, on rank 0.
        make: makes them, on all ranks.
    """
    ranks = job.ranks
    name = ranks.from_first(key)
    with job.store.lock(name):
        kept = job.store.own_arrays(name) if ranks.first else None
        shapes = ranks.from_first(lambda: None if kept is None else {n: list(a.shape) for n, a in kept.items()})
        if shapes is not None:
            return _divided(job, kept, shapes)
        found = make()
        arrays = _gathered(job, found)
        if ranks.first:
            job.store.put_arrays(name, arrays)
        return found


def _flat_uses(name: str, uses: list[Use]) -> Arrays:
    return {
        f"{kind} {i} {name}": getattr(use, kind).cpu().numpy() for i, use in enumerate(uses) for kind in PARTS
    }  # fmt: skip


def _divided(job: Job, kept: Arrays | None, shapes: dict[str, list[int]]) -> Statistics:
    """Give every unit's arrays to one rank."""
    ranks, costs = job.ranks, dict[str, float]()
    for name, shape in shapes.items():
        kind, _, unit = name.partition(" ")
        if kind == "moment":
            of = unit.partition(" ")[2]
            costs[of] = costs.get(of, 0.0) + float(shape[-1]) ** 2
    owner = dict(zip(costs, owners(list(costs.values()), ranks.size), strict=True))
    own: Arrays = {}
    for name in shapes:
        kind, _, unit = name.partition(" ")
        array = ranks.from_first(partial((kept or {}).pop, name))
        if kind not in PARTS or owner[unit.partition(" ")[2]] == ranks.rank:
            own[name] = array
    return whole(own, job.device, owner)


def _gathered(job: Job, found: Statistics) -> Arrays:
    """Return the arrays of all ranks on rank 0; the others return their own."""
    arrays: Arrays = {"tokens": np.array(found.tokens)}
    for name, source in found.owner.items():
        uses = found.uses.get(name)
        tensors = None if uses is None else [getattr(u, kind) for u in uses for kind in PARTS]
        arrived = job.ranks.spread(tensors, source, job.device)
        if job.ranks.first:
            groups = zip(*[iter(arrived)] * len(PARTS), strict=True)
            arrays |= _flat_uses(name, [Use(*parts) for parts in groups])
    return arrays | {f"diagonal {n}": a for n, a in found.diagonal.items()}
