"""`curves.html`: byte-return curves as one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bytecap.report.frame import shell
from bytecap.report.svg import Series, chart, key

SENTENCES = {
    "yardstick": "the yardstick: every other path is measured against it",
    "earns": "earns its bytes",
    "does not earn": "does not earn its bytes",
    "no difference": "does not earn its bytes: no difference from finer steps beyond noise",
    "not applicable": "cannot apply to any matrix of this model",
}


def sentence(path: Mapping[str, Any]) -> str:
    """The verdict on a path in words."""
    text = SENTENCES[path["verdict"]]
    if path.get("advantage_nats") is not None:
        text += (
            f" ({path['advantage_nats']:+.2e} ± {path['advantage_stderr'] or 0:.1e} nats against finer steps "
            f"for the same {path['advantage_bytes']:,} bytes)"
        )
    return text


def page(found: Mapping[str, Any]) -> str:
    """The page of what `curves.json` holds."""
    base = found["base"]
    styles = {name: i for i, name in enumerate(found["paths"])}
    legend = "".join(key(i, n) for n, i in styles.items()) + key(-1, "lambda")
    title = f"Byte returns of {found['model']} at {found['budget_bytes']:,} bytes"
    parts = [
        f"<p>Base <b>{escape(base['name'])}</b>: {base['bytes']:,} bytes of matrices, KL to the original",
        f"{base['kl_nats']:.4f} ± {base['kl_stderr'] or 0:.4f} nats per token, {base['bpb']:.4f} bits per byte",
        f"(original {base['bpb_original']:.4f}). The lambda line is what the same base buys by finer steps:",
        f"{found['lambda']['nats_per_byte'] or 0:.2e} nats per byte.</p><p>{legend}</p>",
        _whole(found, styles, "kl_recovered", "kl_stderr", "KL recovered, nats per token"),
        _whole(found, styles, "loss_recovered", "loss_stderr", "loss recovered, nats per token"),
        _agreement(found, styles),
        *(_path(n, p, styles[n], found["lambda"]) for n, p in found["paths"].items()),
        '<p class="dim">Every measured point is decoded from real sections. Whiskers are one standard error,',
        "paired with the base on the same tokens.</p>",
    ]
    return shell(title, parts, script=False)


def _whole(found: Mapping[str, Any], styles: Mapping[str, int], value: str, error: str, label: str) -> str:
    series = [
        Series(n, [(0.0, 0.0, 0.0)] + [(p["bytes"], p[value], p[error] or 0.0) for p in path["whole"]], styles[n])
        for n, path in found["paths"].items()
    ]
    slope = found["lambda"]["nats_per_byte"]
    if value == "kl_recovered" and slope is not None:
        reach = max([p[0] for s in series for p in s.points])
        series.insert(0, Series("lambda", [(0.0, 0.0, 0.0), (reach, slope * reach, 0.0)], -1))
    return f"<figure>{chart(series, f'{label} against bytes spent', 'bytes spent on top of the base', label)}</figure>"


def _agreement(found: Mapping[str, Any], styles: Mapping[str, int]) -> str:
    series = [
        Series(n, [(p["predicted_nats"], p["kl_recovered"], p["kl_stderr"] or 0.0) for p in path["sample"]],
               styles[n], line=False)
        for n, path in found["paths"].items()
    ]  # fmt: skip
    drawn = chart(series, "Measured against predicted gain of single units", "predicted, nats per token",
                  "measured, nats per token", height=340)  # fmt: skip
    return (
        f"<h2>Single units, one at a time</h2><p>{_ranks(found['agreement'])}, measured on "
        f"{found['held_out_tokens']:,} held-out tokens with everything else at the base.</p><figure>{drawn}</figure>"
    )


def _ranks(found: Mapping[str, Any]) -> str:
    if found["spearman"] is None:
        return f"{found['points']} points, too few for a rank correlation"
    ceiling = "unknown" if found["ceiling"] is None else f"{found['ceiling']:.3f}"
    return (
        f"Rank correlation of predicted and measured gain {found['spearman']:.3f} over {found['points']} points "
        f"(noise allows {ceiling})"
    )


def _path(name: str, path: Mapping[str, Any], style: int, slope: Mapping[str, Any]) -> str:
    parts = [f"<h2>{escape(name)}</h2>", f'<p class="verdict">{escape(name)}: {escape(sentence(path))}.</p>']
    notes = []
    if path["ninety_percent_bytes"] is not None:
        notes.append(f"90% of the largest gain measured is there after {path['ninety_percent_bytes']:,.0f} bytes")
    if path["skipped_units"]:
        notes.append(f"it cannot apply to {path['skipped_units']} matrices")
    if path["whole"]:
        last = path["whole"][-1]["bytes"]
        series = [
            Series("lambda", [(0.0, 0.0, 0.0), (last, (slope["nats_per_byte"] or 0.0) * last, 0.0)], -1),
            Series(f"{name} predicted", [(0.0, 0.0, 0.0)] + [(p["bytes"], p["predicted_nats"], 0.0)
                                                             for p in path["whole"]], style + 1),
            Series(name, [(0.0, 0.0, 0.0)] + [(p["bytes"], p["kl_recovered"], p["kl_stderr"] or 0.0)
                                              for p in path["whole"]], style),
        ]  # fmt: skip
        drawn = chart(series, f"{name}: predicted and measured", "bytes spent", "nats per token", height=260)
        keys = key(style, "measured") + key(style + 1, "predicted") + key(-1, "lambda")
        parts.append(f"<p>{keys}</p><figure>{drawn}</figure>{_table(path['whole'])}")
    notes.append(_ranks(path["agreement"]))
    return "\n".join([*parts, f"<p>{'; '.join(notes)}.</p>"])


def _table(points: Sequence[Mapping[str, Any]]) -> str:
    titles = ("bytes", "side bytes", "matrices", "weights", "KL recovered", "predicted", "loss recovered",
              "nats/byte", "bits/byte per kB")  # fmt: skip
    rows = []
    for p in points:
        cells = (
            f"{p['bytes']:,}", f"{p['side_bytes']:,}", f"{100 * p['units_share']:.0f}%",
            f"{100 * p['weights_share']:.2f}%", f"{p['kl_recovered']:.5f} ± {p['kl_stderr'] or 0:.5f}",
            f"{p['predicted_nats']:.5f}", f"{p['loss_recovered']:.5f} ± {p['loss_stderr'] or 0:.5f}",
            "" if p["nats_per_byte"] is None else f"{p['nats_per_byte']:.2e}",
            "" if p["bpb_per_kb"] is None else f"{p['bpb_per_kb']:.2e}",
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{t}</th>" for t in titles)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
