"""Targets that follow the coded prefix: taken where they pay on the model at hand, and only there."""

import pytest

import bytecap
from bytecap.methods import bytecap as default
from conftest import BUDGET, SMALL


@pytest.mark.slow
@pytest.mark.parametrize("pays", [True, False])
def test_the_correction_tokens_decide(pays, model_directory, texts, monkeypatch):
    costs = iter((1.0, 0.5) if pays else (1.0, 1.5))
    monkeypatch.setattr(default, "_cost", lambda *_: next(costs))
    files = {"calibration": texts["calib"], "evaluation": texts["val"]}
    found = bytecap.fit(model_directory("rotary"), BUDGET, **files, **SMALL)
    assert found.report["targets"] == {"kept": pays, "cost_with": 0.5 if pays else 1.5, "cost_without": 1.0}
    monkeypatch.undo()
    plain = bytecap.fit(model_directory("rotary"), BUDGET, **files, options={"drift": 0.0}, **SMALL)
    assert (found.data == plain.data) == (not pays)


@pytest.mark.slow
def test_the_decision_is_kept(model_directory, texts, tmp_path, monkeypatch):
    files = {"calibration": texts["calib"], "evaluation": texts["val"], "store": tmp_path}
    found = bytecap.fit(model_directory("rotary"), BUDGET, **files, **SMALL)
    monkeypatch.setattr(default, "_cost", None)  # nothing is measured again
    assert bytecap.fit(model_directory("rotary"), BUDGET, **files, **SMALL).data == found.data
