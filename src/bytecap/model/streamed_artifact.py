"""Open an artifact of which one block at a time will be decoded.

The file stays on disk: a unit's section is read and decoded whenever its block is reached, for thousands of tokens at a
time. `bytecap.model.resident` decodes blocks for every batch anew, and keeps the file in memory, for texts that come
token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from bytecap.errors import ArtifactError
from bytecap.format.container import Contents
from bytecap.format.decoder import Decoded, side_files
from bytecap.format.entropy import jit
from bytecap.format.updates import units_of
from bytecap.model import streaming
from bytecap.model.chain import Chain
from bytecap.model.checkpoint import freeze
from bytecap.model.rebuilt import build
from bytecap.model.streamed_checkpoint import Unstreamable, observe
from bytecap.model.streaming import Streamed
from bytecap.model.tensor_files import Tensors


def streamed_module(contents: Contents, name: str, device: str = "cpu") -> nn.Module:
    """Build the decoded model of a file without values, which are decoded block by block in every pass.

    Args:
        contents: of the file, from which units are read when they are asked for.
        name: of the file, for messages.
        device: torch device that passes run on.

    Raises:
        Unstreamable: it has no chain of blocks, or is an update. ArtifactError: it holds no config, or a section
            cannot be decoded.
    """
    if contents.base is not None:
        raise Unstreamable("an update is read together with its base")
    files = side_files(contents)
    if "config.json" not in files:
        raise ArtifactError(f"{name} holds no config.json (written with --no-config), so no module can be built")
    units = units_of(contents)
    module = freeze(build(files, units, name))
    values = Decoded(contents, threads=jit.cores())
    first = {n: u.name for u in units for n in (u.name, *u.aliases)}
    _fill_buffers(module, first, values)
    source: dict[str, Mapping[str, Any]] = dict.fromkeys(first.values(), values)
    trial = Streamed(module, Chain("", 0, 0), Tensors({}, {}), first, replaced=source)
    trial.to(device)
    chain, head = observe(trial, units)
    if chain is None:
        raise Unstreamable("it has no chain of blocks that are called one after the other")
    streaming.attach(Streamed(module, chain, trial.tensors, first, trial.device, replaced=source, head=head))
    return module


def _fill_buffers(module: nn.Module, first: Mapping[str, str], values: Mapping[str, Any]) -> None:
    for name, buffer in module.named_buffers():
        if name in first:
            buffer.copy_(torch.from_numpy(np.require(values[first[name]], requirements=["C", "W"])))
