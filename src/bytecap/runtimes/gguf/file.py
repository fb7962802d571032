"""GGUF files on disk: written as planned, read back strictly, and accounted for byte by byte."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import NotAnArtifact, OutputError
from bytecap.format.decoder import from_matrix
from bytecap.format.ledger import Entry
from bytecap.model.quantized_copy import Lazy, Values
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.blocks.layout import unpack
from bytecap.runtimes.gguf import library
from bytecap.runtimes.gguf.places import Layout
from bytecap.system.atomic import open_regular, replacing
from bytecap.types import Unit

Array = npt.NDArray[Any]
Describe = Callable[[Any], None]  # writes metadata to a gguf writer
ALIGNMENT = 32
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}


def type_bytes(name: str, rows: int, cols: int) -> int:
    """Bytes of a matrix in a type, without padding."""
    if name in PLAIN:
        return rows * PLAIN[name] * cols
    if name in FORMATS:
        return rows * FORMATS[name].row_bytes(cols)
    gguf = library()
    block, size = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, name)]
    return rows * cols // int(block) * int(size)


def padded(size: int) -> int:
    """A size with the padding that follows."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def encode_plain(name: str, values: Array) -> npt.NDArray[np.uint8]:
    """Values (rows, cols) in a floating-point type, as bytes (rows, row bytes)."""
    x = np.ascontiguousarray(values, np.float32)
    if name == "BF16":
        bits = x.view(np.uint32).astype(np.uint64)
        found: Array = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2")
    else:
        found = x.astype("<f4" if name == "F32" else "<f2")
    return np.ascontiguousarray(found).view(np.uint8).reshape(len(x), -1)


def decode(name: str, data: Array, cols: int) -> npt.NDArray[np.float32]:
    """Values (rows, cols) of a tensor's bytes.

    Raises:
        NotAnArtifact: the type is none that gguf-py can decode.
    """
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    if name in FORMATS:
        form = FORMATS[name]
        return unpack(form, raw.reshape(-1, form.row_bytes(cols))).values()
    if name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(-1, cols)
    if name in PLAIN:
        return raw.view("<f4" if name == "F32" else "<f2").astype(np.float32).reshape(-1, cols)
    gguf = library()
    kind = getattr(gguf.GGMLQuantizationType, name)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        found = gguf.dequantize(raw.reshape(-1, cols // block * size), kind)
    except NotImplementedError as exc:
        raise NotAnArtifact(f"tensors of type {name} cannot be read") from exc
    return np.asarray(found, np.float32).reshape(-1, cols)


@dataclass(frozen=True)
class Stored:
    """A tensor ready to be written.

    Attributes:
        shape: outermost dimension first.
        type: its name.
        data: uint8 (rows, row bytes), or what makes them when they are written; None where only the size matters.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: npt.NDArray[np.uint8] | Callable[[], npt.NDArray[np.uint8]] | None = None

    @property
    def bytes(self) -> int:
        """Without padding."""
        return type_bytes(self.type, int(np.prod(self.shape[:-1])), self.shape[-1])


def write(path: Path, architecture: str, describe: Describe, tensors: Sequence[Stored]) -> int:
    """Write a file that appears whole or not at all; returns its bytes.

    Raises:
        OutputError: it cannot be written, or the disk is full.
    """
    with replacing(path) as f, tempfile.TemporaryDirectory() as name:
        head = Path(name) / "head.gguf"
        _write_head(head, architecture, describe, tensors)
        size = f.write(head.read_bytes())
        size += f.write(bytes(padded(size) - size))
        for t in tensors:
            assert t.data is not None  # noqa: S101 (only sizes are asked of tensors without)
            size += f.write(np.ascontiguousarray(t.data() if callable(t.data) else t.data).data)
            size += f.write(bytes(padded(t.bytes) - t.bytes))
    return size


def head_bytes(architecture: str, describe: Describe, tensors: Sequence[Stored]) -> int:
    """Bytes in front of the tensors' data, padding included; they do not depend on the tensors' types."""
    with tempfile.TemporaryDirectory() as name:
        head = Path(name) / "head.gguf"
        _write_head(head, architecture, describe, tensors)
        return padded(head.stat().st_size)


def _write_head(path: Path, architecture: str, describe: Describe, tensors: Sequence[Stored]) -> None:
    gguf = library()
    writer = gguf.GGUFWriter(str(path), architecture)
    describe(writer)
    for t in tensors:
        kind = getattr(gguf.GGMLQuantizationType, t.type)
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.bytes, raw_dtype=kind)
    try:
        with contextlib.closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror}") from exc


def open_file(path: Path) -> Any:
    """gguf-py's reader of a file.

    Raises:
        NotAnArtifact: it is no GGUF file, or a damaged one.
        OutputError: it cannot be read.
    """
    try:
        open_regular(path, os.O_RDONLY, follow=True).close()  # the reader would wait for a pipe's writer for ever
        return library().GGUFReader(str(path))
    except OSError as exc:
        raise OutputError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, IndexError, KeyError) as exc:
        raise NotAnArtifact(f"{path} is no sound GGUF file: {exc}") from exc


def open_model(path: Path) -> Any:
    """gguf-py's reader of a file that holds a model.

    Raises:
        NotAnArtifact: it holds something else, such as an importance matrix.
    """
    reader = open_file(path)
    kind = reader.fields.get("general.type")
    if kind is not None and kind.contents() != "model":
        raise NotAnArtifact(f"{path} holds no model but is of type {kind.contents()!r}: give the model's own GGUF file")
    if not reader.fields.get("general.architecture"):
        raise NotAnArtifact(f"{path} names no architecture: it holds no model")
    return reader


def read_tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], npt.NDArray[np.float32]]]:
    """Name, type, shape and values (rows, cols) of every tensor, one after the other."""
    for t in open_file(path).tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        yield t.name, t.tensor_type.name, shape, decode(t.tensor_type.name, t.data, shape[-1])


def read_each(path: Path, layout: Layout, units: Sequence[Unit]) -> Values:
    """Values of all units in stored layout, from the file alone, each read whenever it is asked for."""
    by_name, places = {u.name: u for u in units}, {p.name: p for p in layout.places}
    members: dict[str, list[str]] = {}
    for t in open_file(path).tensors:
        if places[t.name].unit:
            members.setdefault(places[t.name].unit, []).append(t.name)

    def make(name: str) -> Array:
        matrix, wanted = np.zeros(by_name[name].matrix_shape, np.float32), set(members[name])
        for t in open_file(path).tensors:  # opened anew: pages of a mapped file count as long as it is mapped
            if t.name in wanted:
                places[t.name].to_unit(decode(t.tensor_type.name, t.data, int(t.shape[0])), matrix)
        return np.ascontiguousarray(from_matrix(by_name[name], matrix))

    return Lazy(list(members), make)


def read_units(path: Path, layout: Layout, units: Sequence[Unit]) -> Mapping[str, Array]:
    """Values of all units in stored layout, from the file alone."""
    by_name = {u.name: u for u in units}
    matrices: dict[str, Array] = {}
    places = {p.name: p for p in layout.places}
    tensors = [t for t in open_file(path).tensors if places[t.name].unit]
    for name in dict.fromkeys(places[t.name].unit for t in tensors):
        matrices[name] = np.zeros(by_name[name].matrix_shape, np.float32)

    def one(tensor: Any) -> None:
        place = places[tensor.name]
        place.to_unit(decode(tensor.tensor_type.name, tensor.data, int(tensor.shape[0])), matrices[place.unit])

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, tensors))
    return {n: from_matrix(by_name[n], m) for n, m in matrices.items()}


def ledger(path: Path) -> list[Entry]:
    """Owner and kind of every byte of a GGUF file."""
    reader = open_file(path)
    entries, tokens = [], 0
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            tokens += sum(int(np.asarray(part).nbytes) for part in field.parts)
    data = sum(int(t.n_bytes) for t in reader.tensors)
    start = int(reader.data_offset)
    rest = path.stat().st_size - start - data
    entries.append(Entry("(file)", "header", start - tokens))
    entries.append(Entry("(tokenizer)", "tokenizer", tokens))
    for t in reader.tensors:
        form = FORMATS.get(t.tensor_type.name)
        side = int(t.n_elements) // form.block * form.side if form else 0
        entries.append(Entry(f"{t.name} ({t.tensor_type.name})", "payload", int(t.n_bytes) - side, int(t.n_elements)))
        if side:
            entries.append(Entry(f"{t.name} ({t.tensor_type.name})", "side", side, int(t.n_elements)))
    entries.append(Entry("(file)", "padding", rest))
    return [e for e in entries if e.bytes]
