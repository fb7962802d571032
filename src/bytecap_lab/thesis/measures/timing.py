"""Time decoding all matrices and multiplying each by a vector, uniform against with exceptions, in processor seconds.

Exceptions run as side paths beside a dense base: gathered columns and rows, single weights, thin factors, a factor for
each group. Formats take turns in every repetition, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.format.coders import coder, run
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.overlays.channels import BOTH, COLUMNS
from bytecap.job import Section
from bytecap_lab.thesis.amounts import GLOBAL, PRIMARY
from bytecap_lab.thesis.bench import Bench, pick

REPEATS = 9
_ROUNDS = 8  # matrix-vector products of every matrix in a repetition
_SHORTEST = 1e-9  # seconds; some clocks stand still during short work, and times are divided by one another
Array = npt.NDArray[np.float32]
Product = Callable[[Array], Array]


def timing(bench: Bench) -> dict[str, Any]:
    """Seconds of every repetition by format."""
    operating_point = bench.operating_point
    plan = bench.choose(bench.exceptions, PRIMARY * bench.acted_bytes)
    with_exceptions, uniform = pick(plan).real(operating_point), bench.everywhere(GLOBAL[3]).real(operating_point)
    formats = {
        "global": {n: r.section for n, r in uniform.items()},
        "exceptions": {
            n: with_exceptions[n].section if n in with_exceptions else operating_point.sections[n] for n in bench.units
        },
    }
    settings = {n: (o.path, bench.setting_of(o)) for n, o in plan.items()}
    products = {k: [product(bench, n, s, settings.get(n) if k == "exceptions" else None) for n, s in mine.items()]
                for k, mine in formats.items()}  # fmt: skip
    rng = np.random.default_rng(0)
    vectors = [
        rng.standard_normal(operating_point.base.problems[n].weight.shape[1]).astype(np.float32) for n in bench.units
    ]
    decode: dict[str, list[float]] = {k: [] for k in formats}
    multiply: dict[str, list[float]] = {k: [] for k in formats}
    with bench.reporter.step(f"timing on {bench.base}", REPEATS + 1) as advance:
        for _ in range(REPEATS + 1):
            for k, mine in formats.items():
                decode[k].append(seconds(decoded, bench, mine))
                multiply[k].append(seconds(multiplied, products[k], vectors))
            advance(1)
    return {"decode": {k: v[1:] for k, v in decode.items()}, "multiply": {k: v[1:] for k, v in multiply.items()},
            "bytes": {k: sum(len(s.data) for s in mine.values()) for k, mine in formats.items()}}  # fmt: skip


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Processor time of a piece of work, which other processes do not change; above 0 on the coarsest clock."""
    started = time.process_time()
    work(*arguments)
    return max(time.process_time() - started, _SHORTEST)


def decoded(bench: Bench, sections: Mapping[str, Section]) -> list[Any]:
    """All matrices by the reader's coders."""
    base = bench.operating_point.base
    units = {n: p.unit for n, p in base.problems.items()}
    return run([coder(s.tag).decode(s.data, units[n].matrix_shape, units[n].dtype, base.shared)
                for n, s in sections.items()])  # fmt: skip


def multiplied(products: list[Product], vectors: list[Array]) -> None:
    """Every product some times."""
    for _ in range(_ROUNDS):
        for p, x in zip(products, vectors, strict=True):
            p(x)


def product(bench: Bench, name: str, section: Section, setting: tuple[str, Any] | None) -> Product:
    """A matrix-vector product in the form in which a format would be executed."""
    values = np.ascontiguousarray(decoded(bench, {name: section})[0], np.float32)
    if setting is None or section.tag != STACK.tag:
        return lambda x: np.asarray(values @ x, np.float32)
    (tag, _, data), *_ = STACK.parts(section.data)
    base = np.ascontiguousarray(decoded(bench, {name: Section(tag, data)})[0], np.float32)
    path, amount = setting
    return SIDE[path](base, values - base, amount)


def _columns(base: Array, change: Array, amount: Any) -> Product:
    index = amount.index
    part = np.ascontiguousarray(change[:, index])
    return lambda x: np.asarray(base @ x + part @ x[index], np.float32)


def _rows(base: Array, change: Array, amount: Any) -> Product:
    index = amount.index
    part = np.ascontiguousarray(change[index])

    def multiply(x: Array) -> Array:
        y: Array = base @ x
        y[index] += part @ x
        return y

    return multiply


def _channels(base: Array, change: Array, amount: Any) -> Product:
    if amount.mode != BOTH:
        return (_columns if amount.mode == COLUMNS else _rows)(base, change, amount)
    index, rest = amount.index, change.copy()
    rest[:, index] = 0
    along, part = _columns(base, change, amount), np.ascontiguousarray(rest[index])

    def multiply(x: Array) -> Array:
        y = along(x)
        y[index] += part @ x
        return y

    return multiply


def _outliers(base: Array, change: Array, amount: Any) -> Product:
    del amount
    row, column = np.nonzero(change)
    values, count = change[row, column], len(base)
    return lambda x: np.asarray(base @ x + np.bincount(row, values * x[column], count), np.float32)


def _lowrank(base: Array, change: Array, amount: Any) -> Product:
    del amount
    u, s, v = np.linalg.svd(change, full_matrices=False)
    rank = max(1, int((s > 1e-4 * s[0]).sum()))
    left, right = np.ascontiguousarray(u[:, :rank] * s[:rank]), np.ascontiguousarray(v[:rank])
    return lambda x: np.asarray(base @ x + left @ (right @ x), np.float32)


def _groups(base: Array, change: Array, amount: Any) -> Product:
    del change
    size, (rows, cols) = amount.size, base.shape
    count = -(-cols // size)
    padded = np.zeros((rows, count * size), np.float32)
    padded[:, :cols] = base
    parts = np.ascontiguousarray(padded.reshape(rows, count, size).transpose(1, 0, 2))  # (groups, rows, size)
    scales = np.ones((count, rows), np.float32)  # values do not matter for the time

    def multiply(x: Array) -> Array:
        inputs = np.zeros(count * size, np.float32)
        inputs[:cols] = x
        found: Array = ((parts @ inputs.reshape(count, size, 1))[:, :, 0] * scales).sum(0)
        return found

    return multiply


SIDE = {"columns": _columns, "rows": _rows, "channels": _channels, "outliers": _outliers, "lowrank": _lowrank,
         "groups": _groups}  # fmt: skip
MEASURES = {"timing": timing}
