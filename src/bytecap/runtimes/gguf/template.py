"""Names, metadata and tokenizer from the user's own conversion of the same model.

llama.cpp's converter knows every architecture. A file that it wrote in F32, F16 or BF16 says which tensors there are
and what they hold: every row of a matrix is found again among the rows of the model's units by its values, which gives
the row order whatever the converter did. Rows are known by digests of 16 bytes, so that no model is in memory for it.
Tensors whose rows are not found (computed ones, vectors) are copied.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CheckpointError
from bytecap.model.checkpoint import Model
from bytecap.runtimes.gguf import library
from bytecap.runtimes.gguf.file import PLAIN, decode, encode_plain, open_model
from bytecap.runtimes.gguf.places import Layout, Place
from bytecap.types import as_matrix

Array = npt.NDArray[Any]
_SHAPED = ("general.file_type", "general.quantization_version", "general.architecture")


@dataclass(frozen=True)
class GgufTemplate:
    """The names, keys and tokenizer that a GGUF file of the same model gives.

    Attributes:
        layout: its tensors.
        fields: its keys, as gguf-py reads them.
    """

    layout: Layout
    fields: Mapping[str, Any]

    def write_keys(self, writer: Any) -> None:
        """Copy all keys but those that say how tensors are stored."""
        types = library().GGUFValueType
        for key, entry in self.fields.items():
            if key in _SHAPED or key.startswith("GGUF."):
                continue
            value, kind = entry.contents(), entry.types[0]
            writer.add_key_value(key, value, kind, entry.types[-1] if kind == types.ARRAY else None)


def read_template(path: Path, model: Model, *, quantized: bool = False) -> GgufTemplate:
    """The template at `path`, matched with a model; `quantized` where the model was read from the file itself.

    Raises:
        CheckpointError: it is of another model, or quantized.
        NotAnArtifact: it is no GGUF file.
    """
    reader = open_model(path)
    index = _Index(model)
    places = []
    for t in reader.tensors:
        kind, shape = t.tensor_type.name, tuple(int(n) for n in reversed(t.shape))
        if kind not in PLAIN and not quantized:
            raise CheckpointError(
                f"{path}: {t.name} is stored as {kind}; a template must be F32, F16 or BF16 "
                "(convert_hf_to_gguf.py --outtype f16)"
            )
        values = decode(kind, t.data, shape[-1])
        places.append(index.place(t.name, shape, values, kind if kind in PLAIN else "F32"))
    wanted = {u.name for u in model.units if len(u.shape) >= 2 and u.linear}
    lost = sorted(wanted - {p.unit for p in places})
    if lost:
        shapes = {u.name: u.shape for u in model.units}
        theirs = ", ".join(f"{p.name} {p.shape}" for p in places if p.matrix and not p.unit)
        raise CheckpointError(
            f"{path} is no conversion of {model.name}: it does not hold {lost[0]} {shapes[lost[0]]}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
            + (f"; unknown to the model are {theirs[:200]}" if theirs else "")
        )
    name = str(reader.fields["general.architecture"].contents())
    return GgufTemplate(Layout(name, tuple(places)), reader.fields)


class _Index:
    """Rows of a model's matrices by digests of their values in a storage type."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._rows: dict[str, dict[bytes, list[tuple[str, int]]]] = {}

    def _of(self, kind: str) -> dict[bytes, list[tuple[str, int]]]:
        if kind not in self._rows:
            found: dict[bytes, list[tuple[str, int]]] = {}
            for unit in self._model.units:
                if len(unit.shape) < 2:
                    continue
                matrix = as_matrix(unit, self._model.tensor(unit).detach()).float().cpu().numpy()
                for i, row in enumerate(encode_plain(kind, matrix)):
                    found.setdefault(_digest(row), []).append((unit.name, i))
            self._rows[kind] = found
        return self._rows[kind]

    def place(self, name: str, shape: tuple[int, ...], values: Array, kind: str) -> Place:
        """Find the unit of a tensor; a copy of its values where no unit has all of its rows."""
        copied = Place(name, "", shape, values=values)
        if not copied.matrix:
            return copied
        index = self._of(kind)
        rows = [index.get(_digest(r), []) for r in encode_plain(kind, values)]
        owners = Counter(u for found in rows for u in {u for u, _ in found})
        unit = next((u for u in self._model.units if owners[u.name] == len(rows)), None)
        if unit is None:
            return copied
        order = np.array(_places([[i for u, i in found if u == unit.name] for found in rows]), np.intp)
        whole = len(order) == unit.matrix_shape[0] and np.array_equal(order, np.arange(len(order)))
        return Place(name, unit.name, shape, None if whole else order)


def _digest(row: Array) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _places(candidates: list[list[int]]) -> list[int]:
    """One of the candidates for every row; equal rows take theirs in turn."""
    taken: Counter[tuple[int, ...]] = Counter()
    found = []
    for c in candidates:
        key = tuple(c)
        found.append(c[taken[key] % len(c)])
        taken[key] += 1
    return found
