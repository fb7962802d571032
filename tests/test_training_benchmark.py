"""The training comparison (`benchmarks/train.py`) from texts to paired figures, small enough for a processor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bytecap
from bytecap.model.checkpoint import demo_directory

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (
    "hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=2",
    "num_key_value_heads=1", "head_dim=16",
)  # fmt: skip


@pytest.mark.nightly
def test_three_ways_to_train(tmp_path):
    texts, demo, out = tmp_path / "texts", demo_directory(), tmp_path / "train.jsonl"
    texts.mkdir()
    for name in ("literature", "technical", "general"):
        for kind in ("calib", "val"):
            (texts / f"{name}.{kind}.txt").write_bytes((demo / f"{kind}.txt").read_bytes())
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_bytes((demo / "calib.txt").read_bytes())
    done = subprocess.run(  # noqa: S603
        [
            sys.executable, str(ROOT / "benchmarks" / "train.py"), "--models", str(demo.parent), "--model", demo.name,
            "--texts", str(texts), "--train", str(tmp_path / "train"), "--shape", *SHAPE, "--batch", "8",
            "--length", "64", "--steps", "40", "--tokens", "1200", "--eval-tokens", "900", "--bits", "2.5",
            "--output", str(out), "--keep", str(tmp_path / "kept"), "--device", "cpu",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    runs = {(r["arm"], r["size"]): r for r in rows if r["benchmark"] == "train"}
    assert set(runs) == {("plain", "pquant"), ("plain", "2.5"), ("pquant", "pquant"), ("rate", "2.5")}
    for r in runs.values():
        assert r["budget_bytes"] - 200 <= r["bytes"] <= r["budget_bytes"]
        assert r["bpb_artifact"] < 5
        assert r["training_tokens"] == 40 * 8 * 64
    assert runs["plain", "pquant"]["budget_bytes"] == runs["pquant", "pquant"]["budget_bytes"]
    exported = bytecap.load_model(tmp_path / "kept" / "pquant-s0.bcap")  # an ordinary model of its config
    attention = exported.model.layers[0].self_attn.q_proj.weight
    assert all(len(set(row.abs().tolist())) == 1 for row in attention)
    pairs = {(r["first"], r["size"], r["of"]) for r in rows if r["benchmark"] == "train-pair"}
    wanted = [("pquant", "pquant"), ("rate", "2.5")]
    assert pairs == {(*w, of) for w in wanted for of in ("trained", "coded")}
