"""Load the models that the thesis is tested on, and read where they come from.

A model is written like everywhere else, or `FILE.py:CALLABLE:DIRECTORY` where transformers cannot build it (blocks that
are passed several times): the callable is given the directory and returns the untrained module, which is filled
from `model.safetensors`; tokenizer and config are the directory's. **The file is run.**
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bytecap.errors import CheckpointError
from bytecap.model.checkpoint import Model, load_checkpoint, resolve
from bytecap.model.fileset import read_side_files


@dataclass(frozen=True)
class Origin:
    """The training of a model, from the `training.json` in its directory.

    Attributes:
        recipe: name, empty where nothing is known.
        seed: of its training, -1 where nothing is known.
        registration: hash of the registration it was trained under.
    """

    recipe: str = ""
    seed: int = -1
    registration: str = ""


def directory_of(spec: str) -> Path:
    """The place of a model.

    Raises:
        CheckpointError: nowhere.
    """
    if ".py:" not in spec:
        return resolve(spec)
    found = Path(spec.rpartition(":")[2])
    if not found.is_dir():
        raise CheckpointError(f"no model at {found}: write FILE.py:CALLABLE:DIRECTORY with an existing directory")
    return found


def load(spec: str) -> Model:
    """A model of either spelling.

    Raises:
        BytecapError: see `bytecap.model.checkpoint.load_checkpoint` and `bytecap.model.factory.load_factory`.
    """
    if ".py:" not in spec:
        return load_checkpoint(spec)
    from bytecap.model.factory import load_factory

    directory = directory_of(spec)
    call = spec.rpartition(":")[0]
    files = read_side_files(directory)
    found = load_factory(f"{call}(directory={str(directory)!r})", directory / "model.safetensors")
    return Model(found.module, found.units, files, spec)


def origin(spec: str) -> Origin:
    """Recipe, seed and registration of a model.

    Raises:
        CheckpointError: `training.json` is there and cannot be read.
    """
    path = directory_of(spec) / "training.json"
    if not path.is_file():
        return Origin()
    try:
        found = json.loads(path.read_text("utf-8"))
        return Origin(str(found["recipe"]), int(found["seed"]), str(found["registration"]))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{path} does not say recipe, seed and registration: {exc!r}") from exc
