"""`fit --format gguf`, `recode` and `imatrix`: GGUF files for llama.cpp at an exact size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import Device, Json, check_output, names, print_json, progress
from bytecap.errors import UsageError
from bytecap.pipeline.formats import FORMATS

Types = Annotated[
    list[str] | None, typer.Option("--types", help="Types to choose from, by comma or repeated: q4_k,q6_k, or w4g64.")
]
Pure = Annotated[bool, typer.Option("--pure", help="Refuse tensors that none of --types can hold (not with .bcap).")]
Template = Annotated[
    Path | None, typer.Option("--template", help="GGUF: the model converted by llama.cpp, for names and metadata.")
]
Emit = Annotated[
    Path | None, typer.Option("--emit", help="GGUF: also write the types for llama-quantize --tensor-type-file.")
]
Format = Annotated[
    str | None, typer.Option("--format", help="bcap, gguf, mlx, compressed-tensors; by the suffix of -o if not given.")
]
_Calib = Annotated[list[Path] | None, typer.Option("--calib", help="Calibration text (repeatable).")]
_Eval = Annotated[list[Path] | None, typer.Option("--eval", help="Evaluation text (repeatable).")]


def refuse_others(kind: str, given: dict[str, Any]) -> None:
    """Refuse options that belong to the other format.

    Raises:
        UsageError: one of them is given.
    """
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} is not for --format {kind}")


def fit_file(
    kind: str, model: Any, budget: str, *, output: Path | None, emit: Path | None, report: Path | None, as_json: bool,
    **rest: Any,
) -> None:  # fmt: skip
    """Run the job of a format and print or write what was asked for."""
    from bytecap.report.terminal import print_fit
    from bytecap.runtimes.gguf.export import type_lines
    from bytecap.system.atomic import write_atomically

    check_output(emit)
    result = FORMATS[kind].load()(model, budget, output=output, reporter=progress(as_json), **rest)
    if emit is not None:
        write_atomically(type_lines(result.types).encode(), emit)
    if report is not None:
        from bytecap.report.fit import page

        write_atomically(page(result.report, result.entries).encode(), report)
    if as_json:
        print_json(result.report)
    else:
        print_fit(result.report)


def recode(
    path: Annotated[Path, typer.Argument(help="A GGUF file in F32, F16, BF16 or Q8_0.", metavar="GGUF")],
    budget: Annotated[str, typer.Option("--budget", help="Cap on the file: 4GB, 3000000.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write.")] = None,
    calib: _Calib = None,
    eval_: _Eval = None,
    types: Types = None,
    pure: Pure = False,
    emit: Emit = None,
    tokens: Annotated[int | None, typer.Option(help="Most calibration tokens.")] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Most evaluation tokens.")] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print floor and predicted quality.")] = False,
    allow_quantized: Annotated[
        bool, typer.Option("--allow-quantized", help="Take a file that is below Q8_0 already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put the model in a GGUF file into another one of at most --budget bytes."""
    from bytecap.model.sources import EVALUATION_TOKENS, TOKENS
    from bytecap.runtimes.gguf.recode import check_source, load_gguf
    from bytecap.runtimes.gguf.template import read_template

    if output is None and not dry_run:
        raise typer.BadParameter("say where to write with -o FILE, or use --dry-run")
    check_output(output)
    check_source(path, allow_quantized=allow_quantized, reporter=progress(as_json))
    model = load_gguf(path)
    template = read_template(path, model, quantized=True)
    fit_file(
        "gguf", model, budget, output=output, emit=emit, report=None, as_json=as_json, calibration=calib,
        evaluation=eval_, types=names(types), pure=pure, template=template, tokens=tokens or TOKENS,
        evaluation_tokens=eval_tokens or EVALUATION_TOKENS, device=device, seed=seed, dry_run=dry_run,
    )  # fmt: skip


def imatrix(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id, or `demo`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    calib: _Calib = None,
    tokens: Annotated[int | None, typer.Option(help="Most calibration tokens.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Every token weighs the same, as in llama.cpp's own tool.")
    ] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    as_json: Json = False,
) -> None:
    """Write an importance matrix for llama-quantize, tokens weighted by their output gradients."""
    from bytecap.pipeline.fit_gguf import imatrix_of

    check_output(output)
    size, tensors = imatrix_of(
        model, output, calibration=calib, tokens=tokens, guided=not plain, device=device, seed=seed,
        reporter=progress(as_json),
    )  # fmt: skip
    if as_json:
        print_json({"file": str(output), "file_bytes": size, "tensors": tensors})
    else:
        typer.echo(f"{output}: {tensors} tensors, {size:,} bytes")
