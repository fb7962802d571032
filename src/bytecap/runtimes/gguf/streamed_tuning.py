"""Tune scales, minimums and vectors of a streamed model's blocks at frozen codes.

Gradients are those of the KL of the whole model, made block by block (`bytecap.recovery.streamed_gradients`): tensors
of a block are made from their codes as it is loaded. Five copies in 32 bits of what is tuned are held at most: itself,
Adam's two means, the best that was seen, and its gradient or, at a check, what may become the best. With groups of 32
columns and minimums what is tuned is a sixteenth of the parameters: 1.25 bytes a parameter in all.
Omitted: new codes, and what is outside the chain of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.job import Job
from bytecap.model.quantized_copy import Lazy, Values
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.streaming import Streamed
from bytecap.recovery.streamed import tune_values
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.numbers import RATE, Owner, owner_of, written
from bytecap.runtimes.gguf.places import Layout
from bytecap.runtimes.gguf.solve import Found, keep_of, rounded_values

_SAID = (
    "recovery of a streamed model tunes scales, minimums, norms and biases of its blocks; codes stay. A model in "
    "memory gets new codes too"
)


class BlockNumbers:
    """The numbers of blocks that are tuned, see `bytecap.recovery.streamed.Tuned`."""

    def __init__(
        self, job: Job, source: Streamed, layout: Layout, items: Sequence[Item], found: Found, vectors: str
    ) -> None:  # fmt: skip
        """Start at the plan's numbers, which `source` holds."""
        self._job, self._source, self._layout, self._found, self._vectors = job, source, layout, found, vectors
        self._items, self._names = items, {i.place.name for i in items}
        self._units = {u.name: u for u in job.model.units if source.chain.holds(u.name)}
        self._loaded: tuple[int, dict[str, Owner]] = -1, {}
        self._leaves: dict[str, list[list[Tensor]]] = {}
        for name in self._units:
            owner = self._owner(name)
            if owner is not None:
                self._leaves[name] = [part.leaves for part in owner.parts]

    def _owner(self, name: str) -> Owner | None:
        """Return a unit made from its codes, with its present numbers."""
        unit, about = self._units[name], (self._layout, self._names, self._found, self._vectors, ())
        owner = owner_of(self._job, unit, *about)
        for part, leaves in zip(owner.parts if owner else (), self._leaves.get(name, ()), strict=False):
            part.leaves = leaves
        return owner

    def owners(self, names: Sequence[str]) -> list[Owner]:
        """Return tuned units with their present numbers."""
        return [owner for n in names if (owner := self._owner(n)) is not None]

    def rates(self) -> list[tuple[Tensor, float]]:
        """See `Tuned`."""
        return [(t, RATE) for t in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [t for parts in self._leaves.values() for leaves in parts for t in leaves]

    def weights(self, number: int, block: nn.Module) -> Mapping[str, Tensor]:
        """See `Tuned`."""
        prefix = f"{self._source.chain.path}.{number}."
        units = {n: self._source.first[prefix + n] for n, _ in block.named_parameters()}
        if self._loaded[0] != number:
            tuned = [u for u in dict.fromkeys(units.values()) if u in self._leaves]
            self._loaded = number, {o.unit.name: o for o in self.owners(tuned)}
        owners = self._loaded[1]
        return {n: owners[u].values() for n, u in units.items() if u in owners}

    def storable(self) -> bool:
        """See `Tuned`."""
        return all(bool(t.detach().isfinite().all()) for t in self._tensors())

    def snapshot(self) -> list[Tensor]:
        """See `Tuned`."""
        return [t.detach().clone() for t in self._tensors()]

    def restore(self, kept: Sequence[Tensor]) -> None:
        """See `Tuned`."""
        for t, old in zip(self._tensors(), kept, strict=True):
            t.data.copy_(old)

    def stored(self) -> Values:
        """See `Tuned`."""
        self._loaded = -1, {}  # a check needs no block's tensors
        rest = rounded_values(self._job.model, self._items, self._found.rounded)

        @torch.no_grad()
        def make(name: str) -> Any:
            return self.owners([name])[0].values() if name in self._leaves else rest[name]

        return Lazy(list(dict.fromkeys([*rest, *self._leaves])), make)

    @torch.no_grad()
    def settle(self) -> Found:
        """Return the plan with these numbers."""
        owners = (owner for name in self._leaves for owner in self.owners([name]))
        return written(self._items, self._found, owners, keep_of(self._job.model))


def tune_streamed_blocks(
    job: Job, model: StreamedModel, layout: Layout, items: Sequence[Item], found: Found, vectors: str
) -> tuple[Found, dict[str, Any]]:  # fmt: skip
    """Return the plan with tuned numbers if these measure better on the correction tokens, and a record.

    Args:
        job: with an effort of recovery.
        model: the job's model.
        layout: all tensors of the file that may move.
        items: those in block formats.
        found: the plan.
        vectors: the file's type of vectors: F32, F16 or BF16.
    """
    job.reporter.note(_SAID)
    source = model.streamed.copy()
    source.load(rounded_values(model, items, found.rounded))
    numbers = BlockNumbers(job, source, layout, items, found, vectors)
    best, record = tune_values(job, model, source, numbers)
    return (replace(numbers.settle(), predicted=best) if best < record["kl_before"] else found), record
