"""`bytecap inspect` draws a model before anything is spent on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import Calibration, Device, Factory, Json, Loss, State, print_json, progress
from bytecap.errors import UsageError
from bytecap.model.defaults import TOKENS
from bytecap.progress import Reporter
from bytecap.sizes import check_budget


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face directory, hub id, `demo`, or .bcap file.", metavar="MODEL")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Plan bytes under this cap.", show_default="none: nothing planned")
    ] = None,
    factory: Factory = None,
    state: State = None,
    loss: Loss = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens", help="Token shards to plan with, or most calibration tokens.", show_default=str(TOKENS)
        ),
    ] = None,
    calibration: Calibration = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw a model: units, uses, bytes now, bytes planned."""
    from bytecap.report import summary
    from bytecap.report.tree import print_survey

    path = Path(model) if model is not None else None
    if path is not None and path.suffix == ".bcap":
        lines = summary.of_artifact(path)
    else:
        lines = _lines(model, budget, factory, state, loss, tokens, calibration, device, progress(as_json))
    if as_json:
        total: dict[str, Any] = {"bytes": sum(x.bytes for x in lines), "units": [x.as_dict() for x in lines]}
        print_json(total)
    else:
        print_survey(lines, str(model or factory))


def _lines(
    model: str | None,
    budget: str | None,
    factory: str | None,
    state: Path | None,
    loss: str | None,
    tokens: list[str] | None,
    calibration: list[Path] | None,
    device: str,
    reporter: Reporter,
) -> list[Any]:
    from bytecap.job.config import FitConfig
    from bytecap.model.checkpoint import load_checkpoint
    from bytecap.model.sources import load_sets
    from bytecap.pipeline.fit_shards import Source, numbers_and_shards, shard_sets_of, trial
    from bytecap.pipeline.stages import choose_device, make_job
    from bytecap.report import summary

    if (model is None) == (factory is None):
        raise UsageError("say what to draw: MODEL, or --factory FILE.py:CALLABLE")
    most, shards = numbers_and_shards(tokens, "--tokens")
    source = Source(factory, state, loss) if factory is not None else None
    if budget is not None:
        check_budget(budget)
    loaded = source.model() if source is not None else load_checkpoint(str(model))
    planned = None
    if budget is not None:
        config = FitConfig(
            budget, calibration=shards if source is not None else calibration, tokens=most, device=device,
            reporter=reporter,
        )  # fmt: skip
        loaded.module.to(choose_device(device))
        if source is not None:
            sets = shard_sets_of(source, loaded, config, reporter)
        else:
            sets = load_sets(loaded, calibration, None, tokens=config.tokens, evaluation_tokens=0, reporter=reporter)
        planned = summary.plan(make_job(loaded, sets, config))
    return summary.of_model(loaded, trial(loaded, source.user_loss() if source is not None else None), planned)
