"""Compute the mean squared gradient of every weight in one backward pass, by which `radio` spends bits.

For a linear map with inputs x and output gradients g the gradient of one token is `g x^T`; its square is summed over
tokens as `(g^2)^T (x^2)`, one matrix product the size of the ordinary gradient. For an embedding it is `g^2`, added to
the row of the token. A tied table gets the sum of both uses.

What is differentiated: with `components`, as in the paper, the final hidden states. A pass without gradients finds the
principal components of their covariance, the first 1024 at most; then every sequence is given one component in turn,
and the hidden states' coordinates along it, at a sample of its tokens, are propagated back. Chosen here: each token's
coordinate has a random sign, so that squares of different tokens add up and products vanish; and all of it is scaled
to nats, so that its sum over the maps before the head is that of `loss`. The head lies behind the hidden states (the
paper leaves it in 16 bit); it, and a tied table's second use, get the gradients of `loss`.

With `loss`, a random loss with the true Fisher (`fisher_loss`), so that `1/2 G^2 dW^2` is in nats per token.

Every row of an embedding table is given half a token more than was seen, of the mean token's energy: most of a
vocabulary is rare or missing in a calibration text, and rows without gradient would get no bits. On the
embedded 1.4M model at 3.5 bits per parameter, 4,096 tokens seen, this takes the KL from 2.2 to 1.3 nats per token.

Source: Young, Radio (arXiv:2505.03031). Tokens are treated as independent, which takes out of the estimate the noise
that squaring whole sequences has. Omitted: correlations between weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.calibration.probe import fisher_loss
from bytecap.model.forward import Counted, Progress, batch_tokens, batches, fast_copy, in_fast_dtype
from bytecap.model.linears import linear_weights, maps_tokens
from bytecap.model.texts import Window
from bytecap.types import Unit

KINDS = ("components", "loss")
_COMPONENTS = 1024
_SAMPLED = 4  # one token in so many is propagated back

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
Squares = dict[tuple[str, str], Tensor]  # by unit name and kind of use


@dataclass
class Gradients:
    """The squared gradients and inputs that one pass collected.

    Attributes:
        square: mean squared gradient per token of every weight, float32 (rows, cols) by unit name.
        inputs: mean input of every linear map, float64 (cols,) by unit name.
        tokens: predicted tokens.
    """

    square: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0


@dataclass
class _Sums:
    """Sums over the tokens of a pass: squared gradients of every use, inputs, and the number of tokens."""

    square: Squares = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0


def _add(found: dict[Any, Tensor], name: Any, value: Tensor) -> None:
    found[name] = found[name] + value if name in found else value


def _hooks(module_copy: nn.Module, names: dict[str, str], shapes: dict[str, tuple[int, int]], found: _Sums) -> None:
    """Collect squared gradients in `found` whenever a backward pass goes through the copy."""

    def linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not maps_tokens(module, args[0], output):
                return
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()

            def add(g: Tensor) -> None:
                square = g.reshape(-1, g.shape[-1]).float().square()
                used = square.amax(1) > 0  # padding has no gradient
                _add(found.square, (name, "linear"), (square.T @ x.square()).cpu())
                _add(found.inputs, name, x[used].sum(0, dtype=torch.float64).cpu())

            if output.requires_grad:
                output.register_hook(add)

        return hook

    def embedding(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            ids = args[0].reshape(-1)

            def add(g: Tensor) -> None:
                total = torch.zeros(shapes[name], device=g.device)
                total.index_add_(0, ids, g.reshape(-1, g.shape[-1]).float().square())
                _add(found.square, (name, "embedding"), total.cpu())

            output = output.detach().requires_grad_(True)  # where gradients begin: weights need none
            output.register_hook(add)
            return output

        return hook

    for name, (m, kind) in linear_weights(module_copy).items():
        if name in names:
            m.register_forward_hook((embedding if kind == "embedding" else linear)(names[name]))


class _Hidden:
    """Keeps the final hidden states of a forward pass, which are the input of the last linear map."""

    def __init__(self, module_copy: nn.Module) -> None:
        self.states = torch.empty(0)
        for m, kind in linear_weights(module_copy).values():
            if kind != "embedding":
                m.register_forward_pre_hook(self._keep)

    def _keep(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.states = args[0]

    @torch.no_grad()
    def components(self, module_copy: nn.Module, windows: Sequence[Window], size: int) -> Tensor:
        """Return the principal components (components, width) of the hidden states, those of most variance first."""
        device = next(module_copy.parameters()).device
        moment, total, tokens = torch.zeros(()), torch.zeros(()), 0
        for ids, mask in batches(windows, size):
            module_copy(ids[:, :-1].to(device))
            states = self.states[mask.to(device)].double().cpu()
            moment, total, tokens = moment + states.T @ states, total + states.sum(0), tokens + len(states)
        mean = total / max(1, tokens)
        _, vectors = torch.linalg.eigh(moment / max(1, tokens) - mean[:, None] * mean)
        found: Tensor = vectors.T.flip(0)[:_COMPONENTS].float()
        return found


def _along(hidden: _Hidden, components: Tensor) -> Loss:
    """Return a loss whose gradient is that of the hidden states along one component a sequence; see the module."""
    turn = 0

    def value(module_copy: nn.Module, ids: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal turn
        module_copy(ids[:, :-1])
        number = torch.arange(turn, turn + len(ids)) % len(components)
        turn += len(ids)
        drawn = torch.rand(mask.shape, generator=generator, device=mask.device) * _SAMPLED
        signs = torch.where(drawn < 0.5, -1.0, 1.0) * (drawn < 1) * mask
        direction = components[number].to(hidden.states.device)
        found: Tensor = (torch.einsum("btc,bc->bt", hidden.states.float(), direction) * signs).sum()
        return found

    return value


def _pass(
    module_copy: nn.Module, units: Sequence[Unit], windows: Sequence[Window], size: int, seed: int, loss: Loss,
    progress: Progress | None,
) -> _Sums:  # fmt: skip
    """Return the sums of one backward pass; the copy's hooks stay."""
    found = _Sums()
    names = {alias: u.name for u in units for alias in (u.name, *u.aliases)}
    _hooks(module_copy, names, {u.name: u.matrix_shape for u in units}, found)
    device = next(module_copy.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for ids, mask in batches(windows, size):
        loss(module_copy, ids.to(device), mask.to(device), generator).backward()
        found.tokens += int(mask.sum())
        if progress is not None:
            progress(int(mask.sum()))
    return found


def _in_nats(along: Squares, by_loss: Squares) -> Squares:
    """Put squares from hidden states on the scale of the loss's, and take those they do not reach from the loss."""
    both = [k for k in along if k in by_loss and k[1] == "linear"] or list(along)
    seen = sum(float(along[k].sum()) for k in both)
    scale = sum(float(by_loss[k].sum()) for k in both) / seen if seen > 0 else 0.0
    return by_loss | {k: scale * v for k, v in along.items()}


def mean_squared_gradients(
    module: nn.Module,
    units: Sequence[Unit],
    windows: Sequence[Window],
    *,
    kind: str = KINDS[0],
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Gradients:
    """Return the mean squared gradients of all linear maps and embeddings.

    Args:
        module: causal model, at the weights the gradient is wanted at.
        units: its units.
        windows: calibration windows.
        kind: what is differentiated, `components` or `loss`.
        seed: of all signs, and of tokens.
        device: torch device of the passes.
        progress: called with the number of tokens finished.
        note: told where the passes run in float32.
    """
    target, counted = torch.device(device), Counted(progress)
    size = batch_tokens(max((u.matrix_shape[0] for u in units if u.linear), default=4096)) // 2

    def passes(dtype: torch.dtype) -> tuple[_Sums, Squares]:
        module_copy = fast_copy(module, target, dtype)
        sums = _pass(module_copy, units, windows, size, seed, fisher_loss, counted)
        if kind != "components":
            return sums, sums.square
        module_copy = fast_copy(module, target, dtype)
        hidden = _Hidden(module_copy)
        loss = _along(hidden, hidden.components(module_copy, windows, size))
        return sums, _in_nats(_pass(module_copy, units, windows, size, seed, loss, None).square, sums.square)

    sums, square = in_fast_dtype(module, target, passes, note, counted)
    found = Gradients({}, {n: x / max(1, sums.tokens) for n, x in sums.inputs.items()}, sums.tokens)
    for (name, _), value in square.items():
        _add(found.square, name, value)
    tables = {name for name, use in square if use == "embedding"}
    for name, seen in found.square.items():
        unseen = 0.5 * (name in tables)
        found.square[name] = (seen + unseen * seen.sum(0) / max(1, found.tokens)) / max(
            1, found.tokens + unseen * len(seen)
        )
    return found
