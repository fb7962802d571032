"""What the command line's parts share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.errors import OutputError
from bytecap.progress import Bars, Reporter, Silent
from bytecap.report.plain import finite
from bytecap.system.atomic import check_kind

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Factory = Annotated[
    str | None,
    typer.Option("--factory", help="FILE.py:CALLABLE that returns the module, instead of MODEL. The file is run."),
]
State = Annotated[
    Path | None, typer.Option("--state", help="The factory module's state dict: safetensors, or torch.save.")
]
Loss = Annotated[
    str | None, typer.Option("--loss", help="FILE.py:CALLABLE(module, ids) -> mean nats. The file is run.")
]


def progress(quiet: bool) -> Reporter:
    """Bars, or nothing beside `--json`."""
    return Silent() if quiet else Bars()


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output; NaN and infinity become null."""
    sys.stdout.write(json.dumps(finite(value), allow_nan=False) + "\n")


def names(paths: list[str] | None) -> list[str] | None:
    """Names of paths, given by comma or repeated; None if there are none."""
    return [n.strip() for group in paths or () for n in group.split(",") if n.strip()] or None


def check_output(path: Path | None, made: Path | None = None) -> None:
    """Fail before hours of work, not after; the directory `made` need not be there yet."""
    if path is None or path.parent == made:
        return
    check_kind(path)
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: the directory {path.parent} is not writable")
