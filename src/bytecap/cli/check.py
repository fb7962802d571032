"""`bytecap check` says whether a file is sound."""

from __future__ import annotations

import typer

from bytecap.cli.common import Artifact, Bases, Json, print_json
from bytecap.escape import shown


def check(path: Artifact, base: Bases = None, as_json: Json = False) -> None:
    """Check a file strictly: every checksum, count, stream and file. Sound is what `unpack` writes. Needs no torch."""
    from bytecap.format import updates
    from bytecap.pipeline.export import open_directory, read_whole

    contents, beside = read_whole(path, base)
    open_directory(contents, beside=beside)
    units = updates.units_of(contents)
    parameters = sum(u.parameters for u in units)
    size = sum(p.stat().st_size for p in (path.iterdir() if path.is_dir() else [path]) if p.is_file())
    if as_json:
        print_json({"ok": True, "file_bytes": size, "units": len(units), "parameters": parameters})
    else:
        typer.echo(f"{shown(str(path))}: sound. {size:,} bytes, {len(units)} units, {parameters:,} parameters")
