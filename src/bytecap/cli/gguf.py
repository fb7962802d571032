"""`bytecap recode` and `bytecap imatrix`: GGUF files from GGUF files, and for llama-quantize."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bytecap.cli.common import (
    Calibration,
    Device,
    Json,
    Model,
    MostEvaluationTokens,
    MostTokens,
    Seed,
    check_inputs,
    check_output,
    completed,
    print_json,
    progress,
)
from bytecap.cli.options import with_config
from bytecap.escape import shown
from bytecap.job.config import FitConfig


@with_config
def recode(
    config: FitConfig,
    path: Annotated[Path, typer.Argument(help="A GGUF file in F32, F16, BF16 or Q8_0.", metavar="GGUF")],
    tokens: MostTokens = None,
    evaluation_tokens: MostEvaluationTokens = None,
    allow_quantized: Annotated[
        bool, typer.Option("--allow-quantized", help="Take a file that is below Q8_0 already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put the model in a GGUF file into another one of at most --budget bytes."""
    from bytecap.model.checkpoint import load_checkpoint
    from bytecap.pipeline.fit import each_budget, outputs_of
    from bytecap.pipeline.fit_gguf import fit_gguf_configs
    from bytecap.pipeline.formats import format_of
    from bytecap.progress import warn
    from bytecap.report.terminal import print_fit
    from bytecap.runtimes.gguf.recode import check_source

    config = replace(completed(config, tokens, evaluation_tokens, as_json), format="gguf", template=path)
    format_of(config)
    configs = each_budget(config)
    for each in configs:
        check_output(Path(each.output) if each.output is not None else None)
    check_inputs(
        outputs_of(configs),
        {
            "GGUF": path, "--calib": config.calibration, "--eval": config.evaluation,
            "--recover-text": config.recover_text,
        },
    )  # fmt: skip
    said = check_source(path, allow_quantized=allow_quantized)
    if said is not None and config.reporter is not None:
        warn(config.reporter, said)
    results = fit_gguf_configs(load_checkpoint(path), configs, quantized=True)
    if as_json:
        print_json(results[0].report if len(results) == 1 else {"fits": [r.report for r in results]})
        return
    for result in results:
        print_fit(result.report)


def imatrix(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    calibration: Calibration = None,
    tokens: MostTokens = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Every token weighs the same, as in llama.cpp's own tool.")
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write an importance matrix for llama-quantize, tokens weighted by their output gradients."""
    from bytecap.pipeline.fit_gguf import imatrix_of

    check_output(output)
    check_inputs({"-o": output}, {"MODEL": model, "--calib": calibration})
    size, tensors = imatrix_of(
        model, output, calibration=calibration, tokens=tokens, guided=not plain, device=device, seed=seed,
        reporter=progress(as_json),
    )  # fmt: skip
    if as_json:
        print_json({"file": str(output), "file_bytes": size, "tensors": tensors})
    else:
        typer.echo(shown(f"{output}: {tensors} tensors, {size:,} bytes"))
