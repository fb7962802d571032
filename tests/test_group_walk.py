"""A walk behind the coding of a group: what is coded later makes up for it, and nothing else moves."""

import pytest
import torch

from bytecap.allocation import asymmetric_targets
from bytecap.allocation.asymmetric_targets import order_of
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.forward import batches
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.sources import load_sets
from bytecap.progress import Silent
from bytecap.recovery.group_walk import GroupWalk

STEP = 0.25  # in mean sizes of a matrix


class Units:
    """Matrices that are rounded to a coarse grid each, without feedback."""

    def __init__(self, model, units, moves=True):
        self.weights = {u.name: model.tensor(u).detach().float().clone() for u in units}
        self.own = {n: w.clone() for n, w in self.weights.items()}
        self.coded, self.moves, self.calls = [], moves, []

    def waits(self, name):
        return name in self.weights and name not in self.coded

    def trial(self, name):
        return self.weights[name], torch.ones(len(self.weights[name]))

    def times(self, name, matrix):
        return self.weights[name] @ matrix

    def round(self, names, changes):
        self.calls.append(("round", tuple(names)))
        for n in names:
            w = self.weights[n] + (changes.get(n, 0.0) if self.moves else 0.0)
            step = STEP * w.abs().mean()
            self.weights[n] = (w / step).round() * step
        self.coded += names
        return {n: self.weights[n] for n in names if n in self.own}

    def move(self, changes):
        if changes:
            self.calls.append(("move", tuple(changes)))
        for n, change in changes.items() if self.moves else ():
            self.weights[n] = self.weights[n] + change
        return {n: self.weights[n] for n in changes}


@pytest.fixture(scope="module")
def walked(model_directory, texts):
    """Function: units after the first group was coded, and the model's order, module and tokens."""
    model = load_checkpoint(model_directory("rotary"))
    sets = load_sets(
        model, texts["calib"], texts["val"], tokens=1500, evaluation_tokens=500, window=64, reporter=Silent()
    )
    job = Job(model, sets, 0, lambda *_: 0, "cpu", Silent(), FitConfig(0))
    units = [u for u in model.units if u.linear and "proj" in u.name]
    order = order_of(units, model.module, sets.statistics, "cpu")

    def run(group, others=(), order=order, **changes):
        found = Units(model, units, **changes)
        found.weights |= {n: torch.ones(2, 2) for n in others}
        tuned = copy_of(model.module)
        load_values(tuned, found.own)
        GroupWalk(job, order, strength=1.0, tokens=256).code(tuned, group, found)
        return found, order, model.module, sets.statistics

    return run


def _error(module, weights, windows):
    """Mean squared distance of the logits to the original's."""
    other = copy_of(module)
    load_values(other, weights)
    with torch.no_grad():
        parts = [
            (module(ids[:, :-1]).logits - other(ids[:, :-1]).logits)[mask].square().mean()
            for ids, mask in batches(windows, 512)
        ]
    return float(torch.stack(parts).mean())


def test_later_units_make_up_for_what_a_coding_did(walked):
    _, order, module, windows = walked([])
    group = [n for names in order[:2] for n in names]
    with_walk, without = (_error(module, walked(group, moves=m)[0].weights, windows) for m in (True, False))
    assert with_walk < 0.9 * without


def test_a_group_is_coded_stage_by_stage_and_only_what_comes_next_moves(walked):
    _, order, _, _ = walked([])
    group = [n for names in order[:2] for n in names]
    units, *_ = walked(group)
    kinds = [kind for kind, _ in units.calls]
    assert kinds == sorted(kinds, reverse=True)  # what is coded comes first
    assert [n for kind, names in units.calls if kind == "round" for n in names] == group
    moved = {n for kind, names in units.calls if kind == "move" for n in names}
    assert moved
    assert moved.isdisjoint(group)
    for n, own in units.own.items():
        assert (n in group or n in moved) != bool((units.weights[n] == own).all())


def test_units_without_a_stage_are_coded_before_all_others(walked):
    _, order, _, _ = walked([])
    last = [n for names in order[-1:] for n in names]
    units, *_ = walked(["another", *last], others=["another"])
    assert units.calls[0] == ("round", ("another",))
    assert units.coded == ["another", *last]


def test_stages_between_those_of_a_group_move(walked):
    _, order, module, windows = walked([])
    group = [*order[0], *order[2]]
    units, *_ = walked(group)
    assert units.coded == group
    assert not (units.weights[order[1][0]] == units.own[order[1][0]]).all()
    assert _error(module, units.weights, windows) < _error(module, walked(group, moves=False)[0].weights, windows)


def test_where_calls_come_in_another_order_units_are_coded_without_a_walk(walked):
    _, order, _, _ = walked([])
    group = [n for names in order[:2] for n in names]
    units, *_ = walked(group, order=order[::-1])
    assert sorted(units.coded) == sorted(group)
    assert not any(kind == "move" for kind, _ in units.calls[1:])


def test_targets_move_once_where_a_walk_takes_rounds(walked, monkeypatch):
    _, order, _, _ = walked([])
    monkeypatch.setattr(asymmetric_targets, "_chain_of", lambda *_: None)
    monkeypatch.setattr(asymmetric_targets, "ROUND_TOKENS", {"cpu": 300})  # of 1,500
    units, *_ = walked(order[0])
    calls = [n for _, names in units.calls for n in names]
    assert len(calls) == len(set(calls)) > len(order[0])
