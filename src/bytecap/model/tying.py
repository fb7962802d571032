"""Tie blocks: several layers of the depth read one stored block, each with low-rank parts of its own.

A model directory (or an artifact) that holds `tying.json` beside `config.json` is the model of that config with

- the matrices of layer `i` replaced by those of layer `sources[i]`: they are stored once, under the name of the first
  layer that reads them. Vectors (norms, biases) stay with each layer: they are 0.1% of a block.
- for every linear map named in `ranks`, two small linear maps `down` and `up` beside it in every layer that shares its
  block; `up(down(x))` is added to the map's output.

>>> content = b'{"blocks": "model.layers", "sources": [0, 1, 0, 1], "ranks": {"mlp.up_proj": 8}}'
>>> parse(content, "tying.json").shared
{0, 1}

The depth, the caches and whatever else belongs to a layer by its place are those of the original. Nothing of the file
is run: it names a list of blocks, numbers and linear maps of the model that `config.json` describes.

Source: Relaxed Recursive Transformers (Bae et al., ICLR 2025, arXiv:2410.20672). There a block is looped as a whole;
here any layer may copy any earlier one, which is what Dynamic Layer Tying (Hay and Wolf, ICLR 2024) asks for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.errors import CheckpointError
from bytecap.model.linears import linear_weights

FILE = "tying.json"


@dataclass(frozen=True)
class Tying:
    """The block that every layer reads.

    Attributes:
        blocks: name of the module list that holds the layers.
        sources: for every layer the first layer that reads the same block, itself where it is that layer.
        ranks: rank of the parts added to a linear map, by its name inside a block; none where a block is not shared.
    """

    blocks: str
    sources: tuple[int, ...]
    ranks: dict[str, int] = field(default_factory=dict)

    @property
    def unique(self) -> int:
        """Number of stored blocks."""
        return len(set(self.sources))

    @property
    def shared(self) -> set[int]:
        """Blocks that more than one layer reads."""
        return {s for s, n in Counter(self.sources).items() if n > 1}

    def dump(self) -> bytes:
        """Return the content of `tying.json`."""
        value = {"blocks": self.blocks, "sources": list(self.sources), "ranks": self.ranks}
        return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def parse(content: bytes, name: str) -> Tying:
    """Read `tying.json`.

    Raises:
        CheckpointError: it is no such description; what the module has is checked by `tie`.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{name} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict) or set(value) != {"blocks", "sources", "ranks"}:
        raise CheckpointError(f"{name} must be an object with blocks, sources and ranks")
    blocks, sources, ranks = value["blocks"], value["sources"], value["ranks"]
    if type(blocks) is not str or type(sources) is not list or type(ranks) is not dict:
        raise CheckpointError(f"{name}: blocks is a name, sources a list and ranks an object")
    for i, s in enumerate(sources):
        if type(s) is not int or not 0 <= s <= i or sources[s] != s:
            raise CheckpointError(f"{name}: layer {i} cannot read the block of layer {s!r}")
    for linear, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise CheckpointError(f"{name}: {linear} cannot have rank {rank!r}")
    return Tying(blocks, tuple(sources), dict(ranks))


def find_blocks(module: nn.Module, name: str = "the model") -> tuple[str, list[nn.Module]]:
    """Find the model's depth: its largest list of modules, all of the same shapes.

    Args:
        module: any module.
        name: for messages.

    Raises:
        CheckpointError: there is no such list, or two of its blocks differ (both are named).
    """
    lists = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in lists}
    if not any(sizes.values()):
        raise CheckpointError(f"{name} has no list of blocks (nn.ModuleList), so there is nothing to tie")
    found, blocks = max(lists, key=lambda item: sizes[item[0]])
    first = _shapes(blocks[0])
    for i, block in enumerate(blocks):
        shapes = _shapes(block)
        for key in sorted(first.keys() | shapes.keys()):
            one, other = first.get(key), shapes.get(key)
            if one != other:
                raise CheckpointError(
                    f"{name}: blocks of different shapes cannot be tied: {found}.0.{key} is {_said(one)}, "
                    f"{found}.{i}.{key} is {_said(other)}"
                )
    return found, list(blocks)


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in block.named_parameters(remove_duplicate=False)}


def layers(module: nn.Module, path: str) -> list[nn.Module]:
    """Return the layers of a list of blocks, tied or not."""
    return list(module.get_submodule(path).children())


def matrices(block: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that layers share: those of two dimensions and more, by name."""
    return {n: p for n, p in block.named_parameters(remove_duplicate=False) if p.ndim > 1}


def point(block: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Let a block read the given parameters."""
    for name, p in parameters.items():
        path, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(path), leaf, p)


def tie(module: nn.Module, tying: Tying, name: str = FILE) -> None:
    """Share blocks and add low-rank parts (whose `up` is zero), in place.

    Raises:
        CheckpointError: the description does not fit the module.
    """
    path, blocks = find_blocks(module, name)
    if path != tying.blocks or len(blocks) != len(tying.sources):
        raise CheckpointError(
            f"{name} ties {len(tying.sources)} blocks of {tying.blocks!r}, the model has {len(blocks)} in {path!r}"
        )
    linears = {
        n.removesuffix(".weight"): m for n, (m, kind) in linear_weights(blocks[0]).items() if kind != "embedding"
    }
    for linear, rank in tying.ranks.items():
        if linear not in linears:
            raise CheckpointError(f"{name}: {path}.0 has no linear map {linear}")
        shape = tuple(_weight(linears[linear]).shape)
        if rank > min(shape):
            raise CheckpointError(f"{name}: {linear} of shape {list(shape)} cannot have rank {rank}")
    own = [matrices(b) for b in blocks]
    for block, source in zip(blocks, tying.sources, strict=True):
        point(block, own[source])
    for i in (i for i, s in enumerate(tying.sources) if s in tying.shared):
        for linear, rank in tying.ranks.items():
            _relax(blocks[i].get_submodule(linear), rank)


def _weight(linear: nn.Module) -> Tensor:
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight


def oriented(linear: nn.Module) -> Tensor:
    """Return a linear map's weight as (outputs, inputs), whichever way it is stored."""
    weight = _weight(linear)
    return weight if isinstance(linear, nn.Linear) else weight.T


def _relax(linear: nn.Module, rank: int) -> None:
    """Add `up(down(x))` to a linear map's output, from now on."""
    weight = oriented(linear)
    options: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": weight.dtype}
    linear.add_module("down", nn.Linear(weight.shape[1], rank, **options))
    linear.add_module("up", nn.Linear(rank, weight.shape[0], **options))
    nn.init.zeros_(linear.up.weight)  # type: ignore[union-attr,arg-type]
    linear.register_forward_hook(_add_low_rank)


def _add_low_rank(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result: Tensor = output + linear.up(linear.down(args[0]))
    return result


def tie_as_described(module: nn.Module, directory: Path) -> None:
    """Tie a module as the `tying.json` of its directory says; does nothing where there is none."""
    path = directory / FILE
    if path.is_file():
        tie(module, parse(path.read_bytes(), str(path)), str(path))


@torch.no_grad()
def fill(module: nn.Module, paths: Sequence[Path]) -> None:
    """Put the tensors of safetensors files into a tied module, every stored tensor once.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    from safetensors.torch import load_file

    live = dict(module.state_dict(keep_vars=True))
    missing = {t.data_ptr(): n for n, t in reversed(live.items()) if t.numel()}
    for path in paths:
        for name, value in load_file(path).items():
            if name not in live:
                raise CheckpointError(f"{path} holds tensor {name}, which the tied model has not")
            if live[name].shape != value.shape:
                wanted = list(live[name].shape)
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(value.shape)}, the tied model wants {wanted}"
                )
            live[name].copy_(value)
            missing.pop(live[name].data_ptr(), None)
    if missing:
        raise CheckpointError(f"{paths[0].parent} lacks tensor {min(missing.values())} ({len(missing)} missing in all)")
