"""Budgets between the finest grid and lossless are filled."""

import numpy as np
import pytest
import torch

import bytecap
from bytecap.format.coders.exact import is_lossless
from bytecap.methods.rate_control import allowed_slack
from bytecap.model.checkpoint import load_checkpoint
from conftest import SMALL


@pytest.mark.slow
@pytest.mark.parametrize("bits", [13, 16, 20, 25])
def test_a_float32_model_between_grids_and_lossless_fills_its_budget(model_directory, texts, bits):
    budget = bits * 27_808 // 8  # lossless is about 27 bits; grids stop at 16-bit symbols
    result = bytecap.fit(
        model_directory("rotary", dtype=torch.float32), budget, calibration=texts["calib"], evaluation=texts["val"],
        **SMALL,
    )  # fmt: skip
    assert budget - allowed_slack(budget) <= len(result.data) <= budget
    assert result.report["kl_nats"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", pytest.param("demo", marks=pytest.mark.nightly)])
def test_a_bfloat16_model_with_far_outliers_fills_its_budget(model_directory, model):
    model = load_checkpoint(model_directory() if model == "tiny" else model)
    weight = dict(model.module.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    with torch.no_grad():
        weight[:, ::7] *= 2.0**12
    budget = int(9.5 * model.parameters / 8)
    result = bytecap.fit(model, budget, **SMALL)
    assert budget - allowed_slack(budget) <= len(result.data) <= budget


@pytest.mark.parametrize("values", [[np.nan], [np.inf, 0], [1e30], [0.5]])
@pytest.mark.parametrize("dtype", ["I32", "U8", "BOOL"])
def test_no_integer_holds_these(values, dtype):
    assert not is_lossless(np.array(values, np.float32), dtype)
