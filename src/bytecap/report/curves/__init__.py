"""Make `curves.html`, one page with the contents of `curves.json`; every other file here is one of its sections."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from bytecap.report.frame import sections, shell
from bytecap.report.svg import Series

SENTENCES = {
    "yardstick": "the yardstick: every other path is measured against it",
    "earns": "earns its bytes",
    "does not earn": "does not earn its bytes",
    "no difference": "does not earn its bytes: no difference from finer steps beyond noise",
    "not applicable": "cannot apply to any matrix of this model",
}


def sentence(path: Mapping[str, Any]) -> str:
    """Put the verdict on a path in words."""
    text = SENTENCES[path["verdict"]]
    if path.get("reason"):
        text = f"cannot act here: {path['reason']}"
    if path.get("advantage_nats") is not None:
        text += (
            f" ({path['advantage_nats']:+.2e} ± {path['advantage_stderr'] or 0:.1e} nats against "
            f"{'finer' if path['advantage_bytes'] >= 0 else 'coarser'} steps "
            f"for the same {path['advantage_bytes']:,} bytes)"
        )
    return text


def ranks(found: Mapping[str, Any]) -> str:
    """Say how well predictions rank measured gains."""
    if found["spearman"] is None:
        return f"{found['points']} points, too few for a rank correlation"
    ceiling = "unknown" if found["ceiling"] is None else f"{found['ceiling']:.3f}"
    return (
        f"rank correlation of predicted and measured gain {found['spearman']:.3f} over {found['points']} points "
        f"(noise allows {ceiling})"
    )


def styles(found: Mapping[str, Any]) -> dict[str, int]:
    """Return the colour and marker of every path, the same in all charts."""
    return {name: i for i, name in enumerate(found["paths"])}


def curve(
    name: str, path: Mapping[str, Any], style: int, value: str = "kl_recovered", error: str = "kl_stderr"
) -> Series:
    """Return a path's measured points on the whole model, with the base among them, and their confidence band."""
    places = [((0.0, 0.0, 0.0), f"{name}: the base")] + [
        ((p["bytes"], p[value], p[error] or 0.0),
         (f"{name}, {p['bytes']:,} bytes: {p[value]:.5f} ± {p[error] or 0:.5f} nats, {100 * p['units_share']:.0f}% of "
          f"the matrices, {100 * p['weights_share']:.2f}% of the weights")) for p in path["whole"]
    ]  # fmt: skip
    places.sort(key=lambda place: place[0][0])
    return Series(name, [at for at, _ in places], style, tips=[tip for _, tip in places], band=True)


def line(found: Mapping[str, Any], reach: float) -> Series:
    """Return the lambda line up to a number of bytes."""
    slope = found["lambda"]["nats_per_byte"] or 0.0
    return Series("lambda", [(0.0, 0.0, 0.0), (reach, slope * reach, 0.0)], -1)


def page(found: Mapping[str, Any]) -> str:
    """Return the page for the contents of `curves.json`."""
    title = f"Byte returns of {found['model']} at {found['budget_bytes']:,} bytes"
    return shell(title, sections(sys.modules[__name__], found))
