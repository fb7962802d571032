"""Account for every tensor of a checkpoint: stored, tied, computed from the config, or named and refused.

A library that loads a checkpoint leaves out what it does not know: layers beyond the config's count, scales of weights
that are quantized, adapters. The model then runs and is another one. So the files are read a second time, by what their
headers say: each tensor must have become elements of the built model, value for value, and what has no place in the
model is refused by name, unless the user says that it is meant to be left out.

Two kinds of tensors need no place: those the library computes from the config (tables of positions, masks), which are
compared with what it computed; and the second name of a tied tensor. Scales and adapters are refused always, since the
weights mean something else without them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.errors import CheckpointError
from bytecap.format.sidefiles import source_tensors
from bytecap.model.conversion import Conversion, convert, ignored
from bytecap.model.fileset import DEQUANTIZE, Header, allowed
from bytecap.model.linears import place_of

FLOATS = ("F64", "F32", "BF16", "F16")  # what a weight may be stored as
_SCALES = re.compile(
    r"(?:^|[._])(?:scales?|scale_inv|zeros?|zero_points?|qzeros|qweight|g_idx|absmax|quant_map|nested_\w+|quant_state\S*"
    r"|weight_packed|weight_shape|blocks|scb|amax)$",
    re.IGNORECASE,
)
_ADAPTERS = re.compile(r"(?:^|[._])lora_|(?:^|\.)base_model\.model\.|(?:^|[._])(?:ia3_l|oft_r|hada_w\d|lokr_w\d)")


@dataclass(frozen=True)
class Account:
    """The account of a checkpoint's files.

    Attributes:
        dtypes: source dtype of every tensor of the model, as safetensors spells it.
        files: `source_tensors.json`, where the checkpoint's tensors are not the model's own one by one.
        notes: what the user should know.
        rounded: names of the model's tensors whose source has more bits than float32.
    """

    dtypes: dict[str, str]
    files: dict[str, bytes]
    notes: tuple[str, ...] = ()
    rounded: frozenset[str] = frozenset()


Reader = Callable[[Mapping[Path, Header], Any], Iterator[tuple[str, Tensor]]]


def account(
    module: nn.Module,
    headers: Mapping[Path, Header],
    allow: Sequence[str] = (),
    found: Conversion | None = None,
    values: Reader | None = None,
) -> Account:
    """Account for every tensor of the files that a model was built from.

    Args:
        module: as the library built it, float32.
        headers: of every file that was read.
        allow: names or patterns (`model.layers.61.*`) of tensors that are meant to be left out.
        found: where the tensors went, of a module that holds no values yet and will be given those of the files.
        values: reads tensors of some names one at a time, where they are not stored as the headers say.

    Raises:
        CheckpointError: a tensor has no place in the model, was not read, or became something else.
    """
    entries = {n: e for header in headers.values() for n, e in header.items()}
    filled = found is None
    values = values or stored_values
    found = found or convert(module, {n: tuple(e["shape"]) for n, e in entries.items()})
    notes = _left_out(module, headers, found, allow, values)
    _check_filled(module, found)
    dtypes = _dtypes(module, entries, found)
    units = _first_names(module)
    tensors = module.state_dict(keep_vars=True)
    if filled:
        wide = {name for name, value in values(headers, found.entries) if not _same(tensors, name, value, found)}
    else:
        wide = {name for name in found.entries if entries[name]["dtype"] == "F64"}
    rounded = {units[t] for t, sources in found.sources.items() if sources & wide}
    layout = _layout(module, entries, found, dtypes)
    if any(e is None for e in layout.values()):
        odd = next(n for n, e in layout.items() if e is None)
        notes.append(f"{odd} is changed by the library as it is read: unpack writes the library's names and values")
        layout = {}
    if rounded:
        notes.append(f"float64 values of {min(rounded)} do not fit float32: {len(rounded)} tensors are rounded to it")
    files = {source_tensors.FILE: source_tensors.dump(layout)} if layout else {}
    return Account(dtypes, files, tuple(notes), frozenset(rounded))


def refuse_unread(name: str, where: Path | str) -> CheckpointError | None:
    """Return the error for a tensor of a quantized model or an adapter; None for any other."""
    if _ADAPTERS.search(name):
        return CheckpointError(
            f"{where} holds tensor {name} of an adapter, without which the model is another one: merge it into the "
            "base first (in peft: model.merge_and_unload().save_pretrained(...))"
        )
    if _SCALES.search(name):
        return CheckpointError(
            f"{where} holds tensor {name}, which belongs to quantized weights that config.json does not describe: "
            f"{DEQUANTIZE}"
        )
    return None


def _left_out(
    module: nn.Module, headers: Mapping[Path, Header], found: Conversion, allow: Sequence[str], values: Reader
) -> list[str]:
    """Check tensors that have no place in the model; returns notes about those that may be left out."""
    where = {n: path for path, header in headers.items() for n in header}
    unexpected = set(found.unexpected)
    wanted, known = [], ignored(module)
    for name, value in values(headers, unexpected):
        if error := refuse_unread(name, where[name]):
            raise error
        if allowed(name, allow):
            continue
        if _is_computed(module, name, value, known):
            unexpected.discard(name)
        else:
            wanted.append(name)
    if wanted:
        first = min(wanted)
        size = sum(_count(headers[where[n]][n]) for n in wanted)
        raise CheckpointError(
            f"{where[first]} holds tensor {first}, which the model of config.json has no place for ({len(wanted)} such "
            f"tensors, {size:,} values): correct config.json, or leave them out with --allow-unused "
            f"'{_pattern(wanted)}'"
        )
    return [f"left out, as asked: {', '.join(sorted(unexpected))}"] if unexpected else []


def _pattern(names: Sequence[str]) -> str:
    """Return one pattern for several names, as far as they agree."""
    low, high = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    head = low[:same]
    return low if low == high else f"{head[: head.rfind('.') + 1] or head}*"


def _count(entry: Mapping[str, Any]) -> int:
    size = 1
    for n in entry["shape"]:
        size *= int(n)
    return size


def stored_values(headers: Mapping[Path, Header], names: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the files with the given names, one at a time."""
    from safetensors import safe_open

    for path, header in headers.items():
        chosen = [n for n in header if n in names]
        if chosen:
            with safe_open(path, framework="pt") as file:
                for name in chosen:
                    yield name, file.get_tensor(name)


def _is_computed(module: nn.Module, name: str, value: Tensor, known: re.Pattern[str]) -> bool:
    """Return whether the library computes a tensor from the config: the same values, or a mask without weights.

    Raises:
        CheckpointError: it is one, and holds other values than the library computes.
    """
    tail = name.rpartition(".")[2]
    for other, buffer in module.named_buffers():
        if other.rpartition(".")[2] == tail and buffer.shape == value.shape and _alike(name, other):
            rough = 2e-2 if value.dtype in {torch.bfloat16, torch.float16} else 1e-4
            if torch.allclose(value.double(), buffer.double(), rtol=rough, atol=1e-6):
                return True
            raise CheckpointError(
                f"tensor {name} of the checkpoint holds other values than config.json gives: correct config.json"
            )
    if not known.search(name):
        return False
    if value.numel() < 2:
        return True
    flat = value.reshape(-1).double()
    square = value.ndim > 1 and value.shape[-1] == value.shape[-2] == flat.numel() ** 0.5
    mask = square and torch.equal(flat, torch.ones(value.shape[-2:], dtype=torch.float64).tril().reshape(-1))
    return mask or bool((flat.diff() == 1).all())


def _alike(name: str, other: str) -> bool:
    """Return whether two tensors of one last name sit in modules of one name, wherever those are."""
    return name.split(".")[-2:-1] == other.split(".")[-2:-1]


def _check_filled(module: nn.Module, found: Conversion) -> None:
    """Refuse a model some of whose tensors came from no file."""
    tensors = module.state_dict(keep_vars=True)
    filled = {place_of(tensors[n])[0] for n in found.sources if tensors[n].numel()}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name in parameters and name not in found.sources and tensor.numel() and place_of(tensor)[0] not in filled:
            raise CheckpointError(f"the checkpoint lacks tensor {name}, which the model of config.json has")


def _first_names(module: nn.Module) -> dict[str, str]:
    """Return, for every name in the state dict, the first name of the same tensor."""
    first: dict[Any, str] = {}
    return {n: first.setdefault(place_of(t), n) for n, t in module.state_dict(keep_vars=True).items()}


def _dtypes(module: nn.Module, entries: Header, found: Conversion) -> dict[str, str]:
    """Return the source dtypes of the model's tensors, each of which holds all that the tensor was made from.

    Raises:
        CheckpointError: a weight is stored as integers or in a float of eight bits or less, without its scale.
    """
    tensors = module.state_dict(keep_vars=True)
    dtypes = {}
    for target, sources in found.sources.items():
        kinds = {str(entries[n]["dtype"]) for n in sources}
        odd = next((n for n in sorted(sources) if entries[n]["dtype"] not in FLOATS), None)
        if odd is not None and tensors[target].is_floating_point():
            raise CheckpointError(
                f"tensor {odd} is stored as {entries[odd]['dtype']}, which is no weight without its scale: {DEQUANTIZE}"
            )
        if kinds:
            dtypes[target] = kinds.pop() if len(kinds) == 1 else "F64" if "F64" in kinds else "F32"
    return dtypes


def _same(tensors: Mapping[str, Tensor], name: str, value: Tensor, found: Conversion) -> bool:
    """Return whether the model holds a tensor of the checkpoint exactly.

    Raises:
        CheckpointError: it holds something else, and not because float64 does not fit float32.
    """
    entry = found.entries[name]
    if entry is None:
        return True
    held = _held(entry, tensors).detach()
    narrow = value.to(held.dtype)
    if held.shape != value.shape or not torch.equal(held, narrow):
        same = held.shape == value.shape and torch.equal(held.isnan(), narrow.isnan())
        if not same or not torch.equal(held.nan_to_num(), narrow.nan_to_num()):
            raise CheckpointError(
                f"tensor {name} of the checkpoint is not what the library made of it; another file may hold it too"
            )
    return value.dtype != torch.float64 or torch.equal(narrow.double(), value)


def _held(entry: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the model's values that an entry of `source_tensors.json` names."""
    if isinstance(entry, str):
        return tensors[entry]
    if isinstance(entry, dict):
        return torch.cat([_held(p, tensors) for p in entry["parts"]], entry["axis"])
    name, offset, shape, *strides = entry
    flat = tensors[name].detach().reshape(-1)
    plain = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        plain[i] = plain[i + 1] * shape[i + 1]
    return flat.as_strided(shape, strides[0] if strides else plain, flat.storage_offset() + offset)


def _layout(module: nn.Module, entries: Header, found: Conversion, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Return entries of `source_tensors.json`; none where every tensor is one of the model's under its first name."""
    first = _first_names(module)
    kinds: dict[str, str] = {}
    for target, dtype in dtypes.items():
        kinds.setdefault(first[target], dtype)
    layout = {n: _renamed(e, first, str(entries[n]["dtype"]), kinds) for n, e in found.entries.items()}
    uses = Counter(unit for e in layout.values() for unit in source_tensors.units_of(e))
    return {n: e for n, e in layout.items() if n != e or uses[n] > 1}


def _renamed(entry: Any, first: Mapping[str, str], dtype: str, kinds: Mapping[str, str]) -> Any:
    """Return an entry in units' first names, with its dtype where the unit has another."""
    if isinstance(entry, dict):
        parts = [_renamed(p, first, dtype, kinds) for p in entry["parts"]]
        return {**entry, "parts": parts}
    if entry is None:
        return None
    if isinstance(entry, str):
        unit = first[entry]
        return unit if kinds.get(unit) == dtype else [unit, 0, None, None, dtype]
    unit = first[entry[0]]
    rest = entry[1:] if kinds.get(unit) == dtype else [*entry[1:], *[None] * (4 - len(entry)), dtype]
    return [unit, *rest]
