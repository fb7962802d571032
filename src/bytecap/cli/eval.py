"""`bytecap eval` scores a model or an artifact in bits per byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import (
    EMBEDDED,
    Bases,
    BytesPerToken,
    Device,
    Factory,
    Json,
    Loss,
    Resident,
    State,
    names,
    needed,
    print_json,
    progress,
    source_of,
)
from bytecap.cli.options import described
from bytecap.errors import UsageError
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
    base: Bases = None,
    device: Device = "auto",
    resident: Resident = "decoded",
    memory: Annotated[str | None, typer.Option(help="Most memory its values may take.", show_default="free")] = None,
    allow_unused: Annotated[list[str] | None, typer.Option(help=described("allow_unused"), show_default="none")] = None,
    as_json: Json = False,
) -> None:
    """Score a model or an artifact in bits per byte."""
    from bytecap.pipeline.fit_shards import limit_only, numbers_and_shards, score_shards
    from bytecap.pipeline.score import score
    from bytecap.report.terminal import print_scores

    reporter = progress(as_json)
    if factory is not None:
        if resident != "decoded":
            raise UsageError("--resident coded is for artifacts, and --factory names none")
        if memory is not None:
            raise UsageError("--memory is for a checkpoint or a .bcap file without --factory")
        if base:
            raise UsageError("--base is for a .bcap file without --factory")
        source = replace(source_of(factory, model, state, loss, bytes_per_token), window=window)
        most, shards = numbers_and_shards(tokens, "--tokens")
        scores = score_shards(source, shards, tokens=most, device=device, reporter=reporter)
    else:
        most = limit_only(tokens, "--tokens")
        allow = names(allow_unused) or ()
        scores = score(
            needed(model), text, window=window, tokens=most, device=device, allow_unused=allow, base=base,
            resident=resident, memory=memory, reporter=reporter,
        )  # fmt: skip
    if as_json:
        print_json(_score_json(scores))
    else:
        print_scores(scores)


def _score_json(scores: list[Any]) -> dict[str, Any]:
    """Return unweighted means over the texts on top, and each text under `texts`."""
    n = len(scores)
    return {
        "bpb": sum(s.bpb for s in scores) / n,
        "bpb_stderr": sum(s.bpb_stderr**2 for s in scores) ** 0.5 / n,
        "nats_per_token": sum(s.nats for s in scores) / n,
        "tokens": sum(s.tokens for s in scores), "bytes": sum(s.bytes for s in scores),
        "texts": [s.as_dict() for s in scores],
    }  # fmt: skip
