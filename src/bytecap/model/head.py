"""Compute the logits of large vocabularies for a few tokens at a time.

A streamed pass over 8,192 tokens of a vocabulary of 128,000 would hold 4 GB of logits, and what a loss makes of them
several times that. Where the pass's logits are the output of a linear map and nothing follows it, the pass is ended
before that map, and the map is applied to pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bytecap.model.forward import logits_of
from bytecap.model.streaming import Streamed

_MOST = {"cpu": 2**24, "cuda": 2**27}  # logits at once


def head_of(module: nn.Module, run: Callable[[], Any]) -> str | None:
    """Path of the linear map whose output is what a pass returns as logits; None if there is none.

    Args:
        module: to watch.
        run: one pass over it.
    """
    outputs: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            outputs[path] = output

        return hook

    handles = [m.register_forward_hook(watch(p)) for p, m in module.named_modules() if isinstance(m, nn.Linear)]
    try:
        logits = logits_of(run())
    finally:
        for handle in handles:
            handle.remove()
    return next((p for p, output in outputs.items() if output is logits), None)


@dataclass(frozen=True)
class Pieces:
    """The rest of a pass: nothing, or a head that is applied to pieces of its input.

    Attributes:
        head: None where passes return logits.
        rows: of a piece.
    """

    head: Callable[[Tensor], Tensor] | None
    rows: int

    def logits(self, piece: Tensor) -> Tensor:
        """Return the logits (n, vocabulary) of a piece of what a pass returned (n, width)."""
        return piece if self.head is None else self.head(piece)

    def backward(self, found: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        """Go back through a pass from the sum of the losses of its pieces.

        Args:
            found: what the pass returned (n, width).
            loss: of the logits of some predictions.
        """
        if self.head is None:
            loss(found).backward()
            return
        leaf = found.detach().requires_grad_()
        for piece in leaf.split(self.rows):
            loss(self.logits(piece)).backward()
        found.backward(leaf.grad)


@contextmanager
def head_pieces(streamed: Streamed, tokens: int) -> Iterator[Pieces]:
    """Let a pass end before its head inside a `with` block, where its logits would be many.

    Args:
        streamed: the model.
        tokens: predictions of the pass.
    """
    path = streamed.head
    head: Any = None if path is None else streamed.module.get_submodule(path)
    rows = _MOST[streamed.device.type] // max(1, 1 if head is None else head.out_features)
    if path is None or tokens <= rows:
        yield Pieces(None, tokens)
        return
    at, _, leaf = path.rpartition(".")
    owner = streamed.module.get_submodule(at)
    setattr(owner, leaf, nn.Identity())
    streamed.aside[path] = head
    try:
        yield Pieces(head, max(1, rows))
    finally:
        del streamed.aside[path]
        setattr(owner, leaf, head)
