"""`bytecap compare` runs methods at equal bytes on equal tokens."""

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

_DEFAULT_METHODS = "bytecap,golf,owq,radio,uniform"
_DEFAULT_BUDGETS = "3bpp,3.5bpp,4bpp,5bpp"


def compare(
    models: Annotated[
        list[str] | None, typer.Argument(help="Hugging Face directories, hub ids, or `demo`.", metavar="MODEL...")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to write.", show_default="compare")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Sizes, or bits per parameter (3.5bpp), by comma.")] = _DEFAULT_BUDGETS,
    methods: Annotated[
        str, typer.Option(help="Methods by comma, options behind colons: owq:published. FILE.py:CALLABLE is run.")
    ] = _DEFAULT_METHODS,
    seeds: Annotated[int, typer.Option(help="Calibration seeds, from 0.", min=1)] = 1,
    external: Annotated[
        list[str] | None,
        typer.Option("--external", help="NAME:DIR:BYTES of somebody else's model (repeatable).", show_default="none"),
    ] = None,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    tokens: Tokens = 16_384,
    eval_tokens: EvaluationTokens = 16_384,
    device: Device = "auto",
    jobs: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1,
    store: Annotated[Path | None, typer.Option(help="Directory of statistics.", show_default="DIR/store")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Page to write.", show_default="DIR/compare.html")
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            "--tasks",
            help="Task file (YAML) of lm-evaluation-harness (repeatable). Code that it names is run.",
            show_default="none",
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Show finished runs (runs.jsonl) again; nothing is run.", show_default="none"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare methods: every budget and calibration seed on every MODEL, paired on the same tokens."""
    from bytecap.report.compared import print_comparison
    from bytecap_lab import compare as comparison

    reporter = progress(as_json)
    check_study(models, from_, "compare methods on, or --from runs.jsonl")
    check_output(report, output)
    if from_ is not None:
        found = comparison.render(from_, output, report=report, reporter=reporter)
    else:
        from bytecap_lab.compare.runs import command_line

        found = comparison.compare(
            models or [], output if output is not None else Path("compare"), budgets=names([budgets]) or (),
            methods=names([methods]) or (), seeds=seeds, externals=external or (), calibration=calibration,
            evaluation=evaluation, tokens=tokens, evaluation_tokens=eval_tokens, device=device, jobs=jobs, store=store,
            report=report, tasks=tasks or (), command=command_line(), reporter=reporter,
        )  # fmt: skip
    show(found, as_json, print_comparison)
