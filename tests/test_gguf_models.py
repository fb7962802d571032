"""A `.gguf` file as MODEL: what transformers reads of it is what is fitted, measured against, and kept."""

import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch

import bytecap
from bytecap.errors import CheckpointError
from bytecap.model.building import unheard
from bytecap.model.checkpoint import load_checkpoint
from bytecap.runtimes.gguf.export import write_plain
from bytecap.runtimes.gguf.file import read_units
from bytecap.runtimes.gguf.places import layout_of
from conftest import SMALL

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
IDS = torch.randint(2, 250, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(model_directory):
    return load_checkpoint(model_directory("rotary"))


@pytest.fixture(scope="module")
def path(source, tmp_path_factory):
    """A file of the tiny model in 16 bits, whose values it holds exactly."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_plain(source, layout_of(source), path, "BF16")
    return path


def logits(module):
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits


def test_it_is_the_model_it_was_made_of(source, path):
    found = load_checkpoint(path)
    assert torch.equal(logits(found.module), logits(source.module))
    assert {u.name for u in found.units} == {u.name for u in source.units}
    assert {u.dtype for u in found.units if u.linear} == {"BF16"}
    assert found.notes == ("tiny.gguf is dequantized: it is what is measured against",)
    config, wanted = found.config(), source.config()
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings"):
        assert config[key] == wanted[key], key


@pytest.mark.slow
def test_a_file_of_it_gives_its_logits(path, texts, tmp_path):
    size = 4 * load_checkpoint(path).parameters
    found = bytecap.fit(path, size, calibration=texts["calib"], evaluation=texts["val"], **SMALL)
    assert found.report["lossless"]
    found.save(tmp_path / "a.bcap")
    assert torch.equal(logits(bytecap.load_model(tmp_path / "a.bcap")), logits(load_checkpoint(path).module))


@pytest.mark.slow
def test_a_quantized_one_is_dequantized(source, model_directory, texts, tmp_path):
    bytecap.fit(
        model_directory("rotary"), 27_000, format="gguf", calibration=texts["calib"], evaluation=texts["val"],
        output=tmp_path / "q.gguf", **SMALL,
    )  # fmt: skip
    found = load_checkpoint(tmp_path / "q.gguf")
    stored = read_units(tmp_path / "q.gguf", layout_of(source), source.units)
    for unit in found.units:
        assert np.array_equal(found.tensor(unit).numpy(), stored[unit.name]), unit.name
    assert not torch.equal(logits(found.module), logits(source.module))


def test_reading_draws_no_bars_of_other_libraries(path, capsys):
    load_checkpoint(path)
    assert capsys.readouterr().err == ""


def test_threads_that_read_leave_standard_error_as_it_was():
    """The second comes in while the first is there, and stays longer."""
    before, inside = sys.stderr, threading.Event()

    def first():
        with unheard():
            inside.set()
            time.sleep(0.1)

    def second():
        inside.wait()
        with unheard():
            one.join()

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    two.start()
    two.join()
    assert sys.stderr is before


@pytest.mark.parametrize("cut", [40, 2000])
def test_a_cut_one_is_refused(path, tmp_path, cut):
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-cut] if cut > 40 else path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        load_checkpoint(tmp_path / "cut.gguf")


def test_a_file_of_another_name_is_not_taken_for_one(path, tmp_path):
    shutil.copy(path, tmp_path / "tiny.bin")
    with pytest.raises(CheckpointError, match=r"tiny\.bin"):
        load_checkpoint(tmp_path / "tiny.bin")
