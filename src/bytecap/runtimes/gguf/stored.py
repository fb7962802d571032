"""Hold tensors that types compete for, and rounded ones, in work files, for models larger than memory.

A planner over thousands of tensors then holds a few numbers of each: weights are read from the checkpoint, Hessians and
codes from work files, whenever they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from bytecap.calibration.collectors import Use
from bytecap.calibration.metric import Metric, join
from bytecap.calibration.triangle import Triangle
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.runtimes.blocks import Codes, FloatArray
from bytecap.runtimes.blocks.encode import Shrinkage
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.places import Layout, Place
from bytecap.runtimes.gguf.rounding import Rounded
from bytecap.system.scratch import KeptTensor, Scratch
from bytecap.types import Unit

_ARRAYS = tuple(f.name for f in fields(Codes) if f.name != "format")


class StoredMetric:
    """A metric in work files.

    Args:
        uses: statistics of a unit, used up.
        tokens: behind them.
        scratch: for what is kept.
    """

    def __init__(self, uses: list[Use], tokens: int, scratch: Scratch) -> None:
        metric = join(uses, tokens)
        uses.clear()
        self._size = len(metric.hessian)
        self._lower = scratch.put(Triangle.of(metric.hessian).values)
        self._rows = scratch.put(metric.rows)

    def read(self, place: Place) -> Metric:
        """Return the metric of a place's rows."""
        rows = self._rows.load().cpu()
        hessian = Triangle(self._lower.load(), self._size).symmetric()
        return Metric(hessian, rows if place.rows is None else rows[place.rows])


class StoredItem(Item):
    """A tensor whose weight and metrics are read whenever they are asked for."""

    def __init__(self, place: Place, unit: Unit, model: StreamedModel, metrics: tuple[Any, Any], **more: Any) -> None:
        about = {"place": place, "types": (), "shrinkage": Shrinkage(), "device": "cpu", "spans": (), **more}
        for name, value in {**about, "_unit": unit, "_model": model, "_metrics": metrics}.items():
            object.__setattr__(self, name, value)

    _unit: Unit
    _model: StreamedModel
    _metrics: tuple[StoredMetric | None, StoredMetric | None]

    def under(self, shrinkage: Shrinkage) -> Item:
        """See `Item`."""
        return self._with(shrinkage=shrinkage)

    def sorting(self, spans: tuple[int, ...]) -> Item:
        """See `Item`."""
        return self._with(spans=spans)

    def _with(self, **more: Any) -> Item:
        own = {n: getattr(self, n) for n in ("types", "shrinkage", "device", "spans")}
        return StoredItem(self.place, self._unit, self._model, self._metrics, **{**own, **more})

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.place.parameters // self.place.cols, self.place.cols


def _weight(self: StoredItem) -> FloatArray:
    matrix = self._model.matrix(self._unit).cpu().numpy()
    return np.ascontiguousarray(self.place.to_file(matrix), np.float32)


def _metric(number: int) -> Any:
    def read(self: StoredItem) -> Metric:
        rows, cols = self.shape
        kept = self._metrics[number]
        if kept is None:  # what calibration does not reach costs nothing and gets little
            return Metric(torch.eye(cols, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64))
        return kept.read(self.place)

    return property(read)


StoredItem.weight = property(_weight)  # type: ignore[assignment]
StoredItem.metric, StoredItem.held = _metric(0), _metric(1)


def stored_items(
    model: StreamedModel,
    layout: Layout,
    metrics: Mapping[str, tuple[StoredMetric | None, StoredMetric | None]],
    types: Mapping[str, tuple[str, ...]],
    device: str,
) -> list[Item]:
    """Everything that types compete for, as `bytecap.runtimes.gguf.menu.items_of` gives it, in work files."""
    units = {u.name: u for u in model.units}
    return [
        StoredItem(p, units[p.unit], model, metrics.get(p.unit, (None, None)), types=types[p.name], device=device)
        for p in layout.places
        if p.name in types
    ]


class StoredRounded(Rounded):
    """A rounded tensor whose codes are read from work files, and whose values are decoded from them."""

    def __init__(self, rounded: Rounded, scratch: Scratch) -> None:
        codes, kept = rounded.codes, {}
        if codes is None:
            kept["values"] = scratch.put(torch.from_numpy(np.ascontiguousarray(rounded.values)))
        else:
            kept = {n: scratch.put(torch.from_numpy(np.ascontiguousarray(getattr(codes, n)))) for n in _ARRAYS}
        form = None if codes is None else codes.format
        for name in ("seen", "held", "alone"):
            object.__setattr__(self, name, getattr(rounded, name))
        for name, value in (("_form", form), ("_kept", kept)):
            object.__setattr__(self, name, value)

    _form: Any
    _kept: dict[str, KeptTensor]


def _codes(self: StoredRounded) -> Codes | None:
    if self._form is None:
        return None
    return Codes(self._form, **{n: self._kept[n].load().numpy() for n in _ARRAYS})


def _values(self: StoredRounded) -> FloatArray:
    codes = _codes(self)
    found: FloatArray = self._kept["values"].load().numpy() if codes is None else codes.values()
    return found


StoredRounded.codes = property(_codes)  # type: ignore[assignment]
StoredRounded.values = property(_values)  # type: ignore[assignment]


def keeper(scratch: Scratch) -> Callable[[Rounded], Rounded]:
    """Return what puts rounded tensors into work files."""
    return lambda rounded: StoredRounded(rounded, scratch)
