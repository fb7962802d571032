"""Recovery: after coding, move what is stored so that the coded model as a whole is closer to the original.

Rounding minimises one unit's quadratic form at a time. What is left are the errors of all units together, and those
one backward pass sees: the gradient of the KL to the original at the coded weights. Every coded matrix gets a *shadow*,
the values that error feedback really rounded::

    Y_k = W_k + sum_{j>k} (W_j - W^_j) L_jk / L_kk

Rounding a shadow column by column, without feedback, gives back the very same integers, and a small change of it
changes few of them. Shadows and vectors are moved by Adam along the gradient at their rounded values
(straight-through), in units of each weight's own step, and are rounded again with the same coder, tables and classes
after every move. The common step is steered so that the estimated bytes stay at the cap; in the end the cap is met on
real bytes as always.

What is shipped is the best seen on the correction tokens, the untuned file included: recovery never makes it worse
there, and the file never grows.

Sources: straight-through estimation as in quantization-aware training (LSQ, arXiv:1902.08153) and PV-Tuning
(arXiv:2405.14852); shadows in the coordinates after feedback and steered steps are what an entropy coder adds.
Omitted: units under an exception path keep their integers.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from bytecap import correct, memory
from bytecap.errors import UsageError
from bytecap.methods import Job
from bytecap.methods.waterfill import Planner, State
from bytecap.model.batch import is_batches
from bytecap.model.blind import as_matrix
from bytecap.model.evaluate import kl_to
from bytecap.model.gradient import gradient
from bytecap.model.probe import pass_tokens
from bytecap.model.text import Window, leading
from bytecap.swap import load_values
from bytecap.sweep import Coded, Prepared
from bytecap.triangle import Triangles

RATE = 0.0015  # first learning rate, in steps of each weight's grid
_VECTOR = 0.1  # what is a step for vectors, in their mean sizes
_BETAS = (0.9, 0.95)
_WARMING = 10  # moves until the full rate
_TOKENS = {"cpu": 2048, "cuda": 16_384}  # of one move
_CHECKS = 12  # times the correction tokens are looked at
_CHECK_TOKENS = 8192
_STEERING = 0.5  # share of the bytes too many that one move takes back


@dataclass(frozen=True)
class Effort:
    """How long to recover: `steps` moves, or `seconds` of them.

    >>> Effort.parse("600"), Effort.parse("10m")
    (Effort(steps=600, seconds=None), Effort(steps=None, seconds=600.0))
    """

    steps: int | None = None
    seconds: float | None = None

    @staticmethod
    def parse(text: str) -> Effort:
        """From `600` steps, or a time such as `45s`, `10m`, `1h`.

        Raises:
            UsageError: it is neither, or nothing.
        """
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text.strip())
        if not found or (not found[2] and "." in found[1]) or float(found[1]) <= 0:
            raise UsageError(f"--recover {text!r} is neither a number of steps (600) nor a time (45s, 10m, 1h)")
        if not found[2]:
            return Effort(steps=int(found[1]))
        return Effort(seconds=float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]])

    def share(self, steps: int, seconds: float) -> float:
        """How much of it is done, 1 when it is spent."""
        return steps / self.steps if self.steps is not None else seconds / (self.seconds or math.inf)


def tokens_of_move(device: str) -> int:
    """Tokens one move looks at."""
    return _TOKENS[torch.device(device).type]


def effort_of(text: str | None, method: str) -> Effort | None:
    """The effort asked for.

    Raises:
        UsageError: it cannot be understood, or the method has nothing to recover.
    """
    if text is not None and method != "bytecap":
        raise UsageError(f"method {method} cannot be recovered: --recover is for --method bytecap")
    return None if text is None else Effort.parse(text)


@dataclass
class _Moving:
    """A value that is moved by Adam: its shadow, what one step of its grid is, and the moments of its gradient."""

    value: Tensor
    step: Tensor
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def move(self, gradient: Tensor, rate: float, number: int) -> None:
        """One move, `rate` in steps of the grid; `number` counts from 1."""
        one, two = _BETAS
        g = gradient.to(self.value.device) * self.step
        self.first.lerp_(g, 1 - one)
        self.second.lerp_(g.square(), 1 - two)
        size = (self.second / (1 - two**number)).sqrt_().add_(1e-12)
        self.value.sub_(self.first / size * self.step, alpha=rate / (1 - one**number))


def shadow(item: Prepared, decoded: Tensor) -> Prepared:
    """The unit as the values that were rounded, to be rounded without feedback; (rows, cols) decoded as it was.

    Rounding what is returned gives the same integers as rounding `item` did.
    """
    target = torch.empty_like(item.weight)
    lowers = []
    rows = [torch.tensor_split(x, item.groups) for x in (item.weight, decoded, target)]
    for weight, coded, part, lower, order in zip(*rows, item.lower, item.order, strict=True):
        diag = lower.diagonal()
        error = (weight - coded)[:, order]
        part[:, order] = weight[:, order] + error @ torch.tril(lower, -1) / diag
        lowers.append(torch.diag(diag))
    return replace(item, weight=target, lower=Triangles.of(torch.stack(lowers)))


def _grid_steps(item: Prepared, coded: Coded) -> Tensor:
    """Step of every weight, (rows, cols)."""
    code, device = coded.code, item.weight.device
    column = np.exp2(code.column_step.astype(np.float32) / 4)  # (groups, cols)
    parts = np.array_split(np.exp2(code.row_step.astype(np.float32) / 4), len(column))
    steps = np.concatenate([np.outer(r, c) for r, c in zip(parts, column, strict=True)])
    return torch.from_numpy(np.float32(code.step) * steps).to(device)


class _Course:
    """The moves of one job.

    Attributes:
        planner: its matrices and vectors are replaced by moved shadows.
        steps: steps units are rounded at.
        state: what they were rounded to last.
    """

    def __init__(self, job: Job, planner: Planner, state: State, twin: nn.Module) -> None:
        self.job, self.planner, self.twin = job, planner, twin
        self.units = {p.unit.name: p.unit for p in planner.matrices} | {v.unit.name: v.unit for v in planner.vectors}
        self.moving: dict[str, _Moving] = {}
        matrices = []
        for item in planner.matrices:
            if type(item) is Prepared:
                found = shadow(item, torch.from_numpy(planner.decode(state, item.unit.name)).to(item.weight.device))
                self.moving[item.unit.name] = _Moving(found.weight, _grid_steps(item, state.coded[item.unit.name]))
                item = found  # noqa: PLW2901 (the unit from here on)
            matrices.append(item)
        planner.matrices = matrices
        for v in planner.vectors:
            if v.fisher.any():
                values = torch.from_numpy(v.values.copy()).to(job.device)
                self.moving[v.unit.name] = _Moving(values, _VECTOR * values.abs().mean())
        self.batch = pass_tokens(job.model.module, torch.device(job.device))
        self.steps = dict(state.steps)
        self.state = planner.settle(self.steps, refit=False)
        self.capacity = self.state.rate

    def windows(self) -> Iterator[list[Window]]:
        """Windows of one move after the other, shuffled anew when all have been seen."""
        pool = list(self.job.sets.recovery or self.job.sets.statistics)
        rng = random.Random(self.job.seed)  # noqa: S311 (sampling, not cryptography)
        chosen: list[Window] = []
        while True:
            rng.shuffle(pool)
            for w in pool:
                chosen.append(w)
                if sum(x.predicted for x in chosen) >= tokens_of_move(self.job.device):
                    yield chosen
                    chosen = []

    def move(self, windows: Sequence[Window], rate: float, number: int) -> float:
        """One move on some windows; the mean KL on them before it."""
        self.load()
        kl, gradients = self.gradients(windows)
        for name, x in self.moving.items():
            x.move(as_matrix(self.units[name], gradients[name]).reshape(x.value.shape), rate, number)
        self.place({n: x.value for n, x in self.moving.items()})
        self.state = self.planner.settle(self.steps, refit=False)
        excess = (self.state.rate - self.capacity) / (self.planner.parameters / 8 * 1.2)
        self.steps = {n: s * math.exp(_STEERING * excess) for n, s in self.steps.items()}
        return kl

    def gradients(self, windows: Sequence[Window]) -> tuple[float, dict[str, Tensor]]:
        """KL and gradients on some windows; batches are halved where the device's memory ends."""
        while True:
            try:
                return gradient(
                    self.job.model.module, self.twin, list(self.moving), windows, device=self.job.device,
                    batch=self.batch,
                )  # fmt: skip
            except torch.OutOfMemoryError:
                if self.batch < 2 * max(w.predicted for w in windows):
                    raise MemoryError("recovery: the device's memory does not hold one window") from None
                self.batch //= 2
                torch.cuda.empty_cache()
                self.job.reporter.note(f"recovery: out of device memory, {self.batch:,} tokens a batch from now on")

    def load(self) -> None:
        """Put what is coded now into the twin; units are decoded side by side."""
        values = correct.unit_values(self.planner, self.state)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            load_values(self.twin, dict(zip(values, pool.map(values.__getitem__, values), strict=True)))

    def place(self, values: Mapping[str, Tensor]) -> None:
        """Put shadows into the planner."""
        p = self.planner
        p.matrices = [replace(m, weight=values[n]) if (n := m.unit.name) in values else m for m in p.matrices]
        p.vectors = [
            replace(v, values=values[n].cpu().numpy().copy()) if (n := v.unit.name) in values else v for v in p.vectors
        ]

    def check(self) -> float:
        """KL on the correction tokens."""
        self.load()
        windows = leading(self.job.sets.correction, _CHECK_TOKENS)
        return kl_to(self.job.model.module, self.twin, windows, device=self.job.device)[0]

    def kept(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Shadows and steps as they are now."""
        return {n: x.value.clone() for n, x in self.moving.items()}, dict(self.steps)


def tune(job: Job, planner: Planner, state: State, kl: float, twin: nn.Module) -> State | None:
    """The planner with moved shadows, settled at about the same bytes; None if nothing measured better.

    Args:
        job: names the model, the tokens and the effort.
        planner: its matrices and vectors are replaced, for the worse if None is returned.
        state: what would be shipped without recovery, under the planner's tables.
        kl: of that on the correction tokens.
        twin: a twin of the model, overwritten.
    """
    if is_batches(job.sets.statistics):
        job.reporter.note("recovery needs a module whose forward gives logits: nothing is tuned")
        return None
    effort = job.recover
    assert effort is not None  # noqa: S101 (callers ask first)
    course = _Course(job, planner, state, twin)
    best, kept = kl, None
    started, number, last = time.monotonic(), 0, 0.0
    source = course.windows()
    with memory.no_holes(), job.reporter.step("recovery", 1) as advance:
        done = 0.0
        while done < 1:
            number += 1
            course.move(next(source), RATE * min(1.0, number / _WARMING) * (1 - done), number)
            done, before = effort.share(number, time.monotonic() - started), done
            advance(min(1.0, done) - before)
            if done >= 1 or done - last >= 1 / _CHECKS:
                last, now = done, course.check()
                if now < best:
                    best, kept = now, course.kept()
                if not now < 4 * kl:
                    job.reporter.note(f"recovery diverges after {number} moves (KL {now:.4f}): stopped")
                    break
    job.reporter.note(
        f"recovery: {number} moves of about {tokens_of_move(job.device):,} tokens in "
        f"{time.monotonic() - started:.0f} s, KL on the correction tokens {kl:.4f}, best seen {best:.4f}"
    )
    if kept is None:
        return None
    values, steps = kept
    course.place(values)
    return planner.settle(steps, refit=False)
