"""`bytecap curves`: what a byte buys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bytecap.cli.common import Device, Json, check_output, names, print_json, progress


def curves(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id, or `demo`.")],
    budget: Annotated[str, typer.Option("--budget", help="Budget whose operating point is the base.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    base: Annotated[str, typer.Option(help="grid or golf.")] = "grid",
    paths: Annotated[list[str] | None, typer.Option("--paths", help="Paths, by comma or repeated; all.")] = None,
    calib: Annotated[list[Path] | None, typer.Option("--calib", help="Calibration text (repeatable).")] = None,
    eval_: Annotated[list[Path] | None, typer.Option("--eval", help="Evaluation text (repeatable).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    device: Device = "auto",
    tokens: Annotated[int | None, typer.Option(help="Most calibration tokens.", min=1)] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Most evaluation tokens.", min=1)] = None,
    points: Annotated[int | None, typer.Option(help="Single-unit points to measure.", min=1)] = None,
    point_tokens: Annotated[int | None, typer.Option(help="Most tokens each of them is measured on.", min=1)] = None,
    store: Annotated[Path | None, typer.Option(help="Directory of measured points; DIR/store.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Page to write; DIR/curves.html.")] = None,
    as_json: Json = False,
) -> None:
    """What a byte buys on every exception path, at a budget's operating point."""
    from bytecap.report.terminal import print_curves
    from bytecap_lab.rd_curves import EVALUATION_TOKENS, POINT_TOKENS, POINTS, TOKENS, byte_returns

    check_output(report, output)
    found = byte_returns(
        model, budget, output, base=base, paths=names(paths), calibration=calib, evaluation=eval_, device=device,
        seed=seed, tokens=tokens or TOKENS, evaluation_tokens=eval_tokens or EVALUATION_TOKENS,
        points=points or POINTS, point_tokens=point_tokens or POINT_TOKENS, store=store, report=report,
        reporter=progress(as_json),
    )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        print_curves(found)
