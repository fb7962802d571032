"""`bytecap unpack` writes a file as an ordinary model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bytecap.cli.common import Artifact, Bases, Json, print_json
from bytecap.escape import shown


def unpack(
    path: Artifact,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    base: Bases = None,
    as_json: Json = False,
) -> None:
    """Write an ordinary Hugging Face directory; exactly the values that `eval` scores."""
    from bytecap.pipeline.export import unpack as run

    written = run(path, output, dtype=dtype, base=base)
    if as_json:
        print_json({"directory": str(output), "dtype": written})
    else:
        typer.echo(shown(f"{output}: written as {written}"))
