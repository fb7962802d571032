"""Targets that follow the coded prefix: taken where they pay on the model at hand, and only there."""

import numpy as np
import pytest
import torch

import bytecap
from bytecap.allocation import asymmetric_targets
from bytecap.allocation.planner import Planner
from bytecap.methods import bytecap as default
from bytecap.methods import retargeting
from bytecap.model.quantized_copy import copy_of, load_values, share_storage
from bytecap.model.uncertainty import ratio_stderr, surely_worse
from conftest import BUDGET, SMALL


@pytest.mark.slow
@pytest.mark.parametrize("pays", [True, False])
def test_the_correction_tokens_decide(pays, model_directory, texts, monkeypatch):
    costs = iter((1.0, 0.5) if pays else (1.0, 1.5))
    monkeypatch.setattr(retargeting, "_cost", lambda *_: (np.full(1, next(costs)), np.ones(1)))
    files = {"calibration": texts["calib"], "evaluation": texts["val"]}
    found = bytecap.fit(model_directory("rotary"), BUDGET, **files, **SMALL)
    assert found.report["targets"] == {
        "kept": pays,
        "cost_with": 0.5 if pays else 1.5,
        "cost_without": 1.0,
        "change_stderr": 0.0,
    }
    monkeypatch.undo()
    plain = bytecap.fit(model_directory("rotary"), BUDGET, **files, options={"drift": 0.0}, **SMALL)
    assert (found.data == plain.data) == (not pays)


@pytest.mark.slow
def test_the_decision_is_kept(model_directory, texts, tmp_path, monkeypatch):
    files = {"calibration": texts["calib"], "evaluation": texts["val"], "store": tmp_path}
    found = bytecap.fit(model_directory("rotary"), BUDGET, **files, **SMALL)
    monkeypatch.setattr(retargeting, "_cost", None)  # nothing is measured again
    assert bytecap.fit(model_directory("rotary"), BUDGET, **files, **SMALL).data == found.data


class TestSurelyWorse:
    """A change is refused where it costs more than two paired standard errors, or anything where nobody knows these."""

    TOKENS = np.array([512.0] * 15 + [100.0])
    HARD = np.linspace(50, 400, 16)  # nats of windows, which differ by far more than the change

    def change(self, errors):
        spread = np.cos(np.arange(16.0)) * self.TOKENS / 512
        spread -= spread.sum() / self.TOKENS.sum() * self.TOKENS
        return spread + errors * ratio_stderr(spread, self.TOKENS) * self.TOKENS

    @pytest.mark.parametrize(("errors", "worse"), [(-3, False), (-0.1, False), (1.9, False), (2.1, True), (9, True)])
    def test_two_paired_errors_decide(self, errors, worse):
        assert surely_worse(self.HARD, self.HARD + self.change(errors), self.TOKENS) is worse

    @pytest.mark.parametrize(("errors", "worse"), [(-0.1, False), (0, False), (0.1, True)])
    def test_few_windows_have_no_error(self, errors, worse):
        after = self.HARD[:7] + errors * self.TOKENS[:7]
        assert surely_worse(self.HARD[:7], after, self.TOKENS[:7]) is worse

    def test_no_number_is_worse(self):
        assert surely_worse(self.HARD, self.HARD * np.nan, self.TOKENS)


def test_what_is_recorded_says_how_sure_it_is():
    before, tokens = TestSurelyWorse.HARD, TestSurelyWorse.TOKENS
    after = before + TestSurelyWorse().change(1.5)
    found = retargeting._judged((before, tokens), (after, tokens))
    assert found["kept"]
    assert found["cost_with"] - found["cost_without"] == pytest.approx(1.5 * found["change_stderr"])
    assert not retargeting._judged((before, tokens), (before + TestSurelyWorse().change(2.5), tokens))["kept"]


@pytest.mark.parametrize("names", [None, ["0.weight"]])
def test_a_copy_gives_the_memory_of_its_values_back(names):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = {n: t.clone() for n, t in module.state_dict().items()}
    quantized_copy = copy_of(module)
    load_values(quantized_copy, {n: np.full(t.shape, 7.0, np.float32) for n, t in before.items() if t.ndim})
    share_storage(quantized_copy, module, names)
    for name, tensor in quantized_copy.state_dict().items():
        again = names is None or name in names or not tensor.ndim
        assert (tensor.data_ptr() == module.state_dict()[name].data_ptr()) == again
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("in_rounds", [False, True])
def test_integers_of_the_walk_are_stored(in_rounds, model_directory, texts, monkeypatch):
    """Rounded again, the prefix would have other errors than those that targets make up for."""
    walked, packed = {}, {}
    costs, rounding = iter((1.0, 0.5)), Planner.round
    monkeypatch.setattr(retargeting, "_cost", lambda *_: (np.full(1, next(costs)), np.ones(1)))
    if in_rounds:
        monkeypatch.setattr(asymmetric_targets, "_chain_of", lambda *_: None)
        monkeypatch.setitem(asymmetric_targets.ROUND_TOKENS, "cpu", 512)

    def walk(planner, *args, **kwargs):
        def spy(self, items, *rest):
            found = rounding(self, items, *rest)
            walked.update(found)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Planner, "round", spy)
            return drift_targets(planner, *args, **kwargs)

    def fit_units(planner, state, tables, size, budget, names, inner=default.fit_units):
        packed["state"], packed["last"] = state, names
        packed["found"] = inner(planner, state, tables, size, budget, names)
        return packed["found"]

    drift_targets = retargeting.drift_targets
    monkeypatch.setattr(retargeting, "drift_targets", walk)
    monkeypatch.setattr(default, "fit_units", fit_units)
    bytecap.fit(model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"], **SMALL)
    assert len(walked) > len(packed["last"])
    for name, coded in walked.items():
        np.testing.assert_array_equal(packed["state"].coded[name].code.symbols, coded.code.symbols)
        if name not in packed["last"]:
            assert packed["found"].state.coded[name] is packed["state"].coded[name]


@pytest.mark.slow
def test_where_the_last_matrices_are_not_enough_all_have_their_targets(model_directory, texts, tmp_path, monkeypatch):
    """A store needs the targets of all units; without one the walk is made again for them."""
    monkeypatch.setattr(retargeting, "_cost", lambda *_: (np.zeros(1), np.ones(1)))
    monkeypatch.setattr(default, "fit_units", lambda *_: None)
    walks = []

    def walks_of(name):
        inner = getattr(retargeting, name)

        def walk(*args, held, **kwargs):
            found = inner(*args, held=held, **kwargs)
            walks.append((len(found.change), len(found.coded)))
            return found

        monkeypatch.setattr(retargeting, name, walk)

    walks_of("drift_targets")
    walks_of("streamed_targets")
    files = {"calibration": texts["calib"], "evaluation": texts["val"], **SMALL}
    made = bytecap.fit(model_directory("rotary"), BUDGET, **files)
    assert bytecap.fit(model_directory("rotary"), BUDGET, store=tmp_path, **files).data == made.data
    assert bytecap.fit(model_directory("rotary"), BUDGET, memory="1MB", **files).data == made.data
    every = walks[-1][1]
    assert walks == [
        (retargeting.LAST, every),
        (every, every),
        (every, every),
        (retargeting.LAST, every),
        (every, every),
    ]
    assert every > retargeting.LAST
