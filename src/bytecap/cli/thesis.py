"""`bytecap thesis` runs the registered experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bytecap.cli.common import (
    Calibration,
    Device,
    Evaluation,
    EvaluationTokens,
    Json,
    Tokens,
    check_output,
    check_study,
    names,
    progress,
    show,
)


def thesis(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Hugging Face directories, hub ids, `demo`, or FILE.py:CALLABLE:DIRECTORY (the file is run).",
            metavar="MODEL...",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to write.", show_default="thesis")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Experiments by name or number.", show_default="all")
    ] = None,
    bases: Annotated[str, typer.Option(help="grid, golf or both by comma.")] = "grid,golf",
    budget: Annotated[str, typer.Option(help="Size, or bits per parameter. The registered one is 3bpp.")] = "3bpp",
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    tokens: Tokens = 16_384,
    eval_tokens: EvaluationTokens = 8_192,
    seeds: Annotated[int, typer.Option(help="Calibration seeds of rankings, from 0.", min=1)] = 3,
    rungs: Annotated[int, typer.Option(help="Most settings that a path is tried with on a matrix.", min=2)] = 4,
    units: Annotated[
        int | None, typer.Option(help="Most matrices of a role that arms act on.", min=1, show_default="all")
    ] = None,
    device: Device = "auto",
    jobs: Annotated[int, typer.Option(help="Models and bases at a time.", min=1)] = 1,
    store: Annotated[
        Path | None, typer.Option(help="Directory of statistics and points.", show_default="DIR/store")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Page to write.", show_default="DIR/thesis.html")
    ] = None,
    from_: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", help="Judge finished lines (thesis.jsonl, repeatable); nothing is run.", show_default="none"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run eight registered experiments (docs/thesis.md) on every MODEL: supported, falsified or undecided."""
    from bytecap.report.judged import print_thesis
    from bytecap_lab import thesis as tests

    reporter = progress(as_json)
    check_study(models, from_, "test the thesis on, or --from thesis.jsonl")
    check_output(report, output)
    if from_:
        found = tests.render(from_, output, only=names(only), report=report, reporter=reporter)
    else:
        from bytecap_lab.compare.runs import command_line

        found = tests.thesis(
            models or [], output if output is not None else Path("thesis"), only=names(only),
            bases=names([bases]) or (), budget=budget, calibration=calibration, evaluation=evaluation, tokens=tokens,
            evaluation_tokens=eval_tokens, seeds=seeds, rungs=rungs, units=units, device=device, jobs=jobs, store=store,
            report=report, command=command_line(), reporter=reporter,
        )  # fmt: skip
    show(found, as_json, print_thesis)
