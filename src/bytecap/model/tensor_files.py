"""Read single tensors of safetensors files, piece by piece, into any dtype on any device.

A whole file is never mapped or held: pages of a mapped file count as memory of the process as long as it is mapped.
Files are checked before work begins (`bytecap.model.fileset`), so that reading can only fail where one changes
meanwhile.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bytecap.errors import CheckpointError
from bytecap.system.transfers import fill

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U32": torch.uint32, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Computed(Protocol):
    """Tensors that are made from stored ones."""

    def __contains__(self, name: str) -> bool: ...

    def value(self, name: str) -> Tensor:
        """Return a tensor."""
        ...


class Tensors:
    """The tensors of a checkpoint, by the names that the model has for them.

    Args:
        headers: of its files, checked.
        names: name in the files of every tensor of the model.
        computed: gives the values of tensors that are not stored as such, by their names in the headers.
    """

    def __init__(
        self,
        headers: Mapping[Path, Mapping[str, Mapping[str, Any]]],
        names: Mapping[str, str],
        computed: Computed | None = None,
    ) -> None:
        self._computed = computed
        self._made = {t: n for t, n in names.items() if computed is not None and n in computed}
        places: dict[str, _Place] = {}
        for path, header in headers.items():
            with path.open("rb") as f:
                base = 8 + struct.unpack("<Q", f.read(8))[0]
            for name, entry in header.items():
                if entry["dtype"] in _DTYPES and "data_offsets" in entry:
                    start = base + int(entry["data_offsets"][0])
                    places[name] = _Place(path, start, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        self._places = {target: places[name] for target, name in names.items() if name in places}

    def __contains__(self, name: str) -> bool:
        return name in self._places or name in self._made

    def read(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        """Read a tensor, or some rows of it.

        Args:
            name: in the model.
            device: where it goes.
            dtype: of floating-point tensors; others keep theirs.
            rows: consecutive entries along the first axis; all by default.

        Raises:
            CheckpointError: its file is not what it was.
        """
        if self._computed is not None and name in self._made:
            value = self._computed.value(self._made[name])
            return (value if rows is None else value[rows]).to(device=device, dtype=dtype)
        place = self._places[name]
        wanted = dtype if dtype is not None and place.dtype.is_floating_point else place.dtype
        first, shape = (0, place.shape) if rows is None else (rows.start, (rows.stop - rows.start, *place.shape[1:]))
        out = torch.empty(shape, dtype=wanted, device=device)
        flat, width = out.reshape(-1), torch.empty(0, dtype=place.dtype).element_size()
        start = place.start + first * math.prod(place.shape[1:]) * width

        def read(buffer: Tensor, at: int) -> None:
            if not _read(place.path, start + at, buffer):
                raise CheckpointError(f"{place.path} has become shorter: tensor {name} cannot be read")

        try:
            fill(flat, place.dtype, read)
        except OSError as exc:
            raise CheckpointError(f"{place.path} cannot be read: {exc.strerror or exc}") from exc
        return out


def _read(path: Path, start: int, out: Tensor) -> bool:
    """Read bytes of a file from a place; returns whether there were as many."""
    with path.open("rb", buffering=0) as f:
        f.seek(start)
        view, at = out.numpy().data, 0
        while at < len(view) and (got := f.readinto(view[at:])):
            at += got
        return at == len(view)
