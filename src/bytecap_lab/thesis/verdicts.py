"""Turn lines into verdicts: each model on each base, groups of models, and the experiment as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from bytecap_lab.thesis import experiments
from bytecap_lab.thesis.evidence import Evidence, read
from bytecap_lab.thesis.statistics import (
    FALSIFIED,
    SUPPORTED,
    UNDECIDED,
    FloatArray,
    Interval,
    Missing,
    NotApplicable,
    pooled,
)

SHOWS_ONLY = "module"

SCHEMA = 1
REGISTRATION = "bf64458d430eebac9e051d6d0bd9f38a50368ea03de07e1048cbf211b8b7d6c4"  # of docs/thesis.md
MODELS = {"mini": 5}  # a group needs, by recipe
_FEWEST = 3  # of any other recipe
Record = Mapping[str, Any]
Found = dict[str, Any]


def judge(records: Sequence[Record], only: Sequence[str] | None = None) -> Found:
    """Compute all verdicts from the records alone.

    Args:
        records: lines of `thesis.jsonl`.
        only: experiments; all by default.
    """
    lines = [r for r in records if r["record"] == "measure"]
    every = read(records)
    return {
        "schema": SCHEMA, "registration": REGISTRATION,
        "commands": sorted({r["command"] for r in lines if r["command"]}),
        "hosts": sorted({r["host"] for r in lines}), "cpu_seconds": sum(r.get("cpu_seconds", 0.0) for r in lines),
        "settings": _settings(lines),
        "models": [_about(e) for e in every],
        "experiments": [_experiment(n, m, every) for n, m in experiments.chosen(only).items()],
    }  # fmt: skip


def _settings(lines: Sequence[Record]) -> list[dict[str, Any]]:
    """Every setting that occurs, texts by name only."""
    found: list[dict[str, Any]] = []
    for r in lines:
        s = dict(r["setting"])
        for k in ("calibration", "evaluation"):
            s[k] = [str(p).rpartition("/")[2] for p in s[k]]
        if s not in found:
            found.append(s)
    return found


def counts(one: Evidence) -> bool:
    """Return whether a verdict on this model counts: it was trained under the registration."""
    return one.registration == REGISTRATION


def _about(one: Evidence) -> Found:
    found: Found = {"model": one.model, "base": one.base, "recipe": one.recipe, "seed": one.seed, "counts": counts(one)}
    try:
        line = one.line("base")
    except Missing as exc:
        return found | {"missing": str(exc)}
    texts = one.texts["texts"] if one.texts is not None else []
    return found | {
        "budget_bytes": line["budget_bytes"], "matrix_bytes": line["bytes"], "parameters": line["parameters"],
        "kl": Interval.of(one.draw.mean(line["kl"])).as_dict(), "tokens": sum(sum(t["tokens"]) for t in texts),
        "texts": [t["name"] for t in texts],
    }  # fmt: skip


def _experiment(name: str, module: ModuleType, every: Sequence[Evidence]) -> Found:
    cells, arrays = [], []
    for one in every:
        values, missing = _effects(module, one, every)
        arrays.append((one, values, missing))
        about = {"model": one.model, "base": one.base, "counts": counts(one), "recipe": one.recipe}
        details = _details(module, one, every, values)
        cells.append({**about, **_verdict(module, values, missing), "details": details})
    groups = _groups(module, [a for a in arrays if counts(a[0])])
    word, why = whole([(g["verdict"], g["reason"]) for g in groups])
    return {
        "name": name, "number": module.ORDER, "title": module.TITLE, "kind": module.KIND,
        "hypothesis": module.HYPOTHESIS, "statistic": module.STATISTIC, "main": module.MAIN, "line": module.LINE,
        "verdict": word, "reason": why, "groups": groups, "cells": cells,
    }  # fmt: skip


def _effects(
    module: ModuleType, one: Evidence, every: Sequence[Evidence]
) -> tuple[dict[str, FloatArray], Missing | None]:
    try:
        return module.effects(one, every), None
    except Missing as exc:
        return {}, exc


def _details(
    module: ModuleType, one: Evidence, every: Sequence[Evidence], values: Mapping[str, FloatArray]
) -> list[list[str]]:
    rows: Callable[..., Sequence[tuple[str, str]]] | None = getattr(module, "details", None)
    if rows is None or not values:
        return []
    try:
        return [list(r) for r in rows(one, every)]
    except Missing:
        return []


def _verdict(module: ModuleType, values: Mapping[str, FloatArray], missing: Missing | None) -> Found:
    """Intervals and verdict of effects; `applies` is False where the experiment says nothing of such a model."""
    try:
        if missing is not None:
            raise missing
        found = _intervals(values)
        if module.MAIN not in found:
            Interval.of(values[module.MAIN])
        word, why = module.decide(found)
    except Missing as exc:
        return {"verdict": UNDECIDED, "reason": str(exc), "effects": {}, "applies": not isinstance(exc, NotApplicable)}
    return {"verdict": word, "reason": why, "effects": {n: i.as_dict() for n, i in found.items()}, "applies": True}


def _intervals(values: Mapping[str, FloatArray]) -> dict[str, Interval]:
    """Return the interval of every effect that has one."""
    found = {}
    for name, array in values.items():
        with contextlib.suppress(Missing):
            found[name] = Interval.of(array)
    return found


def _groups(
    module: ModuleType, arrays: Sequence[tuple[Evidence, dict[str, FloatArray], Missing | None]]
) -> list[Found]:
    """One for each recipe and base that the experiment says something of."""
    found = []
    for key in dict.fromkeys((e.recipe, e.base) for e, _, _ in arrays):
        mine = [a for a in arrays if (a[0].recipe, a[0].base) == key]
        if all(isinstance(m, NotApplicable) for _, _, m in mine):
            continue
        values = [v for _, v, m in mine if m is None]
        reasons = [str(m) for _, _, m in mine if m is not None]
        row: Found = {"recipe": key[0], "base": key[1], "models": len(values)}
        if not values:
            found.append(row | {"verdict": UNDECIDED, "reason": reasons[0], "effects": {}, "applies": True})
            continue
        common = [n for n in values[0] if all(n in v for v in values)]
        row |= _verdict(module, {n: pooled([v[n] for v in values]) for n in common}, None)
        need = MODELS.get(key[0], _FEWEST)
        if len(values) < need:
            row |= {
                "verdict": UNDECIDED,
                "reason": f"{len(values)} of {need} models" + (f" ({reasons[0]})" if reasons else ""),
            }
        found.append(row)
    return found


def whole(groups: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The verdict over all groups and bases.

    >>> whole([("supported", ""), ("falsified", "")]), whole([("falsified", ""), ("undecided", "few")])[0]
    (('undecided', 'groups or bases disagree'), 'falsified')
    """
    words = [w for w, _ in groups]
    if not words:
        return UNDECIDED, "no model trained under the registration was measured for it"
    if set(words) == {SUPPORTED}:
        return SUPPORTED, ""
    if FALSIFIED in words and SUPPORTED not in words:
        return FALSIFIED, "" if set(words) == {FALSIFIED} else "other groups are undecided"
    reasons = list(dict.fromkeys(why for w, why in groups if w == UNDECIDED and why))
    both = {SUPPORTED, FALSIFIED} <= set(words)
    return UNDECIDED, "groups or bases disagree" if both else "; ".join(reasons) or "groups or bases disagree"
