"""Collect statistics of every unit in one streamed forward and backward pass over calibration windows.

The distortion of a unit is the Fisher quadratic form of the model's own loss, in nats per token::

    D = 1/2 * sum_i G_i * (W^ - W)_i H (W^ - W)_i^T        i: rows

Gradients are those of random sums of the model's predictions that have the second moment of a loss whose labels are
sampled from the model itself: the true Fisher (`bytecap.model.fisher`), so D predicts the KL divergence to the
original. For a linear map `H` is the *guided* Hessian: every token's `x x^T` weighted by its mean squared output
gradient over all rows (GuidedQuant, arXiv:2505.07004); `G` is what is left of the row energy.
For an embedding `H` is the second moment of a sequence's gradient by rows (`bytecap.calibration.embedding_gradients`)
and `G` the rows' gradient energy; the same for every matrix that hooks do not see through
(`bytecap.model.hook_coverage`). A tensor with several uses keeps one `Use` for each; `bytecap.calibration.metric` joins
them. A module called several times adds up in one.

Memory does not grow with the number of tokens: blocks are float32 and are merged into float64 sums.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.calibration import divided
from bytecap.calibration.embedding_gradients import looked_up
from bytecap.calibration.sums import Leaves, Statistics, Sums
from bytecap.model.batches import Batch
from bytecap.model.determinism import in_order
from bytecap.model.fisher import fisher_change
from bytecap.model.forward import (
    GPU_BATCHES,
    Counted,
    Progress,
    batch_tokens,
    batches,
    fast_copy,
    in_fast_dtype,
    logits_of,
    predictions,
)
from bytecap.model.hook_coverage import Account, is_matrix
from bytecap.model.linears import linear_weights, maps_otherwise, of_transformers
from bytecap.model.oom_retry import halving
from bytecap.model.texts import Window
from bytecap.system.allocator import no_holes, release
from bytecap.system.ranks import ALONE, Ranks
from bytecap.types import Unit, as_matrix

_OWN_PAGES = 2**20  # bytes of blocks that leave no holes: as fast as larger ones, with 100 MiB less on base-s1


def probe(
    module: nn.Module,
    units: Sequence[Unit],
    windows: Sequence[Window],
    *,
    seed: int = 0,
    guided: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> Statistics:
    """Collect the statistics of all units.

    Args:
        module: causal model; `module(ids).logits` or `module(ids)` gives (batch, length, vocabulary). Any module
            where the windows are a `bytecap.model.batches.Batch` each.
        units: its units.
        windows: calibration windows.
        seed: of the signs that predictions are summed with.
        guided: weight tokens by output gradient energy; False gives plain input second moments, same scale.
        device: torch device of the passes.
        progress: called with the number of tokens finished.
        note: told where the device's memory asks for smaller batches.
        ranks: processes that share the windows; the sums are those of one process, each on one rank.
    """
    target, counted = torch.device(device), Counted(progress)

    def passes(dtype: torch.dtype | None) -> Statistics:
        module_copy = copy.deepcopy(module).to(target) if dtype is None else fast_copy(module, target, dtype)
        leaves = _leaves(module_copy, units, windows, target)
        _account(module_copy, units, leaves, windows, seed, target)
        names = {alias: u.name for u in units for alias in (u.name, *u.aliases)}
        chosen = [
            (names[n], m, kind) for n, (m, kind) in linear_weights(module_copy).items()
            if kind != "embedding" and n in names and names[n] not in leaves.matrix
        ]  # fmt: skip

        def work(batch: int) -> Statistics:
            return in_order(
                target,
                lambda: _one_pass(module_copy, chosen, windows, batch, seed, guided, target, leaves, counted, ranks),
            )

        return halving(work, windows, _batch(leaves, target), "statistics", note, counted)[0]

    return in_fast_dtype(module, target, passes, note, counted) if of_transformers(module) else passes(None)


def _leaves(module_copy: nn.Module, units: Sequence[Unit], windows: Sequence[Window], device: torch.device) -> Leaves:
    """Untie embeddings in the copy, so that their gradient holds the input use alone."""
    names = {alias: u for u in units for alias in (u.name, *u.aliases)}
    tables = {
        names[n].name: m for n, (m, kind) in linear_weights(module_copy).items() if kind == "embedding" and n in names
    }
    for m in tables.values():
        m.weight = nn.Parameter(m.weight.detach().clone())  # type: ignore[operator]
    lookup: set[str] = set()
    if of_transformers(module_copy) and tables and not isinstance(windows[0], Batch):
        tokens = max((w.tokens for w in windows), key=len)[:10]
        ids, generator = torch.tensor([tokens, tokens[::-1]], device=device), torch.Generator(device).manual_seed(0)
        mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
        lookup = looked_up(tables, ids[:, :-1], lambda: fisher_loss(module_copy, ids, mask, generator))
    embedding: dict[str, Any] = {}
    for name, m in tables.items():
        m.weight.requires_grad_(name not in lookup)
        if name not in lookup:
            embedding[name] = m.weight
    matrix: dict[str, tuple[Unit, Tensor]] = {}
    other: dict[str, Tensor] = {}
    for name, p in module_copy.named_parameters():
        if name in names and not names[name].linear and p.is_floating_point():
            p.requires_grad_(True)
            unit = names[name]
            if is_matrix(unit):
                matrix[unit.name] = unit, p
            else:
                other[unit.name] = p
    return Leaves({n: tables[n] for n in tables if n in lookup}, embedding, matrix, other, [])


def _account(
    module_copy: nn.Module,
    units: Sequence[Unit],
    leaves: Leaves,
    windows: Sequence[Window],
    seed: int,
    device: torch.device,
) -> None:
    """Let weights that hooks do not explain collect their gradients themselves.

    In a model of transformers only linear maps of classes of its own, such as routers, are asked about: its code reads
    weights through their modules.
    """
    names = {alias: u for u in units for alias in (u.name, *u.aliases)}
    own = of_transformers(module_copy)
    modules = {
        n: (m, kind) for n, (m, kind) in linear_weights(module_copy).items()
        if n in names and (not own or maps_otherwise(m))
    }  # fmt: skip
    if not modules:
        return
    first = [min(windows, key=lambda w: w.predicted)]

    def run() -> Tensor:
        return next(_losses(module_copy, first, 1, torch.Generator(device).manual_seed(seed), device))[0]

    account = Account(modules, run)
    for name in account.unexplained | account.frozen:
        weight: Tensor = modules[name][0].weight  # type: ignore[assignment]
        weight.requires_grad_(True)
        if name in account.unexplained:
            leaves.matrix[names[name].name] = names[name], weight
        else:
            leaves.idle.append(weight)
    _harvest(leaves, None)


def _one_pass(
    module_copy: nn.Module,
    chosen: list[tuple[str, nn.Module, str]],
    windows: Sequence[Window],
    batch: int,
    seed: int,
    guided: bool,
    device: torch.device,
    leaves: Leaves,
    progress: Progress,
    ranks: Ranks,
) -> Statistics:
    sums = Sums.of(chosen, leaves, guided, device, ranks)
    handles = sums.hooks(leaves)
    generator = torch.Generator(device).manual_seed(seed)
    counts: list[int] = []

    def passed(loss: Tensor) -> None:
        loss.backward()
        _harvest(leaves, sums)

    def done(count: int) -> None:
        counts.append(count)
        progress(count)
        release()  # or the next batch finds holes that its own tensors do not fit into

    try:
        with no_holes(_OWN_PAGES):
            if ranks.size == 1:
                for loss, count in _losses(module_copy, windows, batch, generator, device):
                    passed(loss)
                    done(count)
            else:
                _divided(module_copy, sums, list(batches(windows, batch)), generator, device, ranks, passed, done)
    finally:
        for handle in handles:
            handle.remove()
        _harvest(leaves, None)
    release()  # what the passes held: whole sums need the room
    return sums.finished(sum(counts), len(counts), ranks)


def _divided(
    module_copy: nn.Module,
    sums: Sums,
    data: list[tuple[Tensor, Tensor]],
    generator: torch.Generator,
    device: torch.device,
    ranks: Ranks,
    passed: Callable[[Tensor], None],
    done: Callable[[int], None],
) -> None:
    """Pass batches on all ranks; noise is drawn for all of them, so that every batch has its own."""
    with torch.no_grad():
        vocabulary = logits_of(module_copy(data[0][0][:1, :2].to(device))).shape[-1]
    sizes = [int(mask.sum()) for _, mask in data]

    def run(i: int) -> None:
        ids, mask = data[i]
        passed(fisher_loss(module_copy, ids.to(device), mask.to(device), generator))

    def skip(i: int) -> None:
        torch.empty(sizes[i], vocabulary, device=device).bernoulli_(0.5, generator=generator)

    named = sums.sinks()
    divided.passes(
        [s for _, s in named], [sums.owner[n] for n, _ in named], len(data), ranks, device, run, skip,
        lambda i: done(sizes[i]),
    )  # fmt: skip


def _batch(leaves: Leaves, device: torch.device) -> int:
    """Return the tokens of a batch; a GPU takes few sequences at once where a table's gradient sums over them."""
    if leaves.matrix:
        return 1  # a matrix's gradient is one sample a batch
    many = GPU_BATCHES if device.type == "cuda" and not leaves.embedding else 1
    return many * batch_tokens(max(map(len, leaves.tables.values()), default=4096)) // 2


def _losses(
    module_copy: nn.Module, windows: Sequence[Window], tokens: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, int]]:
    """Yield (summed loss, predictions) of batches of about so many tokens, which saved activations double in memory."""
    if isinstance(windows[0], Batch):
        for batch in windows:
            assert isinstance(batch, Batch)  # noqa: S101 (sets hold one kind)
            yield batch.fisher_loss(module_copy, generator, device), batch.count
        return
    for ids, mask in batches(windows, tokens):
        yield fisher_loss(module_copy, ids.to(device), mask.to(device), generator), int(mask.sum())


def fisher_loss(module: nn.Module, ids: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random sum over a batch's predictions whose gradients have the true Fisher as their second moment."""
    return fisher_loss_of(predictions(module(ids[:, :-1]), mask), generator)


def fisher_loss_of(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random sum of logits (n, vocabulary) whose gradients have the true Fisher as their second moment."""
    return (logits * fisher_change(logits, generator).to(logits.dtype)).sum()


def _harvest(leaves: Leaves, sums: Sums | None) -> None:
    """Add this batch's squared gradients to the sums (None drops them), and clear them."""
    for name, p in leaves.embedding.items():
        if p.grad is not None and sums is not None:
            g = p.grad.float()
            square = g.square().sum(1)
            touched = square.nonzero()[:, 0]
            sums.tables[name].add_gradient(square, g[touched])
        p.grad = None
    for name, (unit, p) in leaves.matrix.items():
        if p.grad is not None and sums is not None:
            g = as_matrix(unit, p.grad.float())
            sums.matrices[name].add_gradient(g.square().sum(1), g)
        p.grad = None
    for name, p in leaves.other.items():
        if p.grad is not None and sums is not None:
            sums.vectors[name].add(p.grad)
        p.grad = None
    for p in leaves.idle:
        p.grad = None
