"""Build the module that a file describes, which `load_model` returns and on which quality is measured.

The config alone does not say which tensors are one: a checkpoint may hold a head of its own where its config says that
head and embedding are tied, and then the library keeps them apart as it reads it. So what the file stores decides:
every unit is one tensor under all of its names, and no two units are the same.

>>> module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
>>> share(module, [Unit("0.weight", (2, 2), "F32", ("1.weight",))])
>>> module[0].weight is module[1].weight
True
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bytecap.errors import ArtifactError
from bytecap.format.container import Contents
from bytecap.format.decoder import AHEAD, Decoded, decode_each, side_files
from bytecap.format.updates import units_of
from bytecap.model import streaming
from bytecap.model.building import without_values
from bytecap.model.checkpoint import Model, freeze, is_lazy, module_from_config, tensors_of, unready
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.wrappers import plain_names
from bytecap.system.transfers import to_device
from bytecap.types import Unit

DESCRIBING = ("config.json", "tying.json")  # the side files that say what the module is


def build(files: Mapping[str, bytes], units: Sequence[Unit], name: str) -> nn.Module:
    """Build a float32 module whose tensors are these units, its parameters on the `meta` device, which takes no memory.

    Buffers have the values that the module computes for them.

    Args:
        files: side files; `config.json` is needed.
        units: of the file.
        name: of the file, for messages.

    Raises:
        CheckpointError: transformers cannot build it. ArtifactError: its tensors are not the units.
    """
    with tempfile.TemporaryDirectory() as directory:
        for each in set(DESCRIBING) & files.keys():
            (Path(directory) / each).write_bytes(files[each])
        shapes = {n: u.shape for u in units for n in (u.name, *u.aliases)}
        with without_values():
            module = module_from_config(Path(directory), shapes, name, sum(math.prod(u.shape) for u in units))
    config: Any = module.config
    config.name_or_path = str(json.loads(files["config.json"]).get("_name_or_path", ""))
    if "generation_config.json" in files:
        _take_generation_config(module, files["generation_config.json"], name)
    try:
        share(module, units)
    except ArtifactError as exc:
        raise ArtifactError(f"{name}: {exc}") from None
    return module


def _take_generation_config(module: Any, content: bytes, name: str) -> None:
    """Let a module generate as its side file says."""
    from transformers import GenerationConfig

    try:
        module.generation_config = GenerationConfig.from_dict(json.loads(content))
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise ArtifactError(f"{name} holds a generation_config.json that cannot be read: {exc}") from exc


def share(module: nn.Module, units: Iterable[Unit]) -> None:
    """Let a module's tensors be one where units say so, and nowhere else.

    Raises:
        ArtifactError: names or shapes differ.
    """
    tensors = module.state_dict(keep_vars=True)
    left = dict(tensors)
    seen: set[int] = set()
    for unit in units:
        for name in (unit.name, *unit.aliases):
            if name not in left:
                raise ArtifactError(f"the model of config.json has no tensor {name}")
            tensor = left.pop(name)
            if tuple(tensor.shape) != unit.shape:
                raise ArtifactError(
                    f"tensor {name} has shape {list(unit.shape)}, the model of config.json {list(tensor.shape)}"
                )
        first = tensors[unit.name]
        if id(first) in seen:
            first = nn.Parameter(torch.empty_like(first), requires_grad=first.requires_grad)
            _put(module, unit.name, first)
        seen.add(id(first))
        for name in unit.aliases:
            if tensors[name] is not first:
                _put(module, name, first)
    if left:
        raise ArtifactError(f"the model of config.json has tensor {min(left)}, which the file lacks")


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Let a name of the state dict mean another tensor."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner._parameters.get(leaf), nn.Parameter) and not isinstance(tensor, nn.Parameter):  # noqa: SLF001
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)


@torch.no_grad()
def fill(module: nn.Module, values: Iterable[tuple[Unit, Any]], device: torch.device, dtype: torch.dtype) -> None:
    """Put every unit's values into a module that was built empty, on a device, as they come.

    Args:
        module: from `build`.
        values: units and arrays in stored layout, or tensors.
        device: where the module's tensors go.
        dtype: of its floating-point units; buffers that are computed keep theirs.
    """
    before = module.state_dict(keep_vars=True)
    for unit, array in values:
        found = isinstance(array, torch.Tensor)
        fresh = array if found else torch.from_numpy(np.require(array, requirements=["C", "W"]))
        fresh = to_device(fresh, device, dtype if fresh.is_floating_point() else None)
        if isinstance(before[unit.name], nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=False)
        for name in (unit.name, *unit.aliases):
            _put(module, name, fresh)
    for owner in module.modules():
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            owner._buffers[leaf] = buffer.to(device)  # noqa: SLF001


def written(model: Model, contents: Contents, *, observe: Any, threads: int) -> nn.Module:
    """Build the module that finished bytes describe, beside the model that they were made from.

    Built from the file itself where its side files describe the model, so that what is measured is what `load_model`
    gives; else a copy of the model.

    Args:
        model: what was fitted.
        contents: of the finished bytes.
        observe: see `bytecap.format.decoder.decode_units`.
        threads: that decode.

    Raises:
        ArtifactError: the file does not give back the model.
    """
    streamed = streaming.of(model.module)
    if streamed is not None:
        found = streamed.copy()
        found.load(Decoded(contents, observe, threads))
        return found.module
    each = decode_each(contents, observe, threads=threads, ahead=AHEAD if threads > 1 else 0)
    if model.rebuilt:
        module = build({**{n: model.files[n] for n in DESCRIBING if n in model.files}, **side_files(contents)},
                       units_of(contents), "the written file")  # fmt: skip
        freeze(module)
        check_computed(module, model.module)
        fill(module, each, next(model.module.parameters()).device, torch.float32)
        return module
    module = copy_of(model.module)
    for unit, values in each:
        load_values(module, {unit.name: values})
    return module


def check_computed(module: nn.Module, original: nn.Module) -> None:
    """Refuse a module whose buffers that no file holds are not those of the original.

    Raises:
        ArtifactError: one differs; it is named.
    """
    stored, computed = original.state_dict(), dict(module.named_buffers())
    for name, buffer in original.named_buffers():
        if name not in stored:
            other = computed.get(name)
            if other is None or not torch.equal(other, buffer.to(other.device)):
                raise ArtifactError(f"the module built from the written file computes {name} otherwise than the model")


@torch.no_grad()
def put_into(module: nn.Module, values: Mapping[str, Any], name: str) -> None:
    """Put arrays in stored layout into a module, in place, in its own dtypes: all of them, or none.

    Tensors that share memory in the module and not in the file (a matrix and its transpose, rows of one expanded
    vector) get memory of their own where the file's values cannot share it.

    Args:
        module: whose state dict has the names and shapes, with or without the prefixes of wrappers.
        values: by every name; tied names give the same array.
        name: of the file, for messages.

    Raises:
        ArtifactError: names, shapes or ties differ; every name at fault is listed.
    """
    tensors = tensors_of(module)
    plain = {p: tensors[n] for n, p in plain_names(tensors).items()}
    given = {p: values[n] for n, p in plain_names(values).items()}
    if wrong := _misfits(plain, given):
        raise ArtifactError(f"{name} does not fit the module: {'; '.join(wrong)}")
    fresh = {n: torch.from_numpy(np.require(v, requirements=["C", "W"])) for n, v in given.items()}
    own = _needing_own(plain, fresh)
    for n, v in fresh.items():
        if n in own:
            plain[n].data = v.to(plain[n].device, plain[n].dtype, copy=True)
        else:
            plain[n].data.copy_(v)


def _misfits(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> list[str]:
    """Return the reasons why values cannot be put into tensors."""
    wrong = [f"the artifact lacks {n}" for n in tensors if n not in values]
    wrong += [f"the module lacks {n}" for n in values if n not in tensors]
    both = [n for n in values if n in tensors]
    wrong += [f"{n} holds no values in the module (it is {kind})" for n in both if (kind := unready(tensors[n]))]
    wrong += [
        f"{n} is {list(tensors[n].shape)} in the module and {list(values[n].shape)} in the artifact"
        for n in both
        if not is_lazy(tensors[n]) and tuple(tensors[n].shape) != values[n].shape
    ]
    tied: dict[Any, str] = {}
    for n in (n for n in both if not unready(tensors[n]) and tensors[n].numel()):
        first = tied.setdefault((tensors[n].data_ptr(), tuple(tensors[n].shape), tensors[n].stride()), n)
        if values[first] is not values[n] and not _equal(values[first], values[n]):
            wrong.append(f"{first} and {n} are one tensor in the module and two in the artifact")
    return wrong


def _equal(one: Any, other: Any) -> bool:
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == other.dtype.kind == "f"))


def _needing_own(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of tensors that need storage of their own, because others lie in theirs too."""
    own = {n for n, t in tensors.items() if t.numel() and _overlaps_itself(t)}
    groups: dict[int, list[str]] = {}
    for n, t in tensors.items():
        if n not in own and t.numel():
            groups.setdefault(t.untyped_storage().data_ptr(), []).append(n)
    for names in groups.values():
        if len({(tensors[n].data_ptr(), tuple(tensors[n].shape), tensors[n].stride()) for n in names}) < 2:
            continue
        scratch = tensors[names[0]].untyped_storage().clone()
        views = {n: torch.empty(0, dtype=tensors[n].dtype, device=tensors[n].device).set_(
            scratch, tensors[n].storage_offset(), tensors[n].shape, tensors[n].stride()) for n in names}  # fmt: skip
        for n in names:
            views[n].copy_(values[n])
        own |= {n for n in names if not torch.equal(views[n].nan_to_num(), values[n].to(views[n]).nan_to_num())}
    return own


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether several elements of a tensor are one place in memory."""
    spread = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < spread:
            return True
        spread = stride * (size - 1) + spread
    return False
