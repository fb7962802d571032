"""The step at which a plan's bytes meet the capacity."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

import bytecap
from bytecap.allocation.planner import Planner, State
from bytecap.allocation.secant import next_log_step
from bytecap.allocation.vector_unit import VectorUnit
from bytecap.calibration.metric import Metric
from bytecap.format.coders.vector import CODER as VECTOR
from bytecap.quantization.options import Options
from bytecap.quantization.quantizer import prepare
from bytecap.quantization.rules import initial_rules
from bytecap.types import Unit
from conftest import SMALL, build

pytestmark = pytest.mark.numeric


class Uneven:
    """A planner that holds one unit back: its bytes only fall from a step on that is far from the others'."""

    parameters, names, finest, sample = 1000, ("a",), {"a": 1e9}, None

    def settle(self, steps, _rules):
        return State(dict(steps), {}, None, {"a": 1000 - 150 * max(0.0, math.log(steps["a"]) - 25)}, {})


def test_the_search_goes_as_far_as_it_must():
    c, state = Planner.search(Uneven(), {"a": 1.0}, 600, None, start=1.0)
    assert abs(state.rate - 600) <= 5e-4 * 600
    assert math.log(c) == pytest.approx(25 + 400 / 150, abs=0.01)


class Restless:
    """A planner whose bytes fall with its step, and are far more at every second look."""

    parameters, names, finest, sample = 1000, ("a",), {"a": 1e9}, None

    def __init__(self):
        self.looks = 0

    def settle(self, steps, _rules):
        self.looks += 1
        return State(dict(steps), {}, None, {"a": 1000 - 120 * math.log(steps["a"]) + 400 * (self.looks % 2 == 0)}, {})


class Sampled:
    """A planner whose bytes are a given part more than its sample's; without one it is the sample."""

    parameters, names, finest, search = 1000, ("a",), {"a": 1.0}, Planner.search

    def __init__(self, part=None):
        self.looks, self.times = 0, 1 + (part or 0)
        self.sample = None if part is None else Sampled()

    def settle(self, steps, _rules):
        self.looks += 1
        return State(dict(steps), {}, None, {"a": self.times * (1000 - 150 * math.log(steps["a"]))}, {})


@pytest.mark.parametrize(("part", "looks"), [(0.0, 1), (0.01, 1), (-0.01, 1), (0.2, 3)])
def test_where_a_sample_says_what_all_take_everything_is_rounded_once(part, looks):
    planner = Sampled(part)
    _, state = planner.search({"a": 1.0}, 600, None, start=5.0)
    assert 0.95 * 600 <= state.rate <= 1.015 * 600
    assert planner.sample.looks > 1
    assert planner.looks == looks


def test_points_turned_round_by_refitted_tables_say_nothing_of_the_slope():
    found = [(1.410e-5, 92454), (1.736e-5, 88334), (1.756e-5, 87607), (1.735e-5, 87838), (1.713e-5, 87695)]
    seen = [(math.log(c), r) for c, r in found]
    assert abs(next_log_step(seen, 88_230, 139_584) - seen[-1][0]) < 0.1


def test_where_the_last_look_is_too_large_the_finest_that_fitted_is_taken():
    planner = Restless()
    c, state = Planner.search(planner, {"a": 1.0}, 900, None, start=3.0, rounds=2)
    assert planner.looks == 3
    assert (c, state.rate) == (pytest.approx(3.0), pytest.approx(1000 - 120 * math.log(3.0)))


@pytest.mark.parametrize("values", [np.zeros(5), np.full(3, -1.5), np.ones(1)])
def test_constant_vectors_take_any_step(values):
    vector = VectorUnit(Unit("b", values.shape, "F32"), values.astype(np.float32), np.ones(len(values)))
    for c in (0.0, 1e-30, 1.0):
        assert vector.step(c) > 0
        centre, symbols = VECTOR.quantize(vector.values, vector.step(c))
        assert not symbols.any()
        assert centre == values[0]


@pytest.mark.slow
def test_a_model_with_constant_vectors_and_zero_matrices_at_a_large_budget(model_directory, texts, tmp_path):
    module = build("biased")
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.fill_(float(name.endswith("weight")))
            elif "o_proj.weight" in name:
                p.zero_()
    module.save_pretrained(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_directory("biased") / name).read_bytes())
    budget = 12 * module.num_parameters() // 8
    result = bytecap.fit(tmp_path, budget=budget, calibration=texts["calib"], evaluation=texts["val"], **SMALL)
    assert len(result.data) <= budget
    assert result.report["kl_nats"] < 1e-3


def test_the_search_ends_where_no_step_is_wide_enough():
    stuck = Uneven()
    stuck.settle = lambda steps, _rules: State(dict(steps), {}, None, {"a": 1000.0}, {})
    c, state = Planner.search(stuck, {"a": 1.0}, 600, None, start=1.0)
    assert c == 2.0**20 * 1e9
    assert state.rate == 1000


def test_settling_is_a_function_of_steps_and_rules():
    """A second call gives what the first one gave, and nobody can put something else into a planner or a state."""
    torch.manual_seed(0)
    options = Options()
    inputs = torch.randn(64, 12, dtype=torch.float64)
    metric = Metric(inputs.T @ inputs / 64, torch.ones(20, dtype=torch.float64))
    item = prepare(Unit("a", (20, 12), "F32"), torch.randn(20, 12), metric, options)
    planner, rules = Planner.of([item], [], options), initial_rules(options)
    first = planner.settle({"a": 0.4}, rules)
    assert planner.settle({"a": 0.4}, first.rules).rate != first.rate  # refitted tables and offsets are handed on
    again = planner.settle({"a": 0.4}, rules)
    assert (again.rates, again.distortions) == (first.rates, first.distortions)
    assert again.rules.shrink.offset.tolist() == first.rules.shrink.offset.tolist()
    for value, name in ((planner, "matrices"), (first, "rules"), (rules, "shared")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)
