"""Hold everything that calibration batches add to, and the statistics that come of it.

`Leaves` are the tensors that collect gradients themselves, `Sums` the collectors of a pass, `Statistics` its outcome.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bytecap.calibration.collectors import Collector, Diagonal, Sink, Use
from bytecap.calibration.embedding_gradients import Lookup
from bytecap.model.hook_coverage import shrunk_moment
from bytecap.system.ranks import Ranks, owners
from bytecap.types import Unit

FloatArray = npt.NDArray[np.float64]


@dataclass
class Statistics:
    """The statistics that a probe collected.

    Attributes:
        uses: per unit name, one `Use` for each place the weight is used.
        diagonal: per unit name without a known use, its mean squared gradient per token, in stored layout.
        tokens: number of predicted tokens.
        owner: where ranks share a job, the rank that has the uses of a unit; the others do not have them.
    """

    uses: dict[str, list[Use]]
    diagonal: dict[str, FloatArray]
    tokens: int
    owner: dict[str, int] = field(default_factory=dict)


@dataclass
class Leaves:
    """Tensors of the module's copy that collect gradients themselves.

    Attributes:
        lookup: embedding modules whose lookups show their gradients.
        embedding: other tables, untied.
        matrix: matrices that hooks do not see through, with their units.
        other: vectors and the like.
        idle: weights that ask for a gradient only so that their module's output has one.
    """

    lookup: dict[str, nn.Module]
    embedding: dict[str, Tensor]
    matrix: dict[str, tuple[Unit, Tensor]]
    other: dict[str, Tensor]
    idle: list[Tensor]

    @property
    def tables(self) -> dict[str, Any]:
        """Return the weights (rows, cols) of all embedding tables."""
        return {n: m.weight for n, m in self.lookup.items()} | self.embedding


@dataclass
class Sums:
    """Everything that batches add to.

    Attributes:
        linear: collectors of linear maps' weights, one for each module.
        tables, matrices, vectors: of embeddings, of matrices that hooks do not see through, and of what is left.
        lookups: what fills the tables that are only looked up.
        owner: rank that has the sums of a unit.
    """

    linear: dict[str, list[tuple[nn.Module, Collector]]]
    tables: dict[str, Collector]
    matrices: dict[str, Collector]
    vectors: dict[str, Diagonal]
    lookups: dict[str, Lookup]
    owner: dict[str, int]

    @staticmethod
    def of(
        chosen: list[tuple[str, nn.Module, str]], leaves: Leaves, guided: bool, device: torch.device, ranks: Ranks
    ) -> Sums:
        """Make empty sums; those of linear maps and tables for weights that `ranks` give to this one."""
        shapes: list[tuple[str, tuple[int, int]]] = []
        for name, m, kind in chosen:
            shape: Any = m.weight.shape
            shapes.append((name, shape[::-1] if kind == "conv1d" else shape))
        shapes += [(n, tuple(t.shape)) for n, t in leaves.tables.items()]
        shapes += [(n, u.matrix_shape) for n, (u, _) in leaves.matrix.items()]
        costs = dict.fromkeys(leaves.other, 1.0)
        for name, (_, cols) in shapes:
            costs[name] = costs.get(name, 0.0) + cols * cols
        owner = dict(zip(costs, owners(list(costs.values()), ranks.size), strict=True))
        made = [Collector(*shape, guided, device, owned=owner[n] == ranks.rank) for n, shape in shapes]
        linear: dict[str, list[tuple[nn.Module, Collector]]] = {}
        for (name, m, _), collector in zip(chosen, made, strict=False):
            linear.setdefault(name, []).append((m, collector))
        tables = dict(zip(leaves.tables, made[len(chosen) :], strict=False))
        matrices = dict(zip(leaves.matrix, made[len(chosen) + len(tables) :], strict=True))
        vectors = {n: Diagonal(p.shape, device) for n, p in leaves.other.items()}
        lookups = {n: Lookup(tables[n].moment, tables[n].rows, tables[n].weight) for n in leaves.lookup}
        return Sums(linear, tables, matrices, vectors, lookups, owner)

    def sinks(self) -> list[tuple[str, Sink]]:
        """Return what takes parts up, by unit."""
        found: list[tuple[str, Sink]] = [(n, c) for n, group in self.linear.items() for _, c in group]
        found += [(n, self.lookups.get(n, c)) for n, c in self.tables.items()]
        return [*found, *self.matrices.items(), *self.vectors.items()]

    def hooks(self, leaves: Leaves) -> list[Any]:
        """Have modules fill the sums; returns the handles of hooks."""
        handles: list[Any] = [
            m.register_forward_hook(c.forward_hook) for group in self.linear.values() for m, c in group
        ]
        return handles + [m.register_forward_hook(self.lookups[n].forward_hook) for n, m in leaves.lookup.items()]

    def finished(self, tokens: int, passes: int, ranks: Ranks) -> Statistics:
        """Return what was summed up; to be called once."""
        own = {n for n, r in self.owner.items() if r == ranks.rank}
        uses = {n: [c.use() for _, c in group] for n, group in self.linear.items() if n in own}
        for name, c in self.tables.items():
            if name in own:
                uses.setdefault(name, []).append(c.use())
        for name, c in self.matrices.items():
            if name in own:
                use = c.use()
                use.moment = shrunk_moment(use.moment, passes * len(use.rows))
                uses.setdefault(name, []).append(use)
        diagonal: dict[str, FloatArray] = {}
        for part in ranks.all({n: (d.total / tokens).cpu().numpy() for n, d in self.vectors.items() if n in own}):
            diagonal |= part
        owner = {n: r for n, r in self.owner.items() if n not in diagonal}
        return Statistics(uses, {n: diagonal[n] for n in self.vectors}, tokens, owner)
