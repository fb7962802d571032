"""The Parameter Golf example from its texts to a checked submission, small enough for a processor."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import bytecap

pytest.importorskip("sentencepiece")
FOLDER = Path(__file__).resolve().parents[1] / "examples" / "parameter_golf"
CAP = 320_000
LENGTH = 512  # predictions in a window of `bytecap fit`


def run_script(name, *arguments):
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return done.stdout


def whole(run, folder, *training, factory="mini", tokens=8192, characters=None):
    """Texts to shards to a checkpoint to an artifact to both submissions; the fit's report and training's facts."""
    demo, texts = resources.files("bytecap") / "data" / "demo", []
    for name in ("calib.txt", "val.txt"):
        texts.append(folder / name)
        texts[-1].write_text((demo / name).read_text("utf-8")[:characters], "utf-8")
    data, state, script = folder / "data", folder / "state.pt", FOLDER / "train_gpt.py"
    run_script("data.py", "-o", data, "--held-out", "7", *texts)
    run_script("train_gpt.py", "train", "--factory", factory, "--data", data, "--device", "cpu", "-o", state, *training)
    facts = json.loads(state.with_suffix(".json").read_text())
    spec = f"{FOLDER / 'model.py'}:{factory}"
    budget = run("golf", "budget", "--script", script, "--cap", CAP)[1].strip()
    code, out, err = run(
        "fit", "--factory", spec, "--state", state, "--tokens", data / "train_000000.bin", "--tokens", tokens,
        "--eval-tokens", data / "val_000000.bin", "--bytes-per-token", data / "tokenizer.model", "--budget", budget,
        "--device", "cpu", "-o", folder / "model.bcap", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    evaluation = f"python train_gpt.py --factory {factory} --data {data} --length {LENGTH} --device cpu"
    for variant in ("--vendored", "--library"):
        target = folder / variant[2:]
        code, out, err = run(
            "golf", "export", folder / "model.bcap", "--script", script, "-o", target, "--cap", CAP, variant, "--json"
        )
        assert code == 0, err
        exported = json.loads(out)
        assert {p.name: p.stat().st_size for p in target.iterdir()} == exported["files"]
        code, out, err = run("golf", "check", target, "--cap", CAP, "--eval", evaluation, "--json")
        assert code == 0, err
        checked = json.loads(out)
        assert checked["total_bytes"] == exported["total_bytes"] <= CAP
        assert checked["bpb"] == pytest.approx(report["bpb_artifact"], abs=2e-5)
        if variant == "--vendored":  # the budget was made for this one
            like = run("golf", "budget", "--script", script, "--cap", CAP, "--like", folder / "model.bcap")[1]
            spare = int(like) - int(budget)  # of coders that a file may have and this one has not
            assert 0 <= CAP - checked["total_bytes"] - spare <= 64
    return report, facts


def check_quality(report, facts):
    assert report["evaluation_tokens"] == facts["tokens"]
    assert report["texts"][0]["bytes"] == facts["bytes"]
    assert report["bpb_artifact"] == pytest.approx(report["bpb_original"], rel=0.01)
    assert 0 < report["kl_nats"] < 0.02
    assert report["slack_bytes"] <= 64


@pytest.mark.nightly
def test_texts_to_a_checked_submission(run, tmp_path):
    """Few steps: a model that has hardly learnt, all the way to a submission that is scored from outside."""
    report, facts = whole(run, tmp_path, "--steps", "12", "--batch", "1024", tokens=4096, characters=60_000)
    check_quality(report, facts)
    assert facts["bits_per_byte"] < 4.5
    values = bytecap.load(tmp_path / "model.bcap")
    assert sum(v.size for v in values.values()) == facts["parameters"]


@pytest.mark.nightly
@pytest.mark.parametrize("factory", ["mini", "mini_looped"])
def test_two_minutes(run, tmp_path, factory):
    """The README's miniature: as many steps as a minute takes on a processor."""
    report, facts = whole(run, tmp_path, "--steps", "250", factory=factory, tokens=16_384)
    check_quality(report, facts)
    assert facts["bits_per_byte"] < 3.2
