"""Overlays on synthetic matrices with a few loud input channels, over coarse bases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_parts
from bytecap.format import container
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.decoder import decode_units
from bytecap.quantization.overlays import UnitProblem, groups, lowrank, overlays
from bytecap.quantization.overlays.protect import (
    absorbed,
    nearest,
    row_scores,
    scores,
    store,
    without_columns,
    without_rows,
)
from bytecap.types import Unit

LOUD = (5, 21)


def problem(seed=0, rows=48, cols=32, *, loud=LOUD):
    """Inputs that hang together, some channels thirty times as loud, rows of different importance."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(cols, dtype=torch.float64) + 0.15 * torch.randn(cols, cols, generator=g, dtype=torch.float64)
    inputs = torch.randn(4 * cols, cols, generator=g, dtype=torch.float64) @ mix
    inputs[:, list(loud)] *= 30
    hessian = inputs.T @ inputs / len(inputs)
    hessian = (hessian + hessian.T) / 2
    hessian += 1e-3 * hessian.diagonal().median() * torch.eye(cols, dtype=torch.float64)
    importance = torch.rand(rows, generator=g, dtype=torch.float64) + 0.1
    weight = torch.randn(rows, cols, generator=g) * torch.exp(0.5 * torch.randn(rows, 1, generator=g))
    return UnitProblem(Unit("a", (rows, cols), "F32"), weight, hessian, importance / importance.mean())


def feedback_base(changed, levels=8.0):
    """A coarse base with error feedback under the Hessian it is given: one step per row."""
    values = changed.weight.double().clone()
    step = values.abs().amax(1).clamp_min(1e-30) / levels
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(changed.hessian)), upper=True)
    for j in range(values.shape[1]):
        rounded = (values[:, j] / step).round() * step
        values[:, j + 1 :] -= torch.outer((values[:, j] - rounded) / upper[j, j], upper[j, j + 1 :])
        values[:, j] = rounded
    return values.float()


def all_settings():
    for name, path in sorted(overlays().items()):
        square = problem(rows=32)
        for setting in path.settings(square):
            yield pytest.param(name, setting, id=f"{name}-{setting}")


@pytest.mark.parametrize(("name", "setting"), list(all_settings()))
def test_every_setting_of_every_path(name, setting):
    given_problem, path = problem(rows=32), overlays()[name]
    changed = path.before(given_problem, setting)
    assert float(torch.linalg.eigvalsh(changed.hessian).min()) > 0
    assert torch.equal(changed.hessian, changed.hessian.T)
    assert float(changed.rows.mean()) == pytest.approx(1)
    assert changed.weight.dtype == torch.float32
    base = feedback_base(changed)
    found = path.after(given_problem, base, setting)
    section = STACK.encode((3, EXACT.encode(base.numpy(), "F32")), [(found.tag, found.data)])
    file = golden_parts.pack(golden_parts.unit("a", (32, 32), 5, section))
    assert decode_units(container.parse(file))["a"].tobytes() == found.values.numpy().tobytes()
    assert 0 < found.side < len(found.data)
    assert 0 < found.share <= 1
    assert given_problem.distortion(found.values) < given_problem.distortion(base)


@pytest.mark.parametrize("name", sorted(overlays()))
def test_ladders_rise_in_bytes_and_fall_in_distortion(name):
    given_problem, path = problem(rows=32), overlays()[name]
    base = nearest(given_problem.weight)
    found = [path.after(given_problem, base, s) for s in path.settings(given_problem)]
    assert len(found) >= 2
    assert len(found[0].data) == min(len(f.data) for f in found)
    assert given_problem.distortion(found[-1].values) < given_problem.distortion(found[0].values)


def test_square_matrices_alone_have_channels():
    assert overlays()["channels"].settings(problem(rows=48)) == []


# ------------------------------------------------------------------------------------------------------ protecting


def test_a_measured_score_is_what_protection_gains():
    p = problem(1)
    base = nearest(p.weight)
    before = p.distortion(base)
    column, row = scores(p, base).sum(0), row_scores(p, base)
    for name, worth in (("columns", column), ("rows", row)):
        setting = next(s for s in overlays()[name].settings(p, base) if (s.count, s.bits) == (1, 16))
        gain = before - p.distortion(overlays()[name].after(p, base, setting).values)
        assert setting.index.tolist() == [int(worth.argmax())]
        assert gain == pytest.approx(float(worth.max()), rel=1e-3)


def test_the_score_of_the_paper():
    p = problem(2)
    base = nearest(p.weight)
    error = (base - p.weight).double()
    wanted = [float(p.hessian[j, j] * (p.rows * error[:, j] ** 2).sum() / 2) for j in range(32)]
    np.testing.assert_allclose(scores(p, base, "owq").sum(0), wanted, rtol=1e-12)
    diagonal = UnitProblem(p.unit, p.weight, torch.diag(p.hessian.diagonal()), p.rows)
    torch.testing.assert_close(scores(diagonal, base, "owq"), scores(diagonal, base))


def test_both_scores_find_the_loud_columns():
    p = problem(3)
    for score in ("measured", "owq"):
        two = next(s for s in overlays()["columns"].settings(p, score=score) if s.count == 2)
        assert tuple(two.index) == LOUD


def test_two_protected_columns_save_a_coarse_base():
    p, path = problem(4), overlays()["columns"]
    setting = next(s for s in path.settings(p) if (s.count, s.bits) == (2, 16))
    plain = p.distortion(feedback_base(p))
    after = path.after(p, feedback_base(path.before(p, setting)), setting)
    assert p.distortion(after.values) < plain / 3


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_protected_columns_absorb_what_the_schur_complement_promises(seed, count):
    p = problem(seed, rows=8, cols=16, loud=(3,))
    index = np.sort(np.random.default_rng(seed).permutation(16)[:count])
    changed = without_columns(p, index)
    base = feedback_base(changed)
    best = base.double().clone()
    best[:, torch.from_numpy(index)] = absorbed(p, base, index).T
    kept = base.double().clone()
    kept[:, torch.from_numpy(index)] = p.weight[:, torch.from_numpy(index)].double()
    assert p.distortion(best) <= p.distortion(kept) * (1 + 1e-9)
    assert p.distortion(best) == pytest.approx(changed.distortion(base), rel=1e-6)
    gap = p.hessian - changed.hessian  # the promise is never dearer than the metric itself
    chosen = np.setdiff1d(np.arange(16), index)
    assert float(torch.linalg.eigvalsh(gap[chosen][:, chosen]).min()) > -1e-9 * float(p.hessian.diagonal().max())


def test_knowing_what_will_be_absorbed_helps_the_base():
    path, with_schur, without = overlays()["columns"], 0.0, 0.0
    for seed in range(8):
        p = problem(seed)
        setting = next(s for s in path.settings(p) if (s.count, s.bits) == (4, 16))
        changed = path.before(p, setting)
        with_schur += p.distortion(path.after(p, feedback_base(changed), setting).values)
        plain = UnitProblem(p.unit, changed.weight, p.hessian, p.rows)
        without += p.distortion(path.after(p, feedback_base(plain), setting).values)
    assert with_schur < without


def test_feedback_among_protected_values_pays():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 6, generator=g, dtype=torch.float64)
    metric, wanted = mix.T @ mix, torch.randn(6, 500, generator=g, dtype=torch.float64)
    cost = []
    for fed in (metric, None):
        kept = store(wanted, 8, fed)
        error = torch.from_numpy(kept.values * kept.scales[:, None].astype(np.float64)) - wanted
        cost.append(float(torch.trace(error.T @ metric @ error)))
    assert cost[0] < 0.9 * cost[1]


def test_protected_rows_leave_the_other_rows_costs_alone():
    p = problem(6)
    changed = without_rows(p, np.array([0, 7]))
    values = p.weight + torch.randn(p.weight.shape, generator=torch.Generator().manual_seed(1))
    values[[0, 7]] = p.weight[[0, 7]]
    other = values.clone()
    other[[0, 7]] = 0
    assert changed.distortion(other) == pytest.approx(p.distortion(values), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e6])
@pytest.mark.parametrize("name", sorted(overlays()))
def test_extreme_weights(name, value):
    shape = (32, 32)
    weight = torch.full(shape, value)
    p = UnitProblem(
        Unit("a", shape, "F32"), weight, torch.eye(32, dtype=torch.float64), torch.ones(32, dtype=torch.float64)
    )
    path = overlays()[name]
    for setting in path.settings(p):
        found = path.after(p, nearest(path.before(p, setting).weight), setting)
        assert bool(torch.isfinite(found.values).all())


# ------------------------------------------------------------------------------------------- low rank and groups


def test_the_weighted_decomposition_is_best_in_the_metric():
    p = problem(7)
    base = nearest(p.weight)
    for rank in (1, 2, 4, 8):
        cost = [
            p.distortion(base + left @ right)
            for left, right in (lowrank.factors(p, base, rank, weighted=w) for w in (True, False))
        ]
        assert cost[0] < cost[1]
        stored = lowrank.OVERLAY.after(p, base, lowrank.Rank(rank, 8))
        assert p.distortion(stored.values) < 1.05 * cost[0]


def test_full_rank_leaves_nothing():
    p = problem(8, rows=12, cols=24)
    base = nearest(p.weight)
    left, right = lowrank.factors(p, base, 12)
    assert p.distortion(base + left @ right) < 1e-12 * p.distortion(base)


def test_directions_of_a_large_matrix():
    g = torch.Generator().manual_seed(1)
    matrix = torch.randn(1100, 5, generator=g, dtype=torch.float64) @ torch.randn(
        5, 1050, generator=g, dtype=torch.float64
    )
    left, values, right = lowrank.directions(matrix, 5)
    torch.testing.assert_close(left * values @ right, matrix)


def test_a_base_of_wrong_scales_is_put_right():
    p = problem(9)
    wrong = p.weight * torch.tensor([2.0, 0.25]).repeat_interleave(16)
    for bits, most in ((16, 1e-6), (8, 1e-12)):  # powers of two are sixteenths
        found = groups.OVERLAY.after(p, wrong, groups.Grouping(16, bits, divide=False))
        assert p.distortion(found.values) < most * p.distortion(wrong)


@pytest.mark.slow
@given(st.integers(0, 10**6), st.sampled_from([8, 16]), st.booleans(), st.sampled_from([5, 8, 16]))
def test_refitted_scales_never_lose(seed, bits, divide, size):
    p = problem(seed, rows=6, cols=24, loud=())
    setting = groups.Grouping(size, bits, divide)
    base = nearest(groups.OVERLAY.before(p, setting).weight)
    found = groups.OVERLAY.after(p, base, setting)
    asked = groups.wanted(p, setting).repeat_interleave(size, 1)[:, :24]
    assert p.distortion(found.values) <= p.distortion(base * asked) * (1 + 1e-6)


def test_metric_of_divided_weights_is_exact_for_products():
    p = problem(10)
    row = 2.0 ** torch.arange(48, dtype=torch.float64).remainder(3)
    column = 2.0 ** torch.tensor([0.0, 2.0], dtype=torch.float64)
    sign = torch.where(p.weight > 0, 1.0, -1.0)
    weight = (sign * row[:, None] * column.repeat_interleave(16)).float()
    q = UnitProblem(p.unit, weight, p.hessian, p.rows)
    setting = groups.Grouping(16, 16, divide=True)
    changed = groups.OVERLAY.before(q, setting)
    base = changed.weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    values = base * groups.wanted(q, setting).repeat_interleave(16, 1)
    assert changed.distortion(base) == pytest.approx(q.distortion(values), rel=1e-3)
