"""Tune the continuous values of a streamed model by the KL to the original, with frozen codes.

Tuned are values that cost no bytes wherever they stand: the step of every matrix in a block, and the blocks' vectors
(norms, biases), which are rounded on their grid as they will be stored. Gradients are those of the whole model, made
block by block (`bytecap.recovery.streamed_gradients`). Five copies of the tuned values are held at most: themselves,
Adam's two means, the best, and gradients or, at a check, what may become the best.
The best that was seen on the correction tokens is kept, or nothing, as for models in memory.

Tried and no better on held-out text: each block's output as its own aim (LOG.md).
Omitted: new integers, offsets, and what is outside the chain of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bytecap.allocation.correction import unit_values
from bytecap.allocation.planner import Planner, State
from bytecap.job import Job
from bytecap.model.forward import pass_tokens
from bytecap.model.quantized_copy import Values
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.streaming import Streamed
from bytecap.recovery import loop
from bytecap.recovery.kl_passes import Passes, same_again
from bytecap.recovery.loop import Clock, Schedule
from bytecap.recovery.streamed_gradients import kl_backward
from bytecap.system import allocator

RATE = 0.01  # first learning rate: in natural logarithms of a step, in mean sizes of a vector
_SCHEDULE = Schedule(warming=3, checks=6, apart=2)
_SAID = (
    "recovery of a streamed model tunes steps, norms and biases of its blocks; codes stay. A model in memory gets new "
    "integers too"
)
_MOST = 2.0**30  # steps of a vector's value


class Tuned(Protocol):
    """Values of a streamed model's blocks that are tuned."""

    def rates(self) -> list[tuple[Tensor, float]]:
        """Return what is tuned, with first learning rates."""
        ...

    def weights(self, number: int, block: nn.Module) -> Mapping[str, Tensor]:
        """Return the tuned parameters of a loaded block as a file would hold them; gradients pass through rounding."""
        ...

    def storable(self) -> bool:
        """Return whether a file can hold the values; moves that diverge end that."""
        ...

    def snapshot(self) -> list[Tensor]:
        """Return copies of what is tuned."""
        ...

    def restore(self, kept: Sequence[Tensor]) -> None:
        """Go back to a snapshot."""
        ...

    def stored(self) -> Values:
        """Return all values in stored layout, as a file would hold them."""
        ...


class StreamedValues:
    """The tuned values of a settled plan.

    Attributes:
        logs: (matrices,), logarithms of what steps are multiplied by.
        vectors: by vector, its values.
    """

    def __init__(self, planner: Planner, state: State, source: Streamed) -> None:
        """`source` is a coded model with the values of `state`, whose blocks are tuned."""
        self._planner, self._state, self._source = planner, state, source
        inside = source.chain.holds
        self._places = {n: at for at, n in enumerate(n for n in state.coded if inside(n))}
        self._vectors = {v.unit.name: v for v in planner.vectors if inside(v.unit.name) and v.fisher.any()}
        self.logs = torch.zeros(len(self._places), device=source.device, requires_grad=True)
        self.vectors = {
            n: torch.from_numpy(v.values.copy()).to(source.device).requires_grad_() for n, v in self._vectors.items()
        }

    @property
    def names(self) -> list[str]:
        """Return the names of tuned matrices, in the order of `logs`."""
        return list(self._places)

    def rates(self) -> list[tuple[Tensor, float]]:
        """Return what is tuned, with first learning rates."""
        logs = [(self.logs, RATE)] if self._places else []
        return logs + [(t, RATE * max(float(t.detach().abs().mean()), 1e-8)) for t in self.vectors.values()]

    def weights(self, number: int, block: nn.Module) -> Mapping[str, Tensor]:
        """Return the tuned parameters of a loaded block as a file would hold them; gradients pass through rounding."""
        prefix, found = f"{self._source.chain.path}.{number}.", {}
        for name, parameter in block.named_parameters():
            unit = self._source.first[prefix + name]
            if unit in self._places:
                found[name] = parameter.detach() * torch.exp(self.logs[self._places[unit]])
            elif unit in self._vectors:
                t = self.vectors[unit]
                v = replace(self._vectors[unit], values=t.detach().cpu().numpy())
                stored = torch.from_numpy(v.decode(self._state.steps[unit])).to(t.device).reshape(t.shape)
                found[name] = (t + (stored - t.detach())).reshape(v.unit.shape)
        return found

    def storable(self) -> bool:
        """Return whether steps are finite and vectors have integers at theirs; moves that diverge end that."""
        steps = {n: v.step(self._state.steps[n]) for n, v in self._vectors.items()}
        within = [bool((t.detach().abs() < _MOST * steps[n]).all()) for n, t in self.vectors.items()]
        return all(within) and bool(torch.exp(self.logs.detach()).isfinite().all())

    def snapshot(self) -> list[Tensor]:
        """Return copies of what is tuned."""
        return [t.detach().clone() for t in (self.logs, *self.vectors.values())]

    def restore(self, kept: Sequence[Tensor]) -> None:
        """Go back to a snapshot."""
        for t, old in zip((self.logs, *self.vectors.values()), kept, strict=True):
            t.data.copy_(old)

    def stored(self) -> Values:
        """Return all values in stored layout, as a file would hold them; nothing is priced."""
        return unit_values(*self._unpriced())

    def settle(self, last: Sequence[str] = ()) -> tuple[Planner, State]:
        """Return the units and the state with these values and the same integers, priced.

        Args:
            last: matrices whose targets follow their steps, since they may be rounded anew to meet the cap.
        """
        planner, state = self._unpriced()
        ratios = {n: state.steps[n] / self._state.steps[n] for n in last if n in self._places}
        matrices = [
            p.moved(p.weight * (ratios[n] - 1)) if (n := p.unit.name) in ratios else p for p in planner.matrices
        ]
        rates = {v.unit.name: v.rate(state.steps[v.unit.name], state.shared) for v in planner.vectors}
        return replace(planner, matrices=matrices), replace(state, rates={**state.rates, **rates})

    def _unpriced(self) -> tuple[Planner, State]:
        """Return the units and the state with these values, at the rates of those before."""
        steps, coded = dict(self._state.steps), dict(self._state.coded)
        scales = dict(zip(self._places, torch.exp(self.logs.detach()).tolist(), strict=True))
        for n, scale in scales.items():
            steps[n] *= scale
            coded[n] = coded[n].at_step(coded[n].code.step * scale)
        vectors = [
            replace(v, values=self.vectors[n].detach().cpu().numpy().copy())
            if (n := v.unit.name) in self.vectors
            else v
            for v in self._planner.vectors
        ]
        return replace(self._planner, vectors=vectors), replace(self._state, steps=steps, coded=coded)


def tune_streamed(
    job: Job, model: StreamedModel, planner: Planner, state: State, last: Sequence[str]
) -> tuple[tuple[Planner, State] | None, dict[str, Any]]:
    """Tune a plan; returns it with the same integers, None if its KL is no lower, and a record.

    Args:
        job: names the tokens and the effort.
        model: the job's model.
        planner: the units as they were coded.
        state: what would be shipped without recovery.
        last: matrices that may be rounded anew to meet the cap.
    """
    job.reporter.note(_SAID)
    source = model.streamed.copy()
    source.load(unit_values(planner, state))
    values = StreamedValues(planner, state, source)
    best, record = tune_values(job, model, source, values)
    return values.settle(last) if best < record["kl_before"] else None, record


def tune_values(job: Job, model: StreamedModel, source: Streamed, values: Tuned) -> tuple[float, dict[str, Any]]:
    """Tune values in place, to the best that was seen; returns its KL on the correction tokens, and a record.

    Where no check was lower than `kl_before` of the record, that is what is returned, and the values are of no use.

    Args:
        job: names the tokens and the effort.
        model: the job's model.
        source: a coded copy of it, with the values as they are before.
        values: of its blocks.
    """
    assert job.recover is not None  # noqa: S101 (callers ask first)
    original, checked = model.streamed, model.streamed.copy()
    passes, batch = Passes(job, checked.module), pass_tokens(model.module, original.device)

    def check() -> tuple[float, list[Tensor]]:
        checked.load(values.stored())
        return passes.check(), values.snapshot()

    with allocator.no_holes(), same_again(job.device), job.reporter.step("recovery", 1) as advance:
        start = check()[0]
        best, kept, rates, clock = start, None, values.rates(), Clock(job.recover, advance)
        if rates:
            optimizer = loop.adam(rates)

            def iterate(rate: float) -> float:
                kl = kl_backward(original, source, passes.windows(), values.weights, batch=batch, scratch=model.scratch)
                loop.set_rates(optimizer, rate)
                optimizer.step()
                optimizer.zero_grad()  # a check holds none
                return kl if values.storable() else math.inf

            best, kept = loop.tune(iterate, check, clock, _SCHEDULE, start, job.reporter.note)
        if kept is not None:
            values.restore(kept)
    job.reporter.note(
        f"recovery: {clock.iterations} iterations of values on {passes.read:,} tokens in {clock.seconds:.0f} s, KL on "
        f"the correction tokens {start:.4f} before, {best:.4f} after"
    )
    passes.say_short()
    stage = {"stage": "values", "kl": best, "moves": clock.iterations, "seconds": round(clock.seconds, 1)}
    return best, {"tokens": passes.read, "kl_before": start, "stages": [stage], "curve": passes.curve}
