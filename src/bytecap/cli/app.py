"""The command line: parse, call, print. Every command works offline.

Errors are one line on standard error with exit code 2 (`--debug` shows the traceback); Ctrl-C exits with 130.
With `--json` exactly one JSON object goes to standard output and nothing else is said.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli import gguf
from bytecap.cli.common import Device, Factory, Json, Loss, State, check_output, names, print_json, progress
from bytecap.cli.compare import compare
from bytecap.cli.curves import curves
from bytecap.cli.golf import app as golf_app
from bytecap.cli.inspect import inspect
from bytecap.cli.thesis import thesis
from bytecap.cli.tie import tie
from bytecap.errors import BytecapError, UsageError
from bytecap.methods import METHODS
from bytecap.pipeline.formats import FORMATS, format_of
from bytecap.system.allocator import BOUND, is_shortage

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Put a trained language model into ONE file under a hard byte cap.",
)  # fmt: skip

app.add_typer(golf_app, name="golf")

_Bytes = Annotated[
    Path | None, typer.Option("--bytes-per-token", help="Table (.npy, text) or SentencePiece model (.model).")
]
_Artifact = Annotated[
    Path, typer.Argument(help="A .bcap file (for `ledger` also .gguf or a directory).", metavar="ARTIFACT")
]


@app.command()
def fit(
    budget: Annotated[str, typer.Option("--budget", help="Cap on the file: 3000000, 3MB (decimal), 3MiB.")],
    model: Annotated[str | None, typer.Argument(help="Hugging Face directory, hub id, or `demo`.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write.")] = None,
    calib: Annotated[list[Path] | None, typer.Option("--calib", help="Calibration text (repeatable).")] = None,
    eval_: Annotated[list[Path] | None, typer.Option("--eval", help="Evaluation text (repeatable).")] = None,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = "bytecap",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    tokens: Annotated[
        list[str] | None, typer.Option(help="Most calibration tokens; with --factory also shards (repeatable).")
    ] = None,
    eval_tokens: Annotated[
        list[str] | None, typer.Option(help="Most evaluation tokens; with --factory also shards (repeatable).")
    ] = None,
    factory: Factory = None,
    state: State = None,
    loss: Loss = None,
    bytes_per_token: _Bytes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print floor and predicted quality, write nothing.")
    ] = False,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Leave the tokenizer out.")] = False,
    no_config: Annotated[bool, typer.Option("--no-config", help="Leave the config out.")] = False,
    code: Annotated[list[Path] | None, typer.Option("--code", help="Source file to pack (repeatable).")] = None,
    code_accounting: Annotated[str, typer.Option(help="Which size of the code meets the cap: packed, raw.")] = "packed",
    paths: Annotated[
        list[str] | None, typer.Option("--paths", help="Exception paths to choose from, by comma or repeated, or all.")
    ] = None,
    recover: Annotated[
        str | None, typer.Option(help="Tune what was coded: so many steps (600) or so long (45s, 10m).")
    ] = None,
    recover_text: Annotated[
        list[Path] | None, typer.Option("--recover-text", help="Text to tune on (repeatable), or self.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Page to write (HTML).")] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Directory of finished steps: a killed run, started again, goes on."),
    ] = None,
    format_: gguf.Format = None,
    types: gguf.Types = None,
    pure: gguf.Pure = False,
    template: gguf.Template = None,
    emit: gguf.Emit = None,
    as_json: Json = False,
) -> None:
    """Put MODEL into one file of at most --budget bytes, read it back and measure it."""
    from bytecap.model.sources import EVALUATION_TOKENS, TOKENS
    from bytecap.pipeline import pack_code
    from bytecap.pipeline.fit import fit as run
    from bytecap.pipeline.fit_shards import fit_shards, limit_only, numbers_and_shards
    from bytecap.report.terminal import print_fit

    if output is None and not dry_run:
        raise typer.BadParameter("say where to write with -o FILE, or use --dry-run")
    if recover_text and (recover is None or factory is not None):
        raise UsageError("--recover-text is read by --recover, without --factory")
    kind = format_of(format_, output)
    check_output(report)
    if kind not in FORMATS or FORMATS[kind].suffix:
        check_output(output)
    if kind in FORMATS:
        only_gguf = {"--template": template, "--emit": emit, "--recover": recover} if kind != "gguf" else {}
        gguf.refuse_others(kind, {
            "--method": method != "bytecap", "--factory": factory, "--state": state, "--loss": loss, "--code": code,
            "--bytes-per-token": bytes_per_token, "--paths": paths, "--no-tokenizer": no_tokenizer,
            "--no-config": no_config, **only_gguf,
        })  # fmt: skip
        most, most_eval = limit_only(tokens, "--tokens"), limit_only(eval_tokens, "--eval-tokens")
        own = {"template": template, "recover": recover, "recover_text": recover_text} if kind == "gguf" else {}
        gguf.fit_file(
            kind, _needed(model), budget, output=output, emit=emit, report=report, as_json=as_json, calibration=calib,
            evaluation=eval_, types=names(types), pure=pure, tokens=most or TOKENS,
            evaluation_tokens=most_eval or EVALUATION_TOKENS, device=device, seed=seed, dry_run=dry_run, store=store,
            **own,
        )  # fmt: skip
        return
    gguf.refuse_others(kind, {"--types": types, "--pure": pure, "--template": template, "--emit": emit})
    common: dict[str, Any] = {
        "method": method, "device": device, "seed": seed, "output": output, "dry_run": dry_run,
        "tokenizer": not no_tokenizer, "config": not no_config, "reporter": progress(as_json),
        "code": pack_code.pack(code or (), code_accounting), "paths": names(paths), "recover": recover,
    }  # fmt: skip
    if factory is not None:
        if store is not None:
            raise UsageError("--store is for checkpoints: what a factory's code computes has no name to be kept under")
        source = _source(factory, model, state, loss, bytes_per_token)
        most, shards = numbers_and_shards(tokens, "--tokens")
        most_eval, held = numbers_and_shards(eval_tokens, "--eval-tokens")
        result = fit_shards(
            source, budget, shards, evaluation=held, tokens=most, evaluation_tokens=most_eval, **common
        )  # fmt: skip
    else:
        most, most_eval = limit_only(tokens, "--tokens"), limit_only(eval_tokens, "--eval-tokens")
        result = run(
            _needed(model), budget, calibration=calib, evaluation=eval_, tokens=most or TOKENS,
            evaluation_tokens=most_eval or EVALUATION_TOKENS, recover_text=recover_text, store=store, **common,
        )  # fmt: skip
    if report is not None:
        from bytecap.report.fit import page
        from bytecap.system.atomic import write_atomically

        write_atomically(page(result.report, [] if dry_run else result.ledger()).encode(), report)
    if as_json:
        print_json(result.report)
    else:
        print_fit(result.report)


def _needed(model: str | None) -> str:
    if model is None:
        raise typer.BadParameter("say which MODEL, or give --factory FILE.py:CALLABLE")
    return model


def _source(factory: str, model: str | None, state: Path | None, loss: str | None, table: Path | None) -> Any:
    """The factory's module; MODEL may be its artifact, in place of --state."""
    from bytecap.pipeline.fit_shards import Source

    if model is not None and (state is not None or not model.endswith(".bcap")):
        raise UsageError(f"give --factory or the model {model}, not both (an artifact may stand for --state)")
    return Source(factory, Path(model) if model is not None else state, loss, table)


@app.command("eval")
def evaluate(
    model: Annotated[str | None, typer.Argument(help="Model directory, hub id, `demo`, or .bcap file.")] = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="Text to score (repeatable).")] = None,
    window: Annotated[int, typer.Option(help="Predicted tokens in a window.", min=1)] = 512,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help="Most tokens per text, all by default; with --factory also shards (repeatable)."),
    ] = None,
    factory: Factory = None,
    state: State = None,
    loss: Loss = None,
    bytes_per_token: _Bytes = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Bits per byte of a model or an artifact."""
    from bytecap.pipeline.fit_shards import limit_only, numbers_and_shards, score_shards
    from bytecap.pipeline.score import score
    from bytecap.report.terminal import print_scores

    reporter = progress(as_json)
    if factory is not None:
        source = replace(_source(factory, model, state, loss, bytes_per_token), window=window)
        most, shards = numbers_and_shards(tokens, "--tokens")
        scores = score_shards(source, shards, tokens=most, device=device, reporter=reporter)
    else:
        most = limit_only(tokens, "--tokens")
        scores = score(_needed(model), text, window=window, tokens=most, device=device, reporter=reporter)
    if as_json:
        print_json(_score_json(scores))
    else:
        print_scores(scores)


def _score_json(scores: list[Any]) -> dict[str, Any]:
    """Unweighted means over the texts on top, each text under `texts`."""
    n = len(scores)
    return {
        "bpb": sum(s.bpb for s in scores) / n,
        "bpb_stderr": sum(s.bpb_stderr**2 for s in scores) ** 0.5 / n,
        "nats_per_token": sum(s.nats for s in scores) / n,
        "tokens": sum(s.tokens for s in scores), "bytes": sum(s.bytes for s in scores),
        "texts": [s.as_dict() for s in scores],
    }  # fmt: skip


app.command()(inspect)
app.command()(compare)
app.command()(curves)
app.command()(tie)
app.command()(thesis)
app.command()(gguf.recode)
app.command()(gguf.imatrix)


@app.command()
def ledger(path: _Artifact, as_json: Json = False) -> None:
    """Where every byte went, rebuilt from the file alone."""
    from bytecap.format import container
    from bytecap.format.ledger import total
    from bytecap.report.terminal import print_ledger

    if path.is_dir():
        from bytecap.runtimes.directory.contents import ledger_of

        entries = ledger_of(path)
    elif path.suffix == ".gguf":
        from bytecap.runtimes.gguf.file import ledger as entries_of

        entries = entries_of(path)
    else:
        entries = container.ledger(container.read(path))
    if as_json:
        print_json({"file_bytes": total(entries), "entries": [e.as_dict() for e in entries]})
    else:
        print_ledger(entries, str(path))


@app.command()
def check(path: _Artifact, as_json: Json = False) -> None:
    """Strict integrity check: every checksum, every count, every stream. Needs no torch."""
    from bytecap.format import container
    from bytecap.format.decoder import decode_units

    contents = container.read(path)
    values = decode_units(contents, aliases=False)
    parameters = sum(v.size for v in values.values())
    size = path.stat().st_size
    if as_json:
        print_json({"ok": True, "file_bytes": size, "units": len(values), "parameters": parameters})
    else:
        typer.echo(f"{path}: sound. {size:,} bytes, {len(values)} units, {parameters:,} parameters")


@app.command()
def unpack(
    path: _Artifact,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Write an ordinary Hugging Face directory; exactly the values that `eval` scores."""
    from bytecap.pipeline.export import unpack as run

    written = run(path, output, dtype=dtype)
    if as_json:
        print_json({"directory": str(output), "dtype": written})
    else:
        typer.echo(f"{output}: written as {written}")


@app.command()
def generate(
    path: _Artifact,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="Tokens to add.", min=0)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Continue a prompt with the model in an artifact."""
    from bytecap.pipeline.score import continue_prompt

    text = continue_prompt(path, prompt, tokens=tokens, temperature=temperature, seed=seed)
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        typer.echo(prompt + text)


@app.command()
def demo(
    budget: Annotated[str, typer.Option("--budget", help="Cap on the file.")] = "600kB",
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("demo.bcap"),
    as_json: Json = False,
) -> None:
    """The main job on the embedded model: fit, read back, show where every byte went."""
    from bytecap.model.checkpoint import demo_directory
    from bytecap.pipeline.fit import fit as run
    from bytecap.report.terminal import print_fit, print_ledger

    check_output(output)
    texts = demo_directory()
    result = run(
        "demo", budget, calibration=texts / "calib.txt", evaluation=texts / "val.txt", output=output,
        tokens=32_768, evaluation_tokens=16_384, reporter=progress(as_json),
    )  # fmt: skip
    if as_json:
        print_json(result.report)
        return
    print_ledger(result.ledger(), str(output))
    print_fit(result.report)


def _version(wanted: bool) -> None:
    if wanted:
        from bytecap._version import __version__
        from bytecap.format.container import VERSION

        typer.echo(f"bytecap {__version__}, format {'.'.join(map(str, VERSION))}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del debug, version  # read in `main`, which sees errors of every command


def main() -> None:
    """Entry point: run the command, turn errors into one line and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        code = app(standalone_mode=False)  # Ctrl-C and typer.Exit come back as a number or as an exception
    except KeyboardInterrupt:
        if debug:
            raise
        code = 130
    except Exception as exc:
        if debug:
            raise
        code = _complain(exc)
    if code == 130:
        sys.stderr.write("\ninterrupted; no partial file is left behind\n")
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _complain(exc: Exception) -> int:
    """Print one line for an error; returns the exit code."""
    if isinstance(exc, typer.Abort):
        return 130
    if isinstance(exc, typer.Exit):
        return int(exc.exit_code)
    if hasattr(exc, "format_message"):  # usage errors: typer carries its own copy of click, or click itself
        message = str(exc.format_message())
        if not message:  # no command was given: the help has been printed
            return 2
    elif isinstance(exc, BytecapError):
        message = str(exc)
    elif is_shortage(exc):
        message = f"out of memory ({str(exc) or type(exc).__name__}): {BOUND}"
    elif isinstance(exc, ModuleNotFoundError):
        message = f"the package {exc.name} is missing: pip install 'bytecap[hf]'"
    else:
        message = f"unexpected {type(exc).__name__}: {exc} (run with --debug for the traceback)"
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    return 2


if __name__ == "__main__":
    main()
