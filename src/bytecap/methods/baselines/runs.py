"""Run `--method golf` and `--method uniform` with the same tokens, container and cap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bytecap.calibration.statistics import moments
from bytecap.errors import BudgetError, UsageError
from bytecap.job import Job, Outcome, Section
from bytecap.types import as_matrix


def run_golf(job: Job) -> Outcome:
    """Run the record-shaped Parameter Golf quantizer on plain second moments of inputs."""
    from bytecap.methods.baselines.golf import golf_sections
    from bytecap.methods.baselines.golf_coders import WRITERS
    from bytecap.methods.baselines.residual import Residual

    chosen: dict[str, Any] = {"coder": "best", "lowrank_bits": 0, "embedding_power": 1.0}
    unknown = sorted(set(job.options) - set(chosen))
    if unknown:
        raise UsageError(f"method golf has no option {unknown[0]!r} (there are {', '.join(chosen)})")
    chosen |= job.options
    if chosen["coder"] not in WRITERS or chosen["lowrank_bits"] not in range(9):
        raise UsageError(f"golf has no coder {chosen['coder']!r}, or no factors of {chosen['lowrank_bits']!r} bits")
    how: dict[str, Any] = {"device": job.device, "coder": chosen["coder"], "embedding_power": chosen["embedding_power"]}
    how["residual"] = Residual(chosen["lowrank_bits"]) if chosen["lowrank_bits"] else None
    hessians, embeddings = second_moments(job)
    with job.reporter.step("bisection to the cap", 1):
        return _outcome(
            job, "golf", lambda room: golf_sections(job.model.units, matrices(job), hessians, embeddings, room, **how)
        )


def second_moments(job: Job) -> tuple[dict[str, Tensor], set[str]]:
    """Return plain second moments (cols, cols) of the inputs of linear layers, and the names of embedding tables."""
    found = moments(job, guided=False)
    embeddings = job.model.embeddings()
    hessians = {
        n: torch.stack([u.moment.cpu() for u in us]).sum(0) for n, us in found.uses.items() if n not in embeddings
    }
    return hessians, embeddings


def run_uniform(job: Job) -> Outcome:
    """Round to nearest at the bit width that fits."""
    from bytecap.methods.baselines.uniform import uniform

    with job.reporter.step("bit width", 1):
        return _outcome(job, "uniform", lambda room: uniform(job.model.units, matrices(job), room))


def _outcome(job: Job, name: str, sections: Callable[[int], dict[str, Section]]) -> Outcome:
    """Return an outcome under the cap; a refusal names the floor of the whole file."""
    capacity = _capacity(job)
    try:
        return Outcome(sections(capacity), b"", math.nan, math.nan, math.nan, name)
    except BudgetError as exc:
        floor = exc.floor + job.budget - capacity
        largest = max(job.model.units, key=lambda u: u.parameters)
        raise BudgetError(
            f"a budget of {job.budget:,} bytes is below the smallest reachable size of about {floor:,}: {exc}; "
            f"the largest unit is {largest.name}",
            floor,
        ) from exc


def matrices(job: Job) -> dict[str, Any]:
    """Return float32 values of every unit as (rows, cols), on the CPU."""
    found = {}
    for u in job.model.units:
        found[u.name] = as_matrix(u, job.model.tensor(u).detach().float().cpu()).contiguous()
    return found


def _capacity(job: Job) -> int:
    """Return the bytes left for sections, less the directory's growth with longer sections."""
    blank = {u.name: Section(3, b"") for u in job.model.units}
    growth = sum(3 if u.parameters > 1 << 13 else 1 for u in job.model.units)
    return job.budget - job.size(blank, b"") - growth
