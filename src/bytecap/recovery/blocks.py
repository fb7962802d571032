"""Tune the continuous values of a coding block by block against the original's block outputs.

A block of the copy is fed what the coded prefix really delivers; its continuous parameters (codewords, factors) are
tuned with AdamW until its output is close to what the original block made of the original input. Codes do not change,
so neither do the bytes. The best parameters seen on the calibration batches are kept, never worse than the start.

Blocks are the children of the module list that holds the most weights; a model without one is left as it is.
Sources: ClusComp (ACL 2025) and ReALLM (arXiv:2405.13155), both after BRECQ (arXiv:2102.05426). Learning rates are
relative to the spread of each tensor, which the papers leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bytecap.job import Job
from bytecap.model.evaluation import kl_to
from bytecap.model.forward import batch_tokens, batches, predictions
from bytecap.model.quantized_copy import as_stored, copy_of, load_values
from bytecap.model.texts import leading
from bytecap.types import Unit

TOKENS = 8192  # calibration tokens that are walked
RATE = 0.02  # first learning rate, in standard deviations of the tensor


@dataclass(frozen=True)
class Part:
    """A coded matrix with continuous values that can be tuned.

    Attributes:
        unit: the unit.
        tensors: leaves with gradient.
        weight: the matrix (rows, cols) they make.
        spread: what learning rates are relative to; None for the standard deviation of each tensor.
    """

    unit: Unit
    tensors: list[Tensor]
    weight: Callable[[], Tensor]
    spread: float | None = None

    def rate(self, tensor: Tensor) -> float:
        """Return the first learning rate of a tensor."""
        spread = float(tensor.detach().std(correction=0)) if self.spread is None else self.spread
        return RATE * max(spread, 1e-8)

    def stored(self) -> Tensor:
        """Return the weight in stored layout."""
        matrix = self.weight()
        return as_stored(self.unit, matrix)


@dataclass
class _Pass:
    """One batch on its way through the blocks: inputs of both models and the other arguments of every block."""

    mask: Tensor
    original: Tensor
    coded: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


def blocks(module: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return (name with a dot, block) of the module list that holds most of the named weights."""
    best: list[tuple[str, nn.Module]] = []
    most = 0
    for prefix, found in module.named_modules():
        if isinstance(found, nn.ModuleList):
            held = sum(n.startswith(f"{prefix}.") for n in names)
            if held > most:
                best, most = [(f"{prefix}.{k}.", child) for k, child in found.named_children()], held
    return best


def _inputs(model: nn.Module, chain: Sequence[nn.Module], ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Record the arguments that every block is called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handles = [b.register_forward_pre_hook(hook, with_kwargs=True) for b in chain]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return calls


def _output(result: Any) -> Tensor:
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found


def _run(block: nn.Module, weights: dict[str, Tensor], item: _Pass, at: int) -> Tensor:
    """Run the block with other weights on the inputs that the coded prefix delivers."""
    args, kwargs = item.arguments[at]
    return _output(functional_call(block, weights, (item.coded, *args[1:]), kwargs))


def _loss(block: nn.Module, weights: dict[str, Tensor], item: _Pass, at: int, target: Tensor) -> Tensor:
    error = (_run(block, weights, item, at) - target).square().mean(-1)[item.mask].sum()
    return error / target.square().mean(-1)[item.mask].sum().clamp(min=1e-30)


def _local(parts: Mapping[str, Part], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) :]: p.stored() for n, p in parts.items()}


def _tune(
    block: nn.Module,
    prefix: str,
    parts: Mapping[str, Part],
    passes: list[_Pass],
    at: int,
    targets: list[Tensor],
    steps: int,
) -> None:
    """Tune one block; it ends with the best parameters seen."""
    leaves = [t for p in parts.values() for t in p.tensors]
    if not leaves:
        return
    optimizer, schedule = _adamw(leaves, [p.rate(t) for p in parts.values() for t in p.tensors], steps)

    def total() -> float:
        with torch.no_grad():
            weights = _local(parts, prefix)
            return sum(float(_loss(block, weights, p, at, t)) for p, t in zip(passes, targets, strict=True))

    best, kept = total(), [t.detach().clone() for t in leaves]
    for step in range(steps):
        k = step % len(passes)
        optimizer.zero_grad()
        _loss(block, _local(parts, prefix), passes[k], at, targets[k]).backward()
        optimizer.step()
        schedule.step()
    if not total() < best:  # worse, or not a number
        with torch.no_grad():
            for t, old in zip(leaves, kept, strict=True):
                t.copy_(old)


def _adamw(
    leaves: Sequence[Tensor], rates: Sequence[float], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW with a rate for every leaf, and the schedule that takes all rates down to a tenth."""
    groups = [{"params": [t], "lr": r} for t, r in zip(leaves, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / max(1, steps))


def recover(job: Job, parts: Mapping[str, Part], *, steps: int) -> set[str]:
    """Tune parts block by block, in place; returns the names of the tuned ones.

    Args:
        job: names the model and the calibration windows.
        parts: by unit name; all coded matrices, also those outside any block.
        steps: of AdamW for every block.
    """
    original = job.model.module
    quantized_copy = copy_of(original)
    with torch.no_grad():
        load_values(quantized_copy, {n: p.stored().detach().cpu().contiguous().numpy() for n, p in parts.items()})
    chain, plain = blocks(quantized_copy, list(parts)), blocks(original, list(parts))
    if not chain or not steps:
        job.reporter.note("no list of blocks was found: nothing is tuned")
        return set()
    passes = []
    for ids, mask in batches(leading(job.sets.statistics, TOKENS), batch_tokens(4096)):
        inside = ids[:, :-1].to(job.device)
        calls = _inputs(original, [b for _, b in plain], inside)
        coded = _inputs(quantized_copy, [chain[0][1]], inside)
        if len(calls) != len(chain) or not calls[0][0] or not isinstance(calls[0][0][0], Tensor):
            job.reporter.note("the blocks are not called one after the other: nothing is tuned")
            return set()
        if calls[0][0][0].shape[:-1] != mask.shape:
            job.reporter.note("the blocks do not read one vector a token: nothing is tuned")
            return set()
        trimmed = [((None, *args[1:]), kwargs) for args, kwargs in calls]
        passes.append(_Pass(mask.to(job.device), calls[0][0][0], coded[0][0][0], trimmed))
    tuned: set[str] = set()
    with job.reporter.step("recovery", len(chain)) as advance:
        for at, ((prefix, block), (_, whole)) in enumerate(zip(chain, plain, strict=True)):
            mine = {n: p for n, p in parts.items() if n.startswith(prefix)}
            with torch.no_grad():
                targets = [_output(whole(p.original, *p.arguments[at][0][1:], **p.arguments[at][1])) for p in passes]
            if mine:
                _tune(block, prefix, mine, passes, at, targets, steps)
                tuned |= set(mine)
            with torch.no_grad():
                weights = _local(mine, prefix)
                outputs = [_run(block, weights, p, at) for p in passes]
            passes = [replace(p, original=t, coded=o) for p, t, o in zip(passes, targets, outputs, strict=True)]
            advance(1)
    return tuned


def whole(job: Job, parts: Mapping[str, Part], common: Sequence[Tensor], *, steps: int) -> bool:
    """Tune all parts and their shared values end to end by KL to the original; returns whether that helped.

    Tuned on calibration tokens, judged on the correction tokens: parts stay as they were unless KL falls there.

    Args:
        job: names the model and the tokens.
        parts: all coded matrices.
        common: leaves that parts share.
        steps: of AdamW.
    """
    original = job.model.module
    quantized_copy = copy_of(original)
    leaves = [*common, *(t for p in parts.values() for t in p.tensors)]
    rates = [RATE * float(t.detach().std(correction=0)) for t in common]
    rates += [p.rate(t) for p in parts.values() for t in p.tensors]
    optimizer, schedule = _adamw(leaves, [r / 4 for r in rates], steps)
    prepared = list(batches(leading(job.sets.statistics, TOKENS), batch_tokens(1024)))

    def score() -> float:
        with torch.no_grad():
            load_values(quantized_copy, {n: p.stored().detach().cpu().contiguous().numpy() for n, p in parts.items()})
        return kl_to(original, quantized_copy, job.sets.correction, device=job.device)[0]

    before, kept = score(), [t.detach().clone() for t in leaves]
    with job.reporter.step("recovery end to end", steps) as advance:
        for step in range(steps):
            ids, mask = prepared[step % len(prepared)]
            inside, mask = ids[:, :-1].to(job.device), mask.to(job.device)
            with torch.no_grad():
                target = predictions(original(inside), mask).log_softmax(-1)
            optimizer.zero_grad()
            values = {n: p.stored() for n, p in parts.items()}
            found = predictions(functional_call(quantized_copy, values, (inside,)), mask)
            loss = torch.nn.functional.kl_div(found.log_softmax(-1), target, reduction="batchmean", log_target=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    if score() < before:
        return True
    with torch.no_grad():
        for t, old in zip(leaves, kept, strict=True):
            t.copy_(old)
    return False
