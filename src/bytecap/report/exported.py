"""Print the ledger of an exported folder on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from bytecap.escape import console, shown, styled
from bytecap.sizes import format_size

_LONGEST = 400  # characters of a name


def print_export(found: Mapping[str, Any]) -> None:
    """Print who holds the folder's bytes, and how to serve it; after a dry run what is left for the model."""
    out, fit = console(), found["fit"]
    if "directory" not in found:
        out.print(
            f"{found['model_budget_bytes']:,} bytes for the model, {found['fixed_bytes']:,} for page and runtime; "
            f"smallest model {fit['floor_bytes']:,}", highlight=False,
        )  # fmt: skip
        return
    name = shown(found["directory"], most=_LONGEST)
    out.print(styled((name, "bold"), f": {format_size(found['total_bytes'])}"), highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    for title in ("bytes", "share"):
        table.add_column(title, justify="right")
    for file, size in sorted(found["files"].items(), key=lambda f: -f[1]):
        table.add_row(shown(file, most=_LONGEST), f"{size:,}", f"{100 * size / found['total_bytes']:.2f}%")
    out.print(table, highlight=False)
    out.print(f"bits per byte {fit['bpb_artifact']:.4f}, KL {fit['kl_nats']:.4f} nats per token", highlight=False)
    out.print(f"serve it: python -m http.server -d {name}", highlight=False, soft_wrap=True)
