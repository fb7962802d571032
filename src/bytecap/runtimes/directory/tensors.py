"""Write safetensors planned to the byte, tensor by tensor, and read them back strictly.

The library's own writer knows no bfloat16 without torch and does not say how long a header will be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bytecap.errors import CheckpointError
from bytecap.format.coders.exact import WIDTH, from_bytes, to_bytes
from bytecap.model.fileset import check_safetensors

Array = npt.NDArray[Any]
_WORDS = {"U32": "<u4", "U16": "<u2", "U64": "<u8", "F8_E4M3": "u1"}  # types that only runtimes use
_WIDTHS = {**WIDTH, "U32": 4, "U16": 2, "U64": 8, "F8_E4M3": 1}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        values: contents, or what makes them whenever they are asked for; None where only the size matters.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Array | Callable[[], Array] | None = None

    def array(self) -> Array:
        """Contents."""
        assert self.values is not None  # noqa: S101 (only sizes are asked of tensors without)
        return self.values() if callable(self.values) else self.values

    @property
    def size(self) -> int:
        """Return the bytes of the contents."""
        return _WIDTHS[self.dtype] * math.prod(self.shape)

    def data(self) -> bytes:
        """Contents as stored, floats rounded to nearest even."""
        values = self.array()
        if self.dtype in _WORDS:
            return np.ascontiguousarray(values, _WORDS[self.dtype]).tobytes()
        if self.dtype == "BF16":
            bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
            bits += 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
            return (bits >> np.uint64(16)).astype("<u2").tobytes()
        return to_bytes(values, self.dtype).tobytes()


def ordered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in file order: widest first, so that every one is aligned, then by name."""
    return sorted(tensors, key=lambda t: (-_WIDTHS[t.dtype], t.name))


def header(tensors: Sequence[Tensor], mark: str) -> bytes:
    """Return the bytes in front of the contents of tensors in file order."""
    found: dict[str, Any] = {"__metadata__": {"format": mark}}
    at = 0
    for t in tensors:
        found[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.size]}
        at += t.size
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(f: BinaryIO, tensors: Sequence[Tensor], mark: str) -> int:
    """Write a file tensor by tensor; returns its bytes."""
    tensors = ordered(tensors)
    size = f.write(header(tensors, mark))
    for t in tensors:
        size += f.write(t.data())
    return size


def read(path: Path) -> Mapping[str, Tensor]:
    """All tensors of a file, whose contents are read whenever they are asked for.

    Raises:
        CheckpointError: it is damaged.
    """
    check_safetensors(path)
    found: dict[str, Tensor] = {}
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        entries: dict[str, Any] = json.loads(f.read(length))
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        kind, shape = entry["dtype"], tuple(entry["shape"])
        if kind not in _WIDTHS:
            raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {kind}")
        values = partial(_values, path, 8 + length + entry["data_offsets"][0], kind, shape)
        found[name] = Tensor(name, kind, shape, values)
    return found


def _values(path: Path, start: int, kind: str, shape: tuple[int, ...]) -> Array:
    count = math.prod(shape)
    raw = np.fromfile(path, np.uint8, count * _WIDTHS[kind], offset=start)
    if len(raw) < count * _WIDTHS[kind]:
        raise CheckpointError(f"{path} has become shorter: {len(raw):,} bytes of a tensor are left")
    values: Array = raw.view(_WORDS[kind]) if kind in _WORDS else from_bytes(raw.reshape(-1, _WIDTHS[kind]), kind)
    return values.reshape(shape)
