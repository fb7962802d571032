"""`bytecap export web` puts a model into a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bytecap.cli.common import Json, MostEvaluationTokens, MostTokens, check_inputs, completed, show
from bytecap.cli.options import with_config
from bytecap.job.config import FitConfig

app = typer.Typer(no_args_is_help=True, help="Put a model where others run it.")


@app.callback()
def _export() -> None:
    """Put a model where others run it."""


@app.command("web")
@with_config
def web(
    config: FitConfig,
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id, .gguf file, or `demo`.")],
    runtime: Annotated[
        Path | None,
        typer.Option(
            "--runtime", help="Package of wllama (npm pack @wllama/wllama@2.3.7).", show_default="fetched by npm"
        ),
    ] = None,
    tokens: MostTokens = None,
    evaluation_tokens: MostEvaluationTokens = None,
    as_json: Json = False,
) -> None:
    """Write a folder of at most --budget bytes, runtime included, whose page runs MODEL in the browser."""
    from bytecap.pipeline.export_web import export_web
    from bytecap.report.exported import print_export

    config = completed(config, tokens, evaluation_tokens, as_json, "DIR")
    check_inputs(
        {"-o": config.output},
        {
            "MODEL": model, "--calib": config.calibration, "--eval": config.evaluation, "--runtime": runtime,
            "--recover-text": config.recover_text, "--template": config.template,
        },
    )  # fmt: skip
    show(export_web(model, config, runtime=runtime).report, as_json, print_export)
