"""Make a tied model to start from: shared blocks from the original's, low-rank parts by truncated SVD.

For a block that layers `l` share, with `W_l` a matrix of theirs in the original::

    W' = mean of W_l            average
         W of the first layer   lower
         W of layer round(b (L - 1) / (K - 1)) for block b of K     stepwise

    W_l - W' ~ U_r S_r V_r^T,   up = U_r S_r,   down = V_r^T

The truncated SVD is the nearest matrix of that rank (Eckart and Young), so a tied model with parts of full rank is the
original. Source: Relaxed Recursive Transformers (Bae et al., ICLR 2025, arXiv:2410.20672), which takes whole blocks
where vectors here stay with their layer. `stepwise` is for loops: a group of layers that a search found need not
hold the layer that it would take.

>>> loop(4, 2), divisors(12)
((0, 1, 0, 1), [1, 2, 3, 4, 6])
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bytecap.errors import UsageError
from bytecap.model.linears import linear_weights
from bytecap.model.tying import Tying, find_blocks, layers, matrices, oriented, tie

INITS = ("stepwise", "average", "lower")
# `up` and `down` of every map and layer of a group, by its layers
Parts = dict[tuple[int, ...], list[tuple[Tensor, Tensor]]]


def loop(depth: int, blocks: int) -> tuple[int, ...]:
    """Sources of a depth that goes through so many blocks again and again."""
    return tuple(i % blocks for i in range(depth))


def divisors(depth: int) -> list[int]:
    """Numbers of blocks that a depth can loop over with at least two uses each."""
    return [k for k in range(1, depth) if depth % k == 0]


def ranks_for(module: nn.Module, rank: int) -> dict[str, int]:
    """The rank for every linear map of a block where low-rank parts are smaller than the map itself."""
    linears = linear_weights(find_blocks(module)[1][0])
    found = {}
    for name, (m, kind) in linears.items():
        if kind != "embedding" and 0 < rank * sum(oriented(m).shape) < oriented(m).numel():
            found[name.removesuffix(".weight")] = rank
    return found


def tied(original: nn.Module, tying: Tying, init: str = "average", parts: Parts | None = None) -> nn.Module:
    """A tied copy of a module with storage of its own; the module itself is left alone.

    Args:
        original: module with a list of equal blocks.
        tying: which layer reads which block.
        init: `stepwise`, `average` or `lower`.
        parts: low-rank parts of groups that were met before with the same ranks and init, added to.

    Raises:
        UsageError: `stepwise` where layers are not looped over.
    """
    module = copy.deepcopy(original)
    tie(module, tying)
    blocks, first = layers(module, tying.blocks), layers(original, tying.blocks)
    with torch.no_grad():
        for source in sorted(set(tying.sources)):
            members = [i for i, s in enumerate(tying.sources) if s == source]
            starts = members if init == "average" else [_start(tying, source, init)]
            own = matrices(blocks[source])
            for name in matrices(first[source]):
                own[name].copy_(torch.stack([matrices(first[i])[name] for i in starts]).mean(0))
            if len(members) > 1:
                _relax(blocks, first, members, tying.ranks, {} if parts is None else parts)
    return module


def _start(tying: Tying, source: int, init: str) -> int:
    """Return the layer that a block is taken from."""
    if init == "lower":
        return source
    depth, count = len(tying.sources), tying.unique
    if init != "stepwise" or tying.sources != loop(depth, count):
        raise UsageError("--init stepwise is for loops; layers found by --search need average or lower")
    return round(source * (depth - 1) / max(1, count - 1))


def _relax(
    blocks: list[nn.Module], first: list[nn.Module], members: list[int], ranks: dict[str, int], parts: Parts
) -> None:
    """Fill the low-rank parts of layers that share a block."""
    pairs = [
        (blocks[i].get_submodule(name), first[i].get_submodule(name), r) for name, r in ranks.items() for i in members
    ]
    known = parts.setdefault(tuple(members), [])
    if not known:
        known += [_parts(oriented(theirs) - oriented(owner), r) for owner, theirs, r in pairs]
    for (owner, _, _), (up, down) in zip(pairs, known, strict=True):
        owner.up.weight.copy_(up)  # type: ignore[union-attr,operator]
        owner.down.weight.copy_(down)  # type: ignore[union-attr,operator]


def _parts(missing: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the nearest matrix of a rank as two factors, `(rows, rank)` and `(rank, columns)`."""
    u, s, v = torch.linalg.svd(missing.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank].clone()
