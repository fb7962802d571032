"""`bytecap card` writes the model card of a file or of a directory for hubs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import Artifact, check_inputs, check_output
from bytecap.errors import UsageError
from bytecap.escape import shown
from bytecap.system.atomic import read_regular


def card(
    path: Artifact,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="standard output")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="What `bytecap fit --json` printed: quality, calibration.", show_default="none"),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--source", help="Directory or hub id of the source: its licence is kept.", show_default="none"),
    ] = None,
) -> None:
    """Write a model card: where the bytes are, quality with errors, how to load it, the licence of the source."""
    from bytecap.pipeline.cards import card_of

    check_output(output)
    check_inputs({"-o": output}, {"the artifact": path, "--report": report, "--source": source})
    text = card_of(path, _figures(report), source)
    if output is None:
        sys.stdout.write(text)
        return
    from bytecap.system.atomic import write_atomically

    write_atomically(text.encode(), output)
    typer.echo(shown(f"wrote {output}"))


def _figures(path: Path | None) -> dict[str, Any]:
    """Read the figures of a fit.

    Raises:
        UsageError: the file holds no JSON object.
    """
    if path is None:
        return {}
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as exc:
        raise UsageError(f"cannot read {path}: give what `bytecap fit --json` printed") from exc
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object: give what `bytecap fit --json` printed")
    return found
