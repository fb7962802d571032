"""Learn which blocks to share while training, by Dynamic Layer Tying (Hay and Wolf, ICLR 2024).

After the paper: the state is the source of every layer; layers are visited in turn; the action for layer `i` is a
source in 0..i, `i` itself making it independent; a small network estimates every action's value and is followed
epsilon-greedily; after an action the model trains on a few batches, whose loss is the reward; the network is trained on
the temporal difference of replayed steps.

Chosen here: the model is a trained one, so layers start from its blocks, looped, and the loss is the KL to it. The cap
on blocks is hard, so actions that would need more blocks than that are masked. An independent layer takes up its own
weights again, as it left them. The reward is the KL's share of its running mean, negated, because the KL falls all the
time. Layers that copied a layer which becomes a copy follow it.
Omitted: low-rank parts while searching, and keeping the weights: what comes back is the tying whose visits had the
smallest mean share, to be started from the original like every other. A target network and a decay of the discount,
which so few steps do not need.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.job.effort import Effort
from bytecap.model.texts import Window, iteration_windows
from bytecap.model.tying import Tying, layers, matrices, point
from bytecap.progress import Advance
from bytecap.recovery.checkpointing import ProgressCheckpoint
from bytecap.recovery.kl_passes import tokens_of_iteration
from bytecap.recovery.loop import Clock
from bytecap.system.cache import Store
from bytecap_lab.layer_tying.start import loop, tied
from bytecap_lab.layer_tying.uptrain import RATE, Trainer

_BATCHES = 2  # iterations after an action
_HIDDEN = 64
_DISCOUNT = 0.5  # an action shows in the loss at once
_EPSILON = (1.0, 0.05)  # at the start, and from three quarters of the search on
_REPLAY = 32
_MEMORY = 0.9  # of the running mean of the KL


def resolved(sources: Sequence[int], layer: int, source: int) -> tuple[int, ...]:
    """Sources after one action, flat: every layer names the first layer that reads its block.

    >>> resolved((0, 1, 1, 1), 1, 0), resolved((0, 0, 0, 3), 1, 1)
    ((0, 0, 0, 0), (0, 1, 0, 3))
    """
    if source == layer:
        return (*sources[:layer], layer, *sources[layer + 1 :])
    return tuple(sources[source] if layer in {i, s} else s for i, s in enumerate(sources))


def allowed(sources: Sequence[int], layer: int, blocks: int) -> list[bool]:
    """Return a mask of the sources a layer may take without needing more than so many blocks."""
    return [j <= layer and len(set(resolved(sources, layer, j))) <= blocks for j in range(len(sources))]


@dataclass(frozen=True)
class _Step:
    """One remembered step: state, action, reward and next state."""

    seen: Tensor
    action: int
    reward: float
    then: Tensor
    mask: Tensor


class _Values:
    """The network of action values."""

    def __init__(self, depth: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Linear(depth * depth + depth, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, depth)
            )  # fmt: skip
        self.depth = depth
        self.rng = random.Random(seed)  # noqa: S311 (exploration, not cryptography)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        self.steps: list[_Step] = []

    def seen(self, sources: Sequence[int], layer: int) -> Tensor:
        """Return the state: one-hot sources, and the layer in question."""
        eye = torch.eye(self.depth)
        return torch.cat([eye[list(sources)].flatten(), eye[layer]])

    @torch.no_grad()
    def choose(self, seen: Tensor, mask: Sequence[bool], epsilon: float) -> int:
        """Choose one of the allowed actions."""
        open_ = [j for j, ok in enumerate(mask) if ok]
        if self.rng.random() < epsilon:
            return self.rng.choice(open_)
        values = self.network(seen).tolist()
        return max(open_, key=lambda j: values[j])

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Return network, optimizer, remembered steps and generator, which `resume` takes back."""
        found = {f"network {n}": t for n, t in self.network.state_dict().items()}
        for i, kept in self.optimizer.state_dict()["state"].items():
            found |= {f"value adam {k} {i}": t for k, t in kept.items()}
        for name in ("seen", "then", "mask"):
            found[f"replay {name}"] = torch.stack([getattr(s, name) for s in self.steps])
        return found, {"steps": [[s.action, s.reward] for s in self.steps], "random": self.rng.getstate()}

    def resume(self, kept: Mapping[str, Tensor], about: Any) -> None:
        """Go on from a state that `state` returned."""
        self.network.load_state_dict({n: kept[f"network {n}"] for n in self.network.state_dict()})
        for i, p in enumerate(self.network.parameters()):
            self.optimizer.state[p] = {k: kept[f"value adam {k} {i}"] for k in ("step", "exp_avg", "exp_avg_sq")}
        replay = zip(kept["replay seen"], about["steps"], kept["replay then"], kept["replay mask"], strict=True)
        self.steps = [_Step(seen, action, reward, then, mask) for seen, (action, reward), then, mask in replay]
        version, inner, gauss = about["random"]
        self.rng.setstate((version, tuple(inner), gauss))

    def learn(self, step: _Step) -> None:
        """Remember a step and train on replayed ones."""
        self.steps.append(step)
        batch = self.rng.sample(self.steps, min(_REPLAY, len(self.steps)))
        then = self.network(torch.stack([s.then for s in batch])).detach()
        then = then.masked_fill(~torch.stack([s.mask for s in batch]), -math.inf).amax(1)
        wanted = torch.tensor([s.reward for s in batch]) + _DISCOUNT * then
        found = self.network(torch.stack([s.seen for s in batch]))
        chosen = found.gather(1, torch.tensor([[s.action] for s in batch]))[:, 0]
        self.optimizer.zero_grad()
        nn.functional.smooth_l1_loss(chosen, wanted).backward()
        self.optimizer.step()


@dataclass
class QLearningSearch:
    """A search by Q-learning.

    Attributes:
        original: untouched module on the device.
        start: description of the module with nothing shared.
        train: windows to train on.
        device: torch device.
        seed: of exploration and of the order of the windows.
        rate: learning rate.
        checkpoint: where the search is kept from time to time, and goes on from.
        visited: mean loss, as a share of its running mean, of every visit to every tying.
    """

    original: nn.Module
    start: Tying
    train: Sequence[Window]
    device: str
    seed: int = 0
    rate: float = RATE
    checkpoint: ProgressCheckpoint = field(default_factory=lambda: ProgressCheckpoint(Store()))
    visited: dict[tuple[int, ...], list[float]] = field(default_factory=lambda: defaultdict(list))

    def run(self, blocks: int, effort: Effort, advance: Advance) -> Tying:
        """Search the tying with at most so many blocks that trains best; `effort` counts iterations or seconds."""
        depth = len(self.start.sources)
        student = tied(self.original, Tying(self.start.blocks, self.start.sources))
        modules = layers(student, self.start.blocks)
        own = [matrices(b) for b in modules]
        trainer = Trainer(self.original, student, device=self.device, rate=self.rate)
        values, sources, layer = _Values(depth, self.seed), loop(depth, blocks), 0
        clock, mean = Clock(effort, advance), 0.0
        if (kept := self.checkpoint.get()) is not None:
            sources, layer, seconds, mean = self._resume(trainer, values, *kept)
            clock.resume(trainer.number, seconds)
        source = islice(
            iteration_windows(self.train, tokens_of_iteration(self.device), self.seed), trainer.number, None
        )
        while clock.done < 1:
            layer = layer % (depth - 1) + 1  # the first layer has no choice
            mask = allowed(sources, layer, blocks)
            seen = values.seen(sources, layer)
            high, low = _EPSILON
            action = values.choose(seen, mask, max(low, high - (high - low) * clock.done / 0.75))
            sources = resolved(sources, layer, action)
            for block, s in zip(modules, sources, strict=True):
                point(block, own[s])
            kl = sum(trainer.iterate(next(source)) for _ in range(_BATCHES)) / _BATCHES
            mean = _MEMORY * mean + (1 - _MEMORY) * kl if mean else kl
            share = kl / mean if math.isfinite(kl) and mean > 0 else 10.0
            self.visited[sources].append(share)
            after = layer % (depth - 1) + 1
            open_ = torch.tensor(allowed(sources, after, blocks))
            values.learn(_Step(seen, action, -share, values.seen(sources, after), open_))
            clock.tick(_BATCHES)
            at = (sources, layer, clock.seconds, mean)
            self.checkpoint.put(partial(self._state, trainer, values, at), now=clock.done >= 1)
        return Tying(self.start.blocks, self.best(), self.start.ranks)

    def _state(self, trainer: Trainer, values: _Values, at: tuple[Any, ...]) -> tuple[dict[str, Tensor], Any]:
        """Return everything that the search needs to go on."""
        tensors, numbers = trainer.state()
        more, replay = values.state()
        return tensors | more, {"trainer": numbers, "values": replay, "visited": list(self.visited.items()), "at": at}

    def _resume(self, trainer: Trainer, values: _Values, kept: Mapping[str, Tensor], about: Any) -> tuple[Any, ...]:
        """Go on from a state that `_state` returned."""
        trainer.resume(kept, about["trainer"])
        values.resume(kept, about["values"])
        self.visited.update((tuple(s), shares) for s, shares in about["visited"])
        sources, *rest = about["at"]
        return tuple(sources), *rest

    def best(self) -> tuple[int, ...]:
        """Return the tying whose visits had the smallest mean share."""
        return min(self.visited, key=lambda s: sum(self.visited[s]) / len(self.visited[s]))
