"""Tune the continuous values of a streamed model block by block, with frozen codes.

A model larger than memory takes no gradient end to end. Its blocks do, one by one: what goes into a block is what the
coded blocks before it deliver, and its aim is what the original's block makes of the original's input. Tuned are the
values that cost no bytes: the step of every matrix, and the vectors (norms, biases), which are rounded on their grid
as they will be stored. The best that was seen on windows that are not tuned on is kept, which may be the start.

One block of each model is in memory, with what goes into it and out of it for some thousand tokens, so that memory does
not grow with depth. Whether the whole is kept is decided by the KL on the correction tokens, as for models in memory.

Sources: BRECQ (arXiv:2102.05426) for blocks' outputs as aims; ClusComp (ACL 2025) for tuning them from inputs behind
coded blocks. Omitted: new integers, offsets (which all blocks share), and what is outside the chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bytecap.allocation.asymmetric_targets import passes_of
from bytecap.allocation.correction import unit_values
from bytecap.allocation.planner import Planner, State
from bytecap.job import Job
from bytecap.job.effort import Effort
from bytecap.model.chain import first_of
from bytecap.model.streaming import Pass, Streamed
from bytecap.model.texts import Window, iteration_windows
from bytecap.progress import Advance
from bytecap.recovery.kl_passes import Passes, same_again
from bytecap.recovery.tuning import Clock
from bytecap.system import allocator

RATE = 0.005  # first learning rate: in natural logarithms of a step, in mean sizes of a vector
_TOKENS = {"cpu": 8192, "cuda": 32_768}  # that are walked
_A_PASS = {"cpu": 1024, "cuda": 8192}  # tokens of one iteration
_HELD = 8  # one window in so many is not tuned on
_CHECKS = 4  # of a block, on those windows
_WARMING = 3  # iterations until the full rate


@dataclass
class _Batch:
    """One batch in front of a block.

    Attributes:
        mask: (batch, length) of real tokens.
        args, kwargs: of the coded model's block.
        aim: (batch, length, width), what the original makes of its own input.
        weight: 1 over the sum of squares of the aim.
    """

    mask: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    aim: Tensor
    weight: Tensor

    def error(self, block: nn.Module, weights: dict[str, Tensor]) -> Tensor:
        """Return the squared error of the block's output over the aim's square."""
        found: Tensor = first_of(functional_call(block, weights, self.args, self.kwargs))
        return (found - self.aim)[self.mask].square().sum() * self.weight


class _Tuned:
    """The tuned values of one block, by the names of its units."""

    def __init__(self, units: dict[str, str], block: nn.Module, planner: Planner, state: State) -> None:
        """`units` says which parameter of the block is which unit."""
        parameters = dict(block.named_parameters())
        vectors = {v.unit.name: v for v in planner.vectors if v.fisher.any()}
        self._matrices = {u: (n, parameters[n].detach()) for n, u in units.items() if u in state.coded}
        self._vectors = {u: (n, vectors[u]) for n, u in units.items() if u in vectors}
        self._steps = {u: state.steps[u] for u in self._vectors}
        device = next(iter(parameters.values())).device
        self.logs = torch.zeros(len(self._matrices), device=device, requires_grad=True)
        self.values = {
            u: torch.from_numpy(v.values.copy()).to(device).requires_grad_() for u, (_, v) in self._vectors.items()
        }

    def groups(self) -> list[dict[str, Any]]:
        """Return what an optimizer is given."""
        found = [{"params": [self.logs], "first": RATE}] if self._matrices else []
        return found + [
            {"params": [t], "first": RATE * max(float(t.detach().abs().mean()), 1e-8)} for t in self.values.values()
        ]

    def weights(self) -> dict[str, Tensor]:
        """Return the block's parameters as a file would hold them; gradients pass through rounding."""
        scales = torch.exp(self.logs)
        found = {n: w * scales[at] for at, (n, w) in enumerate(self._matrices.values())}
        for u, (n, v) in self._vectors.items():
            t = self.values[u]
            stored = replace(v, values=t.detach().cpu().numpy()).decode(self._steps[u])
            rounded = torch.from_numpy(stored).to(t.device).reshape(t.shape)
            found[n] = (t + (rounded - t.detach())).reshape(v.unit.shape)
        return found

    def snapshot(self) -> list[Tensor]:
        """Return copies of what is tuned."""
        return [t.detach().clone() for t in (self.logs, *self.values.values())]

    def restore(self, kept: Sequence[Tensor]) -> None:
        """Go back to a snapshot."""
        for t, old in zip((self.logs, *self.values.values()), kept, strict=True):
            t.data.copy_(old)

    def scales(self) -> dict[str, float]:
        """Return what the steps of matrices are multiplied by."""
        return dict(zip(self._matrices, torch.exp(self.logs).tolist(), strict=True))


def tune_streamed(
    job: Job, original: Streamed, planner: Planner, state: State, last: Sequence[str]
) -> tuple[tuple[Planner, State] | None, dict[str, Any]]:
    """Tune a plan; returns it with the same integers, None if its KL is no lower, and a record.

    Args:
        job: names the tokens and the effort.
        original: untouched model.
        planner: the units as they were coded.
        state: what would be shipped without recovery.
        last: matrices whose targets follow their steps, since they may be rounded anew to meet the cap.
    """
    assert job.recover is not None  # noqa: S101 (callers ask first)
    job.reporter.note(
        "recovery of a streamed model tunes steps, norms and biases block by block; codes stay. A model in memory gets "
        "new integers too"
    )
    quantized_copy = original.copy()
    passes = Passes(job, quantized_copy.module)
    quantized_copy.load(unit_values(planner, state))
    with allocator.no_holes(), same_again(job.device), job.reporter.step("recovery", 1) as advance:
        start = passes.check()
        work = _Walk(job, planner, state, original, quantized_copy)
        clock = work.run(job.recover, advance)
        tuned = work.settled(last)
        quantized_copy.load(unit_values(*tuned))
        passes.iterations, passes.read = clock.iterations, work.read
        kl = passes.check()
    better = sum(after < before for before, after in work.errors)
    job.reporter.note(
        f"recovery: {clock.iterations} iterations on {work.read:,} tokens in {clock.seconds:.0f} s lower the error of "
        f"{better} of {len(work.errors)} blocks; KL on the correction tokens {start:.4f} before, {kl:.4f} after"
    )
    stage = {
        "stage": "values", "kl": min(start, kl), "moves": clock.iterations, "seconds": round(clock.seconds, 1),
        "blocks": work.errors,
    }  # fmt: skip
    return tuned if kl < start else None, {
        "tokens": work.read, "kl_before": start, "stages": [stage], "curve": passes.curve,
    }  # fmt: skip


class _Walk:
    """Both models, block by block.

    Attributes:
        read: tokens that were tuned on.
        errors: relative error of each block's output before and after, on windows that are not tuned on.
    """

    def __init__(
        self, job: Job, planner: Planner, state: State, original: Streamed, quantized_copy: Streamed
    ) -> None:  # fmt: skip
        self._planner, self._state, self._original, self._copy = planner, state, original, quantized_copy
        kind = original.device.type
        pool = job.sets.recovery or job.sets.statistics
        chosen = next(iteration_windows(pool, min(_TOKENS[kind], sum(w.predicted for w in pool)), job.seed))
        held, own = chosen[::_HELD], [w for i, w in enumerate(chosen) if i % _HELD]
        self._data = [*self._passes(own or held, _A_PASS[kind])]
        self._own = len(self._data)
        self._data += self._passes(held, _A_PASS[kind])
        self._scales: dict[str, float] = {}
        self._vectors: dict[str, Tensor] = {}
        self.read, self.errors = sum(w.predicted for w in own or held), list[tuple[float, float]]()

    def _passes(self, windows: Sequence[Window], tokens: int) -> Iterator[tuple[Any, Tensor]]:
        for run, mask in passes_of(windows, tokens, str(self._original.device)):
            assert mask is not None  # noqa: S101 (streamed models read tokens)
            yield run, mask

    @torch.no_grad()
    def run(self, effort: Effort, advance: Advance) -> Clock:
        """Walk all blocks, or as many as a time allows; returns the clock."""
        lanes, count = (self._original, self._copy), self._original.chain.count
        waiting = [[Pass(x, run) for run, _ in self._data] for x in lanes]
        clock = Clock(effort, advance)
        try:
            cache: dict[Any, Tensor] = {}
            for lane, group in zip(lanes, waiting, strict=True):
                with lane.outside(cache):
                    calls = [p.advance() for p in group]
            del cache
            for number in range(count):
                with self._original.block(number):
                    aims = [self._taken(p.advance()) for p in waiting[0]]
                with self._copy.block(number) as block:
                    self._tune(number, block, self._batches(calls, aims), clock, (number + 1) / count)
                    if clock.done >= 1 and effort.seconds is not None:
                        break
                    calls = [p.advance() for p in waiting[1]]
                allocator.release()
        finally:
            for p in (p for group in waiting for p in group):
                p.cancel()
        return clock

    def _batches(self, calls: Sequence[Any], aims: Sequence[Tensor]) -> list[_Batch]:
        """Return the batches in front of a block, given its arguments and its aims."""
        found = []
        for (_, mask), (args, kwargs), aim in zip(self._data, calls, aims, strict=True):
            found.append(_Batch(mask, args, kwargs, aim, 1 / aim[mask].square().sum().clamp(min=1e-30)))
        return found

    def _taken(self, stop: Any) -> Tensor:
        """Return what a block has returned: the next block's input, or the last one's output."""
        found: Tensor = stop if isinstance(stop, Tensor) else self._original.chain.taken(*stop)
        return found

    def _tune(self, number: int, block: nn.Module, batches: Sequence[_Batch], clock: Clock, until: float) -> None:
        """Tune one block, which is left with the values that will be stored."""
        prefix = f"{self._copy.chain.path}.{number}."
        units = {n: self._copy.first[prefix + n] for n, _ in block.named_parameters()}
        tuned = _Tuned(units, block, self._planner, self._state)
        groups = tuned.groups()
        if not groups:
            return
        own, held = batches[: self._own], batches[self._own :]
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-12)
        best = first = _mean(block, tuned, held)
        kept, begun, made, seen = tuned.snapshot(), clock.done, 0, 0.0
        while clock.done < until:
            optimizer.zero_grad()
            with torch.enable_grad():
                own[made % len(own)].error(block, tuned.weights()).backward()
            done = (clock.done - begun) / (until - begun)
            for group in optimizer.param_groups:
                group["lr"] = group["first"] * min(1.0, (made + 1) / _WARMING) * (1 - done)
            optimizer.step()
            clock.tick()
            made += 1
            done = (clock.done - begun) / (until - begun)
            if done - seen >= 1 / _CHECKS or clock.done >= until:
                seen, now = done, _mean(block, tuned, held)
                if now < best:
                    best, kept = now, tuned.snapshot()
        tuned.restore(kept)
        self.errors.append((first, best))
        self._scales |= tuned.scales()
        self._vectors |= {n: t.detach().cpu() for n, t in tuned.values.items()}
        parameters = dict(block.named_parameters())
        for n, w in tuned.weights().items():
            parameters[n].data = w

    def settled(self, last: Sequence[str]) -> tuple[Planner, State]:
        """Return the units and the state with what was found; vectors' bytes are priced anew."""
        planner, steps, coded = self._planner, dict(self._state.steps), dict(self._state.coded)
        for n, scale in self._scales.items():
            steps[n] *= scale
            coded[n] = coded[n].at_step(coded[n].code.step * scale)
        vectors = [
            replace(v, values=self._vectors[n].numpy().copy()) if (n := v.unit.name) in self._vectors else v
            for v in planner.vectors
        ]
        matrices = [
            p.moved(p.weight * (self._scales[n] - 1)) if (n := p.unit.name) in last and n in self._scales else p
            for p in planner.matrices
        ]
        rates = {v.unit.name: v.rate(steps[v.unit.name], self._state.shared) for v in vectors}
        state = replace(self._state, steps=steps, coded=coded, rates={**self._state.rates, **rates})
        return replace(planner, matrices=matrices, vectors=vectors), state


def _mean(block: nn.Module, tuned: _Tuned, batches: Sequence[_Batch]) -> float:
    """Return the mean relative error of a block as it would be stored."""
    weights = tuned.weights()
    return sum(float(b.error(block, weights)) for b in batches) / len(batches)
