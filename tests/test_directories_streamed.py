"""Directories of streamed models, held against those of models in memory."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import bytecap
from bytecap.progress import Silent
from conftest import SMALL

BUDGETS = {("mlx", "rotary"): 30_000, ("mlx", "biased"): 40_000, ("compressed-tensors", "biased"): 80_000}


def files(directory):
    """Contents of a directory's files by name."""
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def in_shards(directory, target, count=3):
    """Copy a checkpoint into shards that part every module's tensors."""
    shutil.copytree(directory, target)
    weights = target / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    names = [f"model-{i}.safetensors" for i in range(count)]
    places = {n: names[i % count] for i, n in enumerate(sorted(tensors))}
    for shard in names:
        save_file({n: tensors[n] for n, s in places.items() if s == shard}, target / shard, {"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), BUDGETS)
def test_a_streamed_fit_gives_the_directory_of_one_in_memory(model_directory, texts, tmp_path, name, kind) -> None:
    directory, told, found = model_directory(kind, num_hidden_layers=3), Silent(), []
    shards = in_shards(directory, tmp_path / "shards")
    for source, more in ((directory, {}), (shards, {"memory": "1MB"})):
        found.append(bytecap.fit(
            source, BUDGETS[name, kind], format=name, output=tmp_path / str(len(found)), reporter=told,
            calibration=texts["calib"], evaluation=texts["val"], **more, **SMALL,
        ))  # fmt: skip
    assert len([n for n in told.notes if "the model is streamed" in n]) == 1
    assert found[0].types == found[1].types
    assert len(set(found[1].types.values())) > 1
    assert files(tmp_path / "0") == files(tmp_path / "1")
    assert found[1].report["kl_nats"] == pytest.approx(found[0].report["kl_nats"], rel=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "shards"]  # no work file is left
