"""Bad input of GGUF files: budgets below the floor, files that are no models, disks that are full."""

from __future__ import annotations

import errno
import io
import os

import numpy as np
import pytest

from bytecap.errors import BudgetError, NotAnArtifact, OutputError, UsageError
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.fit_gguf import fit_gguf
from bytecap.runtimes.gguf.export import write_imatrix
from bytecap.runtimes.gguf.file import Stored, encode_plain, type_bytes, write
from bytecap.runtimes.gguf.recode import check_source
from bytecap.runtimes.gguf.template import read_template
from bytecap.system import atomic

pytest.importorskip("gguf")


def _nothing(writer) -> None:
    """No keys."""


def test_the_floor_is_named(model_directory) -> None:
    words = (
        r"below the floor of [\d,]+ of this format.*token_embd.weight [\d,]+ as mxfp4.*; no GGUF type is smaller.*"
        r" stop at 4.25 bits; a .bcap"
    )
    with pytest.raises(BudgetError, match=words):
        fit_gguf(model_directory("rotary"), 20_000)


def test_the_floor_of_some_types_names_those_below(model_directory) -> None:
    with pytest.raises(BudgetError, match=r"as q8_0; --types iq4_nl,mxfp4 would go down to [\d,]+, \d+ have rows"):
        fit_gguf(model_directory("rotary"), 20_000, types=["q8_0"])


def test_an_importance_matrix_is_no_model(tmp_path, model_directory) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, {"blk.0.attn_q.weight": np.ones(32, np.float32)}, 512, ["x"])
    with pytest.raises(NotAnArtifact, match=r"imatrix.gguf holds no model but is of type 'imatrix'"):
        read_template(path, load_checkpoint(model_directory("rotary")))
    with pytest.raises(NotAnArtifact, match="holds no model"):
        check_source(path, allow_quantized=True)


def test_what_recode_takes(tmp_path) -> None:
    paths = {}
    for kind in ("F16", "Q8_0", "Q4_0"):
        paths[kind] = tmp_path / f"{kind}.gguf"
        write(paths[kind], "llama", _nothing, [Stored("a.weight", (2, 32), kind, _blank(kind))])
    assert check_source(paths["F16"], allow_quantized=False) is None
    assert "measured against what it holds" in check_source(paths["Q8_0"], allow_quantized=False)
    with pytest.raises(UsageError, match=r"Q4_0.gguf is quantized already \(1 tensors Q4_0\).*--allow-quantized"):
        check_source(paths["Q4_0"], allow_quantized=False)
    assert "is quantized" in check_source(paths["Q4_0"], allow_quantized=True)


def _blank(kind: str) -> np.ndarray:
    return np.zeros((2, type_bytes(kind, 1, 32)), np.uint8)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, number) -> None:
    """Real files, whose writes fail after the header, as on a full disk."""
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    full = OSError(number, os.strerror(number))

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 1024:
                raise full
            return super().write(data)

    monkeypatch.setattr(atomic.os, "fdopen", lambda handle, _mode: Full(handle, "w"))
    tensors = [Stored("a.weight", (64, 32), "F32", encode_plain("F32", np.zeros((64, 32))))]
    with pytest.raises(OutputError, match=rf"cannot write .*a.gguf: {os.strerror(number)}"):
        write(path, "llama", _nothing, tensors)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
