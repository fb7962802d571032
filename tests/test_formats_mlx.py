"""The comparison with mlx-lm's own tools: its DWQ, as `benchmarks/formats_mlx.py` runs it."""

import copy
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.sources import load_sets
from bytecap.progress import Silent

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def tool(monkeypatch):
    pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm.utils")
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("formats_mlx")
    sys.modules.pop("formats_mlx", None)


@pytest.fixture
def quantized(tool, model_directory):
    """Function: a tiny model and its copy in groups of 32 and so many bits, both in mlx."""
    del tool  # skips where mlx is not installed
    utils = importlib.import_module("mlx_lm.utils")

    def get(bits):
        loaded, config = utils.load_model(model_directory("rotary"))
        original = copy.deepcopy(loaded)
        return original, utils.quantize_model(loaded, config, 32, bits)[0]

    return get


def codes_of(tool, model) -> list[np.ndarray]:
    return [np.array(layer.weight) for _, layer in tool.layers(model)]


def test_layers_that_are_written_out_are_the_same_function(tool, quantized) -> None:
    mx = importlib.import_module("mlx.core")
    _, model = quantized(3)
    student = tool.dense(model)
    model.set_dtype(mx.float32)
    tokens = mx.array([list(range(3, 40))])
    ours, theirs = np.array(student(tokens)), np.array(model(tokens))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_batches_keep_the_order_of_their_samples(tool) -> None:
    batches = importlib.import_module("mlx_lm.tuner.trainer").iterate_batches
    samples = [[i] * n for i, n in enumerate((9, 3, 7, 5, 8, 2), 1)]
    found = [np.array(b)[:, 0].tolist() for b, _ in batches(tool.in_order(samples), 2, 100, seed=0)]
    assert sorted(found) == [[1, 2], [3, 4], [5, 6]]


def test_training_brings_outputs_nearer_and_moves_no_code(tool, quantized, model_directory, texts) -> None:
    mx = importlib.import_module("mlx.core")
    model = load_checkpoint(model_directory("rotary"))
    sets = load_sets(
        model, texts["calib"], texts["val"], tokens=3000, evaluation_tokens=500, correction_tokens=2500,
        reporter=Silent(),
    )  # fmt: skip
    original, trained = quantized(2)
    before, codes = copy.deepcopy(trained), codes_of(tool, trained)
    job = SimpleNamespace(model=model, sets=sets)
    tool.distilled(trained, copy.deepcopy(original), job, 0, rate=1e-3, samples=40)
    tokens = mx.array([[int(t) for t in sets.statistics[0].tokens]])

    def apart(m) -> float:
        """KL of its predictions to the original's."""
        p, q = (np.array(x(tokens).astype(mx.float32)).astype(np.float64) for x in (original, m))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        return float((np.exp(p) * (p - q)).sum(-1).mean())

    assert apart(trained) < 0.95 * apart(before)
    assert all(np.array_equal(a, b) for a, b in zip(codes, codes_of(tool, trained), strict=True))
