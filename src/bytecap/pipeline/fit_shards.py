"""`fit` and `eval` for a factory's module and token shards: what the command line calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bytecap.errors import TextError, UsageError
from bytecap.model.batches import Batch, Loss
from bytecap.model.checkpoint import Model
from bytecap.model.factory import load_callable, load_factory
from bytecap.model.module import device_of, next_token, speech, vocabulary
from bytecap.model.shards import ByteCounts, byte_counts, check_ids, expand, read_shard, shard_sets, windows
from bytecap.model.sources import EVALUATION_TOKENS, TOKENS, WINDOW, report_sets
from bytecap.model.texts import Text, TokenSets
from bytecap.pipeline.fit import Artifact, choose_device, fit_sets
from bytecap.pipeline.fit_module import check_method, with_loss
from bytecap.progress import Reporter
from bytecap.types import Score


@dataclass(frozen=True)
class Source:
    """Where a module and its tokens come from.

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


def fit_shards(
    source: Source,
    budget: int | str,
    shards: Sequence[Path | str],
    *,
    evaluation: Sequence[Path | str] = (),
    tokens: int | None = None,
    evaluation_tokens: int | None = None,
    method: str = "bytecap",
    seed: int = 0,
    reporter: Reporter,
    **options: Any,
) -> Artifact:
    """Put a factory's module into one file; `options` as for `bytecap.pipeline.fit.fit`."""

    def sets(model: Model) -> TokenSets:
        return job_sets(
            source, model, shards, evaluation=evaluation, tokens=tokens, evaluation_tokens=evaluation_tokens,
            method=method, seed=seed, reporter=reporter,
        )  # fmt: skip

    return fit_sets(source.model, budget, sets, method=method, seed=seed, reporter=reporter, **options)


def job_sets(
    source: Source,
    model: Model,
    shards: Sequence[Path | str],
    *,
    evaluation: Sequence[Path | str] = (),
    tokens: int | None = None,
    evaluation_tokens: int | None = None,
    method: str = "bytecap",
    seed: int = 0,
    reporter: Reporter,
) -> TokenSets:
    """The three sets of a factory's module."""
    if not shards:
        raise UsageError("say what to calibrate on with --tokens SHARD (repeatable, patterns are expanded)")
    loss = source.user_loss()
    found = shard_sets(
        expand(shards), expand(evaluation), window=source.window, tokens=tokens or TOKENS,
        evaluation_tokens=evaluation_tokens or EVALUATION_TOKENS, seed=seed,
        vocabulary=source.size(model.module, loss),
        counts=source.counts(),
    )  # fmt: skip
    scoring = source.scoring(model.module, loss)
    if scoring is not None:
        check_method(method)
        found = with_loss(found, scoring)
    report_sets(found, reporter)
    return found


def score_shards(
    source: Source, shards: Sequence[Path | str], *, tokens: int | None, device: str, reporter: Reporter
) -> list[Score]:
    """Bits per byte of a factory's module on every shard."""
    from bytecap.model.evaluation import evaluate

    if not shards:
        raise UsageError("say what to score with --tokens SHARD (repeatable, patterns are expanded)")
    target, model, loss = choose_device(device), source.model(), source.user_loss()
    size = source.size(model.module, loss)
    counts = source.counts()
    scoring = source.scoring(model.module, loss)
    scores = []
    for path in expand(shards):
        found = read_shard(path)
        check_ids(path, found, size)
        check_ids(path, found, len(counts.size) if counts else None)
        text = Text(path.name, tuple(windows(found, source.window, tokens, counts)))
        if scoring is not None:
            text = with_loss(TokenSets((), (), (text,), 0), scoring).evaluation[0]
        with reporter.step(path.name, text.tokens) as advance:
            scores.append(evaluate(model.module.to(target), text, device=target, progress=advance))
    return scores


def trial(model: Model, loss: Loss | None = None) -> Any:
    """One pass over a few tokens: a function of the module."""
    ids = torch.zeros(1, 8, dtype=torch.long, device=device_of(model.module))
    if loss is None and speech(model.module) == "logits":
        return lambda module: module(ids)
    batch = Batch((), 0, ids, loss or next_token, 7)
    return lambda module: batch.value(module, ids.device)


def numbers_and_shards(values: Sequence[str] | None, option: str) -> tuple[int | None, list[str]]:
    """A limit (the last one given) and shards out of one option's values.

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
    """The limit of a job without shards.

    Raises:
        TextError: a shard was given.
    """
    number, shards = numbers_and_shards(values, option)
    if shards:
        raise TextError(f"{option} {shards[0]} is no number; token shards need a module: give --factory")
    return number
