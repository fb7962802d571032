"""The step at which a plan's bytes meet the capacity."""

import math

import numpy as np
import pytest
import torch

import bytecap
from bytecap.coders.vector import CODER as VECTOR
from bytecap.core import Unit
from bytecap.methods.waterfill import Planner, State, VectorUnit, _next_log_step
from conftest import SMALL, build


class Restless:
    """A planner whose bytes fall with its step, and are far more at every second look."""

    parameters, shared = 1000, None

    def __init__(self):
        self.looks = 0

    def __getattr__(self, name):
        assert name == "names"
        return ["a"]

    def settle(self, steps):
        self.looks += 1
        return State(dict(steps), {}, None, {"a": 1000 - 120 * math.log(steps["a"]) + 400 * (self.looks % 2 == 0)}, {})


def test_points_turned_round_by_refitted_tables_say_nothing_of_the_slope():
    found = [(1.410e-5, 92454), (1.736e-5, 88334), (1.756e-5, 87607), (1.735e-5, 87838), (1.713e-5, 87695)]
    seen = [(math.log(c), r) for c, r in found]
    assert abs(_next_log_step(seen, 88_230, 139_584) - seen[-1][0]) < 0.1


def test_where_the_last_look_is_too_large_the_finest_that_fitted_is_taken():
    planner = Restless()
    c, state = Planner.search(planner, {"a": 1.0}, 900, start=3.0, rounds=2)
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


def test_a_model_with_constant_vectors_at_a_large_budget(model_directory, texts, tmp_path):
    module = build("biased")
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.fill_(float(name.endswith("weight")))
    module.save_pretrained(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_directory("biased") / name).read_bytes())
    budget = 12 * module.num_parameters() // 8
    result = bytecap.fit(tmp_path, budget=budget, calibration=texts["calib"], evaluation=texts["val"], **SMALL)
    assert len(result.data) <= budget
    assert result.report["kl_nats"] < 1e-3
