"""Files behind a streamed fit: shards, work files, and the file that is read back a unit at a time."""

import gc
import os
import shutil
import signal

import numpy as np
import pytest
import torch

import bytecap
from bytecap.errors import CheckpointError, CorruptError, NotAnArtifact, OutputError, ShortageError
from bytecap.format import container
from bytecap.format.decoder import Decoded, Ideal
from bytecap.format.filebytes import FileBytes
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.streamed_checkpoint import open_streamed
from bytecap.pipeline import stages
from bytecap.quantization.stored import StoredCoded, StoredPrepared
from bytecap.system import allocator
from bytecap.system.scratch import Scratch
from conftest import BUDGET, SMALL
from forks import child


@pytest.fixture
def shards(model_directory, tmp_path):
    """A private copy of a model in several files."""
    directory = tmp_path / "shards"
    module = load_checkpoint(model_directory("rotary", num_hidden_layers=4)).module
    module.save_pretrained(directory, max_shard_size="30KB")
    shutil.copy(model_directory("rotary") / "tokenizer.json", directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def test_a_missing_or_cut_shard_is_named_before_work_begins(refused, job, shards):
    last = max(shards.glob("*.safetensors"))
    content = last.read_bytes()
    last.write_bytes(content[:-8])
    assert f"{last} is truncated" in refused(*job(shards), "--memory", "1MB", "--method", "bytecap")
    last.unlink()
    assert f"names {last.name}, which is missing" in refused(*job(shards), "--memory", "1MB", "--method", "bytecap")


def test_a_shard_that_shrinks_meanwhile_is_named(shards):
    streamed = open_streamed(shards, Scratch())
    for shard in shards.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="has become shorter"):
        _ = [streamed.tensor(unit) for unit in streamed.units]
    for shard in shards.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        streamed.tensor(streamed.units[0])


def test_weights_that_are_not_finite_are_named(shards):
    from safetensors.torch import load_file, save_file

    shard = min(shards.glob("*.safetensors"))
    tensors = load_file(shard)
    name = min(tensors)
    tensors[name].reshape(-1)[3] = torch.inf
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {name} holds inf"):
        open_streamed(shards, Scratch())


def test_a_full_disk_is_one_line(monkeypatch):
    scratch = Scratch()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    with pytest.raises(OutputError, match=r"No space left on device.*TMPDIR") as caught:
        scratch.put(torch.ones(3))
    assert "\n" not in str(caught.value)
    assert [p.name for p in scratch.directory.iterdir()] == ["lock"]


def test_work_files_go_with_what_they_hold(tmp_path):
    scratch = Scratch(tmp_path)
    kept = scratch.put(torch.ones(3, dtype=torch.bfloat16))
    assert kept.load().dtype == torch.bfloat16
    assert len(list(scratch.directory.iterdir())) == 2
    del kept
    assert [p.name for p in scratch.directory.iterdir()] == ["lock"]
    scratch.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="no work files can be made"):
        Scratch(tmp_path / "nowhere")


def test_work_files_of_a_killed_job_are_removed_by_the_next(tmp_path):
    def work():
        dying = Scratch(tmp_path)
        dying.put(torch.ones(3))
        os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "bytecap-work-of-mine").mkdir()  # holds no lock: not ours
    living = Scratch(tmp_path)
    kept = living.put(torch.ones(3))
    assert child(work) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    other = Scratch(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "bytecap-work-of-mine", living.directory.name, other.directory.name,
    }  # fmt: skip
    assert kept.load().tolist() == [1, 1, 1]


def test_small_tensors_may_stay_in_memory(tmp_path):
    scratch = Scratch(tmp_path, memory=16)
    first, second = scratch.put(torch.ones(3)), scratch.put(torch.ones(2))
    assert first.memory is not None
    assert second.memory is None
    del first
    assert scratch.put(torch.ones(4)).memory is not None


@pytest.mark.slow
def test_factors_and_integers_are_gone_before_the_evaluation(model_directory, texts, monkeypatch):
    """Without the help of the collector, which may not run for minutes."""
    found, deliver = [], stages._deliver

    def spy(*args):
        found.extend(type(o) for o in gc.get_objects() if isinstance(o, StoredPrepared | StoredCoded))
        deliver(*args)

    monkeypatch.setattr(stages, "_deliver", spy)
    files = {"calibration": texts["calib"], "evaluation": texts["val"], **SMALL}
    for _ in range(2):  # compiling a loop within a fit leaves cycles of its own; what is compiled does not come again
        found.clear()
        gc.collect()
        gc.disable()
        try:
            bytecap.fit(model_directory("rotary"), BUDGET, memory="1MB", **files)
        finally:
            gc.enable()
        if not found:
            break
    assert found == []


def test_memory_that_ends_names_the_option():
    with pytest.raises(ShortageError, match="--memory"), allocator.stated(5, streamed=True):
        raise MemoryError
    with pytest.raises(ShortageError, match="--memory SIZE streams it"), allocator.stated(5):
        raise MemoryError


@pytest.mark.coverage
def test_units_of_an_open_file_are_read_when_they_are_asked_for(fitted, tmp_path):
    artifact, path = fitted()
    opened, read = container.open_file(path), container.read(path)
    assert [(u.unit, u.tag, u.length, u.data) for u in opened.units] == [
        (u.unit, u.tag, u.length, u.data) for u in read.units
    ]
    assert container.serialize(opened) == artifact.data
    assert container.size(opened) == len(artifact.data)
    shorter = tmp_path / "shorter.bcap"
    shutil.copy(path, shorter)
    found = FileBytes(shorter)
    shorter.write_bytes(b"")
    with pytest.raises(CorruptError, match="has become shorter"):
        found[:4]
    with pytest.raises(NotAnArtifact):
        container.open_file(tmp_path / "none.bcap")


@pytest.mark.coverage
@pytest.mark.parametrize("threads", [1, 3])
def test_values_are_decoded_one_unit_at_a_time(fitted, threads, monkeypatch):
    artifact, path = fitted()
    ideal, together = Ideal(), Ideal()
    found = Decoded(container.open_file(path), ideal, threads)
    expected = bytecap.load(path)
    assert len(found) == len(list(found)) == len(artifact.contents.units)
    for name in [*found, *found]:
        assert np.array_equal(found[name], expected[name])
    from bytecap.format.decoder import decode_units

    decode_units(artifact.contents, observe=together)
    assert ideal.bytes(1000) == together.bytes(1000)
    monkeypatch.setattr("bytecap.format.decoder.AHEAD", 1)
    assert np.array_equal(found[next(iter(found))], expected[next(iter(found))])


@pytest.mark.coverage
def test_a_unit_that_cannot_be_decoded_is_named(fitted):
    artifact, _ = fitted()
    units = [container.UnitSection(u.unit, u.tag, b"") for u in artifact.contents.units]
    broken = Decoded(container.Contents(tuple(units), artifact.contents.tables, (), {}))
    with pytest.raises(CorruptError, match=r"unit model\.embed_tokens\.weight"):
        broken["model.embed_tokens.weight"]
