"""The loop of all tuning: the best check is kept, and what diverges ends early, whatever is tuned."""

import math

import pytest
import torch

from bytecap.job.effort import Effort
from bytecap.recovery import loop
from bytecap.recovery.loop import Clock, Schedule

EACH = Schedule(warming=2, checks=100, apart=1, what="things")  # a check after every iteration


def run(checks, *, schedule=EACH, losses=None, start=1.0, keepable=lambda _: True, steps=None):
    """The result of a loop whose checks find these, and what it saw."""
    rates, notes, found = [], [], []
    clock = Clock(Effort(steps=steps or len(checks)), lambda _: None)

    def iterate(rate):
        rates.append(rate)
        return 1.0 if losses is None else losses[len(rates) - 1]

    def check():
        found.append(clock.iterations)
        number = len(found)
        return checks[number - 1], number if keepable(number) else None

    return *loop.tune(iterate, check, clock, schedule, start, notes.append), rates, found, notes


def test_the_best_check_is_kept():
    best, kept, _, found, notes = run([0.9, 0.7, 0.8])
    assert (best, kept, notes) == (0.7, 2, [])
    assert found == [1, 2, 3]


def test_nothing_is_kept_where_no_check_is_below_the_start():
    assert run([1.0, 1.05])[:2] == (1.0, None)


def test_what_may_not_be_kept_is_not_the_best():
    assert run([0.9, 0.5, 0.8], keepable=lambda number: number != 2)[:2] == (0.8, 3)


@pytest.mark.parametrize("bad", [4.0, math.inf, math.nan])
def test_a_kl_far_above_the_start_ends_it(bad):
    best, kept, rates, _, notes = run([0.9, bad, 0.1, 0.1])
    assert (best, kept, len(rates)) == (0.9, 1, 2)
    assert notes == [f"recovery diverges after 2 iterations of things (KL {bad:.4f}): stopped"]


def test_three_checks_in_a_row_that_are_much_worse_than_the_best_end_it():
    assert len(run([0.5, 0.6, 0.6, 0.54, 0.6, 0.6, 0.5, 0.5])[2]) == 8
    best, kept, rates, _, notes = run([0.5, 0.6, 0.6, 0.6, 0.1])
    assert (best, kept, len(rates), len(notes)) == (0.5, 1, 4, 1)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_iteration_without_a_finite_kl_ends_it_unchecked(bad):
    seldom = Schedule(warming=1, checks=1, apart=1)
    best, kept, rates, found, notes = run([0.1], losses=[1.0, bad, 1.0, 1.0], schedule=seldom, steps=4)
    assert (best, kept, len(rates), found) == (1.0, None, 2, [])
    assert notes == ["recovery diverges after 2 iterations of values (KL inf): stopped"]


def test_rates_rise_and_fall_to_the_last():
    assert run([1.0] * 5)[2] == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2])
    last = Schedule(warming=1, checks=1, apart=1, last=0.1)
    assert run([1.0], schedule=last, steps=2)[2] == pytest.approx([1.0, 0.55])


def test_checks_are_apart_and_one_is_at_the_end():
    often = Schedule(warming=1, checks=100, apart=4)
    assert run([1.0] * 3, schedule=often, steps=10)[3] == [4, 8, 10]


def test_rates_are_shares_of_the_first_ones():
    tensors = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": [t], "first": first} for t, first in zip(tensors, (1.0, 0.25), strict=True)]
    optimizer = torch.optim.Adam(groups, lr=0.0)
    loop.set_rates(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.125]


@pytest.mark.parametrize(("effort", "parts"), [("40", 10), ("3", 1), ("1000", 24), ("10s", 24)])
def test_parts_of_an_effort_have_some_iterations_each(effort, parts):
    assert Clock(Effort.parse(effort), lambda _: None).parts(24) == parts


def test_an_optimizer_forgets_what_is_no_longer_tuned():
    tensors = [torch.zeros(3), torch.ones(2)]
    optimizer = torch.optim.Adam([{"params": [t], "first": 1.0} for t in tensors])
    for t in tensors:
        t.grad = torch.ones_like(t)
    optimizer.step()
    loop.keep_only(optimizer, tensors[1:])
    assert [p is tensors[1] for g in optimizer.param_groups for p in g["params"]] == [True]
    assert len(optimizer.state) == 1
    assert tensors[1] in optimizer.state
    before = tensors[0].clone()
    optimizer.step()
    assert torch.equal(tensors[0], before)


def test_adam_moves_tensors_of_one_rate_together_and_each_at_its_own(monkeypatch):
    monkeypatch.setattr(loop, "_TOGETHER", 4)
    tensors = [torch.ones(n, requires_grad=True) for n in (3, 2, 2, 5)]
    optimizer = loop.adam(zip(tensors, (0.1, 0.2, 0.1, 0.1), strict=True))
    held = [[len(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held == [[3], [2], [5], [2]]
    for share, moved in ((None, (0.0, 0.0, 0.0, 0.0)), (0.5, (0.05, 0.1, 0.05, 0.05))):
        for t in tensors:
            t.grad = torch.ones_like(t)
        if share is not None:
            loop.set_rates(optimizer, share)
        optimizer.step()
        for t, step in zip(tensors, moved, strict=True):
            assert torch.allclose(1 - t, torch.full_like(t, step), atol=1e-6)
    assert not [p for group in loop.adam(()).param_groups for p in group["params"]]
