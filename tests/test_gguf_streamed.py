"""GGUF files of streamed models, held against those of models in memory."""

from __future__ import annotations

import pytest

import bytecap
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline import memory
from bytecap.progress import Silent
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


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"format": "mlx", "recover": 1}, "recovery of the format mlx"), ({"recover": 1}, "recovery")],
)
def test_what_is_not_streamed_says_so(model_directory, options, reason) -> None:
    config, told = FitConfig(10**9, **{"format": "gguf", "memory": "1MB", **options}), Silent()
    with memory.opened(model_directory("rotary"), config, "cpu", told, None):
        pass
    assert len(told.notes) == 1
    assert "is not streamed" in told.notes[0]
    assert reason in told.notes[0]
