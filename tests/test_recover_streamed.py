"""Recovery of streamed models: gradients are exact, integers and bytes stay, one block is in memory at a time."""

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import bytecap
from bytecap.allocation import preparation
from bytecap.allocation.correction import unit_values
from bytecap.calibration.kl_gradient import gradient
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.job.effort import Effort
from bytecap.model import head
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.sources import load_sets
from bytecap.model.streamed_checkpoint import open_streamed
from bytecap.model.streaming import Streamed
from bytecap.model.texts import leading
from bytecap.pipeline import memory
from bytecap.progress import Silent
from bytecap.quantization.options import Options
from bytecap.quantization.rules import initial_rules
from bytecap.recovery import streamed
from bytecap.recovery.parameters import moves
from bytecap.recovery.streamed_gradients import kl_backward
from bytecap.system.scratch import Scratch
from conftest import BUDGET, SMALL, VOCABULARY


@pytest.fixture(scope="module")
def plans(model_directory, texts, tmp_path_factory):
    """Function: a job of a streamed model of a family, and its plan, made once; nothing changes them."""

    @cache
    def make(kind):
        scratch = Scratch(tmp_path_factory.mktemp(kind))
        model = open_streamed(
            model_directory(kind, num_hidden_layers=3, dtype=torch.float32), scratch, device="cpu"
        )  # fmt: skip
        sets = load_sets(
            model, texts["calib"], texts["val"], tokens=1500, evaluation_tokens=600, window=64, reporter=Silent()
        )
        job = Job(model, sets, BUDGET, lambda *_: 0, "cpu", Silent(), FitConfig(BUDGET))
        planner = preparation.prepare_streamed(job, model, Options()).planner
        multipliers, size = dict.fromkeys(planner.names, 1.0), planner.parameters * 3 // 8
        _, state = planner.search(multipliers, size, initial_rules(planner.options), start=planner.first_step(size))
        return job, planner, state

    return make


@pytest.fixture
def planned(plans):
    """Function: a job of a streamed model to be recovered, with a reporter of its own, and its plan."""

    def make(effort="4", kind="rotary"):
        job, planner, state = plans(kind)
        return replace(job, reporter=Silent(), recover=Effort.parse(effort)), planner, state

    return make


@pytest.fixture
def tuned(planned):
    """Function: a plan before and after a recovery, the job, and the record."""

    def run(effort="4", kind="rotary"):
        job, planner, state = planned(effort, kind)
        names = [p.unit.name for p in planner.matrices if moves(p)]
        found, record = streamed.tune_streamed(job, job.model, planner, state, names[-1:])
        return job, planner, state, names, found, record

    return run


@pytest.mark.slow
@pytest.mark.numeric
class TestValues:
    @pytest.mark.parametrize("kind", ["rotary", "biased", "transposed"])
    @pytest.mark.parametrize("logits", [None, 7 * VOCABULARY])
    def test_gradients_are_those_of_a_model_in_memory(self, planned, kind, logits, monkeypatch):
        job, planner, state = planned(kind=kind)
        whole = load_checkpoint(job.model.name).module
        quantized_copy, values = copy_of(whole), unit_values(planner, state)
        load_values(quantized_copy, values)
        windows = leading(job.sets.correction, 400)
        if logits is not None:
            monkeypatch.setitem(head._MOST, "cpu", logits)
        source = job.model.streamed.copy()
        source.load(values)
        found = streamed.StreamedValues(planner, state, source)
        names = [*found.names, *found.vectors]
        kl, expected = gradient(whole, quantized_copy, names, windows, device="cpu", batch=128)
        mine = kl_backward(
            job.model.streamed, source, windows, found.weights, batch=128, scratch=job.model.scratch
        )  # fmt: skip
        assert mine == pytest.approx(kl, rel=1e-4)
        assert len(found.names) > 6
        logs = [float((expected[n] * torch.as_tensor(values[n])).sum()) for n in found.names]
        assert found.logs.grad.tolist() == pytest.approx(logs, rel=1e-3, abs=1e-6)
        assert len(found.vectors) >= 6
        for n, t in found.vectors.items():
            assert torch.allclose(t.grad.reshape(-1), expected[n].reshape(-1), rtol=1e-3, atol=1e-6)
        assert all(p.is_meta for p in source.module.parameters())

    @pytest.mark.parametrize("kind", ["rotary", "biased"])
    def test_integers_stay_and_nothing_is_worse(self, tuned, kind, monkeypatch):
        monkeypatch.setattr(streamed, "RATE", 0.01)
        job, planner, state, _, found, record = tuned(kind=kind)
        (stage,) = record["stages"]
        assert stage["moves"] == 4
        assert sum("codes stay" in note for note in job.reporter.notes) == 1
        assert [i for _, i, _ in record["curve"]] == [0, 2, 4]
        assert record["curve"][0][2] == record["kl_before"]
        assert stage["kl"] == min(kl for *_, kl in record["curve"])
        assert found is not None
        assert stage["kl"] < record["kl_before"]
        units, after = found
        for name, coded in state.coded.items():
            assert np.array_equal(coded.code.symbols, after.coded[name].code.symbols)
            ratio = after.coded[name].code.step / coded.code.step
            assert ratio == pytest.approx(after.steps[name] / state.steps[name], rel=1e-6)
            assert np.allclose(units.decode(after, name), ratio * planner.decode(state, name), rtol=1e-5)
        assert any(after.steps[n] != state.steps[n] for n in state.coded)

    def test_passes_see_what_is_stored(self, planned):
        job, planner, state = planned()
        source = job.model.streamed.copy()
        source.load(unit_values(planner, state))
        values = streamed.StreamedValues(planner, state, source)
        torch.manual_seed(0)
        for t in (values.logs, *values.vectors.values()):
            t.data += 0.05 * torch.randn(t.shape)
        units, after = values.settle()
        seen = 0
        for number in range(3):
            with source.block(number) as block:
                for n, w in values.weights(number, block).items():
                    name = source.first[f"{source.chain.path}.{number}.{n}"]
                    stored = torch.from_numpy(units.decode(after, name)).reshape(w.shape)
                    assert torch.allclose(w, stored, atol=1e-5)
                    seen += 1
        assert seen == len(values.names) + len(values.vectors)

    def test_one_block_of_one_model_is_in_memory_at_a_time(self, planned, monkeypatch):
        held, most, inner = [], [], Streamed.block

        @contextmanager
        def watched(self, number, cache=None):
            with inner(self, number, cache) as block:
                held.append(number)
                most.append(len(held))
                yield block
                held.remove(number)

        job, planner, state = planned()
        source = job.model.streamed.copy()
        source.load(unit_values(planner, state))
        values = streamed.StreamedValues(planner, state, source)
        monkeypatch.setattr(Streamed, "block", watched)
        kl_backward(
            job.model.streamed, source, leading(job.sets.correction, 200), values.weights, batch=64,
            scratch=job.model.scratch,
        )  # fmt: skip
        assert len(most) == 9
        assert max(most) == 1

    def test_diverging_keeps_what_was_best(self, tuned, monkeypatch):
        monkeypatch.setattr(streamed, "RATE", 30.0)
        job, *_, found, record = tuned("8")
        assert any("diverges" in note for note in job.reporter.notes)
        assert found is None
        assert record["stages"][0]["kl"] == record["kl_before"]

    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
    @pytest.mark.parametrize("vector", [True, False])
    def test_what_cannot_be_stored_has_diverged(self, value, vector, tuned, monkeypatch):
        def spoilt(values, _names=None):
            with torch.no_grad():
                (next(iter(values.vectors.values())) if vector else values.logs).fill_(value)
            return own(values)

        own = streamed.StreamedValues.storable
        monkeypatch.setattr(streamed.StreamedValues, "storable", spoilt)
        job, *_, found, record = tuned("8")
        assert any("diverges after 1 " in note for note in job.reporter.notes)
        assert found is None
        assert len(record["curve"]) == 1

    def test_a_target_follows_its_step_where_it_may_be_rounded_anew(self, tuned, monkeypatch):
        kl = iter([1.0, 0.5])
        monkeypatch.setattr(streamed.Passes, "check", lambda _: next(kl))
        _, planner, state, names, (units, after), _ = tuned("1")
        for n, old, new in zip(names, planner.matrices, units.matrices, strict=True):
            scale = after.steps[n] / state.steps[n] if n == names[-1] else 1.0
            assert torch.allclose(new.weight, old.weight * scale, atol=1e-6)


@pytest.mark.slow
@pytest.mark.numeric
def test_a_whole_fit_is_never_worse_and_the_same_twice(model_directory, texts, tmp_path):
    directory = model_directory("rotary")
    files = {"calibration": texts["calib"], "evaluation": texts["val"], "memory": "1MB", **SMALL}
    plain = bytecap.fit(directory, BUDGET, **files)
    found, again = (
        bytecap.fit(directory, BUDGET, output=tmp_path / f"{i}.bcap", recover="4", **files) for i in range(2)
    )
    assert found.data == again.data == (tmp_path / "0.bcap").read_bytes()
    assert found.length <= BUDGET
    report = found.report
    assert report["predicted_delta_nats"] <= plain.report["predicted_delta_nats"]
    assert report["without_recovery"]["kl_nats"] == pytest.approx(plain.report["kl_nats"])
    if found.before is None:
        assert found.data == plain.data
    else:
        assert found.before.data == plain.data
        assert report["predicted_delta_nats"] < plain.report["predicted_delta_nats"]
    values = bytecap.load(tmp_path / "0.bcap")
    assert values.keys() == plain.tensors().keys()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["0.bcap", "1.bcap"]


@pytest.mark.parametrize("kind", ["bcap", "gguf", "mlx"])
def test_recovery_streams_in_every_format(kind):
    assert memory._reason(FitConfig(BUDGET, recover="5", format=kind)) is None
