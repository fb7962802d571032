import zlib

import numpy as np
import pytest
import torch

from bytecap.errors import BudgetError
from bytecap.format.coders import Shared, coder, run
from bytecap.methods.baselines.uniform import round_rows, tolerance, uniform
from bytecap.types import Unit

pytestmark = pytest.mark.numeric


def model(seed=0, width=64, rows=300):
    rng = torch.Generator().manual_seed(seed)
    units = (
        Unit("embed", (rows, width), "F32", ("head",), linear=True),
        Unit("norm", (width,), "F32"),
        Unit("up", (3 * width, width), "F32", linear=True),
        Unit("down", (3 * width, width), "F32", transposed=True, linear=True),
        Unit("mix", (2, width), "F32"),
        Unit("odd", (width, 1), "F32", linear=True),
    )
    weights = {u.name: torch.randn(u.matrix_shape, generator=rng) * 0.05 for u in units}
    weights["up"][3, 4] = 4.0  # outliers must not break anything
    weights["down"][5] = 0.0
    return units, weights


def used(sections):
    return sum(len(s.data) for s in sections.values())


def decoded(units, sections):
    parts = [
        coder(sections[u.name].tag).decode(sections[u.name].data, u.matrix_shape, u.dtype, Shared()) for u in units
    ]
    return {u.name: torch.from_numpy(np.array(w)) for u, w in zip(units, run(parts), strict=True)}


@pytest.mark.parametrize("bits", [2.5, 3.3, 5.2])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_budget_is_met_and_used(bits, seed):
    units, weights = model(seed)
    capacity = int(bits * sum(u.parameters for u in units) / 8)
    sections = uniform(units, weights, capacity)
    assert list(sections) == [u.name for u in units]
    assert capacity - tolerance(capacity) <= used(sections) <= capacity
    found = decoded(units, sections)
    for u in units:
        assert found[u.name].shape == u.matrix_shape
        assert torch.isfinite(found[u.name]).all()
    assert torch.equal(found["norm"], weights["norm"])  # vectors and small unknown tensors are exact
    assert torch.equal(found["mix"], weights["mix"])


def test_it_is_round_to_nearest_with_at_most_two_neighbouring_level_counts():
    units, weights = model()
    found = decoded(units, uniform(units, weights, 18_000))
    levels = set()
    for name in ("embed", "up", "down"):
        peak = weights[name].abs().amax(1)
        count = torch.arange(1, 128)[:, None]
        step = (peak / count).half().float()[:, :, None]  # (levels, rows, 1)
        whole = torch.round(weights[name] / step.clamp(min=1e-30)).clamp(-count[:, :, None], count[:, :, None])
        same = (whole * step == found[name]).all(dim=2)[:, peak > 0]
        assert same.any(dim=0).all()  # every row is round to nearest at some number of levels
        levels |= set((same.int().argmax(dim=0) + 1).tolist())
    assert len(levels) <= 2
    assert max(levels) - min(levels) <= 1


def test_more_bytes_mean_less_error():
    units, weights = model()
    errors = []
    for capacity in (12_000, 18_000, 26_000):
        found = decoded(units, uniform(units, weights, capacity))
        errors.append(sum(float((found[n] - weights[n]).square().sum()) for n in weights))
    assert errors == sorted(errors, reverse=True)


def test_a_generous_budget_gives_eight_bits_and_leaves_the_rest():
    units, weights = model()
    sections = uniform(units, weights, 10**6)
    raw = zlib.compress(round_rows(weights["embed"].numpy(), 127).codes.T.tobytes(), 9)
    assert sections["embed"].data.endswith(raw)
    assert sections["embed"].data[:2] == bytes([0, 1])


def test_a_hopeless_budget_names_its_floor():
    units, weights = model()
    with pytest.raises(BudgetError) as caught:
        uniform(units, weights, 500)
    floor = caught.value.floor
    assert used(uniform(units, weights, floor)) <= floor
    with pytest.raises(BudgetError):
        uniform(units, weights, floor - 1)


def test_progress_is_told_and_vectors_alone_work():
    ticks = []
    units, weights = model()
    uniform(units, weights, 20_000, ticks.append)
    assert sum(ticks) == 1
    assert len(ticks) > 2
    only = {"norm": weights["norm"]}
    assert list(uniform(units[1:2], only, 10_000)) == ["norm"]


@pytest.mark.parametrize("levels", [1, 7, 127])
def test_extreme_rows(levels):
    weight = np.array([[0, 0, 0], [1e-9, -1e-9, 0], [1e6, -3e7, 5], [3e-8, 1, -1]], np.float32)
    matrix = round_rows(weight, levels)
    assert np.isfinite(matrix.scales).all()
    assert np.abs(matrix.codes.astype(int)).max() <= levels
    assert not matrix.codes[0].any()
