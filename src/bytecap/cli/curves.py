"""`bytecap curves` measures what a byte buys."""

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
    Model,
    Seed,
    Tokens,
    check_output,
    names,
    progress,
    show,
)


def curves(
    model: Model,
    budget: Annotated[str, typer.Option("--budget", help="Budget whose operating point is the base.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    base: Annotated[str, typer.Option(help="grid or golf.")] = "grid",
    paths: Annotated[
        list[str] | None,
        typer.Option("--paths", help="Paths, by comma or repeated, or `all`.", show_default="all, recodings briefly"),
    ] = None,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    seed: Seed = 0,
    device: Device = "auto",
    tokens: Tokens = 32_768,
    eval_tokens: EvaluationTokens = 8_192,
    points: Annotated[int, typer.Option(help="Single-unit points to measure.", min=1)] = 64,
    point_tokens: Annotated[int, typer.Option(help="Most tokens each of them is measured on.", min=1)] = 4_096,
    units: Annotated[
        int | None, typer.Option(help="Most matrices of a role that paths act on.", min=1, show_default="all")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Directory of measured points.", show_default="DIR/store")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Page to write.", show_default="DIR/curves.html")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what a byte buys on every overlay, at a budget's operating point."""
    from bytecap.report.terminal import print_curves
    from bytecap_lab.rd_curves import byte_returns

    check_output(report, output)
    found = byte_returns(
        model, budget, output, base=base, paths=names(paths), calibration=calibration, evaluation=evaluation,
        device=device, seed=seed, tokens=tokens, evaluation_tokens=eval_tokens,
        points=points, point_tokens=point_tokens, units=units, store=store, report=report,
        reporter=progress(as_json),
    )  # fmt: skip
    show(found, as_json, print_curves)
