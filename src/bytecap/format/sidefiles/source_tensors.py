"""`source_tensors.json`: names, shapes and dtypes of a checkpoint whose tensors are not the model's own, one by one.

A library may stack what a checkpoint keeps apart (the experts of a mixture), or call it otherwise. Units are the
model's tensors, since they are what runs; `unpack` writes the checkpoint's, so that other programs load the directory
too. This side file says which element of which unit every tensor of the checkpoint is. It is stored only where the two
differ. docs/format.md, 7.5, is its law.

An entry is the name of a unit (the whole of it), a view `[unit, offset, shape, strides, dtype]`, of which trailing
members may be missing, or `{"axis": axis, "parts": [view, ...]}`, views joined along an axis. Offsets and strides count
elements of the unit in its stored layout. A unit that no entry speaks of is a tensor of the checkpoint by itself.

>>> units = {"w": np.arange(6.0).reshape(2, 3)}
>>> tensors(b'{"a": "w", "b": ["w", 3, [3]], "c": ["w", 0, [3, 2], [1, 3]]}', units)["c"][0].tolist()
[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CorruptError

FILE = "source_tensors.json"
_MOST = 32  # dimensions of a tensor
_COPIES = 4  # times the units' values that tensors may hold together: tied ones are written under every name

Array = npt.NDArray[Any]


def dump(entries: Mapping[str, Any]) -> bytes:
    """The file's content."""
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()


def tensors(content: bytes, units: Mapping[str, Array]) -> dict[str, tuple[Array, str, str | None]]:
    """(values, name of its first unit, dtype if it is not the unit's) of every tensor of the checkpoint, by name.

    Args:
        content: of the side file.
        units: decoded values in stored layout, without aliases; views of them are returned.

    Raises:
        CorruptError: the description does not fit the units.
    """
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise CorruptError(f"{FILE} is not valid JSON: {exc}") from exc
    if not isinstance(entries, dict):
        raise CorruptError(f"{FILE} holds no object")
    left = _COPIES * sum(max(1, a.size) for a in units.values())
    found: dict[str, tuple[Array, str, str | None]] = {}
    for name, entry in entries.items():
        parts = entry.get("parts") if isinstance(entry, dict) else [entry]
        if not isinstance(parts, list) or not parts:
            raise CorruptError(f"{FILE}: tensor {name} is made of nothing")
        views = [_view(name, p, units) for p in parts]
        left -= sum(max(1, v.size) for v, _, _ in views)
        if left < 0:
            raise CorruptError(f"{FILE} describes more than {_COPIES} times what the units hold")
        values = _joined(name, [v for v, _, _ in views], entry.get("axis")) if isinstance(entry, dict) else views[0][0]
        found[name] = values, views[0][1], views[0][2]
    named = {unit for entry in entries.values() for unit in units_of(entry)}
    if twice := found.keys() & (units.keys() - named):
        raise CorruptError(f"{FILE}: tensor {min(twice)} is also the name of a unit that is written as it is")
    return found | {n: (a, n, None) for n, a in units.items() if n not in named}


def units_of(entry: Any) -> set[str]:
    """Names of the units that an entry speaks of."""
    if isinstance(entry, str):
        return {entry}
    if isinstance(entry, dict):
        return {p if isinstance(p, str) else p[0] for p in entry["parts"]}
    return {entry[0]} if entry else set()


def _joined(name: str, views: list[Array], axis: Any) -> Array:
    try:
        return np.concatenate(views, operator.index(axis))
    except (ValueError, TypeError) as exc:
        raise CorruptError(f"{FILE}: the parts of tensor {name} cannot be joined: {exc}") from exc


def _counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _view(name: str, part: Any, units: Mapping[str, Array]) -> tuple[Array, str, str | None]:
    """One view, after checking that it lies inside its unit."""
    part = [part] if isinstance(part, str) else part
    if not isinstance(part, list) or not 1 <= len(part) <= 5 or not isinstance(part[0], str) or part[0] not in units:
        raise CorruptError(f"{FILE}: tensor {name} is made of no unit of this file")
    whole = units[part[0]]
    if len(part) == 1:
        return whole, part[0], None
    more: list[Any] = part[1:] + [None] * (5 - len(part))
    offset, shape, strides, dtype = more
    shape, offset = list(whole.shape) if shape is None else shape, 0 if offset is None else offset
    if not _counts([offset]) or not _counts(shape) or not isinstance(dtype, str | None):
        raise CorruptError(f"{FILE}: tensor {name} has no such place in unit {part[0]}")
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if not _counts(strides) or len(strides) != len(shape):
        raise CorruptError(f"{FILE}: tensor {name} has no such place in unit {part[0]}")
    size = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if size > whole.size or (size and last >= whole.size):
        raise CorruptError(f"{FILE}: tensor {name} reaches beyond unit {part[0]}")
    if not size:
        return np.zeros(shape, whole.dtype), part[0], dtype
    flat = np.ascontiguousarray(whole).reshape(-1)[offset:]
    steps = [s * whole.dtype.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False), part[0], dtype
