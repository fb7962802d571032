"""Recovery of streamed models: block by block, integers and bytes stay, one block is in memory at a time."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

import bytecap
from bytecap.allocation import preparation
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.job.effort import Effort
from bytecap.model.sources import load_sets
from bytecap.model.streamed_checkpoint import open_streamed
from bytecap.model.streaming import Streamed
from bytecap.pipeline import memory
from bytecap.progress import Silent
from bytecap.quantization.options import Options
from bytecap.quantization.rules import initial_rules
from bytecap.recovery import streamed
from bytecap.recovery.parameters import moves
from bytecap.system.scratch import Scratch
from conftest import BUDGET, SMALL


@pytest.fixture
def tuned(model_directory, texts, tmp_path):
    """Function: a streamed model's plan before and after a recovery, the job and the record."""

    def run(effort="30", kind="rotary", **changes):
        model = open_streamed(model_directory(kind, num_hidden_layers=3, **changes), Scratch(tmp_path))
        sets = load_sets(
            model, texts["calib"], texts["val"], tokens=1500, evaluation_tokens=600, window=64, reporter=Silent()
        )
        config = FitConfig(BUDGET)
        job = Job(model, sets, BUDGET, lambda *_: 0, "cpu", Silent(), config, recover=Effort.parse(effort))
        planner = preparation.prepare_streamed(job, model, Options()).planner
        multipliers, size = dict.fromkeys(planner.names, 1.0), planner.parameters * 3 // 8
        _, state = planner.search(multipliers, size, initial_rules(planner.options), start=planner.first_step(size))
        names = [p.unit.name for p in planner.matrices if moves(p)]
        found, record = streamed.tune_streamed(job, model.streamed, planner, state, names[-1:])
        return job, planner, state, names, found, record

    return run


@pytest.mark.slow
@pytest.mark.numeric
class TestBlocks:
    @pytest.mark.parametrize("kind", ["rotary", "biased", "transposed"])
    def test_integers_stay_and_no_block_is_worse(self, tuned, kind, monkeypatch):
        monkeypatch.setitem(streamed._A_PASS, "cpu", 256)
        job, planner, state, _, found, record = tuned(kind=kind)
        (stage,) = record["stages"]
        assert stage["moves"] == 30
        assert len(stage["blocks"]) == 3
        assert all(after <= before for before, after in stage["blocks"])
        assert any(after < before for before, after in stage["blocks"])
        assert sum("codes stay" in note for note in job.reporter.notes) == 1
        assert [i for _, i, _ in record["curve"]] == [0, 30]
        if found is None:
            assert record["curve"][1][2] >= record["kl_before"]
            return
        units, after = found
        assert record["curve"][1][2] < record["kl_before"]
        changed = 0
        for name, coded in state.coded.items():
            assert np.array_equal(coded.code.symbols, after.coded[name].code.symbols)
            ratio = after.coded[name].code.step / coded.code.step
            assert ratio == pytest.approx(after.steps[name] / state.steps[name], rel=1e-6)
            assert np.allclose(units.decode(after, name), ratio * planner.decode(state, name), rtol=1e-5)
            changed += ratio != 1
        assert changed

    def test_what_a_block_is_left_with_is_what_is_stored(self, tuned, monkeypatch):
        seen, inner = {}, streamed._Walk._tune

        def spied(walk, number, block, *others):
            inner(walk, number, block, *others)
            seen.update({walk._copy.first[f"{walk._copy.chain.path}.{number}.{n}"]: p.detach().clone()
                         for n, p in block.named_parameters()})  # fmt: skip

        monkeypatch.setattr(streamed._Walk, "_tune", spied)
        kl = iter([1.0, 0.5])
        monkeypatch.setattr(streamed.Passes, "check", lambda _: next(kl))
        *_, (planner, state), _ = tuned()
        assert len(seen) > 20
        for name, value in seen.items():
            assert np.allclose(planner.decode(state, name).reshape(value.shape), value.numpy(), atol=1e-6), name

    def test_one_block_of_one_model_is_in_memory_at_a_time(self, tuned, monkeypatch):
        held, most, inner = [], [], Streamed.block

        @contextmanager
        def watched(self, number, cache=None):
            with inner(self, number, cache) as block:
                held.append(number)
                most.append(len(held))
                yield block
                held.remove(number)

        monkeypatch.setattr(streamed._Walk, "run", _watching(streamed._Walk.run, monkeypatch, watched))
        job, *_ = tuned("3")
        assert len(most) == 6
        assert max(most) == 1
        assert all(p.is_meta for p in job.model.module.parameters())

    def test_without_time_nothing_changes(self, tuned):
        _, _, state, _, found, record = tuned("0.001s")
        assert record["stages"][0]["moves"] <= 1
        assert found is None or found[1].coded.keys() == state.coded.keys()

    def test_a_target_follows_its_step_where_it_may_be_rounded_anew(self, tuned, monkeypatch):
        kl = iter([1.0, 0.5])
        monkeypatch.setattr(streamed.Passes, "check", lambda _: next(kl))
        _, planner, state, names, (units, after), _ = tuned()
        for n, old, new in zip(names, planner.matrices, units.matrices, strict=True):
            scale = after.steps[n] / state.steps[n] if n == names[-1] else 1.0
            assert torch.allclose(new.weight, old.weight * scale, atol=1e-6)


def _watching(run, monkeypatch, watched):
    def inside(*args):
        with monkeypatch.context() as m:
            m.setattr(Streamed, "block", watched)
            return run(*args)

    return inside


@pytest.mark.slow
@pytest.mark.numeric
def test_a_whole_fit_is_never_worse_and_the_same_twice(model_directory, texts, tmp_path):
    directory = model_directory("rotary", num_hidden_layers=3)
    files = {"calibration": texts["calib"], "evaluation": texts["val"], "memory": "1MB", **SMALL}
    plain = bytecap.fit(directory, BUDGET, **files)
    found, again = (
        bytecap.fit(directory, BUDGET, output=tmp_path / f"{i}.bcap", recover="24", **files) for i in range(2)
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


def test_what_recovery_needs_in_memory_is_named():
    assert memory._reason(FitConfig(BUDGET, recover="5")) is None
    said = memory._reason(FitConfig(BUDGET, recover="5", format="gguf"))
    assert said == "recovery of the format gguf needs it in memory"
