"""A live torch module from an artifact: a new one from its config, or values put into a module that is there.

No network, no code from the file. torch is imported when it is asked for a module, so that importing this needs numpy
alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bytecap.errors import ArtifactError
from bytecap.format import container
from bytecap.format.decoder import decode_units, side_files

if TYPE_CHECKING:
    from torch import nn


def load_model(path: Path | str) -> nn.Module:
    """The decoded model as a torch module in evaluation mode, float32.

    Raises:
        ArtifactError: the file cannot be trusted or holds no config.
    """
    from bytecap.model.checkpoint import module_from_config
    from bytecap.model.quantized_copy import load_values

    contents = container.read(path)
    files = side_files(contents)
    if "config.json" not in files:
        raise ArtifactError(f"{path} holds no config.json (written with --no-config), so no module can be built")
    with tempfile.TemporaryDirectory() as directory:
        for name in {"config.json", "tying.json"} & files.keys():
            (Path(directory) / name).write_bytes(files[name])
        module = module_from_config(Path(directory))
    load_values(module, decode_units(contents, aliases=False))
    return module


def load_into(path: Path | str, module: nn.Module) -> None:
    """Put an artifact's decoded values into a module, in place, in the module's own dtypes.

    Args:
        path: `.bcap` file.
        module: whose state dict has the artifact's names and shapes. Nothing is changed where it has not.

    Raises:
        ArtifactError: the file cannot be trusted, or does not fit; every name at fault is listed.
    """
    import torch

    values = decode_units(container.read(path))
    live = module.state_dict(keep_vars=True)
    wrong = [f"the artifact lacks {n}" for n in live if n not in values]
    wrong += [f"the module lacks {n}" for n in values if n not in live]
    wrong += [
        f"{n} is {list(live[n].shape)} in the module and {list(v.shape)} in the artifact"
        for n, v in values.items()
        if n in live and tuple(live[n].shape) != v.shape
    ]
    tied: dict[tuple[int, tuple[int, ...]], str] = {}
    for n in (n for n in values if n in live and live[n].numel()):
        first = tied.setdefault((live[n].data_ptr(), tuple(live[n].shape)), n)
        if values[first] is not values[n] and not np.array_equal(values[first], values[n]):
            wrong.append(f"{first} and {n} are one tensor in the module and two in the artifact")
    if wrong:
        raise ArtifactError(f"{path} does not fit the module: {'; '.join(wrong)}")
    with torch.no_grad():
        for n, v in values.items():
            live[n].copy_(torch.from_numpy(np.require(v, requirements=["C", "W"])))
