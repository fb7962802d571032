"""Matrices that a directory keeps in 16 bits: the file holds what targets and recovery have made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import bytecap
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline import fit_directory
from bytecap.runtimes.directory import family
from bytecap.runtimes.directory.contents import PLAIN, read_units
from bytecap.runtimes.gguf.rounding import Rounded
from conftest import SMALL

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("memory", [None, "1MB"])
def test_they_are_written_as_they_were_aimed(memory, model_directory, texts, tmp_path, monkeypatch):
    finish, seen = fit_directory._finish, {}

    def moved(job, contents, items, found, output):
        best, _ = found
        names = [n for n, s in fit_directory._schemes(contents, best.plan).items() if s in PLAIN]
        for n in names:
            was = best.rounded[n]
            seen[n] = Rounded(None, 2 * was.values, was.seen, was.held, was.alone)  # still a number of 16 bits
        best = replace(best, rounded={**best.rounded, **seen})
        return finish(job, contents, items, (best, best), output)

    monkeypatch.setattr(fit_directory, "_finish", moved)
    bytecap.fit(
        model_directory("rotary"), "11bpp", format="mlx", types=["w4g32", "bf16"], calibration=texts["calib"],
        evaluation=texts["val"], output=tmp_path / "model", memory=memory, **SMALL,
    )  # fmt: skip
    file = read_units(family("mlx"), tmp_path / "model", load_checkpoint(model_directory("rotary")).units)
    assert len(seen) > 2
    for name, rounded in seen.items():
        assert np.array_equal(np.asarray(file[name]), rounded.values), name
