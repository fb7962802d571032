"""Make a live torch module from an artifact: a new one from its config, or values in an existing one.

No network, no code from the file. torch is imported when it is asked for a module, so that importing this needs numpy
alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bytecap.errors import ArtifactError
from bytecap.format import updates
from bytecap.format.container import Contents
from bytecap.format.decoder import decode_units, side_files

if TYPE_CHECKING:
    from torch import nn


def load_model(path: Path | str, base: updates.Bases = None) -> nn.Module:
    """Return the decoded model as a float32 torch module in evaluation mode.

    Args:
        path: `.bcap` file.
        base: the file that it is an update of; several where that is an update as well.

    Raises:
        ArtifactError: the file cannot be trusted or holds no config, or its base is missing or another.
    """
    return module_of(updates.read(path, base), str(path))


def module_of(contents: Contents, name: str) -> nn.Module:
    """Build the decoded model of an artifact's contents; `name` is for messages.

    Raises:
        ArtifactError: the contents cannot be trusted or hold no config.
    """
    from bytecap.model.quantized_copy import load_values
    from bytecap.model.rebuilt import build

    files = side_files(contents)
    if "config.json" not in files:
        raise ArtifactError(f"{name} holds no config.json (written with --no-config), so no module can be built")
    module = build(files, updates.units_of(contents), name)
    load_values(module, decode_units(contents, aliases=False))
    return module


def load_into(path: Path | str, module: nn.Module, base: updates.Bases = None) -> None:
    """Put an artifact's decoded values into a module, in place, in the module's own dtypes.

    Args:
        path: `.bcap` file.
        module: whose state dict has the artifact's names and shapes, with or without prefixes of wrappers
            (`torch.compile`, FSDP). Nothing is changed where it has not.
        base: the file that it is an update of; several where that is an update as well.

    Raises:
        ArtifactError: the file cannot be trusted, or does not fit; every name at fault is listed.
    """
    from bytecap.model.rebuilt import put_into

    put_into(module, decode_units(updates.read(path, base)), str(path))
