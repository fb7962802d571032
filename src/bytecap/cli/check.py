"""`bytecap check` says whether a file is sound."""

from __future__ import annotations

import typer

from bytecap.cli.common import Artifact, Json, print_json


def check(path: Artifact, as_json: Json = False) -> None:
    """Check a file strictly: every checksum, every count, every stream. Needs no torch."""
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
