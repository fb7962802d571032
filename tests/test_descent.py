"""Rounding by descent: what it says it costs, that it beats error feedback at few bits, and which units take it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecap.allocation.decoded import decode_grid
from bytecap.allocation.differences import over
from bytecap.calibration.metric import Metric
from bytecap.format.coders.classes import CLASSES
from bytecap.format.entropy.shared_tables import fit_shared
from bytecap.quantization.descent import descend, square
from bytecap.quantization.options import Options
from bytecap.quantization.quantizer import prepare, rate, round_units
from bytecap.quantization.rules import initial_rules
from bytecap.types import Unit

ROWS, COLS = 128, 64
OPTIONS = Options(damping=0.0, trellis=False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(size, decay):
    """Hessian (size, size) of inputs of which neighbours are alike."""
    apart = (torch.arange(size)[:, None] - torch.arange(size)).abs().double()
    return decay**apart


def difference(rows=ROWS, cols=COLS, seed=0):
    """A unit whose difference is what rounding leaves: white in the coordinates of error feedback."""
    hessian = correlated(cols, 0.9)
    lower = torch.linalg.cholesky(hessian).float()
    weight = torch.linalg.solve_triangular(lower, random(rows, cols, seed=seed).T, upper=False).T
    unit = Unit("w", (rows, cols), "F32", linear=True)
    energy = 0.5 + torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain = prepare(unit, weight, Metric(hessian, energy), OPTIONS)
    return over(plain, np.zeros((rows, cols), np.float32)), hessian


def settled(item, step, *, descent):
    """The unit rounded under tables and centroids that were fitted to it, and those."""
    rules = initial_rules(OPTIONS, descent=descent)
    for _ in range(4):
        prices = rules.shared if descent else None
        coded, centres = round_units([item], {"w": step}, rules.shrink, OPTIONS, shared=prices)
        shared = fit_shared(coded["w"].counts.sum(0), centres, rules.shared)
        rules = replace(rules, shared=shared).with_offsets(shared.offset)
    coded, _ = round_units([item], {"w": step}, rules.shrink, OPTIONS, shared=rules.shared if descent else None)
    return coded["w"], rules.shared


def curve(item, steps, *, descent):
    """(bits a weight, distortion) at every step."""
    found = [settled(item, step, descent=descent) for step in steps]
    return [(8 * rate(coded, shared) / (ROWS * COLS), coded.distortion) for coded, shared in found]


def test_it_costs_what_it_says():
    item, hessian = difference()
    coded, shared = settled(item, 4.0, descent=True)
    assert coded.code.first == CLASSES
    assert 0 < np.count_nonzero(coded.code.symbols) < ROWS * COLS / 5
    error = (item.weight - torch.from_numpy(decode_grid(coded.code, shared))).double()
    cost = float(((error @ hessian) * error).sum(1) @ item.rows.double()) / 2
    assert coded.distortion == pytest.approx(cost, rel=1e-4)


def test_at_few_bits_it_beats_feedback():
    item, _ = difference()
    more, few = (curve(item, [2.0 ** (k / 4) for k in range(3, 12, 2)], descent=d) for d in (False, True))
    bits, cost = zip(*sorted(more), strict=True)
    at = [(d, np.interp(b, bits, cost)) for b, d in few if 0.1 < b < 0.5]
    assert len(at) >= 2
    assert all(d < 0.97 * other for d, other in at), at


def test_units_of_many_bits_are_left_to_feedback():
    item, _ = difference()
    rules = initial_rules(OPTIONS, descent=True)
    assert item.sparse(4.0, rules.shrink, rules.shared) is not None
    assert item.sparse(0.05, rules.shrink, rules.shared) is None
    assert replace(item, descent=False).sparse(4.0, rules.shrink, rules.shared) is None


def test_batches_hold_both_kinds_in_the_order_of_the_units():
    items = [replace(difference(seed=k)[0], unit=Unit(f"w{k}", (ROWS, COLS), "F32", linear=True)) for k in range(3)]
    rules = initial_rules(OPTIONS, descent=True)
    steps = {"w0": 4.0, "w1": 0.05, "w2": 6.0}
    together, centres = round_units(items, steps, rules.shrink, OPTIONS, shared=rules.shared)
    apart = [round_units([i], steps, rules.shrink, OPTIONS, shared=rules.shared) for i in items]
    assert list(together) == ["w0", "w1", "w2"]
    for name, (alone, _) in zip(together, apart, strict=True):
        assert together[name].code.step == alone[name].code.step
        np.testing.assert_array_equal(together[name].code.symbols, alone[name].code.symbols)
    np.testing.assert_allclose(centres, sum(c for _, c in apart))


@given(st.integers(1, 400), st.integers(0, 9))
@settings(max_examples=8, deadline=None)
def test_a_factor_times_itself(size, seed):
    lower = random(size, size, seed=seed).tril()
    torch.testing.assert_close(square(lower), lower @ lower.T, rtol=1e-4, atol=1e-3)


def test_nothing_is_left_of_a_difference_that_buys_nothing():
    item, _ = difference()
    rules = initial_rules(OPTIONS, descent=True)
    coded = item.complete(item.sparse(1e3, rules.shrink, rules.shared)[0], rules.shared)
    assert coded.as_in_base
    assert rate(coded, rules.shared) == 0


def test_weights_far_beyond_the_steps_do_not_overflow():
    rules = initial_rules(OPTIONS, descent=True)
    weight = torch.full((2, 3), 1e5)
    found = descend(weight, torch.eye(3), torch.ones(2), 1.0, rules.shrink, rules.shared)
    assert ((found.symbols > 30_000) & (found.symbols < 2**15)).all()
