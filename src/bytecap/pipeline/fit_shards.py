"""Fit and score a factory's module on token shards, for the command line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bytecap.errors import TextError, UsageError
from bytecap.job.config import FitConfig
from bytecap.model.batches import Batch, Loss
from bytecap.model.checkpoint import Model
from bytecap.model.defaults import TOKENS, WINDOW
from bytecap.model.factory import load_callable, load_factory
from bytecap.model.inputs import check_causal
from bytecap.model.module import device_of, next_token, speech, vocabulary
from bytecap.model.shards import ByteCounts, byte_counts, check_ids, expand, read_shard, shard_sets, windows
from bytecap.model.sources import as_paths, report_sets
from bytecap.model.texts import Text, TokenSets, Window
from bytecap.pipeline.artifact import Artifact
from bytecap.pipeline.fit import each_budget, finish_all
from bytecap.pipeline.fit_module import check_method, with_loss
from bytecap.pipeline.stages import check, choose_device, open_model
from bytecap.progress import Reporter
from bytecap.system import allocator
from bytecap.types import Score


@dataclass(frozen=True)
class Source:
    """The source of a module and its tokens.

    Attributes:
        factory: `FILE.py:CALLABLE`, whose file is run.
        state: checkpoint or artifact; None leaves the module as the factory made it.
        loss: `FILE.py:CALLABLE`, called with (module, ids (batch, length)); the module's own prediction if None.
        bytes_per_token: table or SentencePiece model; without it there are no bits per byte.
        window: predicted tokens in a window.
    """

    factory: str
    state: Path | None = None
    loss: str | None = None
    bytes_per_token: Path | None = None
    window: int = WINDOW

    def model(self) -> Model:
        """The filled module."""
        return load_factory(self.factory, self.state)

    def counts(self) -> ByteCounts | None:
        """Bytes of tokens, if they are known."""
        return byte_counts(self.bytes_per_token) if self.bytes_per_token else None

    def user_loss(self) -> Loss | None:
        """The user's loss."""
        if self.loss is None:
            return None
        found, arguments = load_callable(self.loss)
        return partial(found, **arguments)

    def size(self, module: nn.Module, loss: Loss | None) -> int | None:
        """The module's vocabulary, if it shows."""
        return None if loss is not None else vocabulary(module, speech(module))

    def scoring(self, module: nn.Module, loss: Loss | None) -> Loss | None:
        """The loss of a batch of ids; None where forward gives logits."""
        if loss is None and speech(module) == "loss":
            return next_token
        return loss


def fit_shards(source: Source, config: FitConfig) -> list[Artifact]:
    """Put a factory's module into one file for each budget of `config`, whose texts are shards or patterns of them."""
    started = time.perf_counter()
    asked = [check(c) for c in each_budget(config)]
    loaded = source.model()
    opened = [open_model(a, loaded) for a in asked]
    with allocator.stated(loaded.parameters):
        sets = shard_sets_of(source, loaded, asked[0].config, asked[0].reporter)
    return finish_all(opened, sets, started)


def shard_sets_of(source: Source, model: Model, config: FitConfig, reporter: Reporter) -> TokenSets:
    """Read the three sets of a factory's module from token shards."""
    shards = as_paths(config.calibration)
    if not shards:
        raise UsageError("say what to calibrate on with --tokens SHARD (repeatable, patterns are expanded)")
    loss = source.user_loss()
    found = shard_sets(
        expand(shards), expand(as_paths(config.evaluation)), window=source.window, tokens=config.tokens or TOKENS,
        evaluation_tokens=config.evaluation_tokens, seed=config.seed,
        vocabulary=source.size(model.module, loss),
        counts=source.counts(),
    )  # fmt: skip
    scoring = source.scoring(model.module, loss)
    if scoring is not None:
        check_method(config.method)
        found = with_loss(found, scoring)
    elif found.statistics:
        _refuse_others(model, found.statistics[0], source.size(model.module, loss))
    report_sets(found, reporter)
    return found


def _refuse_others(model: Model, window: Window, size: int | None) -> None:
    """Refuse a module whose logits for a window change with later tokens of it."""
    check_causal(model.module, model.name, size, ids=torch.tensor([window.tokens[:-1]]))


def score_shards(
    source: Source, shards: Sequence[Path | str], *, tokens: int | None, device: str, reporter: Reporter
) -> list[Score]:
    """Score a factory's module on every shard."""
    from bytecap.model.evaluation import evaluate

    if not shards:
        raise UsageError("say what to score with --tokens SHARD (repeatable, patterns are expanded)")
    target, model, loss = choose_device(device), source.model(), source.user_loss()
    size = source.size(model.module, loss)
    counts = source.counts()
    scoring = source.scoring(model.module, loss)
    scores: list[Score] = []
    for path in expand(shards):
        found = read_shard(path)
        check_ids(path, found, size)
        check_ids(path, found, len(counts.size) if counts else None)
        text = Text(path.name, tuple(windows(found, source.window, tokens, counts)))
        if scoring is not None:
            text = with_loss(TokenSets((), (), (text,), 0), scoring).evaluation[0]
        elif not scores and text.windows:
            _refuse_others(model, text.windows[0], size)
        with reporter.step(path.name, text.tokens) as advance:
            scores.append(evaluate(model.module.to(target), text, device=target, progress=advance))
    return scores


def trial(model: Model, loss: Loss | None = None) -> Any:
    """Return a function that passes a few tokens through a module."""
    ids = torch.zeros(1, 8, dtype=torch.long, device=device_of(model.module))
    if loss is None and speech(model.module) == "logits":
        return lambda module: module(ids)
    batch = Batch((), 0, ids, loss or next_token, 7)
    return lambda module: batch.value(module, ids.device)


def numbers_and_shards(values: Sequence[str] | None, option: str) -> tuple[int | None, list[str]]:
    """Split one option's values into a limit, the last one given, and shards.

    >>> numbers_and_shards(["train_*.bin", "4096"], "--tokens")
    (4096, ['train_*.bin'])

    Raises:
        UsageError: the limit is below 1.
    """
    numbers = [v for v in values or () if v.lstrip("-").isdigit()]
    if any(int(v) < 1 for v in numbers):
        raise UsageError(f"{option} {numbers[-1]} is below 1")
    return (int(numbers[-1]) if numbers else None), [v for v in values or () if v not in numbers]


def limit_only(values: Sequence[str] | None, option: str) -> int | None:
    """Return the limit of a job without shards.

    Raises:
        TextError: a shard was given.
    """
    number, shards = numbers_and_shards(values, option)
    if shards:
        raise TextError(f"{option} {shards[0]} is no number; token shards need a module: give --factory")
    return number
