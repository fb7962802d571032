"""From an artifact back to an ordinary Hugging Face directory or a live module.

`unpack` writes exactly the values `eval` scores: in the source dtype where that holds them all, else float32.
No network, no code from the file: config and tokenizer come out of the artifact's own sections.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bytecap.errors import ArtifactError, CorruptError, UsageError
from bytecap.format import codefiles, container
from bytecap.format.codefiles import side_files
from bytecap.format.coders.exact import WIDTH, is_lossless, to_bytes
from bytecap.format.container import CODE, FILE, Contents
from bytecap.format.decoder import decode_units
from bytecap.format.sidefiles import names
from bytecap.format.sidefiles.names import WEIGHTS
from bytecap.system.atomic import write_directory
from bytecap.system.collisions import refuse_collisions

if TYPE_CHECKING:
    from torch import nn

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
    names.check(f.name for f in contents.files)
    if any(u.unit.name == _METADATA for u in contents.units):
        raise CorruptError(f"a tensor of the name {_METADATA} cannot be written as safetensors")
    found = codefiles.files(contents, (FILE, CODE))
    values = decode_units(contents, aliases=False)
    chosen = _choose_dtypes(values, {u.unit.name: u.unit.dtype for u in contents.units}, dtype)
    float_dtypes = {d for d in chosen.values() if d in _CONFIG_NAMES}
    written = _CONFIG_NAMES[float_dtypes.pop()] if len(float_dtypes) == 1 else "float32"
    if "config.json" in found:
        found["config.json"] = _with_dtype(found["config.json"], written)
    return Directory(values, chosen, found, written)


def directory_files(contents: Contents, dtype: str = "auto") -> tuple[dict[str, bytes], str]:
    """Every file that `unpack` writes, by name, and the dtype written; nothing is written here.

    Raises:
        ArtifactError: see `open_directory`.
    """
    opened, weights = open_directory(contents, dtype), io.BytesIO()
    opened.write_weights(weights)
    return {WEIGHTS: weights.getvalue(), **opened.files}, opened.dtype


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
    """Write an artifact as a Hugging Face directory (`model.safetensors`, config, tokenizer, code): all files or none.

    Args:
        path: `.bcap` file.
        directory: created if missing; existing files of these names are replaced.
        dtype: `auto` (the source dtype if it holds every value exactly, else float32), `float32`, `float16`
            or `bfloat16` (rounded).

    Returns:
        The dtype written.

    Raises:
        ArtifactError: the file cannot be trusted. OutputError: the directory cannot be written, or a file to be written
            is the artifact itself.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    opened, target = open_directory(container.read(path), dtype), Path(directory)
    refuse_collisions({name: target / name for name in (WEIGHTS, *opened.files)}, {"the artifact": path})
    write_directory(target, {WEIGHTS: opened.write_weights, **opened.files})
    return opened.dtype


def _choose_dtypes(values: dict[str, npt.NDArray[Any]], source: dict[str, str], dtype: str) -> dict[str, str]:
    """Dtype of every tensor; with `auto`, one float dtype for all unless every value fits its source's."""
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
        shapes = {n: u.unit.shape for u in contents.units for n in (u.unit.name, *u.unit.aliases)}
        module = module_from_config(Path(directory), shapes, str(path))
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
