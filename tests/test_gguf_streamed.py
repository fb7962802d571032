"""GGUF files of streamed models, held against those of models in memory."""

from __future__ import annotations

import pytest
import torch

import bytecap
from bytecap.job.config import FitConfig
from bytecap.model import streaming
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline import memory
from bytecap.pipeline.runtime_model import opened
from bytecap.progress import Silent
from bytecap.runtimes.gguf import streamed_tuning
from bytecap.runtimes.gguf.export import write_plain
from bytecap.runtimes.gguf.places import layout_of
from conftest import SMALL

pytest.importorskip("gguf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"),
    [("rotary", 60_000), pytest.param("biased", 60_000, marks=pytest.mark.numeric), ("transposed", 85_000)],
)
def test_a_streamed_fit_gives_the_file_of_one_in_memory(model_directory, texts, tmp_path, kind, size) -> None:
    directory, told, found = model_directory(kind, num_hidden_layers=3), Silent(), []
    for i, more in enumerate(({}, {"memory": "1MB"})):
        found.append(bytecap.fit(
            directory, size, format="gguf", output=tmp_path / f"{i}.gguf", reporter=told,
            calibration=texts["calib"], evaluation=texts["val"], **more, **SMALL,
        ))  # fmt: skip
    assert len([n for n in told.notes if "the model is streamed" in n]) == 1
    one, two = (f.report for f in found)
    assert two["file_bytes"] == found[1].path.stat().st_size <= size
    assert found[0].types == found[1].types
    assert found[0].path.read_bytes() == found[1].path.read_bytes()
    assert two["kl_nats"] == pytest.approx(one["kl_nats"], rel=1e-6)


@pytest.mark.slow
def test_a_template_serves_a_streamed_fit(model_directory, texts, tmp_path) -> None:
    directory, told, found = model_directory("rotary"), Silent(), []
    model = load_checkpoint(directory)
    write_plain(model, layout_of(model), tmp_path / "f16.gguf", "F16")
    for i, more in enumerate(({}, {"memory": "1MB"})):
        found.append(bytecap.fit(
            directory, "14bpp", format="gguf", template=tmp_path / "f16.gguf", output=tmp_path / f"{i}.gguf",
            calibration=texts["calib"], evaluation=texts["val"], reporter=told, **more, **SMALL,
        ))  # fmt: skip
    assert len([n for n in told.notes if "the model is streamed" in n]) == 1
    assert found[0].path.read_bytes() == found[1].path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("gguf", 60_000), ("mlx", 30_000)])
def test_recovery_of_a_streamed_fit_moves_numbers_of_blocks(
    model_directory, texts, tmp_path, kind, size, monkeypatch
) -> None:
    directory, told, starts = model_directory("rotary", num_hidden_layers=3), Silent(), {}
    moved, tune = [], streamed_tuning.tune_values

    def watched(job, model, source, values):
        with streaming.of(source.module).block(1) as module:  # at the start tensors are what is coded
            own = dict(module.named_parameters())
            found = values.weights(1, module)
            starts.update({n: float((v.detach() - own[n]).abs().max()) for n, v in found.items()})
        plan = values.settle()
        done, tuned = tune(job, model, source, values), values.settle()
        pairs = [(r.codes, plan.rounded[n].codes) for n, r in tuned.rounded.items()]
        coded = [(new, old) for new, old in pairs if new is not None and old is not None]  # read while work files last
        moved.append(any((new.scale != old.scale).any() for new, old in coded))
        moved.append(any((v != plan.vectors[n]).any() for n, v in tuned.vectors.items()))
        moved.append(any((new.codes != old.codes).any() for new, old in coded))
        return done

    monkeypatch.setattr(streamed_tuning, "tune_values", watched)
    result = bytecap.fit(
        directory, size, format=kind, output=tmp_path / f"out.{kind}", calibration=texts["calib"], memory="1MB",
        evaluation=texts["val"], recover="12", reporter=told, **SMALL,
    )  # fmt: skip
    assert {"input_layernorm.weight", "post_attention_layernorm.weight"} < starts.keys()  # and what is in blocks
    assert max(starts.values()) < 1e-3
    assert any("scales, minimums, norms and biases" in n for n in told.notes)
    record = result.report["recovery"]
    assert record["stages"][0]["moves"] == 12
    assert record["stages"][0]["kl"] <= record["kl_before"]
    assert moved == [True, True, False]  # scales, norms, codes
    assert result.report["file_bytes"] <= size


@pytest.mark.parametrize("moves", [0, 1])  # that succeed: while it is opened, and behind that
def test_no_work_files_stay_where_a_device_has_no_room(model_directory, tmp_path, monkeypatch, moves) -> None:
    move, done = streaming.Streamed.to, []

    def full(streamed, device):
        if len(done) == moves:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(move(streamed, device))

    monkeypatch.setattr(streaming.Streamed, "to", full)
    config = FitConfig(10**9, memory="1MB", output=tmp_path / "out.gguf", format="gguf", reporter=Silent())
    with pytest.raises(torch.OutOfMemoryError) as caught, opened(model_directory("rotary"), [config]):
        pass
    assert caught.value.__traceback__ is not None  # holds the model, which would hold its work files
    assert not list(tmp_path.iterdir())


def test_what_is_not_streamed_says_so(model_directory) -> None:
    config, told = FitConfig(10**9, method="golf", memory="1MB"), Silent()
    with memory.opened(model_directory("rotary"), config, "cpu", told, None):
        pass
    assert len(told.notes) == 1
    assert "is not streamed: method golf needs it in memory" in told.notes[0]
