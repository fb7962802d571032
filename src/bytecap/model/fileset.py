"""Sort the files of a model directory: weights, side files that travel with them, and refused ones.

One reader of the set: what counts as weights is what transformers loads (`model.safetensors`, else the shards of
`model.safetensors.index.json`, or the file that config.json names). Any other safetensors file is looked into:
a second copy of the same tensors is said and left alone, anything else is refused by name.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bytecap.errors import CheckpointError
from bytecap.model.building import parse_object
from bytecap.system.directories import interrupted

Header = dict[str, dict[str, Any]]
DEQUANTIZE = "load it with the tool that made it and save it dequantized, in bfloat16 or float32"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
_MOST_AXES = 64  # of a tensor in torch
_LONGEST = 200  # letters of a stranger's name in a message
# Files beside the weights that are kept byte for byte. Where there is no tokenizer.json, what it is made from is kept.
SIDE_FILES = (
    "config.json", "generation_config.json", TOKENIZER, "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "tying.json",
)  # fmt: skip
SLOW_TOKENIZER_FILES = (
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "sentencepiece.bpe.model", "spiece.model",
    "spm.model", "tekken.json", "source.spm", "target.spm",
)  # fmt: skip
HUB_FILES = (  # all that a model needs from the hub, its licence included
    "*.json", "*.safetensors", "*.model", "*.spm", "*.txt", "*.jinja", "*.bcap", "README.md", "LICENSE*", "LICENCE*",
    "COPYING",
)  # fmt: skip
# What AutoGPTQ and early AutoAWQ write of a quantization, beside the weights instead of in config.json; and its method.
SETTINGS_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_WIDTHS = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip


def pickle_message(path: Path) -> str:
    """Say why a pickle checkpoint is refused, and what to do."""
    return (
        f"{path} is a pickle checkpoint, which can run code when it is loaded and is refused; convert it with "
        "`save_pretrained(..., safe_serialization=True)` or safetensors.torch.save_file"
    )


def read_side_files(directory: Path) -> dict[str, bytes]:
    """Read the config and tokenizer files of a model directory.

    Raises:
        CheckpointError: there is no readable `config.json`.
    """
    parsed = read_config(directory)
    del parsed
    names = SIDE_FILES if (directory / TOKENIZER).is_file() else SIDE_FILES + SLOW_TOKENIZER_FILES
    return {n: (directory / n).read_bytes() for n in names if (directory / n).is_file()}


def read_config(directory: Path) -> dict[str, Any]:
    """Read and parse the `config.json` of a directory.

    Raises:
        CheckpointError: there is none, or it is no object.
    """
    config = directory / "config.json"
    if not config.is_file():
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(_adapter_message(directory / "adapter_config.json"))
        if ggufs := sorted(directory.glob("*.gguf")):
            raise CheckpointError(f"{directory} holds {ggufs[0].name} and no config.json: give the file as MODEL")
        raise CheckpointError(f"{directory} holds no config.json, so it is not a Hugging Face model directory")
    return parse_object(config.read_bytes(), str(config))


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file; an empty one where there is no such file.

    Raises:
        CheckpointError: it is none.
    """
    return parse_object(path.read_bytes(), str(path)) if _is_file(path) else {}


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files of a model directory, as transformers chooses them.

    Raises:
        CheckpointError: there are none, a shard is missing, or only pickles are there.
    """
    named = read_config(directory).get("transformers_weights") if (directory / "config.json").is_file() else None
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or not _is_file(directory / named):
            raise CheckpointError(
                f"{directory}/config.json names the weights {_short(repr(named))}, which are not there"
            )
        return _shards(directory / named) if named.endswith(".index.json") else [directory / named]
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        return _shards(directory / INDEX)
    if named := _named_beside(directory):
        return named
    if interrupted(directory):
        raise CheckpointError(
            f"{directory} was being written when its writer was killed; write it again: its old files return first"
        )
    if (directory / WEIGHTS).exists() or (directory / INDEX).exists():
        raise CheckpointError(f"{directory} holds a {WEIGHTS} or {INDEX} that is a device, a pipe or a directory")
    others = sorted(p for p in directory.glob("*.safetensors") if p.is_file())
    if others:
        raise CheckpointError(f"{directory} holds {others[0].name}, but weights are read from {WEIGHTS}: rename it")
    ggufs = sorted(directory.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{directory} holds {ggufs[0].name} and no safetensors: give the file as MODEL")
    pickles = sorted(p for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(pickle_message(pickles[0]))
    raise CheckpointError(f"{directory} holds no *.safetensors weights")


def _named_beside(directory: Path) -> list[Path]:
    """Return the weight files that AutoGPTQ's settings name; none where there are no such settings or files."""
    said = read_object(directory / "quantize_config.json")
    base = said.get("model_file_base_name") or f"gptq_model-{said.get('bits')}bit-{said.get('group_size')}g"
    if not said or not isinstance(base, str) or Path(base).name != base:
        return []
    single, index = directory / f"{base}.safetensors", directory / f"{base}.safetensors.index.json"
    if _is_file(single):
        return [single]
    return _shards(index) if _is_file(index) else []


def _weight_map(index: Path) -> dict[str, str]:
    """Return the shard of every tensor, as an index says."""
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        whole = found and all(isinstance(s, str) and Path(s).name == s for s in found.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(f"{index} is not a valid shard index") from exc
    if not whole:
        raise CheckpointError(f"{index} is not a valid shard index")
    return dict(found)


def _shards(index: Path) -> list[Path]:
    shards = sorted(set(_weight_map(index).values()))
    missing = [s for s in shards if not _is_file(index.parent / s)]
    if missing:
        raise CheckpointError(f"{index} names {_short(missing[0])}, which is missing ({len(missing)} of {len(shards)})")
    return [index.parent / s for s in shards]


def _is_file(path: Path) -> bool:
    """Return whether there is a file; false of names that no system has, whose `Path.is_file` raises."""
    return os.path.isfile(path)  # noqa: PTH113


def _short(text: str) -> str:
    """Return the beginning of a text that somebody else chose."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def read_headers(directory: Path, allow: Sequence[str] = ()) -> tuple[dict[Path, Header], list[str]]:
    """Read the headers of a model's weight files, and return notes about files that are not read.

    Args:
        directory: of the model.
        allow: names or patterns of files and tensors that are meant to be left out.

    Raises:
        CheckpointError: a file is damaged, tensors are in two files or in none that is read, or another file holds what
            belongs to the model.
    """
    headers: dict[Path, Header] = {}
    owner: dict[str, Path] = {}
    for path in weight_files(directory):
        headers[path] = check_safetensors(path)
        for name in headers[path]:
            if name in owner:
                raise CheckpointError(f"{path} and {owner[name].name} both hold tensor {name}: which one is meant?")
            owner[name] = path
    _check_index(directory, owner)
    notes = []
    for path in sorted(directory.iterdir()):
        if path.name.startswith("adapter_") and (path.suffix in {".safetensors", ".bin"} or path.suffix == ".json"):
            raise CheckpointError(_adapter_message(path))
        if path.suffix == ".safetensors" and path.is_file() and path not in headers and not allowed(path.name, allow):
            notes += _second(path, owner, allow)
    return headers, notes


def allowed(name: str, allow: Sequence[str]) -> bool:
    """Return whether a tensor or file is meant to be left out."""
    return any(name == a or fnmatch.fnmatchcase(name, a) for a in allow)


def _check_index(directory: Path, owner: Mapping[str, Path]) -> None:
    """Check that an index names the tensors that are read, and no others."""
    index = directory / INDEX
    for name, shard in (_weight_map(index) if index.is_file() else {}).items():
        if name not in owner:
            raise CheckpointError(f"{index} says that {shard} holds tensor {name}, which is in none of the files read")


def _second(path: Path, owner: Mapping[str, Path], allow: Sequence[str]) -> list[str]:
    """Return a note about an unread file, if all of its tensors are in other files too."""
    unread = sorted(n for n in check_safetensors(path) if n not in owner and not allowed(n, allow))
    if unread:
        read = sorted({p.name for p in owner.values()})
        raise CheckpointError(
            f"{path} holds tensor {unread[0]} ({len(unread)} of its own), but only {', '.join(read[:2])} "
            f"{'are' if len(read) > 1 else 'is'} read: remove it, or leave it out with --allow-unused '{path.name}'"
        )
    return [f"{path.name} is not read: it holds the same tensors as {min(p.name for p in owner.values())}"]


def _adapter_message(path: Path) -> str:
    return (
        f"{path} belongs to an adapter, without which the model is another one: merge it into the base first (in peft: "
        "model.merge_and_unload().save_pretrained(...)), or remove it"
    )


def _describes(entry: Any) -> bool:
    """Return whether a header's entry has the type, the shape and the bytes of a tensor."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    numbers = len(shape) <= _MOST_AXES and len(offsets) == 2
    return numbers and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, *offsets))


def check_safetensors(path: Path) -> dict[str, dict[str, Any]]:
    """Return the header of a safetensors file, after checking that every tensor lies inside the file.

    Raises:
        CheckpointError: truncated or corrupt; the message names the first bad tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 2 or length > size - 8:
            raise CheckpointError(f"{path} is not a safetensors file or is truncated ({size} bytes)")
        try:
            header = json.loads(f.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
        except (ValueError, AttributeError, RecursionError) as exc:
            raise CheckpointError(f"{path} has a corrupt safetensors header: {_short(str(exc))}") from exc
    odd = next((n for n, entry in entries.items() if not _describes(entry)), None)
    if odd is not None:
        raise CheckpointError(f"{path} has a corrupt safetensors header: {_short(odd)} is {_short(str(entries[odd]))}")
    spans = {k: tuple(v["data_offsets"]) for k, v in entries.items()}
    at = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if not 0 <= start <= stop <= size - 8 - length:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} needs bytes {start}..{stop} of {size - 8 - length}"
            )
        shape, dtype = entries[name]["shape"], entries[name]["dtype"]
        if dtype in _WIDTHS and stop - start != _WIDTHS[dtype] * math.prod(shape):
            raise CheckpointError(f"{path} is corrupt: tensor {name} of {dtype} {shape} takes {stop - start} bytes")
        if start != at:
            raise CheckpointError(f"{path} is corrupt: tensor {name} begins at byte {start}, not at {at}")
        at = stop
    if at != size - 8 - length:
        raise CheckpointError(f"{path} is corrupt: {size - 8 - length - at} bytes are left over behind its tensors")
    return entries
