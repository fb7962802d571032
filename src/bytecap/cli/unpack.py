"""`bytecap unpack` writes a file as an ordinary model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bytecap.cli.common import Artifact, Bases, Json, print_json
from bytecap.escape import shown

DTYPE = "source (as the source was), float32 (exact), auto (as the source if exact), float16 or bfloat16."


def unpack(
    path: Artifact,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    dtype: Annotated[str, typer.Option(help=DTYPE)] = "source",
    base: Bases = None,
    as_json: Json = False,
) -> None:
    """Write an ordinary Hugging Face directory, with the names, shapes and dtypes that the source had."""
    from bytecap.pipeline.export import unpack_directory

    written = unpack_directory(path, output, dtype=dtype, base=base)
    if as_json:
        print_json({"directory": str(output), "dtype": written.dtype, "rounded": len(written.rounded)})
        return
    note = f" ({len(written.rounded)} tensors rounded; --dtype float32 keeps all bits)" if written.rounded else ""
    typer.echo(shown(f"{output}: written as {written.dtype}{note}"))
