"""Turn an artifact back into an ordinary Hugging Face directory.

`unpack` writes the source's names, shapes and dtypes, so that other tools take the directory for the original. A coded
value is a float32, and rounding it to a source of 16 bits changes it a little: far less than coding it did
(docs/cli.md has figures). `float32`, or `auto`, writes exactly the values that `eval` scores.
No network, no code from the file: config and tokenizer come out of the artifact's own sections.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bytecap.errors import ArtifactError, CorruptError, UsageError
from bytecap.format import codefiles, updates
from bytecap.format.coders.exact import WIDTH, from_bytes, is_lossless, to_bytes
from bytecap.format.container import CODE, FILE, Contents
from bytecap.format.decoder import decode_units
from bytecap.format.sidefiles import names, source_tensors
from bytecap.format.sidefiles.names import WEIGHTS
from bytecap.system.collisions import Paths, refuse_collisions
from bytecap.system.directories import write_directory

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
RULES = ("source", "auto")  # that choose a dtype for every tensor
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
        rounded: names of the tensors whose dtype does not hold their decoded values exactly.
    """

    values: dict[str, npt.NDArray[Any]]
    dtypes: dict[str, str]
    files: dict[str, bytes]
    dtype: str
    rounded: tuple[str, ...] = ()

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
            into.writelines(_rounded_bytes(piece, self.dtypes[name]).data for piece in _pieces(self.values[name]))


def read_whole(path: Path | str, base: updates.Bases = None) -> tuple[Contents, dict[str, bytes]]:
    """Read a file, or a directory in the hub's layout; returns its contents and the files that lie beside them.

    Raises:
        ArtifactError: the file cannot be trusted. CheckpointError: the directory holds two files of weights.
        UsageError: a directory has a base.
    """
    from bytecap.runtimes import hub  # which knows tokenizers and configs; decoding needs neither

    if not hub.is_hub(Path(path)):
        return updates.read(path, base), {}
    if base:
        raise UsageError(f"{path} is a directory with a whole file: it has no base")
    return hub.read(Path(path))


def open_directory(contents: Contents, dtype: str = "source", beside: Mapping[str, bytes] | None = None) -> Directory:
    """Return the files that `unpack` would write; every section is decoded and every name checked.

    Args:
        contents: of the artifact.
        dtype: see `unpack`.
        beside: config and tokenizer that are not inside.

    Raises:
        ArtifactError: a section is damaged, or a name would overwrite the weights or leave the directory.
        UsageError: `dtype` is too narrow for a value.
    """
    names.check(updates.names_of(contents))
    unpacked = codefiles.files(contents, (FILE, CODE))
    found = {n: unpacked.pop(n) for n in updates.names_of(contents, (FILE,))}
    values, source = _tensors(contents, found)
    found |= unpacked
    found = {**(beside or {}), **found}
    if _METADATA in values:
        raise CorruptError(f"a tensor of the name {_METADATA} cannot be written as safetensors")
    chosen, rounded = _choose_dtypes(values, source, dtype)
    float_dtypes = {d for d in chosen.values() if d in _CONFIG_NAMES}
    written = _CONFIG_NAMES[float_dtypes.pop()] if len(float_dtypes) == 1 else "float32"
    if "config.json" in found:
        content = _with_dtype(found["config.json"], written)  # which also refuses what is no config
        if chosen != source or len(set(chosen.values())) == 1:
            found["config.json"] = content
    return Directory(values, chosen, found, written, rounded)


def directory_files(contents: Contents, dtype: str = "source") -> tuple[dict[str, bytes], str]:
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


def unpack(path: Path | str, directory: Path | str, *, dtype: str = "source", base: updates.Bases = None) -> str:
    """Write an artifact as a Hugging Face directory (`model.safetensors`, config, tokenizer, code): all files or none.

    Args:
        path: `.bcap` file, or a directory that holds `model.bcap`.
        directory: created if missing; existing files of these names are replaced.
        dtype: `source` (the source's own dtypes; values are rounded to them, but where one is beyond such a dtype),
            `float32` (the decoded values exactly), `auto` (the source's dtypes if they hold every value exactly, else
            float32), `float16` or `bfloat16` (rounded).
        base: the file that it is an update of; several where that is an update as well.

    Returns:
        The dtype written; `float32` where there are several.

    Raises:
        ArtifactError: the file cannot be trusted. OutputError: the directory cannot be written, or a file to be written
            is the artifact itself. UsageError: the dtype is unknown, or too narrow for a value.
    """
    return unpack_directory(path, directory, dtype=dtype, base=base).dtype


def unpack_directory(
    path: Path | str, directory: Path | str, *, dtype: str = "source", base: updates.Bases = None
) -> Directory:
    """Do what `unpack` does; returns what was written."""
    if dtype not in (*RULES, *DTYPES):
        raise UsageError(f"unknown dtype {dtype!r}: use {', '.join((*RULES, *DTYPES))}")
    contents, beside = read_whole(path, base)
    opened, target = open_directory(contents, dtype, beside), Path(directory)
    inputs: dict[str, Paths] = {"the artifact": path, "its base": updates.paths_of(base)}
    refuse_collisions({name: target / name for name in (WEIGHTS, *opened.files)}, inputs)
    write_directory(target, {WEIGHTS: opened.write_weights, **opened.files})
    return opened


def _choose_dtypes(
    values: dict[str, npt.NDArray[Any]], source: dict[str, str], dtype: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Choose the dtype of every tensor, and name those that are rounded by it."""
    floats = [n for n in values if values[n].dtype.kind == "f"]
    wanted = dict(source) if dtype in RULES else {n: DTYPES[dtype] if n in floats else source[n] for n in values}
    rounded = [n for n in floats if not all(is_lossless(piece, wanted[n]) for piece in _pieces(values[n]))]
    if dtype == "auto" and rounded:
        return wanted | dict.fromkeys(floats, "F32"), ()
    beyond = [n for n in rounded if not _in_range(values[n], wanted[n])]
    if beyond and dtype != "source":
        raise UsageError(f"tensor {beyond[0]} holds values beyond {dtype}: use float32, or bfloat16")
    return wanted | dict.fromkeys(beyond, "F32"), tuple(n for n in rounded if n not in beyond)


def _in_range(values: npt.NDArray[Any], dtype: str) -> bool:
    """Return whether rounding to a dtype makes no value infinite; other dtypes than floats hold none."""
    if dtype not in DTYPES.values():
        return False
    return all(
        np.array_equal(np.isfinite(from_bytes(_rounded_bytes(piece, dtype), dtype)), np.isfinite(piece))
        for piece in _pieces(values)
    )


def _pieces(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """All values in order, some at a time; at least one piece."""
    flat = values.reshape(-1)
    return (flat[i : i + _PIECE] for i in range(0, max(1, len(flat)), _PIECE))


def _rounded_bytes(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.uint8]:
    """Return the bytes (n, width) of values, rounded to the nearest, ties to even, as torch does."""
    if dtype == "BF16":
        single = np.ascontiguousarray(values, "<f4")
        bits = single.view("<u4").astype(np.uint64)
        bits += 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
        short = (bits >> np.uint64(16)).astype("<u2")
        short[np.isnan(single)] = 0x7FC0  # whose last bits the sum above would carry into the exponent
        return short.view(np.uint8).reshape(-1, 2)
    with np.errstate(over="ignore"):
        return to_bytes(values, dtype)
