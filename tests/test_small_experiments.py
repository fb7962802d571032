"""The benchmarks of recovery and of the searches, on models of a few thousand weights."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.sources import load_sets, with_recovery
from bytecap.progress import Silent
from bytecap.recovery import kl_passes
from bytecap_lab.layer_tying import read

pytestmark = pytest.mark.numeric

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Function: a benchmark as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in ("common", "device", "recover", "scale", "searches"):
        if name not in before:
            sys.modules.pop(name, None)


def test_several_ranks_write_the_own_format_alone(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale.py", "tiny", "--gpus", "1,2", "--format", "mlx"])
    scale = benchmark("scale")
    monkeypatch.setattr(scale, "one", lambda *_: pytest.fail("a fit is started"))
    with pytest.raises(SystemExit, match="2"):
        scale.main()
    assert "not mlx" in capsys.readouterr().err


def rows(args):
    return [json.loads(line) for line in args.output.read_text().splitlines()]


@pytest.mark.slow
def test_recovery_beside_fine_tuning(benchmark, model_directory, texts, tmp_path):
    recover = benchmark("recover")
    model = load_checkpoint(model_directory("rotary"))
    sets = load_sets(model, texts["calib"], texts["val"], tokens=2000, evaluation_tokens=1000, reporter=Silent())
    sets = with_recovery(model, sets, [texts["calib"]], seed=0, device="cpu", reporter=Silent())
    args = argparse.Namespace(
        models="models", texts="texts", output=tmp_path / "out.jsonl", device="cpu", seed=0, recover="4",
        recover_text=None, rate=0.02, values_rate=0.002, tuning_rates=[1e-4],
    )  # fmt: skip
    read_tokens = recover.one(args, model, sets, 4.0)
    recover.tuned(args, model, sets, 2)
    found, tuned = rows(args)
    assert read_tokens >= 4 * 2048
    assert found["file_bytes"] <= found["budget_bytes"] == int(4.0 * model.parameters / 8)
    assert found["kl_ratio"] == pytest.approx(found["kl_nats"] / found["without_recovery"]["kl_nats"])
    assert found["kl_ratio"] > 0  # the evaluation's tokens are few: a random model may lose some KL on them
    assert found["predicted_delta_nats"] <= 1.001 * found["recovery"]["kl_before"]  # on the correction tokens never
    assert tuned["steps"] == 2
    assert tuned["kl_nats"] > 0


@pytest.mark.slow
def test_searches_at_equal_moves(benchmark, four, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(kl_passes._TOKENS, "cpu", 512)  # of a move
    searches = benchmark("searches")
    model = load_checkpoint(four)
    pool = read(model, texts["calib"], window=64, seed=0, reporter=Silent())
    args = argparse.Namespace(
        models="models", texts="texts", output=tmp_path / "out.jsonl", device="cpu", seed=0, search_steps="6",
        steps="2",
    )  # fmt: skip
    for search in (None, "greedy", "dlt"):
        searches.one(args, model, pool, 2, search)
    loop, greedy, dlt = rows(args)
    assert loop["sources"] == [0, 1, 0, 1]
    assert len(greedy["merges"]) == 2
    assert dlt["actions"] == 3
    assert all(len(set(r["sources"])) <= 2 for r in (greedy, dlt))
    assert all(r["uptraining"]["kl"] <= r["uptraining"]["kl_start"] for r in (loop, greedy, dlt))
