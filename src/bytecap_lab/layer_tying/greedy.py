"""Choose blocks to share one merge at a time, always the one with the least measured loss per freed byte.

From the original on, every pair of groups of layers is tried: they are tied, started as `bytecap_lab.layer_tying.start`
says, trained for a few iterations where the effort allows any, and the KL to the original is measured on other tokens.
The pair with the smallest rise of the KL per freed parameter is merged, until the wanted number of blocks is left.

What is chosen from is (K + 1 .. L choose 2) candidates in all, so a time is cut into equal parts beforehand. Omitted:
looking ahead by more than one merge.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from bytecap.job.effort import Effort
from bytecap.model.texts import Window, iteration_windows
from bytecap.model.tying import Tying
from bytecap.progress import Advance
from bytecap.recovery.checkpointing import ProgressCheckpoint
from bytecap.recovery.kl_passes import tokens_of_iteration
from bytecap.system.cache import Store
from bytecap_lab.layer_tying.start import Parts, tied
from bytecap_lab.layer_tying.uptrain import RATE, Trainer


@dataclass(frozen=True)
class Merge:
    """One merge.

    Attributes:
        sources: of every layer after it.
        kl: to the original, nats per token, as measured.
        freed: parameters that need no longer be stored.
        byte_return: rise of the KL by freed parameter, nats per token.
    """

    sources: tuple[int, ...]
    kl: float
    freed: int
    byte_return: float


def merged(sources: Sequence[int], one: int, other: int) -> tuple[int, ...]:
    """Merge two groups of layers into one that is read from the first.

    >>> merged((0, 1, 2, 1), 1, 2)
    (0, 1, 1, 1)
    """
    first, last = sorted((one, other))
    return tuple(first if s == last else s for s in sources)


def candidates(depth: int, blocks: int) -> int:
    """Return the number of merges that are tried in all.

    >>> candidates(4, 2)
    9
    """
    return sum(n * (n - 1) // 2 for n in range(blocks + 1, depth + 1))


@dataclass
class GreedySearch:
    """A greedy search.

    Attributes:
        original: untouched module on the device.
        start: description of the module with nothing shared; its ranks are those of every candidate.
        init: how shared blocks start.
        train: windows to train candidates on.
        held: windows to measure them on.
        device: torch device.
        seed: order of the windows.
        rate: learning rate of these iterations.
        checkpoint: where measured candidates are kept, and taken from.
    """

    original: nn.Module
    start: Tying
    init: str
    train: Sequence[Window]
    held: Sequence[Window]
    device: str
    seed: int = 0
    rate: float = RATE
    checkpoint: ProgressCheckpoint = field(default_factory=lambda: ProgressCheckpoint(Store()))
    _parts: Parts = field(default_factory=dict, init=False)

    def run(self, blocks: int, effort: Effort, advance: Advance) -> tuple[Tying, list[Merge]]:
        """Search the tying with so many blocks; returns it and every merge on the way."""
        measured: list[list[Any]] = []  # KL and parameters of every candidate, in the order they are tried
        before, tried = 0.0, 0
        if (kept := self.checkpoint.get()) is not None:
            measured, before = kept[1]["measured"], kept[1]["seconds"]
        began = time.monotonic() - before

        def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
            return {}, {"measured": measured, "seconds": time.monotonic() - began}

        total = candidates(len(self.start.sources), blocks)
        tying, kl, taken = self.start, 0.0, list[Merge]()
        size = _parameters(self.original)
        while tying.unique > blocks:
            found = []
            for one, other in combinations(sorted(set(tying.sources)), 2):
                trial = Tying(tying.blocks, merged(tying.sources, one, other), tying.ranks)
                budget = Effort(
                    None if effort.steps is None else effort.steps // total,
                    None if effort.seconds is None else
                    (effort.seconds - (time.monotonic() - began)) / (total - tried),
                )  # fmt: skip
                if tried == len(measured):
                    measured.append(list(self._measure(trial, budget)))
                    self.checkpoint.put(state, now=tried + 1 == total)
                after, parameters = measured[tried]
                freed = size - parameters
                found.append((Merge(trial.sources, after, freed, (after - kl) / max(1, freed)), parameters))
                tried += 1
                advance(1 / total)
            best, size = min(found, key=lambda item: item[0].byte_return)
            kl, tying = best.kl, Tying(tying.blocks, best.sources, tying.ranks)
            taken.append(best)
            self._parts = {k: v for k, v in self._parts.items() if _whole(k, tying.sources)}
        return tying, taken

    def _measure(self, tying: Tying, effort: Effort) -> tuple[float, int]:
        """Measure a candidate's KL after its iterations, and its parameters."""
        began = time.monotonic()
        student = tied(self.original, tying, self.init, self._parts)
        trainer = Trainer(self.original, student, device=self.device, rate=self.rate)
        source = iteration_windows(self.train, tokens_of_iteration(self.device), self.seed)
        if effort.steps is not None:
            for _ in range(effort.steps):
                trainer.iterate(next(source))
        else:
            one = 0.0  # seconds of an iteration
            while (now := time.monotonic()) - began + one < (effort.seconds or 0.0):
                trainer.iterate(next(source))
                one = time.monotonic() - now
        return trainer.validate(self.held).kl, _parameters(student)


def _whole(members: tuple[int, ...], sources: Sequence[int]) -> bool:
    """Return whether a group holds all layers of every group that it touches, so that it can occur again.

    >>> _whole((0, 1, 2), (0, 1, 1, 3)), _whole((0, 1), (0, 1, 1, 3))
    (True, False)
    """
    touched = {sources[i] for i in members}
    return all((source in touched) == (i in members) for i, source in enumerate(sources))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def as_dicts(merges: Sequence[Merge]) -> list[dict[str, Any]]:
    """Plain dictionaries for JSON."""
    return [{**m.__dict__, "sources": list(m.sources)} for m in merges]
