"""Pass calibration batches on several ranks, and add up what they say as one process would.

Rank r passes every N-th batch, forward and backward. What a batch says about a weight (its inputs and their weights,
not yet a product) goes to the rank that owns the weight, which takes the batches up in their order. So passes are
divided by batches, products and sums by weights, and the memory of sums too; and each sum is the same to the last
bit, whatever N is. Noise for the labels of others' batches is drawn and dropped, which costs little beside a pass.

Sent are the inputs of all maps in their own type: for each weight, 2 bytes (bf16) times tokens times columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bytecap.calibration.collectors import Sink
from bytecap.errors import RankError
from bytecap.sizes import in_groups
from bytecap.system.ranks import Ranks

_TOGETHER = 2**28  # bytes that are sent at once

Parts = list[tuple[Tensor, ...]]  # of every call in one batch


def passes(
    sinks: Sequence[Sink],
    owner: Sequence[int],
    count: int,
    ranks: Ranks,
    device: torch.device,
    run: Callable[[int], None],
    skip: Callable[[int], None],
    done: Callable[[int], None],
) -> None:
    """Pass `count` batches.

    Args:
        sinks: all that take something up, in the same order on all ranks.
        owner: rank that takes up each.
        count: number of batches.
        ranks: processes.
        device: of the passes.
        run: passes batch i forward and backward.
        skip: does what batch i changes for those that follow.
        done: told of batch i when it is taken up.

    Raises:
        torch.OutOfMemoryError: on all ranks, where one rank's memory has ended.
    """
    boxes: list[Parts] = [[] for _ in sinks]
    for sink, box in zip(sinks, boxes, strict=True):
        sink.deliver = _into(box)
    for at in range(0, count, ranks.size):
        trouble = ""
        for i in range(at, min(at + ranks.size, count)):
            if i - at != ranks.rank:
                skip(i)
                continue
            try:
                run(i)
            except RuntimeError as exc:
                trouble = _known(exc)
        _stop_all(ranks.all(trouble))
        _take_up(sinks, boxes, owner, ranks, device)
        for i in range(at, min(at + ranks.size, count)):
            done(i)


def _into(box: Parts) -> Callable[..., None]:
    return lambda *parts: box.append(parts)


def _known(exc: RuntimeError) -> str:
    """Return what to tell the other ranks of an error after which all try again; others are raised."""
    if isinstance(exc, torch.OutOfMemoryError) or "deterministic" in str(exc):
        return f"{type(exc).__name__}: {exc}"
    raise exc


def _stop_all(troubles: Sequence[str]) -> None:
    """Raise what any rank has met."""
    trouble = next((t for t in troubles if t), "")
    if trouble.startswith("OutOfMemoryError"):
        raise torch.OutOfMemoryError(trouble)
    if trouble:
        raise RuntimeError(trouble)


@torch.no_grad()
def _take_up(
    sinks: Sequence[Sink], boxes: Sequence[Parts], owner: Sequence[int], ranks: Ranks, device: torch.device
) -> None:
    """Send parts to those who own their sinks, who take them up in the order of ranks."""
    calls = ranks.all([[len(b), sum(t.numel() * t.element_size() for parts in b for t in parts)] for b in boxes])
    width = ranks.all([len(b[0]) if b else 0 for b in boxes])  # parts of a call
    size = [max(theirs[i][1] for theirs in calls) for i in range(len(sinks))]
    for group in in_groups(range(len(sinks)), lambda i: size[i], _TOGETHER):
        sent = [
            [t for i in group if owner[i] == to for parts in boxes[i] for t in parts] for to in range(ranks.size)
        ]  # fmt: skip
        arrived = [iter(tensors) for tensors in ranks.exchange(sent, str(device))]
        for i in group:
            boxes[i].clear()
            if owner[i] != ranks.rank:
                continue
            for source, tensors in enumerate(arrived):
                for _ in range(calls[source][i][0]):
                    sinks[i].take(*(next(tensors) for _ in range(width[source][i])))
        if any(next(tensors, None) is not None for tensors in arrived):
            raise RankError("a rank has sent more than it said")
