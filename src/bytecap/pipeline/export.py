"""Turn an artifact back into an ordinary Hugging Face directory.

`unpack` writes exactly the values `eval` scores: in the source dtype where that holds them all, else float32.
No network, no code from the file: config and tokenizer come out of the artifact's own sections.
"""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import ArtifactError, OutputError, UsageError
from bytecap.format import codefiles, container
from bytecap.format.coders.exact import is_lossless, to_bytes
from bytecap.format.container import Contents
from bytecap.format.decoder import decode_units, side_files
from bytecap.format.sidefiles import source_tensors
from bytecap.system.atomic import write_atomically

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CONFIG_NAMES = {v: k for k, v in DTYPES.items()}
_WEIGHTS = "model.safetensors"
_METADATA = "__metadata__"  # a name that a safetensors header keeps for itself


def directory_files(contents: Contents, dtype: str = "auto") -> tuple[dict[str, bytes], str]:
    """Return every file that `unpack` writes, by name, and the dtype; nothing is written here.

    Raises:
        ArtifactError: a section is damaged, or a name would overwrite the weights or leave the directory.
    """
    found = side_files(contents)
    values, source = _tensors(contents, found)
    found |= codefiles.files(contents)
    chosen = _choose_dtypes(values, source, dtype)
    float_dtypes = {d for d in chosen.values() if d in _CONFIG_NAMES}
    written = _CONFIG_NAMES[float_dtypes.pop()] if len(float_dtypes) == 1 else "float32"
    for name in found:
        if name.lower() == _WEIGHTS or PureWindowsPath(name).name != name or ":" in name:
            raise ArtifactError(f"a side file must not have the name {name!r}")
    if "config.json" in found and (chosen != source or len(set(chosen.values())) == 1):
        found["config.json"] = _with_dtype(found["config.json"], written)
    return {_WEIGHTS: _safetensors(values, chosen), **found}, written


def _tensors(contents: Contents, files: dict[str, bytes]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Tensors of the checkpoint by its own names, and their dtypes there; takes out the side file that says which."""
    values = decode_units(contents, aliases=False)
    dtypes = {u.unit.name: u.unit.dtype for u in contents.units}
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


def unpack(path: Path | str, directory: Path | str, *, dtype: str = "auto") -> str:
    """Write an artifact as a Hugging Face directory (`model.safetensors`, config, tokenizer, code).

    Args:
        path: `.bcap` file.
        directory: created if missing; existing files of these names are replaced.
        dtype: `auto` (the source dtype if it holds every value exactly, else float32), `float32`, `float16`
            or `bfloat16` (rounded).

    Returns:
        The dtype written.

    Raises:
        ArtifactError: the file cannot be trusted. OutputError: the directory cannot be written.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    found, written = directory_files(container.read(path), dtype)
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"cannot create {target}: {exc.strerror}") from exc
    for name, content in found.items():
        write_atomically(content, target / name)
    return written


def _choose_dtypes(values: dict[str, npt.NDArray[Any]], source: dict[str, str], dtype: str) -> dict[str, str]:
    """Choose the dtype of every tensor; with `auto`, one float dtype for all unless every value fits its source's."""
    floats = [n for n in values if values[n].dtype.kind == "f"]
    if dtype != "auto":
        return {n: DTYPES[dtype] if n in floats else source[n] for n in values}
    exact = all(is_lossless(values[n], source[n]) for n in floats)
    return {n: source[n] if exact or n not in floats else "F32" for n in values}


def _safetensors(values: dict[str, npt.NDArray[Any]], dtypes: dict[str, str]) -> bytes:
    """Write the bytes of a safetensors file; the library's numpy interface has no bfloat16."""
    if _METADATA in values:
        raise ArtifactError(f"a tensor of the name {_METADATA} cannot be written as safetensors")
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    chunks, at = [], 0
    for name in sorted(values):
        data = _rounded_bytes(values[name], dtypes[name])
        header[name] = {"dtype": dtypes[name], "shape": list(values[name].shape), "data_offsets": [at, at + len(data)]}
        chunks.append(data)
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def _rounded_bytes(values: npt.NDArray[Any], dtype: str) -> bytes:
    if dtype == "BF16":  # round to nearest even, as torch does
        bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
        bits += 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
        return (bits >> np.uint64(16)).astype("<u2").tobytes()
    return to_bytes(values, dtype).tobytes()
