"""Turn an artifact back into an ordinary Hugging Face directory.

`unpack` writes exactly the values `eval` scores: in the source dtype where that holds them all, else float32.
No network, no code from the file: config and tokenizer come out of the artifact's own sections.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bytecap.errors import ArtifactError, CorruptError, UsageError
from bytecap.format import codefiles, updates
from bytecap.format.coders.exact import WIDTH, is_lossless, to_bytes
from bytecap.format.container import CODE, FILE, Contents
from bytecap.format.decoder import decode_units
from bytecap.format.sidefiles import names, source_tensors
from bytecap.format.sidefiles.names import WEIGHTS
from bytecap.system.atomic import write_directory
from bytecap.system.collisions import Paths, refuse_collisions

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CONFIG_NAMES = {v: k for k, v in DTYPES.items()}
_METADATA = "__metadata__"  # a name that a safetensors header keeps for itself
_PIECE = 1 << 20  # values converted at a time: a copy of them all is never made


@dataclass(frozen=True)
class Directory:
    """Everything `unpack` writes, before anything is written.

    Attributes:
        values: of every unit in stored layout, by name.
        dtypes: that each is written in.
        files: config, tokenizer and code by name.
        dtype: of the floating-point tensors, for the config.
    """

    values: dict[str, npt.NDArray[Any]]
    dtypes: dict[str, str]
    files: dict[str, bytes]
    dtype: str

    def write_weights(self, into: BinaryIO) -> None:
        """Write `model.safetensors`, some values at a time."""
        header: dict[str, Any] = {_METADATA: {"format": "pt"}}
        at = 0
        for name in sorted(self.values):
            values, dtype = self.values[name], self.dtypes[name]
            end = at + values.size * WIDTH[dtype]
            header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        into.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(self.values):
            into.writelines(_rounded_bytes(piece, self.dtypes[name]) for piece in _pieces(self.values[name]))


def open_directory(contents: Contents, dtype: str = "auto") -> Directory:
    """What `unpack` would write; every section is decoded and every name checked.

    Raises:
        ArtifactError: a section is damaged, or a name would overwrite the weights or leave the directory.
    """
    names.check(updates.names_of(contents))
    unpacked = codefiles.files(contents, (FILE, CODE))
    found = {n: unpacked.pop(n) for n in updates.names_of(contents, (FILE,))}
    values, source = _tensors(contents, found)
    found |= unpacked
    if _METADATA in values:
        raise CorruptError(f"a tensor of the name {_METADATA} cannot be written as safetensors")
    chosen = _choose_dtypes(values, source, dtype)
    float_dtypes = {d for d in chosen.values() if d in _CONFIG_NAMES}
    written = _CONFIG_NAMES[float_dtypes.pop()] if len(float_dtypes) == 1 else "float32"
    if "config.json" in found:
        content = _with_dtype(found["config.json"], written)  # which also refuses what is no config
        if chosen != source or len(set(chosen.values())) == 1:
            found["config.json"] = content
    return Directory(values, chosen, found, written)


def directory_files(contents: Contents, dtype: str = "auto") -> tuple[dict[str, bytes], str]:
    """Return every file that `unpack` writes, by name, and the dtype; nothing is written here.

    Raises:
        ArtifactError: see `open_directory`.
    """
    opened, weights = open_directory(contents, dtype), io.BytesIO()
    opened.write_weights(weights)
    return {WEIGHTS: weights.getvalue(), **opened.files}, opened.dtype


def _tensors(contents: Contents, files: dict[str, bytes]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Tensors of the checkpoint by its own names, and their dtypes there; takes out the side file that says which."""
    values = decode_units(contents, aliases=False)
    dtypes = {u.name: u.dtype for u in updates.units_of(contents)}
    layout = files.pop(source_tensors.FILE, None)
    if layout is None:
        return values, dtypes
    found = source_tensors.tensors(layout, values)
    return {n: v for n, (v, _, _) in found.items()}, {n: d or dtypes[unit] for n, (_, unit, d) in found.items()}


def _with_dtype(content: bytes, written: str) -> bytes:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"the artifact's config.json is not valid JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise ArtifactError("the artifact's config.json is not an object")
    config["dtype" if "dtype" in config else "torch_dtype"] = written
    return (json.dumps(config, indent=2) + "\n").encode()


def unpack(path: Path | str, directory: Path | str, *, dtype: str = "auto", base: updates.Bases = None) -> str:
    """Write an artifact as a Hugging Face directory (`model.safetensors`, config, tokenizer, code): all files or none.

    Args:
        path: `.bcap` file.
        directory: created if missing; existing files of these names are replaced.
        dtype: `auto` (the source dtype if it holds every value exactly, else float32), `float32`, `float16`
            or `bfloat16` (rounded).
        base: the file that it is an update of; several where that is an update as well.

    Returns:
        The dtype written.

    Raises:
        ArtifactError: the file cannot be trusted. OutputError: the directory cannot be written, or a file to be written
            is the artifact itself.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    opened, target = open_directory(updates.read(path, base), dtype), Path(directory)
    inputs: dict[str, Paths] = {"the artifact": path, "its base": updates.paths_of(base)}
    refuse_collisions({name: target / name for name in (WEIGHTS, *opened.files)}, inputs)
    write_directory(target, {WEIGHTS: opened.write_weights, **opened.files})
    return opened.dtype


def _choose_dtypes(values: dict[str, npt.NDArray[Any]], source: dict[str, str], dtype: str) -> dict[str, str]:
    """Choose the dtype of every tensor; with `auto`, one float dtype for all unless every value fits its source's."""
    floats = [n for n in values if values[n].dtype.kind == "f"]
    if dtype != "auto":
        return {n: DTYPES[dtype] if n in floats else source[n] for n in values}
    exact = all(is_lossless(piece, source[n]) for n in floats for piece in _pieces(values[n]))
    return {n: source[n] if exact or n not in floats else "F32" for n in values}


def _pieces(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """All values in order, some at a time; at least one piece."""
    flat = values.reshape(-1)
    return (flat[i : i + _PIECE] for i in range(0, max(1, len(flat)), _PIECE))


def _rounded_bytes(values: npt.NDArray[Any], dtype: str) -> bytes:
    if dtype == "BF16":  # round to nearest even, as torch does
        bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
        bits += 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
        return (bits >> np.uint64(16)).astype("<u2").tobytes()
    return to_bytes(values, dtype).tobytes()
