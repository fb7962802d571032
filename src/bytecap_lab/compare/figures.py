"""Turn records into the figures of `compare.json`; docs/compare.md describes every member."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bytecap_lab.compare.envelope import envelope, resampled, saved
from bytecap_lab.compare.pairs import METRICS, Entry, clusters, difference, entry, figure
from bytecap_lab.compare.task_scores import figures

SHOWS_ONLY = "module"

SCHEMA = 1
MEAN = "mean"  # of all texts
Record = Mapping[str, Any]


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Compute all figures of runs from their records alone."""
    runs = sorted((r for r in records if r["record"] == "run"), key=lambda r: int(r.get("order", 0)))  # as asked for
    texts = {r["key"]: r for r in records if r["record"] == "texts"}
    models = list(dict.fromkeys(r["model"] for r in runs))
    return {
        "schema": SCHEMA,
        "commands": sorted({r["command"] for r in runs if r["command"]}),
        "hosts": sorted({r["host"] for r in runs}),
        "cpu_seconds": sum(r.get("cpu_seconds", 0.0) for r in runs),
        "models": [one(m, [r for r in runs if r["model"] == m], texts) for m in models],
    }


def one(model: str, runs: Sequence[Record], texts: Mapping[str, Record]) -> dict[str, Any]:
    """Compute all figures of one model."""
    refused = [{"method": r["method"], "budget_bytes": r["budget_bytes"], "seed": r["seed"],
                "floor_bytes": r["floor_bytes"]} for r in runs if "refused" in r]  # fmt: skip
    done = [r for r in runs if "refused" not in r]
    if not done:
        return {"model": model, "refused": refused, "texts": [], "methods": [], "budgets": [], "cells": [],
                "wins": [], "saved": [], "envelope": {}}  # fmt: skip
    reference = texts[done[-1]["texts_key"]]
    done = [r for r in done if r["texts_key"] == reference["key"]]
    groups: dict[tuple[str, int], dict[Any, Record]] = {}
    for r in done:
        groups.setdefault((r["method"], r["budget_bytes"]), {})[r["seed"]] = r
    entries = [entry(list(g.values()), reference) for g in groups.values()]
    methods = list(dict.fromkeys(e.method for e in entries))
    budgets = sorted({r["budget_bytes"] for r in runs if r["seed"] is not None})
    names = [t["name"] for t in reference["texts"]]
    scopes = {MEAN: names} | ({n: [n] for n in names} if len(names) > 1 else {})
    return {
        "model": model, "parameters": reference["parameters"], "refused": refused, "methods": methods,
        "budgets": budgets, "seeds": sorted({s for e in entries for s in e.seeds if s is not None}),
        "texts": [_text(t) for t in reference["texts"]],
        "cells": [_cell(e, entries, methods[0], scopes) for e in entries],
        "wins": [w for metric in METRICS for scope, over in scopes.items() for b in budgets
                 if (w := _win(_present(entries, b, budgets), metric, scope, over, b)) is not None],
        "saved": _all_saved(entries, methods, names),
        "envelope": {m: envelope([(e.bytes, figure(e, m, names).mean) for e in entries]) for m in METRICS},
    }  # fmt: skip


def _text(text: Record) -> dict[str, Any]:
    tokens, size = sum(text["tokens"]), sum(text["bytes"])
    nats = sum(text["original"])
    return {
        "name": text["name"], "tokens": tokens, "windows": len(text["tokens"]),
        "clusters": int(clusters(text)[0].max()) + 1, "errors_over": clusters(text)[1],
        "nats_original": nats / tokens, "bytes_per_token": size / tokens if size else math.nan,
    }  # fmt: skip


def _cell(e: Entry, entries: Sequence[Entry], first: str, scopes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Compute one method's figures under one budget, and its differences to the first method there."""
    partner = next((p for p in entries if (p.method, p.budget) == (first, e.budget)), None)
    kept = e.records[0]
    found: dict[str, Any] = {
        "method": e.method, "budget_bytes": e.budget, "file_bytes": e.bytes, "seeds": list(e.seeds),
        "bits_per_parameter": kept["bits_per_parameter"], "same_top1": _mean(e, "same_top1"),
        "predicted_delta_nats": _mean(e, "predicted_delta_nats"), "cpu_seconds": _mean(e, "cpu_seconds"),
        "external": kept.get("external"), "scores": {},
    }  # fmt: skip
    if kept.get("tasks"):
        found["tasks"] = figures(kept)
    for scope, over in scopes.items():
        scores: dict[str, Any] = {m: figure(e, m, over).as_dict() for m in METRICS}
        if partner is not None and partner is not e:
            scores["against"] = {m: difference(e, partner, m, over).as_dict() for m in METRICS}
        found["scores"][scope] = scores
    return found


def _mean(e: Entry, member: str) -> float:
    values = [r.get(member) for r in e.records]
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else math.nan


def _present(entries: Sequence[Entry], budget: int, budgets: Sequence[int]) -> list[Entry]:
    """Return the entries under a budget: its runs, and the largest file of every external that fits it.

    A method takes part only with all of the seeds that the others have.
    """
    below = max([b for b in budgets if b < budget], default=0)
    mine = [e for e in entries if e.budget == budget and e.seeds != (None,)]
    seeds = {s for e in mine for s in e.seeds}
    found = {e.method: e for e in mine if set(e.seeds) == seeds}
    for e in sorted((e for e in entries if e.seeds == (None,)), key=lambda e: e.bytes):
        if below < e.bytes <= budget:
            found[e.method] = e
    return list(found.values())


def _win(
    present: Sequence[Entry], metric: str, scope: str, over: Sequence[str], budget: int
) -> dict[str, Any] | None:  # fmt: skip
    """Return the best entry under a budget, and those within one standard error of the difference from it."""
    if len(present) < 2:
        return None
    order = sorted(present, key=lambda e: figure(e, metric, over).mean)
    best = order[0]
    behind = {e.method: difference(e, best, metric, over) for e in order[1:]}
    second = order[1].method
    return {
        "metric": metric, "text": scope, "budget_bytes": budget, "best": best.method, "second": second,
        "difference": behind[second].as_dict(),
        "ties": [n for n, d in behind.items() if not d.mean > d.stderr],
    }  # fmt: skip


def _all_saved(entries: Sequence[Entry], methods: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Compute the bytes that every method saves against every other one, and against the envelope of all others."""
    found = []
    sizes = [e.bytes for e in entries]
    columns = {m: [i for i, e in enumerate(entries) if e.method == m] for m in methods}
    for metric in METRICS:
        means = resampled(entries, metric, texts)
        for method in methods:
            rivals = {n: columns[n] for n in methods if n != method}
            if len(rivals) > 1:
                rivals["all others"] = [i for c in rivals.values() for i in c]
            for name, others in rivals.items():
                if (x := saved(columns[method], others, sizes, means)) is not None:
                    found.append({"metric": metric, "method": method, "against": name, **x})
    return found
