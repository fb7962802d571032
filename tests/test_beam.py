"""Several ways to round a row side by side: against all ways tried one by one, and against one way alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from bytecap.runtimes.blocks import beam, device_beam
from bytecap.runtimes.blocks.code_search import search_of
from bytecap.runtimes.blocks.encode import _FLOATS, _tables, encode, prepare
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.blocks.search import LANES
from bytecap.runtimes.directory import family
from test_blocks import loss, weights

COLS, SUB, SCALES = 6, 3, np.array([0.7, 1.3], np.float32)
STEPS = np.repeat(SCALES, SUB)


@dataclass(frozen=True)
class Row:
    """A row of weights under a Cholesky factor, and the levels that its codes may have."""

    w: np.ndarray
    lower: np.ndarray
    levels: Sequence[int]

    @property
    def push(self) -> np.ndarray:
        """Shares of a column's error that are fed to the columns in front of it."""
        return np.ascontiguousarray(self.lower / self.lower.diagonal(), np.float32)

    def lost(self, levels: Sequence[float]) -> float:
        return float((((self.w - STEPS * np.asarray(levels)) @ self.lower) ** 2).sum())

    def ways(self, behind: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
        """Every way to take a level on one side or the other of what feedback asks for."""
        at = COLS - 1 - len(behind)
        if at < 0:
            yield behind
            return
        errors = self.w[at + 1 :] - STEPS[at + 1 :] * np.array(behind)
        t = (self.w[at] + self.push[at + 1 :, at] @ errors) / STEPS[at]
        for level in [p for p in self.levels if p <= t][-1:] + [p for p in self.levels if p > t][:1]:
            yield from self.ways((level, *behind))

    def found(self, width: int, table: np.ndarray) -> np.ndarray:
        """Levels by the program under test."""
        room = [np.empty((width, COLS), np.float32) for _ in range(2)]
        room += [np.empty(width, np.float32) for _ in range(2)]
        back = np.empty((COLS, width), np.int32), np.empty((COLS, width), np.float32)
        ends, found = (np.float32(self.levels[0]), np.float32(self.levels[-1])), np.empty(COLS, np.float32)
        own = (self.lower.diagonal() ** 2).astype(np.float32)
        levels = *ends, table, beam.neighbours(*ends, table)
        beam.row(
            self.w, self.w, self.push, own, *levels, SCALES, np.zeros(2, np.float32), 0, SUB, *room, *back, found
        )  # fmt: skip
        return found


@pytest.mark.parametrize("levels", [(), (-8, -5, -3, -2, 0, 1, 4, 7)])
def test_as_many_ways_as_there_are_find_the_best(levels: tuple[int, ...]) -> None:
    rng, gained = np.random.default_rng(3), 0
    form = replace(FORMATS["Q4_0"], low=-8, high=7, levels=levels)
    for _ in range(20):
        lower = np.tril(rng.normal(0, 0.5, (COLS, COLS)), -1) + np.diag(rng.uniform(0.5, 2, COLS))
        row = Row(rng.normal(0, 3, COLS).astype(np.float32), lower, levels or tuple(range(-8, 8)))
        best = min(map(row.lost, row.ways()))
        assert row.lost(row.found(2**COLS, _tables(form)[0])) == pytest.approx(best, rel=1e-4)
        gained += row.lost(row.found(1, _tables(form)[0])) > 1.001 * best
    assert gained > 5  # one way alone often misses it


def test_the_levels_next_to_one() -> None:
    form = FORMATS["IQ4_NL"]
    found = beam.neighbours(np.float32(form.low), np.float32(form.high), _tables(form)[0])
    lower, upper = ([found[side][int(x) - form.low] for x in form.levels] for side in (0, 1))
    assert lower == [form.levels[0], *form.levels[:-1]]
    assert upper == [*form.levels[1:], form.levels[-1]]


def correlated(cols: int) -> torch.Tensor:
    """A Hessian of columns that can make up for each other."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * cols, cols)) @ (np.eye(cols) + rng.standard_normal((cols, cols)) / np.sqrt(cols))
    return torch.from_numpy(x.T @ x / len(x))


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "IQ4_XS", "Q6_K"])
def test_several_ways_pay(name: str) -> None:
    h, weight = correlated(512), weights(64, 512)
    one, many = (loss(encode(weight, prepare(h), FORMATS[name], sweeps=0, width=n), weight, h) for n in (1, 8))
    assert many < 0.98 * one


def test_a_tile_that_does_not_divide_the_block() -> None:
    layout = family("compressed-tensors").layout("w4c", 320, "BF16")
    assert layout is not None
    assert layout.block % beam.TILE
    h, weight = correlated(320), weights(64, 320)
    one, many = (loss(encode(weight, prepare(h), layout, width=n), weight, h) for n in (1, 8))
    assert many < one


def test_scales_of_zero_have_codes_of_zero() -> None:
    weight = weights(3, 256)
    weight[1] = 0
    assert not encode(weight, prepare(correlated(256)), FORMATS["Q6_K"]).codes[1].any()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cols"), [("IQ4_XS", 256), ("Q4_K", 256), ("Q6_K", 256), ("Q4_1", 32), ("w4c", 320)])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_torch_takes_the_same_ways(name: str, cols: int, width: int) -> None:
    layout = FORMATS.get(name) or family("compressed-tensors").layout(name, cols, "BF16")
    assert layout is not None
    forms = [prepare(correlated(2 * cols)), prepare(correlated(2 * cols) + torch.diag(torch.linspace(0, 1, 2 * cols)))]
    rng, per = np.random.default_rng(5), cols // layout.sub
    low, high, table = np.float32(layout.low), np.float32(layout.high), _tables(layout)[0]
    weight, fed_back = (rng.standard_normal((2, cols, LANES)).astype(np.float32) for _ in range(2))
    scale = (6 / (high - low) * rng.uniform(0.5, 1, (2, per, LANES))).astype(np.float32)
    scale[:, :, 3] = 0
    minimum = (rng.uniform(0, 3, scale.shape) * (layout.minimums > 0)).astype(np.float32)
    wanted, first, lost = [], cols, np.empty(LANES, np.float32)
    for at, form in enumerate(forms):  # the block in front, as if the one behind it had fed back
        q, error = (np.zeros((2 * cols, LANES), np.float32) for _ in range(2))
        w = np.concatenate([np.zeros_like(weight[at]), weight[at]])
        y = weight[at] + 0.1 * fed_back[at]
        beam.beam_block(
            w, first, cols, y, form.fed, form.weight, layout.sub, low, high, table, scale[at], minimum[at], q, error,
            width, lost,
        )  # fmt: skip
        wanted.append((q[first:], error[first:], lost.copy()))
    fed = np.stack([f.fed[first:, first:] for f in forms])
    own = np.stack([f.weight[first:] for f in forms])
    given = (torch.from_numpy(t) for t in (weight + np.float32(0.1) * fed_back, weight, scale, minimum, fed, own))
    levels = device_beam.Levels.of(layout, table, torch.device("cpu"))
    codes, errors, costs = (t.numpy() for t in device_beam.round_block(*given, levels, width))
    q, error, wanted_costs = (np.stack(t) for t in zip(*wanted, strict=True))
    same = (codes == q).all(1)  # whole rows, but where two ways are equally good
    assert same.mean() > 0.95
    assert np.abs(errors - error).max(1)[same].max() < 1e-4
    assert np.allclose(costs[same], wanted_costs[same], rtol=1e-3)
    assert not codes[:, :, 3].any() or len(table)


@pytest.mark.parametrize("name", ["w4c", "w4g128", "w4g128a", "w3g64"])
def test_scales_are_tried(name: str) -> None:
    """A longer search of layouts whose columns share one scale, and of no others."""
    layout = family("mlx" if name == "w3g64" else "compressed-tensors").layout(name, 256, "BF16")
    assert layout is not None
    h, weight = correlated(256), weights(64, 256)
    short, long = (
        loss(encode(weight, prepare(h), layout, **search_of(layout, thorough=t)._asdict()), weight, h)
        for t in (False, True)
    )
    assert long < 0.99 * short
    assert search_of(FORMATS["Q4_K"], thorough=True) == search_of(FORMATS["Q4_K"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4g128", "w4g128a", "w3g64"])
def test_torch_takes_the_same_scales(name: str) -> None:
    layout = family("mlx" if name == "w3g64" else "compressed-tensors").layout(name, 256, "BF16")
    assert layout is not None
    block, zero, rng = layout.block, layout.minimums > 1, np.random.default_rng(6)
    form, table = prepare(correlated(block)), _tables(layout)[0]
    low, high, trials = np.float32(layout.low), np.float32(layout.high), np.array([1, 0.9, 1.1], np.float32)
    weight = rng.standard_normal((block, LANES)).astype(np.float32)
    scale = torch.from_numpy(6 / (high - low) * rng.uniform(0.6, 1.3, LANES)).bfloat16().float().numpy()
    ls, m = np.ones((1, LANES), np.float32), np.full((1, LANES), np.rint(high / 2) if zero else 1, np.float32)
    minimum = scale.copy() if zero else np.full(LANES, 3 * (layout.minimums > 0), np.float32)
    d, dm, spare = scale.copy(), minimum.copy(), np.empty((2, block, LANES), np.float32)
    q, error = np.zeros_like(weight), np.zeros_like(weight)
    beam.best_block(
        weight, 0, weight.copy(), form.fed, form.weight, layout.sub, low, high, table, (1.0, *_FLOATS["BF16"]), zero,
        trials, d, dm, ls, m, q, error, 4, spare,
    )  # fmt: skip
    w, tried = torch.from_numpy(weight)[None], torch.from_numpy(scale * trials[:, None]).bfloat16().float()[None]
    codes, errors, found = (
        t[0].numpy() for t in device_beam.best_block(
            w, w, tried, None if zero else torch.from_numpy(minimum)[None],
            (torch.from_numpy(ls)[None], torch.from_numpy(m)[None]), torch.from_numpy(form.fed)[None],
            torch.from_numpy(form.weight)[None], device_beam.Levels.of(layout, table, torch.device("cpu")), 4,
        )
    )  # fmt: skip
    same = (codes == q).all(0)
    assert same.mean() > 0.95
    assert np.array_equal(found[same], d[same])
    assert np.abs(errors - error)[:, same].max() < 1e-4
    assert len({*np.round(d / scale, 1)}) > 1
    assert not zero or np.array_equal(d, dm)
