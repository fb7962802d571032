"""Tune a file of blocks end to end at the same bytes: new codes in the types of the plan, then scales and vectors.

Tensors are coded anew first (`bytecap.runtimes.gguf.recoding`), then codes are frozen. Scales and minimums of blocks,
vectors, and tables that a directory keeps in 16 bits follow Adam on the KL to the original; they are rounded to the
type that the file has for them in every pass, with the gradient going straight through. From time to time the result is
measured on the correction tokens, and the best of these is written. Integer sub-scales stay as they are: they are
shared with codes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.allocation.asymmetric_targets import order_of
from bytecap.job import Job
from bytecap.job.effort import Effort
from bytecap.model.forward import pass_tokens
from bytecap.model.quantized_copy import Values, copy_of, load_values
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.recovery import loop
from bytecap.recovery.group_walk import GroupWalk
from bytecap.recovery.kl_passes import Passes, same_again
from bytecap.recovery.loop import Clock, Schedule
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.numbers import RATE, Owner, owners_of, written
from bytecap.runtimes.gguf.places import Layout
from bytecap.runtimes.gguf.recoding import BlockUnits, code_anew
from bytecap.runtimes.gguf.rounding import Coding
from bytecap.runtimes.gguf.solve import Found, keep_of, rounded_values
from bytecap.runtimes.gguf.streamed_tuning import tune_streamed_blocks

_SCHEDULE = Schedule(warming=10, checks=8, apart=5, last=0.1, what="scales and vectors")
_CODING = 0.7  # share of the effort in which tensors are coded anew
_MANY = 100  # iterations from which that pays: in 28 new codes were no better, in 140 they were (LOG.md)
_MANY_TIMED = 300  # that fit into a time: some 140 are left where codings take a third of their stage, a guess (LOG.md)


@dataclass(frozen=True)
class _File:
    """The plan of a file, and what belongs to it: see `tune_blocks`."""

    layout: Layout
    items: Sequence[Item]
    coding: Coding
    found: Found
    vectors: str
    tables: Collection[str]


def tune_blocks(
    job: Job, layout: Layout, items: Sequence[Item], coding: Coding, found: Found, vectors: str = "F32",
    tables: Collection[str] = (),
) -> tuple[Found, dict[str, Any]]:  # fmt: skip
    """Return the plan with new codes and tuned numbers where these measure better on the correction tokens; a record.

    Args:
        job: with an effort of recovery.
        layout: all tensors of the file that may move.
        items: those in block formats.
        coding: the family of formats.
        found: the plan.
        vectors: the file's type of vectors: F32, F16 or BF16.
        tables: names of matrices of that type which are tuned as well, number by number.
    """
    assert job.recover is not None  # noqa: S101 (callers ask first)
    if isinstance(job.model, StreamedModel):
        return tune_streamed_blocks(job, job.model, layout, items, found, vectors)
    quantized_copy, stages = copy_of(job.model.module), list[dict[str, Any]]()
    passes, file = Passes(job, quantized_copy), _File(layout, items, coding, found, vectors, tables)
    with same_again(job.device), job.reporter.step("recovery", 1) as advance:
        load_values(quantized_copy, _values(job, file))
        start = best = passes.check()
        many = _MANY if job.recover.seconds is None else _MANY_TIMED
        anew = _CODING if _iterations(job.recover, passes, items) >= many else 0.0
        (most, rest), spare = job.recover.part(anew), 0.0
        for stage, what, effort, share in (
            (_code, "codes", most, anew), (_tune_numbers, "scales and vectors", rest, 1 - anew)
        ):  # fmt: skip
            if not share:
                continue
            clock = Clock(effort.longer(spare), advance, share)
            kl, tuned = stage(job, passes, quantized_copy, file, clock, best)
            spare = clock.left
            stages.append({"stage": what, "moves": clock.iterations, "kl": kl, "seconds": round(clock.seconds, 1)})
            job.reporter.note(
                f"recovery: {clock.iterations} iterations of {what} in {clock.seconds:.0f} s, KL on the correction "
                f"tokens {best:.4f} before, {kl:.4f} after{'' if kl < best else ': left as they were'}"
            )
            if tuned is not None and kl < best:
                best, file = kl, replace(file, found=tuned)
    passes.say_short()
    record = {"tokens": passes.read, "kl_before": start, "stages": stages, "curve": passes.curve}
    return (replace(file.found, predicted=best) if best < start else found), record


def _iterations(effort: Effort, passes: Passes, items: Sequence[Item]) -> float:
    """Return how many iterations an effort is, two of which are made to see how long they take where it is a time."""
    if effort.seconds is None:
        return float(effort.steps or 0)
    started = 0.0
    for _ in range(2):  # the first compiles kernels
        started = time.monotonic()
        passes.gradients([items[0].place.unit])
    return effort.seconds / max(1e-9, time.monotonic() - started)


def _values(job: Job, file: _File) -> Values:
    return rounded_values(job.model, file.items, file.found.rounded)


def _code(
    job: Job, passes: Passes, quantized_copy: nn.Module, file: _File, clock: Clock, start: float
) -> tuple[float, Found | None]:
    """Code the tensors anew; returns the KL on the correction tokens, and the plan, None if it took too long."""
    units = BlockUnits(job, file.items, file.coding, file.found)
    windows = job.sets.statistics
    order = order_of([u for u in job.model.units if u.name in units.names], job.model.module, windows, job.device)
    tokens = pass_tokens(job.model.module, torch.device("cpu"))  # waiting passes are many
    if not code_anew(units, passes, quantized_copy, GroupWalk(job, order, strength=1.0, tokens=tokens), clock):
        job.reporter.note("recovery: coding takes more than half of the time for new codes: the old ones are kept")
        return start, None
    return passes.check(), replace(file.found, rounded={**file.found.rounded, **units.rounded})


def _tune_numbers(
    job: Job, passes: Passes, quantized_copy: nn.Module, file: _File, clock: Clock, start: float
) -> tuple[float, Found | None]:
    """Tune scales, vectors and tables at frozen codes; returns the lowest KL, and the plan that has it."""
    load_values(quantized_copy, _values(job, file))
    owners = owners_of(job, file.layout, file.items, file.found, file.vectors, file.tables)
    leaves = [t for o in owners for p in o.parts for t in p.leaves]
    optimizer = loop.adam(((t, RATE) for t in leaves), betas=(0.9, 0.98))

    def check() -> tuple[float, list[Tensor]]:
        with torch.no_grad():
            passes.load({o.unit.name: o.values() for o in owners})
        return passes.check(), [t.detach().clone() for t in leaves]

    iterate = partial(_iterate, passes, owners, optimizer)
    best, kept = loop.tune(iterate, check, clock, _SCHEDULE, start, job.reporter.note)
    if kept is None:
        return best, None
    with torch.no_grad():
        for leaf, value in zip(leaves, kept, strict=True):
            leaf.copy_(value)
    return best, written(file.items, file.found, owners, keep_of(job.model))


def _iterate(passes: Passes, owners: Sequence[Owner], optimizer: torch.optim.Adam, rate: float) -> float:
    """Make one iteration at a share of the first rate; returns the mean KL before it."""
    optimizer.zero_grad()
    kl = passes.backward({o.unit.name: o.values() for o in owners})
    loop.set_rates(optimizer, rate)
    optimizer.step()
    return kl
