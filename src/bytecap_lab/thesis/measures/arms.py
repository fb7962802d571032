"""Measure the base and the arms that spend bytes on it; see docs/thesis.md, *What is measured*."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bytecap_lab.thesis.amounts import PRIMARY
from bytecap_lab.thesis.bench import Bench, pick

ARMS = ("global", "ranked", "exceptions", "structured", "irregular")


def base(bench: Bench) -> dict[str, Any]:
    """Sizes and KL of the operating point."""
    operating_point, at = bench.operating_point, bench.at_base
    figures = {"bytes": operating_point.bytes, "acted_bytes": bench.acted_bytes, "budget_bytes": bench.budget}
    return figures | {"units": len(bench.units), "parameters": bench.model.parameters, "kl": bench.fold(at.kl)}


def arm(name: str) -> Callable[[Bench], dict[str, Any]]:
    """The measurement of an arm."""

    def measure(bench: Bench) -> dict[str, Any]:
        return {"points": bench.arm(name)}

    return measure


def paths(bench: Bench) -> dict[str, Any]:
    """Every overlay by itself at the primary amount."""
    plans = {n: bench.choose([n], PRIMARY * bench.acted_bytes) for n in bench.exceptions}
    plans = {n: p for n, p in plans.items() if p}
    found = bench.measure([pick(p) for p in plans.values()], "paths")
    return {"paths": {n: {"bytes": m.bytes, "kl": bench.recovered(m)} for n, m in zip(plans, found, strict=True)}}


MEASURES = {"base": base, **{f"arm {n}": arm(n) for n in ARMS}, "paths": paths}
