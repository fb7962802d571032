"""Streamed jobs on a CUDA device, held against jobs in its memory and against the processor; skipped without one."""

import json

import pytest
import torch

import bytecap
from bytecap.allocation import preparation
from bytecap.calibration.probe import probe
from bytecap.calibration.streamed import probe_streamed
from bytecap.model import head
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.evaluation import compare_models
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.streamed_checkpoint import open_streamed
from bytecap.model.texts import Text
from bytecap.pipeline import memory
from bytecap.quantization import stored
from bytecap.system import slabs
from bytecap.system.scratch import Scratch
from conftest import BUDGET, KINDS, SMALL, VOCABULARY
from test_probe import windows_of

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
]  # fmt: skip
WINDOWS = windows_of(5) + windows_of(2, 65, seed=1) + windows_of(1, 13, seed=2)


@pytest.mark.parametrize("room", [0, 10**9])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_a_model_in_memory(model_directory, kind, room):
    directory, found = model_directory(kind, dtype=torch.float32), {}
    whole = load_checkpoint(directory)
    scratch = Scratch(None, room, room)
    streamed = open_streamed(directory, scratch, device="cuda")
    rest = probe_streamed(
        streamed.streamed, streamed.units, WINDOWS, sink=found.__setitem__, scratch=scratch, seed=3
    )  # fmt: skip
    expected = probe(whole.module, whole.units, WINDOWS, seed=3, device="cuda")
    assert rest.tokens == expected.tokens
    assert found.keys() == expected.uses.keys()
    for name, uses in expected.uses.items():
        for one, other in zip(uses, found[name], strict=True):
            assert other.moment.device.type == "cuda"
            for part in ("moment", "rows", "weight"):
                torch.testing.assert_close(getattr(other, part), getattr(one, part), rtol=1e-3, atol=1e-6)
    assert all(p.is_meta for p in streamed.module.parameters())


@pytest.mark.parametrize("pieces", [False, True])
def test_comparisons_are_those_of_a_model_in_memory(model_directory, pieces, monkeypatch):
    if pieces:
        monkeypatch.setitem(head._MOST, "cuda", 7 * VOCABULARY)
    directory, scores = model_directory("rotary", dtype=torch.float32), []
    whole, streamed = load_checkpoint(directory), open_streamed(directory, Scratch(), device="cuda")
    values = {u.name: (1.01 * whole.tensor(u)).numpy() for u in whole.units}
    whole.module.to("cuda")
    for model in (whole, streamed):
        coded = copy_of(model.module)
        load_values(coded, values)
        scores.append(compare_models(model.module, coded, Text("text", tuple(WINDOWS)), device="cuda"))
    assert scores[1].kl_nats == pytest.approx(scores[0].kl_nats, rel=1e-2)
    assert scores[1].nats_original == pytest.approx(scores[0].nats_original, rel=1e-4)


@pytest.mark.parametrize("room", ["all", "none"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_fit(model_directory, texts, tmp_path, monkeypatch, room, sampled):
    files = {"calibration": texts["calib"], "evaluation": texts["val"]}
    directory = model_directory("rotary", num_hidden_layers=4)
    whole = bytecap.fit(directory, BUDGET, output=tmp_path / "whole.bcap", device="cuda", **files, **SMALL)
    here = bytecap.fit(directory, BUDGET, output=tmp_path / "cpu.bcap", device="cpu", **files, **SMALL)
    monkeypatch.setattr(memory, "_room", lambda *_: (10**9, 10**9) if room == "all" else (0, 0))
    if sampled:
        monkeypatch.setattr(preparation, "_LARGE", 0)
        monkeypatch.setattr(stored, "_LEAST_ROWS", 16)
        monkeypatch.setattr(slabs, "_VALUES", 64 * 32)
    made = []
    for name in "ab":
        path = tmp_path / f"{name}.bcap"
        made.append(bytecap.fit(directory, BUDGET, output=path, device="cuda", memory="1MB", **files, **SMALL))
        assert path.read_bytes() == made[-1].data
    assert made[0].data == made[1].data
    found = made[0]
    assert found.length <= BUDGET
    assert found.report["slack_bytes"] <= found.report["allowed_slack_bytes"]
    for other in (whole, here):
        assert [(u.unit, u.tag) for u in found.read().units] == [(u.unit, u.tag) for u in other.read().units]
        assert found.report["kl_nats"] <= (1.3 if sampled else 1.1) * other.report["kl_nats"]
    if not sampled:  # the same plan; its targets come from sums in TF32, and few tokens tell such files apart
        assert found.report["targets"]["cost_without"] == pytest.approx(whole.report["targets"]["cost_without"])
        assert found.report["targets"]["cost_with"] == pytest.approx(whole.report["targets"]["cost_with"], rel=0.02)


def test_scores(run, fitted, model_directory, texts):
    for model in (model_directory("rotary"), fitted()[1]):
        found = []
        for more in ((), ("--memory", "1MB"), ("--device", "cpu")):
            code, out, err = run(
                "eval", model, "--text", texts["val"], "--tokens", 900, "--device", "cuda", "--json", *more
            )  # fmt: skip
            assert code == 0, err
            found.append(json.loads(out)["bpb"])
        assert found[1] == pytest.approx(found[0], rel=1e-4)
        assert found[2] == pytest.approx(found[0], rel=1e-2)
