"""docs/architectures.md is made from its lines, and `benchmarks/architectures.py` can tell right from wrong."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from bytecap.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("architectures", folder / "architectures.py")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found
    finally:
        sys.path.remove(str(folder))


def test_the_page_is_what_the_lines_say(script):
    assert script.PAGE.read_text("utf-8") == script.page(script.read(script.LINES))


def test_every_family_has_a_line(script):
    import transformers

    rows = script.read(script.LINES)
    if {r["transformers"] for r in rows.values() if "transformers" in r} != {transformers.__version__}:
        pytest.skip("other families: the page is of another version of transformers")
    assert set(rows) == set(script.families())


@pytest.mark.slow
def test_a_family_works(script, tmp_path):
    row = script.try_family("decoder", "qwen3", tmp_path)
    assert (row["outcome"], row["reason"]) == ("works", "")
    assert row["kl_nats"] > 0
    assert row["bits"] < 8


@pytest.mark.slow
def test_values_that_are_not_those_of_the_file_are_noticed(script, tmp_path, monkeypatch):
    import bytecap

    sound = bytecap.load_model

    def spoiled(path):
        module = sound(path)
        with torch.no_grad():
            next(module.parameters())[5, 0] += 1e-3
        return module

    monkeypatch.setattr(bytecap, "load_model", spoiled)
    row = script.try_family("decoder", "gpt2", tmp_path)
    assert row["outcome"] == "wrong"
    assert row["reason"] == "load_model and the unpacked directory differ"


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [(CheckpointError("no"), "refused", "no"), (ValueError("odd\nmore"), "failed", "ValueError: odd")],
)
def test_errors_are_told_apart(script, tmp_path, monkeypatch, error, outcome, reason):
    import bytecap

    def fit(*_, **__):
        raise error

    monkeypatch.setattr(bytecap, "fit", fit)
    row = script.try_family("decoder", "gpt2", tmp_path)
    assert (row["outcome"], row["reason"]) == (outcome, reason)


def test_lines_later_in_the_file_replace_earlier_ones(script, tmp_path):
    row = {"kind": "decoder", "family": "gpt2", "outcome": "failed"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({**row, "outcome": o}) + "\n" for o in ("failed", "works")))
    assert script.read(tmp_path / "a.jsonl")["decoder", "gpt2"]["outcome"] == "works"
