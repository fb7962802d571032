"""Turn measured points into the figures of `curves.json`; docs/curves.md describes every member."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.model.evaluation import ByWindow
from bytecap.model.uncertainty import ratio_stderr
from bytecap_lab.rd_curves.points import MeasuredPick
from bytecap_lab.rd_curves.ranks import ceiling, spearman
from bytecap_lab.rd_curves.trial import COARSER, STEP, OverlayCandidate

FloatArray = npt.NDArray[np.float64]
_SURE = 2.0  # standard errors


def base_figures(base: ByWindow) -> dict[str, float]:
    """KL, loss and bits per byte of the operating point, and of the original."""
    tokens, size = base.tokens.sum(), base.bytes.sum()
    return {
        "kl_nats": float(base.kl.sum() / tokens), "kl_stderr": ratio_stderr(base.kl, base.tokens),
        "nats": float(base.nats.sum() / tokens), "nats_original": float(base.original.sum() / tokens),
        "bpb": float(base.nats.sum() / math.log(2) / size),
        "bpb_original": float(base.original.sum() / math.log(2) / size), "tokens": int(tokens),
    }  # fmt: skip


def point(measured: MeasuredPick, base: ByWindow, predicted: float, units: int) -> dict[str, Any]:
    """One measured point against the base.

    Args:
        measured: the point.
        base: on the same windows.
        predicted: nats per token.
        units: matrices in the model.
    """
    tokens, spent = base.tokens.sum(), measured.bytes
    kl, loss = base.kl - measured.kl, base.nats - measured.nats
    bpb = float(loss.sum() / math.log(2) / base.bytes.sum())
    gain = float(kl.sum() / tokens)
    return {
        "bytes": spent, "side_bytes": measured.side, "list_bytes": measured.lists,
        "units_share": len(measured.growth) / max(1, units),
        "weights_share": measured.share, "predicted_nats": predicted,
        "kl_recovered": gain, "kl_stderr": ratio_stderr(kl, base.tokens),
        "loss_recovered": float(loss.sum() / tokens), "loss_stderr": ratio_stderr(loss, base.tokens),
        "nats_per_byte": gain / spent if spent > 0 else None,
        "bpb_recovered": bpb, "bpb_per_kb": 1000 * bpb / spent if spent > 0 else None,
        "units": dict(measured.growth),
    }  # fmt: skip


def yardstick(steps: Sequence[MeasuredPick], base: ByWindow) -> dict[str, Any]:
    """The lambda line: the slope of finer steps, least squares through the base."""
    spent = np.array([m.bytes for m in steps], float)
    kl = np.array([(base.kl - m.kl).sum() / base.tokens.sum() for m in steps])
    bpb = np.array([(base.nats - m.nats).sum() / math.log(2) / base.bytes.sum() for m in steps])
    scale = float(spent @ spent) or math.nan
    return {"nats_per_byte": float(spent @ kl) / scale, "bpb_per_kb": 1000 * float(spent @ bpb) / scale}


def _at(spent: float, steps: Sequence[MeasuredPick], base: ByWindow) -> FloatArray:
    """KL per window that other steps recover for as many bytes: (windows,), linear between measured points.

    `spent` may be negative if coarser steps were measured.
    """
    points = {0.0: np.zeros(len(base.kl))} | {float(m.bytes): base.kl - m.kl for m in steps if m.bytes}
    known = sorted(points.items(), key=lambda k: k[0])
    if len(known) == 1:
        return known[0][1]
    i = int(np.clip(np.searchsorted([k[0] for k in known], spent), 1, len(known) - 1))
    (low, a), (high, b) = known[i - 1], known[i]
    found: FloatArray = a + (b - a) * ((spent - low) / (high - low))
    return found


def lead(measured: MeasuredPick, steps: Sequence[MeasuredPick], base: ByWindow) -> tuple[float, float]:
    """Return the nats per token by which a point is ahead of other steps for the same bytes, and their error."""
    ahead = base.kl - measured.kl - _at(measured.bytes, steps, base)
    return float(ahead.sum() / base.tokens.sum()), ratio_stderr(ahead, base.tokens)


def verdict(path: str, whole: Sequence[MeasuredPick], steps: Sequence[MeasuredPick], base: ByWindow) -> dict[str, Any]:
    """Decide whether a path recovers more than finer steps do for the same bytes, at any amount.

    Returns:
        `verdict` (`yardstick`, `earns`, `does not earn`, `no difference`, `not applicable`), `advantage_nats` over
        finer steps at the same bytes, its paired standard error, and the bytes it was found at: the clearest lead
        if it earns, else the clearest lag.
    """
    if path in (STEP, COARSER):
        return {"verdict": "yardstick"}
    found = []
    for m in whole:
        gain, error = lead(m, steps, base)
        found.append((gain / error if error > 0 else math.copysign(_SURE, gain), gain, error, m.bytes))
    if not found:
        return {"verdict": "not applicable"}
    best, worst = max(found), min(found)
    word = "earns" if best[0] > _SURE else "does not earn" if worst[0] < -_SURE else "no difference"
    _, gain, error, spent = best if word == "earns" else worst
    return {"verdict": word, "advantage_nats": gain, "advantage_stderr": error, "advantage_bytes": spent}


def ninety(points: Sequence[Mapping[str, Any]]) -> float | None:
    """Bytes at which a path has 90% of the most it recovered, linear between measured points."""
    best = max((p["kl_recovered"] for p in points), default=0.0)
    low = (0.0, 0.0)
    for p in sorted(points, key=lambda p: p["bytes"]):
        if best > 0 and p["kl_recovered"] >= 0.9 * best:
            share = (0.9 * best - low[1]) / (p["kl_recovered"] - low[1])
            return float(low[0] + share * (p["bytes"] - low[0]))
        low = (p["bytes"], p["kl_recovered"])
    return None


def agreement(
    candidates: Sequence[OverlayCandidate], measured: Sequence[MeasuredPick], base: ByWindow, seed: int
) -> dict[str, Any]:
    """Rank correlation of predicted and measured gains over a sample, with its ceiling."""
    gains = np.array([base.kl - m.kl for m in measured])
    predicted = np.array([o.alone for o in candidates])
    found = gains.sum(1) / base.tokens.sum() if len(gains) else np.zeros(0)
    return {"points": len(candidates), "spearman": spearman(predicted, found),
            "ceiling": ceiling(gains, base.tokens, seed)}  # fmt: skip
