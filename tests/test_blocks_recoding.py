"""Tensors of blocks coded anew in a recovery: from the model's own values, in their types, group after group."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bytecap.allocation.asymmetric_targets import order_of
from bytecap.job.effort import Effort
from bytecap.model.quantized_copy import copy_of
from bytecap.pipeline import fit_directory as directories
from bytecap.recovery import loop
from bytecap.recovery.group_walk import GroupWalk
from bytecap.recovery.kl_passes import Passes
from bytecap.recovery.loop import Clock
from bytecap.runtimes.gguf import recoding, tuning
from bytecap.runtimes.gguf.recoding import BlockUnits, code_anew
from bytecap.types import as_matrix
from conftest import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def planned(model_directory, texts):
    """Job, tensors, coding and plan of a tiny model, as recovery is given them."""
    seen, patch = [], pytest.MonkeyPatch()

    def spy(job, layout, items, coding, found, *_):
        del layout
        seen.append((job, items, coding, found))
        return found, {}

    patch.setattr(directories, "tune_blocks", spy)
    directories.fit_directory(
        model_directory("rotary"), 26_000, format="mlx", calibration=texts["calib"], evaluation=texts["val"],
        recover="6", **SMALL,
    )  # fmt: skip
    patch.undo()
    return seen[0]


def test_values_begin_as_the_models_own(planned):
    job, items, *_ = planned
    units = BlockUnits(*planned)
    assert set(units.names) == {i.place.unit for i in items}
    for n, value in units.values().items():
        assert torch.allclose(value, job.model.module.state_dict()[n].float(), atol=1e-6)
    assert [n for group in units.groups(3) for n in group] == units.names
    assert 1 < len(units.groups(3)) <= 3
    assert units.groups(1) == [units.names]


def test_moves_are_in_steps_of_what_rounding_left(planned):
    _, items, _, found = planned
    units = BlockUnits(*planned)
    item = items[-1]
    name, before = item.place.unit, units.values([item.place.unit])[item.place.unit].clone()
    units.tuned()[name].add_(0.5)
    unit = next(u for u in planned[0].model.units if u.name == name)
    step = 2 * as_matrix(unit, units.values([name])[name] - before)
    assert torch.allclose(units.slope(name, torch.ones_like(before)), step, atol=1e-6)
    error = torch.from_numpy(found.rounded[item.place.name].values - item.weight)[:, :32]
    assert torch.allclose(step[:, 0], (12 * error.double().square().mean(1)).sqrt().float(), rtol=1e-3, atol=1e-5)


def test_what_is_coded_is_what_a_file_holds(planned):
    units = BlockUnits(*planned)
    first, second = units.names[1:3]
    change = torch.full_like(units.tuned()[second], 0.01)
    moved = units.move({second: change})[second]
    assert torch.allclose(moved - planned[0].model.module.state_dict()[second].float(), change, atol=1e-5)
    found = units.round([first], {})
    assert torch.equal(torch.from_numpy(found[first]), units.values()[first])
    assert not units.waits(first)
    assert units.waits(second)
    assert first not in units.tuned()
    (tensor,) = [i for i in planned[1] if i.place.unit == first]
    assert (units.rounded[tensor.place.name].values == found[first].reshape(tensor.shape)).all()


def test_no_change_moves_nothing(planned):
    assert BlockUnits(*planned).move({}) == {}


def test_a_batch_that_is_not_finite_ends_tuning_and_no_more(planned, monkeypatch):
    job, items, *_ = planned
    units, quantized_copy = BlockUnits(*planned), copy_of(job.model.module)
    passes, clock = Passes(job, quantized_copy), Clock(Effort(steps=12), lambda _: None)
    strange = lambda names: (float("nan"), {n: torch.full((), float("nan")) for n in names})  # noqa: E731
    monkeypatch.setattr(passes, "gradients", strange)
    code_anew(units, passes, quantized_copy, GroupWalk(job, [], strength=1.0, tokens=256), clock)
    assert clock.iterations == 1
    assert set(units.rounded) == {i.place.name for i in items}
    assert all(bool(v.isfinite().all()) for v in units.values().values())


def test_everything_is_coded_once_within_the_effort(planned, monkeypatch):
    monkeypatch.setattr(recoding, "GROUPS", 4)
    job, items, _, found = planned
    units, quantized_copy = BlockUnits(*planned), copy_of(job.model.module)
    order = order_of([u for u in job.model.units if u.name in units.names], job.model.module,
                     job.sets.statistics, "cpu")  # fmt: skip
    passes, clock = Passes(job, quantized_copy), Clock(Effort(steps=6), lambda _: None)
    code_anew(units, passes, quantized_copy, GroupWalk(job, order, strength=1.0, tokens=256), clock)
    assert clock.iterations == passes.iterations == 6
    assert set(units.rounded) == {i.place.name for i in items}
    assert {n: r.codes.format for n, r in units.rounded.items() if r.codes} == {
        n: r.codes.format for n, r in found.rounded.items() if r.codes
    }
    held = quantized_copy.state_dict()
    assert all(torch.equal(held[n].float(), v) for n, v in units.values().items())


def test_new_codes_that_take_the_time_leave_it_to_scales(planned, monkeypatch):
    job, items, coding, found = planned
    notes, efforts = [], []
    monkeypatch.setattr(tuning, "_iterations", lambda *_: 1000.0)
    monkeypatch.setattr(tuning, "code_anew", lambda *_: False)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 7.0))  # it stands still

    def scales(*given):
        *_, clock, start = given
        efforts.append(clock.left)
        return start, None

    monkeypatch.setattr(tuning, "_tune_numbers", scales)
    timed = replace(
        job, recover=Effort(seconds=1000.0), reporter=SimpleNamespace(step=job.reporter.step, note=notes.append)
    )
    kept, record = tuning.tune_blocks(timed, None, items, coding, found)
    assert kept is found
    assert efforts == [1000.0]  # not the 300 that scales have behind new codes
    assert any("half of the time" in n for n in notes)
    assert record["stages"][0]["kl"] == record["kl_before"]


@pytest.mark.parametrize(
    ("name", "types", "budget"), [("mlx", None, 26_000), ("compressed-tensors", ["w4g32a", "w4c"], 45_000)]
)
def test_recovery_keeps_bytes_and_types_and_lowers_the_kl(
    name, types, budget, model_directory, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(tuning, "_MANY", 30)
    report = directories.fit_directory(
        model_directory("rotary"), budget, format=name, calibration=texts["calib"], evaluation=texts["val"],
        output=tmp_path / "model", types=types, recover="30", **SMALL,
    ).report  # fmt: skip
    before = report["without_recovery"]
    assert sum(f.stat().st_size for f in (tmp_path / "model").iterdir()) == report["file_bytes"] <= budget
    assert [s["stage"] for s in report["recovery"]["stages"]] == ["codes", "scales and vectors"]
    assert min(s["kl"] for s in report["recovery"]["stages"]) < report["recovery"]["kl_before"]
    assert report["kl_nats"] < before["kl_nats"] + 3 * before["kl_difference_stderr"]


def test_efforts_of_few_iterations_keep_codes(planned):
    job, items, *_ = planned
    passes = Passes(job, copy_of(job.model.module))
    assert tuning._iterations(Effort(steps=30), passes, items) == 30
    assert passes.iterations == 0
    assert 0 < tuning._iterations(Effort(seconds=1.0), passes, items) < 1e6
    assert passes.iterations == 2


@pytest.mark.parametrize(
    ("effort", "iterations", "anew"), [("200", 200, True), ("60s", 200, False), ("60s", 400, True), ("50", 50, False)]
)
def test_a_time_needs_more_iterations_for_new_codes_since_codings_take_some_of_it(
    planned, monkeypatch, effort, iterations, anew
):
    job, items, coding, found = planned
    monkeypatch.setattr(tuning, "_iterations", lambda *_: float(iterations))
    for stage in ("_code", "_tune_numbers"):
        monkeypatch.setattr(tuning, stage, lambda *given: (given[-1], None))
    _, record = tuning.tune_blocks(replace(job, recover=Effort.parse(effort)), None, items, coding, found)
    assert [s["stage"] for s in record["stages"]] == ["codes"] * anew + ["scales and vectors"]
