"""Lay a model out as a directory that transformers and a hub know: `model.bcap`, plain side files, a card.

Config and tokenizer lie beside the weights, where programs look for them, and are therefore not inside `model.bcap`.
The weights have no name that transformers reads by itself: its config's `transformers_weights` is a sentence that says
what to install, and transformers shows it in the error with which it refuses the directory; the plug-in
(`bytecap.runtimes.transformers`) puts the name of an index there, as sharded checkpoints have one, by which
transformers finds `model.bcap` locally and on a hub. numpy alone is needed to read and write the layout.

>>> config = json.loads(with_quantization(b'{"model_type": "gpt_neo"}', "1.3", "bfloat16"))
>>> config["quantization_config"]["quant_method"], config["transformers_weights"].partition(",")[0]
('bytecap', 'model.bcap')
>>> json.loads(without_quantization(json.dumps(config).encode(), "config.json"))
{'model_type': 'gpt_neo', 'dtype': 'bfloat16'}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bytecap.errors import ArtifactError, CheckpointError, VersionError
from bytecap.format import container, updates
from bytecap.format.container import FILE as FILE_KIND
from bytecap.format.container import VERSION, Contents
from bytecap.format.decoder import side_files
from bytecap.format.ledger import Entry
from bytecap.format.sidefiles import names, source_tensors
from bytecap.model.building import parse_object
from bytecap.model.fileset import INDEX, SIDE_FILES, SLOW_TOKENIZER_FILES, WEIGHTS
from bytecap.system.atomic import read_regular

METHOD = "bytecap"  # the `quant_method` of a config
FILE = "model.bcap"
CONFIG, CARD, TYING = "config.json", "README.md", "tying.json"
SHARDS = "model.bcap.safetensors.index.json"  # transformers reads indices by this ending alone
INSTALL = "pip install 'bytecap[hf]' and import bytecap.runtimes.transformers"
_SENTENCE = f"{FILE}, which is read after: {INSTALL}"
_OTHERS = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")  # that transformers would read
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def is_hub(path: Path) -> bool:
    """Return whether a directory holds a model in this layout."""
    return os.path.isdir(path) and os.path.isfile(path / FILE)  # noqa: PTH112, PTH113 (false of a name too long)


def check_alone(directory: Path) -> None:
    """Refuse a directory that holds the weights twice.

    Raises:
        CheckpointError: there is another file of weights, which may be another model.
    """
    for name in _OTHERS:
        if (directory / name).is_file():
            raise CheckpointError(f"{directory} holds both {FILE} and {name}: remove the one that is not meant")


def check_format(config: Mapping[str, Any], name: str) -> None:
    """Refuse a directory that was written by a newer version, before its weights are fetched.

    Raises:
        VersionError: the config names a format that this reader does not know.
    """
    said = str(config.get("format", ""))
    numbers = said.split(".")
    if not (len(numbers) == 2 and all(n.isascii() and n.isdigit() and len(n) < 4 for n in numbers)):
        raise VersionError(f"{name} names no format of bytecap ({said[:40]!r}): it was written by something else")
    if tuple(map(int, numbers)) > VERSION:
        own = ".".join(map(str, VERSION))
        raise VersionError(f"{name} has format {said}, this version of bytecap reads {own}: pip install -U bytecap")


def read(directory: Path) -> tuple[Contents, dict[str, bytes]]:
    """Read a directory in this layout: contents of the weights, and the side files as a plain file has them.

    Raises:
        ArtifactError: the file cannot be trusted. CheckpointError: there are two files of weights, or no config.
    """
    check_alone(directory)
    content = _content(directory, CONFIG)
    check_format(_quantization(content, f"{directory}/{CONFIG}"), f"{directory}/{CONFIG}")
    contents = updates.read(directory / FILE)
    beside = {n: _content(directory, n) for n in (*SIDE_FILES, *SLOW_TOKENIZER_FILES) if (directory / n).is_file()}
    return contents, plain_files(beside, f"{directory}/") | side_files(contents)


def plain_files(beside: Mapping[str, bytes], where: str = "") -> dict[str, bytes]:
    """Return config and tokenizer of a directory as an artifact holds them."""
    known = {*SIDE_FILES, *SLOW_TOKENIZER_FILES}
    return {
        n: without_quantization(d, f"{where}{n}") if n == CONFIG else d for n, d in beside.items() if n in known
    }  # fmt: skip


def split(contents: Contents, files: Mapping[str, bytes]) -> tuple[Contents, dict[str, bytes]]:
    """Take the side files out of contents; a description of the source's tensors stays inside.

    Args:
        contents: of an artifact, with side files or without.
        files: the side files, unpacked.
    """
    kept = tuple(f for f in contents.files if f.kind != FILE_KIND or f.name == source_tensors.FILE)
    return replace(contents, files=kept), {n: d for n, d in files.items() if n != source_tensors.FILE}


def layout(contents: Contents, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return every file of a directory but the card, by name.

    Args:
        contents: of the artifact.
        files: config and tokenizer, unpacked.

    Raises:
        ArtifactError: there is no config, it is an update, or a side file has a name of another file.
    """
    if contents.base is not None:
        raise ArtifactError("an update has a base of its own, which nobody else has: lay out a whole file instead")
    inside, beside = split(contents, files)
    check_files(beside)
    names.check((CARD, *beside))
    data = container.serialize(inside)
    found = beside_weights(beside, format_of(data), dtype_named(u.unit.dtype for u in contents.units))
    return {FILE: data, **found}


def check_files(files: Mapping[str, bytes]) -> None:
    """Refuse side files of which transformers cannot make the model.

    Raises:
        ArtifactError: there is no config, or layers share blocks, which transformers knows nothing of.
    """
    if CONFIG not in files:
        raise ArtifactError(f"there is no {CONFIG} (written with --no-config), so no directory can be made")
    if TYING in files:
        raise ArtifactError(f"layers share blocks ({TYING}), which transformers does not know: keep the single file")


def beside_weights(files: Mapping[str, bytes], version: str, dtype: str) -> dict[str, bytes]:
    """Return the files beside the weights, without the card."""
    return {
        **files,
        CONFIG: with_quantization(files[CONFIG], version, dtype),
        SHARDS: json.dumps({"metadata": {}, "weight_map": {METHOD: FILE}}, separators=(",", ":")).encode(),
    }


def format_of(data: bytes) -> str:
    """Return the format version of an artifact's bytes, `major.minor`."""
    return f"{data[8]}.{data[9]}"


def dtype_named(stored: Iterable[str]) -> str:
    """Return the dtype in which the source was, in transformers' words; float32 where there are several."""
    found = set(stored) & _DTYPES.keys()
    return _DTYPES[found.pop()] if len(found) == 1 else "float32"


def with_quantization(content: bytes, version: str, dtype: str) -> bytes:
    """Return a `config.json` that names the plug-in."""
    config = parse_object(content, CONFIG)
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    config["transformers_weights"] = _SENTENCE
    config["quantization_config"] = {"quant_method": METHOD, "format": version, "install": INSTALL}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def without_quantization(content: bytes, name: str) -> bytes:
    """Return the `config.json` as it was before `with_quantization`."""
    config = parse_object(content, name)
    for key in ("transformers_weights", "quantization_config"):
        config.pop(key, None)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def ledger(contents: Contents, beside: Mapping[str, bytes], file_bytes: int | None = None) -> list[Entry]:
    """Return owner and kind of every byte of a directory; `file_bytes` as in `container.ledger`."""
    entries = [e for e in container.ledger(contents, file_bytes) if e.bytes]
    return entries + [Entry(n, "tokenizer" if container.is_tokenizer(n) else "config", len(d))
                      for n, d in beside.items() if n != FILE]  # fmt: skip


def ledger_of(directory: Path) -> list[Entry]:
    """Return owner and kind of every byte of a directory on disk."""
    contents, _ = read(directory)
    beside = {p.name: _content(directory, p.name) for p in sorted(directory.iterdir()) if p.is_file()}
    return ledger(contents, beside, len(beside[FILE]))


def _quantization(content: bytes, name: str) -> Mapping[str, Any]:
    found = parse_object(content, name).get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        raise CheckpointError(f"{name} does not say that {FILE} beside it is its model (quant_method {METHOD!r})")
    return found


def _content(directory: Path, name: str) -> bytes:
    try:
        return read_regular(directory / name)
    except OSError as exc:
        raise CheckpointError(f"cannot read {directory / name}: {exc.strerror}") from exc
