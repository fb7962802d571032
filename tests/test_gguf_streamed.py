"""GGUF files of streamed models, held against those of models in memory."""

from __future__ import annotations

import pytest

import bytecap
from bytecap.job.config import FitConfig
from bytecap.pipeline import memory
from bytecap.progress import Silent
from conftest import SMALL

pytest.importorskip("gguf")


class Told(Silent):
    """Keeps what a job says."""

    def __init__(self):
        self.notes = []

    def note(self, message, *_):
        self.notes.append(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"),
    [("rotary", 60_000), pytest.param("biased", 60_000, marks=pytest.mark.numeric), ("transposed", 85_000)],
)
def test_a_streamed_fit_gives_the_file_of_one_in_memory(
    model_directory, texts, tmp_path, kind, size, monkeypatch
) -> None:
    directory, told, found = model_directory(kind, num_hidden_layers=3), Told(), []
    for i, more in enumerate(({}, {"memory": "1MB"})):
        with monkeypatch.context() as patch:
            if not more:  # which alone would have targets behind the coded prefix
                patch.setattr("bytecap.runtimes.gguf.plan.follow_prefix", lambda *given: given[-1])
            found.append(bytecap.fit(
                directory, size, format="gguf", output=tmp_path / f"{i}.gguf", reporter=told,
                calibration=texts["calib"], evaluation=texts["val"], **more, **SMALL,
            ))  # fmt: skip
    assert len([n for n in told.notes if "the model is streamed" in n]) == 1
    assert len([n for n in told.notes if "need the model in memory: left out" in n]) == 1
    one, two = (f.report for f in found)
    assert two["file_bytes"] == found[1].path.stat().st_size <= size
    assert two["kl_nats"] == pytest.approx(one["kl_nats"], rel=0.05)
    same = sum(found[0].types[n] == t for n, t in found[1].types.items())
    assert same >= 0.8 * len(found[0].types)  # metrics are symmetric to the last bit only when streamed


@pytest.mark.parametrize(
    ("options", "reason"), [({"format": "mlx"}, "the format mlx needs it in memory"), ({"recover": 1}, "recovery")]
)
def test_what_is_not_streamed_says_so(model_directory, options, reason) -> None:
    config, told = FitConfig(10**9, **{"format": "gguf", "memory": "1MB", **options}), Told()
    with memory.opened(model_directory("rotary"), config, "cpu", told, None):
        pass
    assert len(told.notes) == 1
    assert "is not streamed" in told.notes[0]
    assert reason in told.notes[0]
