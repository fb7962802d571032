"""Summarise a model: units, their uses, bytes now and bytes planned.

A unit is stored once whatever the number of its names or uses. `planned` are estimated bytes of the allocated plan at a
budget, or the bytes of an artifact. Drawing is `bytecap.report.tree`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytecap.format import container
from bytecap.format.coders.exact import WIDTH
from bytecap.format.ledger import by_unit
from bytecap.types import Unit


@dataclass(frozen=True)
class Line:
    """One unit.

    Attributes:
        uses: times one pass reads it; None where nothing can be run.
        bytes: as it is.
        planned: in the file; None without a budget.
        buffer: it is no parameter.
    """

    unit: Unit
    uses: int | None
    bytes: int
    planned: int | None
    buffer: bool = False

    @property
    def bits(self) -> float | None:
        """Planned bits a parameter."""
        return 8 * self.planned / self.unit.parameters if self.planned is not None and self.unit.parameters else None

    def as_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return {
            "unit": self.unit.name, "names": [self.unit.name, *self.unit.aliases], "shape": list(self.unit.shape),
            "dtype": self.unit.dtype, "parameters": self.unit.parameters, "uses": self.uses, "bytes": self.bytes,
            "planned_bytes": self.planned, "planned_bits": self.bits, "buffer": self.buffer,
        }  # fmt: skip


def _stored(unit: Unit) -> int:
    return unit.parameters * WIDTH.get(unit.dtype, 4)


def of_artifact(path: Path) -> list[Line]:
    """Return the units of an artifact; no torch is needed."""
    contents = container.read(path)
    owners = {line.unit: line.bytes for line in by_unit(container.ledger(contents))}
    return [Line(u.unit, None, _stored(u.unit), owners.get(u.unit.name, 0)) for u in contents.units]


def of_model(model: Any, run: Callable[[Any], Any], planned: Mapping[str, float] | None = None) -> list[Line]:
    """Return the units of a `bytecap.model.checkpoint.Model`.

    Args:
        model: the model.
        run: one forward pass of a module.
        planned: bytes of every unit in the file.
    """
    from bytecap.model.weight_reads import count_uses

    uses = count_uses(model.module, run)
    buffers = dict(model.module.named_buffers(remove_duplicate=False))
    lines = []
    for u in model.units:
        count = None if u.name in buffers else sum(uses.get(n, 0) for n in (u.name, *u.aliases))
        size = round(planned[u.name]) if planned is not None else None
        lines.append(Line(u, count, _stored(u), size, u.name in buffers))
    return lines


def plan(job: Any) -> dict[str, float]:
    """Estimate the bytes of every unit under the default method's allocated plan."""
    from bytecap.allocation.plans import allocated_plan
    from bytecap.methods.bytecap import calibrate, prepare
    from bytecap.quantization.options import Options, effort_on

    options = Options.of(job.options, effort=effort_on(job.device, job.config.effort))
    prepared = prepare(job, options, calibrate(job, options))
    state, _ = allocated_plan(job, prepared)
    fixed = {u.name: float(_stored(u)) for u in job.model.units if u.name not in prepared.planner.names}
    return {**fixed, **state.rates}
