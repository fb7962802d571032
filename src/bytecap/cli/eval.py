"""`bytecap eval`: bits per byte of a model or an artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import (
    EMBEDDED,
    BytesPerToken,
    Device,
    Factory,
    Json,
    Loss,
    State,
    needed,
    print_json,
    progress,
    source_of,
)
from bytecap.model.defaults import WINDOW


def evaluate(
    model: Annotated[str | None, typer.Argument(help="Model directory, hub id, `demo`, or .bcap file.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Text to score (repeatable).", show_default=EMBEDDED)
    ] = None,
    window: Annotated[int, typer.Option(help="Predicted tokens in a window.", min=1)] = WINDOW,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help="Most tokens per text; with --factory also shards (repeatable).", show_default="all"),
    ] = None,
    factory: Factory = None,
    state: State = None,
    loss: Loss = None,
    bytes_per_token: BytesPerToken = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Bits per byte of a model or an artifact."""
    from bytecap.pipeline.fit_shards import limit_only, numbers_and_shards, score_shards
    from bytecap.pipeline.score import score
    from bytecap.report.terminal import print_scores

    reporter = progress(as_json)
    if factory is not None:
        source = replace(source_of(factory, model, state, loss, bytes_per_token), window=window)
        most, shards = numbers_and_shards(tokens, "--tokens")
        scores = score_shards(source, shards, tokens=most, device=device, reporter=reporter)
    else:
        most = limit_only(tokens, "--tokens")
        scores = score(needed(model), text, window=window, tokens=most, device=device, reporter=reporter)
    if as_json:
        print_json(_score_json(scores))
    else:
        print_scores(scores)


def _score_json(scores: list[Any]) -> dict[str, Any]:
    """Unweighted means over the texts on top, each text under `texts`."""
    n = len(scores)
    return {
        "bpb": sum(s.bpb for s in scores) / n,
        "bpb_stderr": sum(s.bpb_stderr**2 for s in scores) ** 0.5 / n,
        "nats_per_token": sum(s.nats for s in scores) / n,
        "tokens": sum(s.tokens for s in scores), "bytes": sum(s.bytes for s in scores),
        "texts": [s.as_dict() for s in scores],
    }  # fmt: skip
