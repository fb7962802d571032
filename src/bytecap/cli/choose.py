"""`bytecap choose` finds the best of several models under one cap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import Device, Json, check_inputs, check_output, progress, show, source_file
from bytecap.cli.options import described
from bytecap.errors import UsageError
from bytecap.model.defaults import TOKENS, WINDOW
from bytecap.system.collisions import Paths

_TEXT = "embedded general text, with a warning"


Models = Annotated[
    list[str], typer.Argument(help="Hugging Face directories, hub ids, .gguf files, or `demo`.", metavar="MODEL...")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="File to write the best to.", show_default="none")]
Evaluation = Annotated[
    list[Path] | None,
    typer.Option("--evaluation", "--eval", help="Text to compare on (repeatable).", show_default=_TEXT),
]
Budgets = Annotated[
    str | None,
    typer.Option("--budgets", help="Further caps for the curves, by comma; no file is kept.", show_default="none"),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option("--calibration", "--calib", help="Calibration text (repeatable).", show_default="as for fit"),
]


def choose(
    models: Models,
    budget: Annotated[str, typer.Option("--budget", help="Cap on the file.")],
    output: Output = None,
    evaluation: Evaluation = None,
    budgets: Budgets = None,
    calibration: Calibration = None,
    tokens: Annotated[
        int | None, typer.Option(help="Most calibration tokens of whole fits.", min=1, show_default=str(TOKENS))
    ] = None,
    evaluation_bytes: Annotated[
        int, typer.Option("--evaluation-bytes", "--eval-bytes", help="Most bytes to compare on, over all texts.", min=1)
    ] = 65_536,
    short_tokens: Annotated[int, typer.Option(help="Calibration tokens of short fits.", min=1)] = 8_192,
    finalists: Annotated[int, typer.Option(help="Models fitted whole at each budget.", min=1)] = 2,
    window: Annotated[int, typer.Option(help=described("window"), min=1)] = WINDOW,
    method: Annotated[str, typer.Option(help=described("method"))] = "bytecap",
    effort: Annotated[
        int | None,
        typer.Option(help="How hard whole fits search for integers, 0 to 3.", min=0, show_default="as for fit"),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help=described("seed"))] = 0,
    store: Annotated[Path | None, typer.Option(help=described("store"), show_default="none")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Page to write (HTML): table and picture.", show_default="none")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say which models fit and what would be fitted; fit and write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the best of several models under one cap, in bits per byte on the same text, and keep its file."""
    from bytecap.pipeline.choose import choose as run
    from bytecap.pipeline.contenders import plan
    from bytecap.report.chosen import print_plan
    from bytecap.sizes import split_budgets

    _check(
        models, output, report, store, {"--eval": evaluation, "--calib": calibration, "--method": source_file(method)}
    )
    if dry_run:
        if report is not None:
            raise UsageError("--report draws what was fitted: leave it out with --dry-run")
        planned = plan(
            models, budget, evaluation=evaluation, budgets=split_budgets(budgets or ""),
            evaluation_bytes=evaluation_bytes, short_tokens=short_tokens, finalists=finalists, window=window,
            method=method, device=device, reporter=progress(as_json),
        )  # fmt: skip
        show(planned, as_json, print_plan)
        return
    found = run(
        models, budget, evaluation=evaluation, output=output, budgets=split_budgets(budgets or ""),
        calibration=calibration, tokens=tokens, evaluation_bytes=evaluation_bytes, short_tokens=short_tokens,
        finalists=finalists, window=window, method=method, effort=effort, device=device, seed=seed, store=store,
        reporter=progress(as_json),
    )  # fmt: skip
    _shown(found.report, report, as_json)


def _shown(found: dict[str, Any], page_to: Path | None, as_json: bool) -> None:
    """Write the page of a choice where one is asked for, and show the choice."""
    from bytecap.report.choice import page
    from bytecap.report.chosen import print_choice
    from bytecap.system.atomic import write_atomically

    if page_to is not None:
        write_atomically(page(found).encode(), page_to)
    show(found, as_json, print_choice)


def _check(
    models: list[str], output: Path | None, report: Path | None, store: Path | None, others: dict[str, Paths]
) -> None:
    """Refuse outputs that cannot be written or are inputs."""
    check_output(output)
    check_output(report)
    check_inputs({"-o": output, "--report": report, "--store": store}, {"MODEL": models, **others})
