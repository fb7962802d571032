"""`bytecap demo` runs the main job on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bytecap.cli.common import Json, check_output, print_json, progress


def demo(
    budget: Annotated[str, typer.Option("--budget", help="Cap on the file.")] = "600kB",
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("demo.bcap"),
    as_json: Json = False,
) -> None:
    """Run the main job on the embedded model: fit, read back, show where every byte went."""
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
