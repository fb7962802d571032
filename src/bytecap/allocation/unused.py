"""Handle units that no gradient reaches, so that calibration would let any error in them cost nothing.

It may cost everything: a vision tower in a model calibrated on text, an expert that the texts never called for. They
are kept at a rate that is safe without any knowledge: vectors exactly, matrices in the source's own floats with five
bits of mantissa, some nine bits a weight. `unused: drop` stores them as coarsely as the plan likes.

Experts of one stack that no token has reached are weighed like an average one of those that were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bytecap.allocation.vector_unit import VectorUnit
from bytecap.calibration.collectors import Use
from bytecap.calibration.metric import Metric
from bytecap.errors import UsageError
from bytecap.format.coders import Shared, coder, run
from bytecap.format.coders.base import CODER as BASE
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.job import Job, Section
from bytecap.progress import warn
from bytecap.quantization.quantizer import Prepared
from bytecap.quantization.short_floats import section
from bytecap.types import Unit, as_matrix

CHOICES = ("keep", "drop")
_MANTISSA_BITS = 5


def check_choice(choice: str) -> None:
    """Refuse a word that is neither `keep` nor `drop`."""
    if choice not in CHOICES:
        raise UsageError(f"unknown choice {choice!r} for units that no gradient reaches: use {' or '.join(CHOICES)}")


def keep_unused(job: Job, matrices: Sequence[Prepared], vectors: Sequence[VectorUnit]) -> dict[str, Section]:
    """Sections of the units that no gradient reaches, which are not planned then; says which they are.

    Args:
        job: whose model they belong to; its option `unused` may be `drop`, to have them planned like all others.
        matrices: prepared ones.
        vectors: units without a known use.
    """
    idle = [p.unit for p in matrices if not float(p.rows.sum())] + [v.unit for v in vectors if not v.fisher.any()]
    if not idle:
        return {}
    names = ", ".join(u.name for u in idle[:8]) + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")
    head = f"no gradient reaches {names} on the calibration tokens: stored"
    if job.config.unused == "drop":
        warn(job.reporter, f"{head} coarsely, as asked")
        return {}
    found = {}
    for u in idle:
        values = as_matrix(u, job.model.tensor(u).detach().float().cpu()).numpy()
        exact = min(u.matrix_shape) == 1
        found[u.name] = (
            Section(EXACT.tag, EXACT.encode(np.ascontiguousarray(values), u.dtype))
            if exact
            else section(values, u.dtype, _MANTISSA_BITS)
        )
        if job.base is not None and job.base.has(u, _decoded(u, found[u.name])):
            found[u.name] = Section(BASE.tag, b"")
    size = sum(len(s.data) for s in found.values())
    warn(
        job.reporter, f"{head} at about nine bits a weight, {size:,} bytes in all (--unused drop stores them coarsely)"
    )
    return found


def _decoded(unit: Unit, section: Section) -> npt.NDArray[Any]:
    return run([coder(section.tag).decode(section.data, unit.matrix_shape, unit.dtype, Shared())])[0]


def advice(kept: Mapping[str, int]) -> str:
    """Return the advice to add to the refusal of a budget."""
    if not kept:
        return ""
    return (
        f"; {len(kept)} units that no gradient reaches hold {sum(kept.values()):,} (--unused drop stores them coarsely)"
    )


def even_experts(unit: Unit, uses: Sequence[Use], metric: Metric) -> tuple[Metric, int]:
    """The metric of a stack with rows of experts that were never reached weighed like the others, and their number."""
    if not unit.stacked:
        return metric, 0
    energy = torch.stack([u.rows for u in uses]).sum(0).reshape(unit.shape[0], -1)
    unseen = energy.sum(1) == 0
    count = int(unseen.sum())
    if count in {0, len(unseen)}:
        return metric, 0
    rows = metric.rows.reshape(unit.shape[0], -1).clone()
    rows[unseen] = rows[~unseen].mean(0)
    return replace(metric, rows=rows.reshape(-1)), count
