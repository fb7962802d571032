"""Bounds on what torch reserves of a GPU: an allocator that is stood in for, and a real one where there is a GPU."""

from types import SimpleNamespace

import pytest
import torch

import bytecap
from bytecap.errors import ShortageError
from bytecap.job.config import FitConfig
from bytecap.pipeline import memory
from bytecap.progress import Silent
from bytecap.system import device_memory
from bytecap.system.device_memory import allowed, bounded
from conftest import BUDGET, SMALL

DEVICE = torch.device("cuda", 0)
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


class Gpu:
    """The settings of an allocator on a GPU of 100 GB."""

    def __init__(self, monkeypatch, settings="", grows=True):
        self.fraction, self.settings, self.set = 1.0, settings, []
        self.probe = None

        def segments():
            at = self.probe.data_ptr()
            return [{"address": at, "total_size": 2**25, "is_expandable": grows and "s:True" in self.settings}]

        def set_fraction(fraction):
            self.fraction = fraction

        def empty(*args, device=None, **more):
            if device != "cuda":
                return inner(*args, device=device, **more)
            if grows is None:
                raise RuntimeError("driver error")
            self.probe = inner(*args, **more)
            return self.probe

        inner = torch.empty
        for name, value in {
            "get_device_properties": lambda _: SimpleNamespace(total_memory=100 * 10**9),
            "get_per_process_memory_fraction": lambda *_: self.fraction,
            "set_per_process_memory_fraction": set_fraction,
            "current_device": lambda: 0,
            "empty_cache": lambda: None,
            "memory_snapshot": segments,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(device_memory, "_settings", lambda: (self.write, self.settings))
        monkeypatch.setattr(device_memory.torch, "empty", empty)

    def write(self, settings):
        self.settings = settings


def test_a_bound_stands_as_long_as_the_job(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert allowed(DEVICE) == 100 * 10**9
    with bounded(24 * 10**9) as holds:
        assert holds
        assert gpu.fraction == 0.24
        assert allowed(DEVICE) == 24 * 10**9
        assert gpu.settings == "expandable_segments:True"
    assert (gpu.fraction, gpu.settings) == (1.0, "expandable_segments:False")
    with pytest.raises(KeyError), bounded(24 * 10**9):
        raise KeyError
    assert (gpu.fraction, gpu.settings) == (1.0, "expandable_segments:False")


def test_a_smaller_bound_of_the_process_stays(monkeypatch):
    gpu = Gpu(monkeypatch)
    gpu.fraction = 0.1
    with bounded(24 * 10**9):
        assert gpu.fraction == 0.1
    assert gpu.fraction == 0.1


def test_other_settings_stay_as_they_are(monkeypatch):
    gpu = Gpu(monkeypatch, "garbage_collection_threshold:0.8")
    with bounded(10**9):
        assert gpu.settings == "garbage_collection_threshold:0.8,expandable_segments:True"
    assert gpu.settings == "garbage_collection_threshold:0.8,expandable_segments:False"


@pytest.mark.parametrize("chosen", [True, False])
def test_what_the_user_has_chosen_stays(monkeypatch, chosen):
    gpu = Gpu(monkeypatch, f"expandable_segments:{chosen}")
    with bounded(10**9) as holds:
        assert holds == chosen
        assert gpu.fraction == (0.01 if chosen else 1.0)
        assert gpu.settings == f"expandable_segments:{chosen}"


@pytest.mark.parametrize("grows", [False, None])
def test_nothing_is_bounded_where_segments_do_not_grow(monkeypatch, grows):
    gpu = Gpu(monkeypatch, grows=grows)
    with bounded(10**9) as holds:
        assert not holds
        assert (gpu.fraction, gpu.settings) == (1.0, "expandable_segments:False")


def test_nothing_is_bounded_without_a_bound_or_by_an_old_torch(monkeypatch):
    with bounded(None) as holds:
        assert not holds
    Gpu(monkeypatch)
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert allowed(DEVICE) == 100 * 10**9
    with bounded(10**9) as holds:
        assert not holds


def test_settings_are_read_and_written_by_torch_itself():
    write, before = device_memory._settings()
    write(f"{before},garbage_collection_threshold:0.8" if before else "garbage_collection_threshold:0.8")
    assert "threshold:0.8" in device_memory._settings()[1]
    write(before)
    assert device_memory._settings()[1] == before


LEAST = memory._BASE["cuda"]  # and what the tiny model's largest tensor takes


@pytest.mark.parametrize(
    ("size", "more", "most"),
    [
        ("24GB", {}, 24 * 10**9),
        ("1MB", {}, LEAST),
        ("1MB", {"method": "uniform"}, None),
        ("24GB", {"format": "gguf"}, None),
        (None, {}, None),
    ],
)
def test_a_job_is_bounded_where_its_need_is_known(model_directory, monkeypatch, size, more, most):
    gpu, told = Gpu(monkeypatch), Silent()
    monkeypatch.setattr(memory, "free", lambda _: 10**11)
    monkeypatch.setattr(memory, "open_streamed", lambda *_, **__: "streamed")
    with memory.opened(model_directory("rotary"), FitConfig(10**9, memory=size, **more), "cuda", told, None) as found:
        assert gpu.fraction == (1.0 if most is None else pytest.approx(most / 100e9, rel=0.01))
        assert (found == "streamed") == (most == LEAST)
    assert gpu.fraction == 1.0
    says = [n for n in told.notes if "reserves at most" in n]
    assert len(says) == (most is not None)
    for note in says:
        assert note.startswith(f"torch reserves at most {most / 1e9:.1f} GB of the GPU")
        assert ("more than --memory" in note) == (most == LEAST)


def test_a_model_that_cannot_be_streamed_is_not_bounded(model_directory, monkeypatch):
    def refuse(*_, **__):
        raise memory.Unstreamable("it has no chain")

    gpu, told = Gpu(monkeypatch), Silent()
    monkeypatch.setattr(memory, "open_streamed", refuse)
    with memory.opened(model_directory("rotary"), FitConfig(10**9, memory="1MB"), "cuda", told, None):
        assert gpu.fraction == 1.0
    assert len(told.notes) == 1


def test_a_driver_without_such_segments_is_said(model_directory, monkeypatch):
    gpu, told = Gpu(monkeypatch, grows=False), Silent()
    with memory.opened(model_directory("rotary"), FitConfig(10**9, memory="24GB"), "cuda", told, None):
        assert gpu.fraction == 1.0
    assert told.notes == [
        "torch may reserve more of the GPU than --memory says: the driver or this torch has no segments that grow"
    ]


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "out of memory within the 24.0 GB of the GPU .* larger --memory",
        ),
        (MemoryError("statistics: the device's memory does not hold one window"), "out of .* larger --memory"),
        (MemoryError(), "short"),
    ],
)
def test_memory_that_ends_within_a_bound_names_it(model_directory, monkeypatch, cause, said):
    Gpu(monkeypatch)
    config = FitConfig(10**9, memory="24GB")
    with (
        pytest.raises(ShortageError, match=said),
        memory.opened(model_directory("rotary"), config, "cuda", Silent(), None),
    ):
        raise ShortageError("short") from cause


@pytest.mark.slow
@with_cuda
def test_a_gpu_keeps_to_the_bound():
    torch.cuda.reset_peak_memory_stats()
    with bounded(2 * 10**9) as holds:
        assert holds
        kept = []
        for size in (200, 300, 250, 350, 150, 400) * 3:  # more than the bound in all; little of it at a time
            for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
                with torch.cuda.stream(stream):
                    large = torch.empty(size * 10**6, dtype=torch.uint8, device="cuda")
                    kept.append(torch.empty(2**20, dtype=torch.uint8, device="cuda"))
                    del large
        assert torch.cuda.max_memory_reserved() <= 2 * 10**9
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda")
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
    assert torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda").numel()


@pytest.mark.slow
@with_cuda
def test_a_fit_on_a_gpu_keeps_to_the_bound(model_directory, texts, tmp_path):
    files = {"calibration": texts["calib"], "evaluation": texts["val"]}
    made = []
    for size in ("4GB", "1MB"):  # in memory, and streamed in what that takes at least
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        out = tmp_path / f"{size}.bcap"
        made.append(
            bytecap.fit(model_directory("rotary"), BUDGET, output=out, device="cuda", memory=size, **files, **SMALL)
        )
        assert torch.cuda.max_memory_reserved() <= 1.01 * (4e9 if size == "4GB" else LEAST)
    assert all(m.length <= BUDGET for m in made)
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
