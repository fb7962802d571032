"""Large models meet the cap along the walk for targets, without being rounded for it beforehand."""

import math
from types import SimpleNamespace

import pytest

import bytecap
import ranks
from bytecap.allocation import pacing, preparation
from bytecap.allocation.pacing import Pace
from bytecap.allocation.planner import Planner, State
from bytecap.methods import bytecap as default
from bytecap.methods import rate_control, retargeting
from bytecap.quantization import stored
from bytecap.types import Unit
from conftest import BUDGET, SMALL
from test_ranks import fit_words

WEIGHTS = 100_000
RATE = 30_000.0  # bytes that every unit is expected to take
NAMES = [f"layers.{i}" for i in range(32)]


class Growing:
    """A planner whose units take a given part more than was planned, and 0.15 bytes a weight less an octave-e."""

    def __init__(self, growth, finest=0.0):
        self.growth, self.finest, self.steps = growth, dict.fromkeys(NAMES, finest), {}
        self.matrices = [SimpleNamespace(unit=Unit(n, (WEIGHTS // 100, 100), "F32")) for n in ["table", *NAMES]]

    def round(self, items, steps, _rules):
        self.steps |= {p.unit.name: steps[p.unit.name] for p in items}
        return {
            p.unit.name: RATE * (1 + self.growth) - 0.15 * WEIGHTS * math.log(steps[p.unit.name]) for p in items
        }  # fmt: skip


def walked(planner, capacity, monkeypatch, times=1):
    """Bytes of all units after a walk."""
    monkeypatch.setattr(pacing, "rate", lambda coded, _shared: coded)
    names = ["table", *NAMES]
    state = State(dict.fromkeys(names, 1.0), {}, SimpleNamespace(shared=None), dict.fromkeys(names, RATE), {})
    pace, found = Pace(planner, state, set(NAMES), capacity), {"table": RATE}
    for _ in range(times):
        for i in range(0, len(NAMES), 2):
            found |= pace.round(planner, planner.matrices[1 + i : 3 + i])
    assert pace.steps == {"table": 1.0, **planner.steps}
    return sum(found.values())


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("off", [-0.004, 0.0, 0.004])
@pytest.mark.parametrize("growth", [-0.01, 0.0, 0.01])
def test_a_walk_ends_at_the_capacity(growth, off, times, monkeypatch):
    planned = RATE * (1 + len(NAMES))
    planner = Growing(growth)
    assert walked(planner, planned * (1 + off), monkeypatch, times) == pytest.approx(planned * (1 + off), rel=1e-4)
    assert max(abs(math.log(s)) for s in planner.steps.values()) < 0.06


def test_what_cannot_be_met_moves_no_unit_far(monkeypatch):
    planner = Growing(0.5)
    assert walked(planner, RATE * 33, monkeypatch) > RATE * 33
    assert max(math.log(s) for s in planner.steps.values()) == pytest.approx(0.1)


def test_no_step_is_finer_than_the_finest(monkeypatch):
    planner = Growing(-0.2, finest=0.99)
    walked(planner, RATE * 33, monkeypatch)
    assert set(planner.steps.values()) == {1.0, 0.99}


def test_without_a_capacity_steps_are_those_of_the_plan(monkeypatch):
    planner = Growing(0.3)
    walked(planner, None, monkeypatch)
    assert set(planner.steps.values()) == {1.0}


def counted(monkeypatch):
    """From now on: whole roundings of each unit by name, without those of searches; packings; samples; searches."""
    rounded, packed, sampled, searches = {}, {}, set(), []
    rounding, packing, searching = Planner._rounded, Planner.encode, Planner.search

    def count_rounding(self, items, *rest):
        for n, p in ((p.unit.name, p) for p in items):
            if isinstance(p, stored.Sample | stored.HeldSample):
                sampled.add(n)
            elif not searches or searches[-1] == "over":
                rounded[n] = rounded.get(n, 0) + 1
        return rounding(self, items, *rest)

    def count_searches(self, *args, **options):
        if self.sample is None:  # it is the sample
            return searching(self, *args, **options)
        searches.append("on")
        try:
            return searching(self, *args, **options)
        finally:
            searches[-1] = "over"

    def count_packing(self, state, names=None):
        for n in self.names if names is None else names:
            packed[n] = packed.get(n, 0) + 1
        return packing(self, state, names)

    monkeypatch.setattr(Planner, "_rounded", count_rounding)
    monkeypatch.setattr(Planner, "search", count_searches)
    monkeypatch.setattr(Planner, "encode", count_packing)
    return rounded, packed, sampled, searches


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["1MB", None])
def test_a_large_model_is_not_rounded_for_the_cap(memory, model_directory, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_LARGE", 0)
    monkeypatch.setattr(stored, "_LEAST_ROWS", 16)
    monkeypatch.setattr(retargeting, "near_cap", None)
    monkeypatch.setattr(default, "fit_to_cap", None)
    cost, directory = retargeting._cost, model_directory("rotary", num_hidden_layers=4)
    monkeypatch.setattr(retargeting, "_cost", lambda *args: (cost(*args)[0] / 2, cost(*args)[1]))  # targets are kept
    files = {"calibration": texts["calib"], "evaluation": texts["val"], "memory": memory, **SMALL}
    rounded, packed, sampled, searches = counted(monkeypatch)
    plain = bytecap.fit(directory, BUDGET, options={"correct": False}, **files)
    assert plain.length <= BUDGET
    assert plain.report["slack_bytes"] <= BUDGET // 100
    assert plain.report["predicted_delta_nats"] == plain.report["text_distance"]["calibration_kl"] > 0
    few = [n for n in packed if ".layers.0." in n]
    assert len(few) > 6
    assert {packed[n] for n in few} == {1}
    # whole roundings are one of each search (`test_search`), and the walk's; a few of the last units meet the cap
    assert searches == ["over", "over"]
    walks = [n for n in sampled if ".layers.3." not in n and "embed" not in n]
    assert len(walks) > 12
    assert {n: rounded[n] for n in walks} == dict.fromkeys(walks, 1)
    assert "model.embed_tokens.weight" in sampled - rounded.keys()  # nothing gives it a target
    packed.clear()
    kept = bytecap.fit(directory, BUDGET, options={"correct": False}, store=tmp_path, **files)
    assert kept.data == plain.data
    rounded.clear()
    assert bytecap.fit(directory, BUDGET, options={"correct": False}, store=tmp_path, **files).data == plain.data
    assert all(rounded[n] == 2 for n in walks)  # by the plan that was kept, and on the walk


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_without_targets_it_is_settled_after_all(lost, model_directory, texts, monkeypatch):
    monkeypatch.setattr(preparation, "_LARGE", 0)
    if lost:

        def lose(*_, **__):
            raise retargeting.LostError

        monkeypatch.setattr(retargeting, "drift_targets", lose)
    else:
        cost = retargeting._cost
        monkeypatch.setattr(retargeting, "_cost", lambda *args: (2 * cost(*args)[0], cost(*args)[1]))
    near = []
    monkeypatch.setattr(retargeting, "near_cap", lambda *args: near.append(1) or rate_control.near_cap(*args))
    found = bytecap.fit(model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"], **SMALL)
    assert near == [1]
    assert found.report["slack_bytes"] <= found.report["allowed_slack_bytes"]
    if not lost:
        assert not found.report["targets"]["kept"]


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["100MB", None])
def test_ranks_meet_the_cap_together(memory, model_directory, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_LARGE", 0)
    monkeypatch.setattr(stored, "_LEAST_ROWS", 16)
    files = {"calibration": texts["calib"], "evaluation": texts["val"]}
    alone = bytecap.fit(model_directory("rotary"), BUDGET, memory=memory, **files, **SMALL)
    more = [] if memory is None else ["--memory", memory]
    words = fit_words(model_directory("rotary"), texts, tmp_path / "a.bcap", *more)
    (code, said), other = ranks.together(2, ranks.command(words), tmp_path)
    assert code == 0, said
    assert other == (0, "")
    assert (tmp_path / "a.bcap").read_bytes() == alone.data
