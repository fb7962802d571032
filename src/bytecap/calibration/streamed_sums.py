"""Hold the sums of one part of a streamed model: a block, or what is outside of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from bytecap.calibration.collectors import Collector, Diagonal, Sink, Use
from bytecap.calibration.embedding_gradients import Lookup
from bytecap.model.hook_coverage import is_matrix, shrunk_moment
from bytecap.model.linears import linear_weights
from bytecap.model.streaming import Streamed
from bytecap.system.ranks import Ranks, owners
from bytecap.types import Unit, as_matrix


class PartSums:
    """The sums of the units in one part of a module.

    Args:
        streamed: the model.
        units: all of its units.
        inside: whether a parameter of this name belongs to the part.
        looked: units of tables that are only looked up.
        guided: weight tokens by output gradient energy.
        ranks: processes, among which the part's units are divided by cost.

    Attributes:
        owner: rank that has the sums of a unit.
    """

    def __init__(
        self,
        streamed: Streamed,
        units: Sequence[Unit],
        inside: Callable[[str], bool],
        looked: set[str],
        guided: bool,
        ranks: Ranks,
    ) -> None:
        names = {n: u for u in units for n in (u.name, *u.aliases)}
        module, device = streamed.module, streamed.device
        self._module, self._rank = module, ranks.rank
        maps = {n: found for n, found in linear_weights(module).items() if n in names and inside(n)}
        chosen = {
            n: names[n] for n, p in module.named_parameters()
            if n in names and inside(n) and not names[n].linear and p.is_floating_point()
        }  # fmt: skip
        costs: dict[str, float] = {}
        for n in (*maps, *chosen):
            unit = names[n]
            costs[unit.name] = costs.get(unit.name, 0.0) + (1.0 if n in chosen else float(unit.matrix_shape[1])) ** 2
        self.owner = dict(zip(costs, owners(list(costs.values()), ranks.size), strict=True))
        self._linear: list[tuple[str, nn.Module, Collector]] = []
        self._table: dict[str, tuple[str, nn.Module, Collector]] = {}
        for n, (m, kind) in maps.items():
            weight: Tensor = m.weight  # type: ignore[assignment]
            rows, cols = weight.shape[::-1] if kind == "conv1d" else weight.shape
            name = names[n].name
            collector = Collector(rows, cols, guided, device, owned=self._owns(name))
            if kind == "embedding":
                self._table[name] = n, m, collector
            else:
                self._linear.append((name, m, collector))
        self._lookup = {
            n: Lookup(c.moment, c.rows, c.weight) for n, (_, _, c) in self._table.items() if n in looked
        }  # fmt: skip
        self._matrix = {
            n: (u, Collector(*u.matrix_shape, guided, device, owned=self._owns(u.name)))
            for n, u in chosen.items() if is_matrix(u)
        }  # fmt: skip
        self._other = {
            n: (u.name, Diagonal(module.get_parameter(n).shape, device)) for n, u in chosen.items() if not is_matrix(u)
        }  # fmt: skip
        streamed.trained |= {n for name, (n, _, _) in self._table.items() if name not in looked} | chosen.keys()

    def _owns(self, name: str) -> bool:
        return self.owner[name] == self._rank

    def sinks(self) -> list[tuple[str, Sink]]:
        """Return what takes parts up, by unit."""
        found: list[tuple[str, Sink]] = [(n, c) for n, _, c in self._linear]
        found += [(n, self._lookup.get(n, c)) for n, (_, _, c) in self._table.items()]
        found += [(u.name, c) for u, c in self._matrix.values()]
        return [*found, *self._other.values()]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect, inside a `with` block."""
        handles = [m.register_forward_hook(c.forward_hook) for _, m, c in self._linear]
        handles += [self._table[n][1].register_forward_hook(x.forward_hook) for n, x in self._lookup.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def harvest(self) -> None:
        """Add this batch's squared gradients to the sums, and clear them."""
        for name, (at, _, c) in self._table.items():
            p = self._module.get_parameter(at)
            if name not in self._lookup and p.grad is not None:
                g = p.grad.float()
                square = g.square().sum(1)
                c.add_gradient(square, g[square.nonzero()[:, 0]])
            p.grad = None
        for at, (unit, c) in self._matrix.items():
            p = self._module.get_parameter(at)
            if p.grad is not None:
                g = as_matrix(unit, p.grad.float())
                c.add_gradient(g.square().sum(1), g)
            p.grad = None
        for at, (_, found) in self._other.items():
            p = self._module.get_parameter(at)
            if p.grad is not None:
                found.add(p.grad)
            p.grad = None

    def diagonals(self) -> dict[str, Tensor]:
        """Return the summed squared gradients of this rank's other units."""
        return {name: found.total for name, found in self._other.values() if self._owns(name)}

    def used(self) -> dict[str, int]:
        """Return the ranks of all units with uses."""
        names = [n for n, _, _ in self._linear] + list(self._table) + [u.name for u, _ in self._matrix.values()]
        return {n: self.owner[n] for n in names}

    def uses(self, passes: int) -> Iterator[tuple[str, list[Use]]]:
        """Yield every unit of this rank with its finished uses, whose sums are dropped; to be called once.

        Args:
            passes: batches that were gone through, by all ranks.
        """
        found: dict[str, list[Collector]] = {}
        for name, _, c in self._linear:
            found.setdefault(name, []).append(c)
        for name, (_, _, c) in self._table.items():
            found.setdefault(name, []).append(c)
        self._linear.clear()
        self._table.clear()
        self._lookup.clear()
        for name in list(found):
            collectors = found.pop(name)
            if self._owns(name):
                yield name, [c.use() for c in collectors]
        for unit, c in self._matrix.values():
            if self._owns(unit.name):
                use = c.use()
                use.moment = shrunk_moment(use.moment, passes * len(use.rows))
                yield unit.name, [use]
        self._matrix.clear()
