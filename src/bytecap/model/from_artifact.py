"""Make a live torch module from an artifact: a new one from its config, or values in an existing one.

No network, no code from the file. torch is imported when it is asked for a module, so that importing this needs numpy
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bytecap.errors import ArtifactError, UsageError
from bytecap.format import container, updates
from bytecap.format.container import Contents
from bytecap.format.decoder import decode_units, side_files

if TYPE_CHECKING:
    import torch
    from torch import nn


RESIDENT = ("decoded", "coded")


def load_model(
    path: Path | str,
    base: updates.Bases = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    resident: str = "decoded",
) -> nn.Module:
    """Return the decoded model as a torch module in evaluation mode.

    Units are decoded on all cores and go to the device one by one, so the processor's memory holds an eighth of the
    values, or the largest unit, beside what stays there; a GPU decodes matrices itself where triton is installed. With
    `resident="coded"` weights stay coded in memory and every block is decoded just before it runs: the same logits in
    the memory of the file, two blocks and activations, and slower (`docs/scale.md`).

    Args:
        path: `.bcap` file.
        base: the file that it is an update of; several where that is an update as well.
        device: torch device for weights and buffers.
        dtype: of floating-point weights, `float32`, `bfloat16`, `float16`, or a torch dtype.
        resident: `decoded`, or `coded`.

    Raises:
        ArtifactError: the file cannot be trusted or holds no config, or its base is missing or another. UsageError:
            an option is none of these, or the model cannot be kept coded.
    """
    opened = container.read if resident == "coded" else container.open_file  # what stays coded stays in memory
    contents = updates.attached(opened(path), updates.found(updates.paths_of(base)), str(path))
    return module_of(contents, str(path), device=device, dtype=dtype, resident=resident)


def module_of(
    contents: Contents,
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    resident: str = "decoded",
    beside: Mapping[str, bytes] | None = None,
) -> nn.Module:
    """Build the decoded model of an artifact's contents, as `load_model` does.

    `name` is that of the file, for messages; `beside` holds config and tokenizer where they are not inside.
    """
    import torch

    from bytecap.model.device_decode import decode_each
    from bytecap.model.rebuilt import build, fill
    from bytecap.model.resident import keep_coded

    if resident not in RESIDENT:
        raise UsageError(f"resident={resident!r} is neither decoded nor coded")
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise UsageError(f"dtype={dtype!r} is no floating-point type of torch, such as float32 or bfloat16")
    target = torch.device(device)
    files = {**(beside or {}), **side_files(contents)}
    if "config.json" not in files:
        raise ArtifactError(f"{name} holds no config.json (written with --no-config), so no module can be built")
    module = build(files, updates.units_of(contents), name)
    if resident == "coded":
        keep_coded(module, contents, device=target, dtype=kind, name=name)
    else:
        fill(module, decode_each(contents, target, kind), target, kind)
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
