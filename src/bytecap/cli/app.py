"""Register the commands, each a file of this folder, and show their errors.

Errors are one line on standard error with exit code 2 (`--debug` shows the traceback); Ctrl-C exits with 130.
With `--json` exactly one JSON object goes to standard output and nothing else is said. Every command works offline.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any

import typer
import typer.main

from bytecap.cli.card import card
from bytecap.cli.check import check
from bytecap.cli.choose import choose
from bytecap.cli.compare import compare
from bytecap.cli.complaints import DEBUG, complain, warning
from bytecap.cli.curves import curves
from bytecap.cli.demo import demo
from bytecap.cli.eval import evaluate
from bytecap.cli.export import app as export_app
from bytecap.cli.fit import fit
from bytecap.cli.generate import generate
from bytecap.cli.gguf import imatrix, recode
from bytecap.cli.golf import app as golf_app
from bytecap.cli.inspect import inspect
from bytecap.cli.ledger import ledger
from bytecap.cli.thesis import thesis
from bytecap.cli.tie import tie
from bytecap.cli.unpack import unpack
from bytecap.errors import UsageError
from bytecap.system.ranks import started

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Put a trained language model into ONE file under a hard byte cap.",
)  # fmt: skip
for _command in (
    fit, inspect, compare, choose, curves, tie, thesis, ledger, check, card, unpack, generate, demo, recode,
    imatrix,
):  # fmt: skip
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(golf_app, name="golf")
app.add_typer(export_app, name="export")


def _version(wanted: bool) -> None:
    if wanted:
        from bytecap._version import __version__
        from bytecap.format.container import VERSION

        typer.echo(f"bytecap {__version__}, format {'.'.join(map(str, VERSION))}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del debug, version  # read in `main`, which sees errors of every command
    if started() and context.invoked_subcommand not in {None, "fit"}:
        raise UsageError(f"{context.invoked_subcommand} is not divided among ranks: start it as one process")


@cache
def _parser() -> Callable[..., Any]:
    """Read the signatures of all commands, which takes a program that calls `main` often longer than the rest."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = warning
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    DEBUG.set(debug)
    try:
        with _ending_in_order():
            code = _parser()(standalone_mode=False)  # Ctrl-C and typer.Exit come back as a number or as an exception
    except KeyboardInterrupt:
        if debug:
            raise
        code = 130
    except BaseException as exc:
        if debug or not (isinstance(exc, Exception) or type(exc).__name__ == "PanicException"):
            raise
        code = _complain_once(exc)
    if code == 130:
        sys.stderr.write("\ninterrupted; no partial file is left behind\n")
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _complain_once(exc: BaseException) -> int:
    """Print one line for an error, which one of several ranks says for all; returns the exit code."""
    if not started() or isinstance(exc, typer.Exit | typer.Abort):
        return complain(exc)
    from bytecap.system.distributed import joined

    try:
        with joined("cpu", complain):
            raise exc
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let a process that is told to end take its partial files away first; a child of it just ends."""
    mine, changed = os.getpid(), []

    def end(number: int, _: object) -> None:
        if os.getpid() != mine:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():  # else signals are the business of whoever runs us
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) is signal.SIG_DFL:  # not where somebody ignores it, as nohup does
                signal.signal(number, end)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
