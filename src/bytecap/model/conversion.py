"""Which tensor of a checkpoint becomes which element of which tensor of the model.

transformers renames tensors as it loads them, and stacks, splits or turns some (experts of a mixture, fused maps). The
library is asked, not imitated: its own conversions are run on the numbers of the elements instead of on weights, so
that what comes out says where every element went. No architecture is named here.

>>> describe(np.arange(6).reshape(2, 3).T, [("w", 0, 6)])
['w', 0, [3, 2], [1, 3]]
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

_MOST_PARTS = 64

Numbers = npt.NDArray[np.int64]


@dataclass
class Conversion:
    """What became of a checkpoint's tensors.

    Attributes:
        entries: of every tensor that was used: what it is made of, as `source_tensors.json` says it, in names of the
            model's tensors; None where the library changed values and not only their places.
        sources: of every tensor of the model that was filled, the names of the tensors that it came from.
        unexpected: names of tensors that have no place in the model.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, set[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def use(self, target: str, name: str) -> None:
        """Note that a tensor of the model came from a tensor of the checkpoint."""
        self.sources.setdefault(target, set()).add(name)


def convert(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Conversion:
    """Follow tensors of a checkpoint into a model of transformers.

    Args:
        module: built from that checkpoint's config.
        shapes: of the checkpoint's tensors, by name.
    """
    live = module.state_dict(keep_vars=True)
    found = Conversion()
    groups: dict[tuple[str, str], list[str]] = {}
    rename, converters = _library(module, live)
    for name in shapes:
        target, pattern = rename(name)
        if target not in live:
            found.unexpected.append(name)
        elif pattern is not None:
            groups.setdefault((target, pattern_owner(converters, pattern)), []).append(name)
        else:
            found.entries[name] = target
            found.use(target, name)
    for (target, _), names in groups.items():
        _follow(module, live, target, {n: rename(n)[1] for n in names}, shapes, converters, found)
    return found


def pattern_owner(converters: Mapping[str, Any], pattern: str) -> str:
    """A name for the converter that a pattern belongs to."""
    return "|".join(converters[pattern].source_patterns)


def _library(module: Any, live: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The library's function from a name to (name in the model, pattern of a converter or None), and its converters."""
    prefix = str(getattr(module, "base_model_prefix", ""))
    try:
        from transformers import conversion_mapping as mapping
        from transformers import core_model_loading as loading
    except ImportError:  # before version 5 a model's own names were stored

        def plain(name: str) -> tuple[str, None]:
            tries = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            return next((n for n in tries if n in live), name), None

        return plain, {}
    rules = mapping.get_model_conversion_mapping(module) if hasattr(module, "config") else []
    renamings = [r for r in rules if isinstance(r, loading.WeightRenaming)]
    converters = [r for r in rules if isinstance(r, loading.WeightConverter)]

    def rename(name: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = loading.rename_source_key(name, renamings, converters, prefix, live)
        if found[0] not in live and name in live:
            found = loading.rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=live)
        return found

    return rename, {p: c for c in converters for p in c.source_patterns}


def _follow(
    module: nn.Module,
    live: Mapping[str, Any],
    target: str,
    patterns: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    converters: Mapping[str, Any],
    found: Conversion,
) -> None:
    """Send numbered elements of some tensors through the converter that takes them all."""
    from transformers.core_model_loading import dot_natural_key

    names = sorted(patterns, key=dot_natural_key)
    starts = np.cumsum([0, *(int(np.prod(shapes[n], dtype=np.int64)) for n in names)])
    machine = copy.deepcopy(converters[str(patterns[names[0]])])
    for name, start, stop in zip(names, starts, starts[1:], strict=False):
        numbers = torch.arange(int(start), int(stop)).reshape(shapes[name])
        machine.add_tensor(target, name, patterns[name], numbers)
    try:
        results = machine.convert(target, model=module, config=getattr(module, "config", None))
    except Exception:  # noqa: BLE001 (whatever the library's operation needs besides: it was content with weights)
        results = {}
    results = {n: (r[0] if isinstance(r, list) else r) for n, r in results.items() if n in live}
    for name in names:
        found.entries[name] = None
        for n in results or (target,):
            found.use(n, name)
    whole, spans = _inverse(results, live, int(starts[-1]))
    if whole is None:
        return
    for name, start, stop in zip(names, starts, starts[1:], strict=False):
        found.entries[name] = describe(whole[start:stop].reshape(shapes[name]), spans)
        touched = {n for n, first, last in spans if ((whole[start:stop] >= first) & (whole[start:stop] < last)).any()}
        for n in results.keys() - touched:
            found.sources[n].discard(name)


def _inverse(results: Mapping[str, Any], live: Mapping[str, Any], count: int) -> tuple[Any, list[tuple[str, int, int]]]:
    """Place of every numbered element among the results laid end to end; None unless each is in one place."""
    spans: list[tuple[str, int, int]] = []
    whole = np.full(count, -1, np.int64)
    at = 0
    for name, numbers in results.items():
        if not isinstance(numbers, torch.Tensor) or numbers.shape != live[name].shape or numbers.dtype != torch.int64:
            return None, []
        flat = numbers.reshape(-1).numpy()
        if flat.size and (flat.min() < 0 or flat.max() >= count):
            return None, []
        whole[flat] = np.arange(at, at + len(flat))
        spans.append((name, at, at + len(flat)))
        at += len(flat)
    return (whole, spans) if at == count and (whole >= 0).all() else (None, [])


def describe(places: Numbers, spans: Sequence[tuple[str, int, int]]) -> Any:
    """An entry of `source_tensors.json` for elements that lie at these places.

    Args:
        places: of a tensor's elements, in its shape, among tensors of the model laid end to end.
        spans: (name, first place, place behind the last) of those.

    Returns:
        The entry; None where no few views make it up.
    """
    view = _strided(places, spans)
    if view is not None:
        return view
    for axis in range(places.ndim):
        parts = _parts(np.moveaxis(places, axis, 0), spans)
        views = [_strided(np.moveaxis(p, 0, axis), spans) for p in parts]
        if views and all(v is not None for v in views):
            return {"axis": axis, "parts": views}
    return None


def _parts(places: Numbers, spans: Sequence[tuple[str, int, int]]) -> list[Numbers]:
    """Runs along the first axis that may be one view each: of one owner, and evenly spaced."""
    first = places.reshape(len(places), -1)[:, 0] if places.size else places.reshape(-1)
    owner = np.searchsorted([s for _, s, _ in spans], first, "right")
    cuts, at = [], 0
    for i in range(1, len(first)):
        step = first[at + 1] - first[at] if i > at + 1 else None
        if owner[i] != owner[at] or (step is not None and first[i] - first[i - 1] != step):
            cuts.append(i)
            at = i
        if len(cuts) > _MOST_PARTS:
            return []
    return np.split(places, cuts)


def _strided(places: Numbers, spans: Sequence[tuple[str, int, int]]) -> list[Any] | None:
    """`[unit, offset, shape, strides]` with trailing members left out where they say nothing; None if it is no view."""
    if not places.size:
        return None
    offset = int(places.reshape(-1)[0])
    name, start, stop = next(s for s in spans if s[1] <= offset < s[2])
    strides = [
        int(np.take(places, 1, axis).reshape(-1)[0]) - offset if n > 1 else 0 for axis, n in enumerate(places.shape)
    ]
    grid = np.zeros(places.shape, np.int64)
    for axis, step in enumerate(strides):
        shape = [1] * places.ndim
        shape[axis] = -1
        grid += (np.arange(places.shape[axis]) * step).reshape(shape)
    if min(strides, default=0) < 0 or not np.array_equal(grid + offset, places) or int(places.max()) >= stop:
        return None
    plain = [int(np.prod(places.shape[i + 1 :])) for i in range(places.ndim)]
    same = all(s == p or n == 1 for s, p, n in zip(strides, plain, places.shape, strict=True))
    found: list[Any] = [name, offset - start, list(places.shape)]
    return found if same else [*found, strides]


def ignored(module: nn.Module) -> re.Pattern[str]:
    """Names that the library itself leaves out of checkpoints it reads."""
    patterns = [
        *(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()),
        r"rotary_emb\.inv_freq", r"(^|\.)position_ids$",
    ]  # fmt: skip
    return re.compile("|".join(f"(?:{p})" for p in patterns))
