"""`fit` for any `nn.Module`: batches of whatever the user's loss takes, no tokenizer, no transformers.

Batches become the three disjoint sets that every other model has. Batches of token ids for a module that gives logits
become windows, and everything runs as for a language model from a hub: labels from the model, KL, drift targets.
Other batches are kept as they are with the loss beside them (`bytecap.model.batches`).

>>> from torch import nn
>>> module = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))
>>> ids = torch.randint(64, (64, 33), generator=torch.Generator().manual_seed(0))
>>> artifact = fit_module(module, 3500, calibration=[ids])
>>> len(artifact.data) <= 3500, artifact.report["kl_nats"] < 0.01
(True, True)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.errors import TextError, UsageError
from bytecap.format.codefiles import Code
from bytecap.format.decoder import decode_units
from bytecap.job import Section
from bytecap.methods import METHODS
from bytecap.model.batches import Batch, Loss
from bytecap.model.checkpoint import Model
from bytecap.model.forward import logits_of
from bytecap.model.module import device_of, model_of, next_token, speech, vocabulary
from bytecap.model.quantized_copy import load_values, twin_of
from bytecap.model.sources import CORRECTION_TOKENS, EVALUATION_TOKENS, TOKENS, report_sets
from bytecap.model.texts import Text, TokenSets, Window, split_sets
from bytecap.pipeline.fit import Artifact, fit_sets
from bytecap.progress import Reporter, Silent

Evaluate = Callable[[nn.Module], float]


def fit_module(
    module: nn.Module,
    budget: int | str,
    *,
    calibration: Iterable[Any],
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    evaluation: Iterable[Any] | None = None,
    predictions: Callable[[Any], int] | None = None,
    method: str = "bytecap",
    device: str = "auto",
    seed: int = 0,
    output: Path | str | None = None,
    dry_run: bool = False,
    tokens: int = TOKENS,
    evaluation_tokens: int = EVALUATION_TOKENS,
    code: Code | Sequence[Path | str] = (),
    paths: Sequence[str] | None = None,
    options: dict[str, Any] | None = None,
    given: Mapping[str, Section] | None = None,
    reporter: Reporter | None = None,
) -> Artifact:
    """Put any module's state dict into one file of at most `budget` bytes; the module itself is left as it is.

    Args:
        module: torch module; a float32 copy in evaluation mode is what runs.
        budget: bytes, or text such as `3MB` or `3MiB`.
        calibration: batches; no more are taken than the sets need, so it may be endless.
        loss: `loss(module, batch)`, mean nats of a batch as a scalar tensor. May be left out where batches are
            integer tensors (batch, length) of token ids and forward gives logits, or takes (ids, targets) and gives
            a loss.
        evaluate: `evaluate(module)`, a score of your own; reported for the original and the decoded file.
        evaluation: batches nothing is fitted on; without them a fifth of the calibration is held out.
        predictions: number of predictions that a batch's mean loss is over; by default the size of its last integer
            tensor, else its first tensor's length.
        method: see `bytecap.pipeline.fit.fit`, as all that follow.
        device: `auto`, `cpu` or `cuda`.
        seed: of every random choice.
        output: where to write; None keeps the result in memory.
        dry_run: predict, write and evaluate nothing.
        tokens: most predictions for statistics.
        evaluation_tokens: most predictions for evaluation.
        code: source files to keep inside.
        paths: exception paths the allocator may choose from.
        options: ingredients of the coder, see `bytecap.quantization.quantizer.Options`.
        given: sections of parameters that are coded already, see `bytecap_lab.train.export`.
        reporter: told about progress.

    Raises:
        UsageError: the loss is not one finite number, or fits neither batches nor module.
        CheckpointError: the module holds nothing to store. TextError: too few batches.
    """
    reporter = reporter or Silent()

    def sets(model: Model) -> TokenSets:
        found = _sets(
            model, calibration, evaluation, loss, predictions or _predictions, tokens, evaluation_tokens, seed
        )
        if isinstance(found.statistics[0], Batch):
            check_method(method)
        report_sets(found, reporter)
        return found

    loaded: list[Model] = []

    def make() -> Model:
        loaded.append(model_of(module))
        return loaded[0]

    result = fit_sets(
        make, budget, sets, method=method, device=device, seed=seed, output=output, dry_run=dry_run, code=code,
        paths=paths, options=options, given=given, reporter=reporter,
    )  # fmt: skip
    if evaluate is not None and not dry_run:
        result.report |= _scores(loaded[0], result, evaluate)
    return result


def check_method(method: str) -> None:
    """Refuse methods that need logits where there is only a loss."""
    if method in METHODS and METHODS[method].windows_only:
        raise UsageError(f"method {method} needs a module whose forward(ids) gives logits")


def _scores(model: Model, result: Artifact, evaluate: Evaluate) -> dict[str, float]:
    twin = twin_of(model.module)
    load_values(twin, decode_units(result.contents, aliases=False))
    with torch.no_grad():
        return {"score_original": float(evaluate(model.module)), "score_artifact": float(evaluate(twin))}


def _sets(
    model: Model,
    calibration: Iterable[Any],
    evaluation: Iterable[Any] | None,
    loss: Loss | None,
    predictions: Callable[[Any], int],
    tokens: int,
    evaluation_tokens: int,
    seed: int,
) -> TokenSets:
    """The three sets."""
    wanted = tokens + CORRECTION_TOKENS + (evaluation_tokens if evaluation is None else 0)
    pool = _take(calibration, predictions, wanted)
    held = None if evaluation is None else _take(evaluation, predictions, evaluation_tokens)
    every = [*pool, *(held or [])]
    if all(_is_ids(data) for data in every) and _is_next_token(model.module, every[0], loss):
        check_ids(every, vocabulary(model.module, speech(model.module)))
        texts = [
            Text(name, tuple(Window(tuple(row), 0) for data in part for row in data.tolist()))
            for name, part in (("calibration", pool), ("evaluation", held or []))
        ]
        if held is None:
            texts = list(_hold_out(texts[0], evaluation_tokens))
        found = split_sets(texts[:1], texts[1:], tokens=tokens, correction_tokens=CORRECTION_TOKENS, seed=seed)
        return found if speech(model.module) == "logits" else with_loss(found, next_token)
    if loss is None:
        raise UsageError(
            "say how a batch is scored with loss=callable(module, batch): only batches that are integer tensors "
            "(batch, length) of token ids need none"
        )
    text = Text("calibration", tuple(Batch((), 0, data, loss, predictions(data)) for data in pool))
    kept = () if held is None else tuple(Batch((), 0, data, loss, predictions(data)) for data in held)
    text, rest = (text, Text("evaluation", kept)) if kept else _hold_out(text, evaluation_tokens)
    return _split(text.windows, rest, tokens, seed)


def _take(batches: Iterable[Any], predictions: Callable[[Any], int], wanted: int) -> list[Any]:
    """Batches until `wanted` predictions are reached."""
    taken, count = [], 0
    for data in batches:
        taken.append(data)
        count += predictions(data)
        if count >= wanted:
            break
    if not taken:
        raise TextError("there are no batches: calibration or evaluation is empty")
    return taken


def _tensors(data: Any) -> list[Tensor]:
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, Mapping):
        data = list(data.values())
    return [t for part in data for t in _tensors(part)] if isinstance(data, list | tuple) else []


def _predictions(data: Any) -> int:
    """Size of the last integer tensor, ids alone less one for each row; else the first tensor's length; else 1."""
    tensors = _tensors(data)
    if len(tensors) == 1 and _is_ids(tensors[0]):
        return int(tensors[0].shape[0] * (tensors[0].shape[1] - 1))
    labels = [t for t in tensors if not t.is_floating_point()]
    if labels:
        return max(1, labels[-1].numel())
    return max(1, len(tensors[0])) if tensors and tensors[0].ndim else 1


def _is_ids(data: Any) -> bool:
    return isinstance(data, Tensor) and data.ndim == 2 and data.dtype in {torch.int64, torch.int32} and len(data[0]) > 1


def _is_next_token(module: nn.Module, ids: Tensor, loss: Loss | None) -> bool:
    """Whether predicting the next token is all that the loss does: then nothing is lost by taking the logits."""
    if loss is None:
        return True
    try:
        kind = speech(module)
        if kind == "loss" or vocabulary(module, kind) is None:
            return False
        ids = ids.to(device_of(module))
        with torch.no_grad():
            logits = logits_of(module(ids[:, :-1])).float()
            usual = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().long())
    except (UsageError, RuntimeError, IndexError, ValueError, TypeError, AttributeError):
        return False  # the loss knows how to call it
    with torch.no_grad():
        given = float(Batch((), 0, ids, loss, 1).value(module, device_of(module)))
    return abs(given - float(usual)) <= 1e-3 * abs(float(usual))


def check_ids(ids: Sequence[Tensor], size: int | None) -> None:
    """Refuse token ids beyond a vocabulary.

    Raises:
        TextError: naming the first bad id.
    """
    for number, data in enumerate(ids):
        low, high = int(data.min()), int(data.max())
        if low < 0 or (size is not None and high >= size):
            bad = low if low < 0 else high
            raise TextError(f"batch {number} holds the token id {bad}, but the vocabulary has {size} entries")


def _hold_out(text: Text, most: int) -> tuple[Text, Text]:
    """A fifth of the predictions from the end, at most `most`, as evaluation."""
    wanted, count, at = min(most, text.tokens // 5), 0, len(text.windows)
    while at > 1 and (count < wanted or at == len(text.windows)):
        at -= 1
        count += text.windows[at].predicted
    return Text(text.name, text.windows[:at]), Text("held out", text.windows[at:])


def _split(pool: Sequence[Window], rest: Text, tokens: int, seed: int) -> TokenSets:
    """Batches for statistics and correction factors; windows are not compared, batches cannot be."""
    order = list(pool)
    random.Random(seed).shuffle(order)  # noqa: S311 (sampling, not cryptography)
    total = sum(w.predicted for w in order)
    correction: list[Window] = []
    while len(order) > 1 and sum(w.predicted for w in correction) < min(CORRECTION_TOKENS, max(1, total // 8)):
        correction.append(order.pop())
    while len(order) > 1 and sum(w.predicted for w in order[:-1]) >= tokens:
        order.pop()
    if not order or not correction or not rest.windows:
        raise TextError(f"{len(pool)} batches are too few: statistics, correction and evaluation need one each")
    return TokenSets(tuple(order), tuple(correction), (rest,), 0)


def with_loss(sets: TokenSets, loss: Loss) -> TokenSets:
    """Sets of token windows as batches for a loss that takes ids (batch, length)."""

    def each(windows: Sequence[Window]) -> tuple[Window, ...]:
        return tuple(Batch((), w.bytes, torch.tensor([w.tokens]), loss, w.predicted) for w in windows)

    texts = tuple(Text(t.name, each(t.windows)) for t in sets.evaluation)
    return TokenSets(each(sets.statistics), each(sets.correction), texts, sets.dropped)
