"""Fit any `nn.Module` on batches of whatever the user's loss takes, without a tokenizer or transformers.

Batches become the three disjoint sets that every other model has. Batches of token ids for a module that gives logits
become windows, and everything runs as for a language model from a hub: labels from the model, KL, drift targets.
Other batches are kept as they are with the loss beside them (`bytecap.model.batches`).

>>> from torch import nn
>>> module = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))
>>> ids = torch.randint(64, (64, 33), generator=torch.Generator().manual_seed(0))
>>> artifact = fit_module(module, FitConfig(3500, calibration=[ids]))
>>> len(artifact.data) <= 3500, artifact.report["kl_nats"] < 0.01
(True, True)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.errors import TextError, UsageError
from bytecap.format.decoder import decode_units
from bytecap.job.config import FitConfig
from bytecap.methods import METHODS
from bytecap.model.batches import Batch, Loss
from bytecap.model.checkpoint import Model
from bytecap.model.defaults import TOKENS
from bytecap.model.forward import logits_of
from bytecap.model.inputs import check_causal, sees_later
from bytecap.model.module import device_of, model_of, next_token, speech, vocabulary
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.sources import CORRECTION_TOKENS, report_sets
from bytecap.model.texts import Text, TokenSets, Window, split_sets
from bytecap.pipeline.artifact import Artifact
from bytecap.pipeline.stages import Asked, check, finish, open_model

Evaluate = Callable[[nn.Module], float]
_FOR_TEXTS = ("recover_text", "store")


def fit_module(module: nn.Module, config: FitConfig) -> Artifact:
    """Put any module's state dict into one file; the module itself is left as it is.

    Args:
        module: torch module; a float32 copy in evaluation mode is what runs.
        config: options; `calibration` and `evaluation` are batches.

    Raises:
        UsageError: the loss is not one finite number, or fits neither batches nor module, or an option is for texts.
        CheckpointError: the module holds nothing to store. TextError: too few batches.
    """
    started = time.perf_counter()
    for option in _FOR_TEXTS:
        if getattr(config, option) is not None:
            raise UsageError(f"the option {option} is for checkpoints: batches of a module have no name to be kept by")
    calibration, evaluation = config.calibration, config.evaluation
    if calibration is None or isinstance(calibration, str | Path) or isinstance(evaluation, str | Path):
        raise UsageError("a module needs calibration=batches, an iterable of what its loss takes, not text files")
    asked = check(config)
    loaded = model_of(module)
    opened = open_model(asked, loaded)
    result = finish(opened, batch_sets(loaded, asked, calibration, evaluation), started)
    if config.evaluate is not None and not config.dry_run:
        result.report |= _scores(loaded, result, config.evaluate)
    return result


def batch_sets(model: Model, asked: Asked, calibration: Iterable[Any], evaluation: Iterable[Any] | None) -> TokenSets:
    """Split batches into the three sets of a module."""
    config = asked.config
    found = _sets(model, config, calibration, evaluation)
    if isinstance(found.statistics[0], Batch):
        check_method(config.method)
    report_sets(found, asked.reporter)
    return found


def check_method(method: str) -> None:
    """Refuse methods that need logits where there is only a loss."""
    if method in METHODS and METHODS[method].windows_only:
        raise UsageError(f"method {method} needs a module whose forward(ids) gives logits")


def _scores(model: Model, result: Artifact, evaluate: Evaluate) -> dict[str, float]:
    quantized_copy = copy_of(model.module)
    load_values(quantized_copy, decode_units(result.contents, aliases=False))
    with torch.no_grad():
        return {"score_original": float(evaluate(model.module)), "score_artifact": float(evaluate(quantized_copy))}


def _sets(model: Model, config: FitConfig, calibration: Iterable[Any], evaluation: Iterable[Any] | None) -> TokenSets:
    """Split batches into the three sets."""
    loss, predictions = config.loss, config.predictions or _predictions
    tokens, evaluation_tokens, seed = config.tokens or TOKENS, config.evaluation_tokens, config.seed
    wanted = tokens + CORRECTION_TOKENS + (evaluation_tokens if evaluation is None else 0)
    pool = _take(calibration, predictions, wanted)
    held = None if evaluation is None else _take(evaluation, predictions, evaluation_tokens)
    every = [*pool, *(held or [])]
    if all(_is_ids(data) for data in every) and _is_next_token(model.module, every[0], loss):
        size = vocabulary(model.module, speech(model.module))
        check_ids(every, size)
        if speech(model.module) == "logits":
            check_causal(model.module, model.name, size, ids=every[0][:1, :-1])
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
    """Take batches until `wanted` predictions are reached."""
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
    """Guess a batch's predictions: the size of its last integer tensor (ids alone: less one a row), else its length."""
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
    """Return whether the loss only predicts the next token, so that logits say everything.

    A loss of the user's own on a module that sees later tokens is another one, whatever it comes to.
    """
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
    same = abs(given - float(usual)) <= 1e-3 * abs(float(usual))
    return same and not sees_later(module, ids[:1, :-1], logits.shape[-1])


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
    """Hold out a fifth of the predictions from the end, at most `most`, as evaluation."""
    wanted, count, at = min(most, text.tokens // 5), 0, len(text.windows)
    while at > 1 and (count < wanted or at == len(text.windows)):
        at -= 1
        count += text.windows[at].predicted
    return Text(text.name, text.windows[:at]), Text("held out", text.windows[at:])


def _split(pool: Sequence[Window], rest: Text, tokens: int, seed: int) -> TokenSets:
    """Split batches for statistics and correction factors."""
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
    """Turn sets of token windows into batches for a loss that takes ids (batch, length)."""

    def each(windows: Sequence[Window]) -> tuple[Window, ...]:
        return tuple(Batch((), w.bytes, torch.tensor([w.tokens]), loss, w.predicted) for w in windows)

    texts = tuple(Text(t.name, each(t.windows)) for t in sets.evaluation)
    return TokenSets(each(sets.statistics), each(sets.correction), texts, sets.dropped)
