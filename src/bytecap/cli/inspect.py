"""`bytecap inspect`: a model drawn, before anything is spent on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import Device, Factory, Json, Loss, State, print_json, progress
from bytecap.errors import UsageError
from bytecap.progress import Reporter


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face directory, hub id, `demo`, or .bcap file.", metavar="MODEL")
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Plan bytes under this cap.")] = None,
    factory: Factory = None,
    state: State = None,
    loss: Loss = None,
    tokens: Annotated[
        list[str] | None, typer.Option("--tokens", help="Token shards to plan with, or most calibration tokens.")
    ] = None,
    calib: Annotated[list[Path] | None, typer.Option("--calib", help="Calibration text to plan with.")] = None,
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
        lines = _lines(model, budget, factory, state, loss, tokens, calib, device, progress(as_json))
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
    calib: list[Path] | None,
    device: str,
    reporter: Reporter,
) -> list[Any]:
    from bytecap.model.checkpoint import load_model
    from bytecap.model.sources import TOKENS, load_sets
    from bytecap.pipeline.fit import choose_device, make_job
    from bytecap.pipeline.fit_shards import Source, job_sets, numbers_and_shards, trial
    from bytecap.report import summary
    from bytecap.sizes import parse_size

    if (model is None) == (factory is None):
        raise UsageError("say what to draw: MODEL, or --factory FILE.py:CALLABLE")
    most, shards = numbers_and_shards(tokens, "--tokens")
    source = Source(factory, state, loss) if factory is not None else None
    loaded = source.model() if source is not None else load_model(str(model))
    planned = None
    if budget is not None:
        target = choose_device(device)
        loaded.module.to(target)
        if source is not None:
            sets = job_sets(source, loaded, shards, tokens=most, reporter=reporter)
        else:
            sets = load_sets(loaded, calib, None, tokens=most or TOKENS, reporter=reporter)
        planned = summary.plan(make_job(loaded, sets, parse_size(budget), target, 0, reporter))
    return summary.of_model(loaded, trial(loaded, source.user_loss() if source is not None else None), planned)
