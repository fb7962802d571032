"""`bytecap golf` makes and checks submissions for Parameter Golf."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import Json, print_json
from bytecap.escape import shown
from bytecap.sizes import format_size, parse_size

app = typer.Typer(no_args_is_help=True, help="Parameter Golf: code and model under one cap.")

_Cap = Annotated[str, typer.Option("--cap", help="Cap on code and model together.")]
_Vendored = Annotated[bool, typer.Option("--vendored/--library", help="Carry a numpy-only decoder, or import bytecap.")]
_DEFAULT_CAP = "16000000"


@app.command()
def budget(
    script: Annotated[Path, typer.Option("--script", help="Training script, evaluation included.")],
    vendored: _Vendored = True,
    cap: _Cap = _DEFAULT_CAP,
    like: Annotated[
        Path | None,
        typer.Option(help="Artifact whose coders the decoder must know.", show_default="the default coders"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what the cap leaves for the model: the --budget of `fit`."""
    from bytecap_lab.submission import export

    limit = parse_size(cap)
    left = export.budget(script, cap=limit, vendored=vendored, like=like)
    if as_json:
        print_json({"budget_bytes": left, "cap_bytes": limit, "script_bytes": limit - left})
    else:
        typer.echo(left)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="A .bcap file.", metavar="ARTIFACT")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write, of its own.")],
    script: Annotated[
        Path | None, typer.Option("--script", help="Training script.", show_default="the artifact's code")
    ] = None,
    vendored: _Vendored = True,
    cap: _Cap = _DEFAULT_CAP,
    as_json: Json = False,
) -> None:
    """Write a whole submission: train_gpt.py, which extracts itself, and model.bcap."""
    from bytecap_lab.submission.export import export as run

    found = run(path, output, script, vendored=vendored, cap=parse_size(cap))
    if as_json:
        print_json(found)
        return
    decoder = f", {found['decoder_bytes']:,} of them the decoder" if vendored else ", bytecap not counted"
    _print_count(found, {"train_gpt.py": f"{found['script_raw_bytes']:,} bytes of source{decoder}"})


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="A submission.", metavar="DIR")],
    cap: _Cap = _DEFAULT_CAP,
    eval_: Annotated[
        str | None,
        typer.Option("--eval", help="Command in quotes, which is run in a copy of DIR.", show_default="none"),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="File that is public data (repeatable).", show_default="none")
    ] = None,
    library: Annotated[
        list[str] | None,
        typer.Option("--library", help="Public library that is not installed here (repeatable).", show_default="none"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Most seconds of the evaluation.", min=0.1)] = 600.0,
    memory: Annotated[
        str | None,
        typer.Option(help="Most memory of the evaluation.", show_default="three quarters of the machine's"),
    ] = None,
    disk: Annotated[str, typer.Option(help="Most bytes that the evaluation writes to its directories.")] = "16GB",
    processes: Annotated[int, typer.Option(help="Most processes and threads of the evaluation.", min=1)] = 4096,
    as_json: Json = False,
) -> None:
    """Recount a submission from outside: every file counts, and every name. Runs nothing but the command of --eval."""
    from bytecap_lab.submission.check import check as run
    from bytecap_lab.submission.check import evaluate

    bounds: dict[str, Any] = {"seconds": seconds, "disk": parse_size(disk), "processes": processes}
    bounds["memory"] = None if memory is None else parse_size(memory)
    found = run(directory, cap=parse_size(cap), data=data or (), libraries=library or ())
    if eval_ is not None:
        found |= evaluate(directory, eval_, data=data or (), **bounds)
    if as_json:
        print_json(found)
        return
    _print_count(found, dict.fromkeys(found["public"], "public data, not counted"))
    if eval_ is not None:
        typer.echo(f"evaluation: {found['bpb']:g} bits per byte ({shown(found['line'], most=400)})")


def _print_count(found: dict[str, Any], remarks: dict[str, str]) -> None:
    """Print the table of a judge."""
    rows = found["files"] | found.get("public", {})
    if found.get("name_bytes"):
        rows = rows | {"(names)": found["name_bytes"]}
        remarks = remarks | {"(names)": "of files and directories but train_gpt.py and model.bcap"}
    for name, size in rows.items():
        typer.echo(f"{size:>14,}  {shown(name)}  {remarks.get(name, '')}".rstrip())
    typer.echo(f"{found['total_bytes']:>14,}  together, of {format_size(found['cap_bytes'])}")
    typer.echo(f"{found['slack_bytes']:>14,}  left")
