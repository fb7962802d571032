"""Files around a model that are not the product of a plan: unquantized GGUF, importance matrices, lists of types."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.calibration.metric import join
from bytecap.calibration.sums import Statistics
from bytecap.model.checkpoint import Model
from bytecap.runtimes.gguf import file, library
from bytecap.runtimes.gguf.metadata import write_keys
from bytecap.runtimes.gguf.places import Layout, Place
from bytecap.runtimes.gguf.tokenizer import write_tokenizer
from bytecap.types import as_matrix

_MIXES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def describer(model: Model, layout: Layout, keys: Callable[[Any], None] | None, type_: str = "Q4_K") -> file.Describe:
    """Function that writes a file's metadata: `keys` if there are some, else what the model says.

    Args:
        model: whose metadata it is.
        layout: its tensors.
        keys: writes a template's.
        type_: which type the file is said to be of; readers only show it.
    """

    def describe(writer: Any) -> None:
        if keys is not None:
            keys(writer)
        else:
            writer.add_name(Path(model.name).name)
            write_keys(writer, model, layout)
            write_tokenizer(writer, model)
        writer.add_quantization_version(library().GGML_QUANT_VERSION)
        kinds = library().LlamaFileType
        names = ("ALL_F32",) if type_ == "F32" else (f"MOSTLY_{_MIXES.get(type_, type_)}",)
        writer.add_file_type(int(getattr(kinds, names[0], kinds.GUESSED)))

    return describe


def values_of(model: Model, place: Place) -> npt.NDArray[np.float32]:
    """A tensor's values (rows, cols) in the file's order, unquantized."""
    if not place.unit:
        assert place.values is not None  # noqa: S101 (a place has a unit or values)
        return place.values.reshape(-1, place.cols)
    unit = next(u for u in model.units if u.name == place.unit)
    matrix = as_matrix(unit, model.tensor(unit).detach()).float().cpu().numpy()
    return np.ascontiguousarray(place.to_file(matrix), np.float32).reshape(-1, place.cols)


def plain(model: Model, place: Place, type_: str = "F32") -> file.Stored:
    """A tensor in a floating-point type; vectors and what llama.cpp keeps exact stay in float32."""
    name = type_ if place.matrix else "F32"
    return file.Stored(place.name, place.shape, name, file.encode_plain(name, values_of(model, place)))


def write_plain(model: Model, layout: Layout, path: Path, type_: str = "F32") -> int:
    """Write a model in F32, F16 or BF16; returns the bytes."""
    tensors = [plain(model, p, type_) for p in layout.places]
    return file.write(path, layout.architecture, describer(model, layout, None, type_), tensors)


def importance(model: Model, layout: Layout, found: Statistics) -> dict[str, npt.NDArray[np.float32]]:
    """Mean squared input of every column of every matrix, as `llama-quantize --imatrix` weights errors.

    With guided statistics every token weighs as much as its output gradients; plain ones are llama.cpp's own.
    """
    del model
    return {
        p.name: join(found.uses[p.unit], found.tokens).hessian.diagonal().float().cpu().numpy()
        for p in layout.places
        if p.matrix and p.unit in found.uses
    }


def write_imatrix(
    path: Path, found: Mapping[str, npt.NDArray[np.float32]], tokens: int, datasets: Sequence[str]
) -> int:
    """Write an importance matrix that `llama-quantize --imatrix` reads; returns the bytes."""

    def describe(writer: Any) -> None:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", max(1, tokens // 512))
        writer.add_uint32("imatrix.chunk_size", 512)

    tensors = []
    for name, mean in found.items():
        sums = file.encode_plain("F32", (mean * tokens)[None])
        count = file.encode_plain("F32", np.full((1, 1), tokens, np.float32))
        tensors.append(file.Stored(f"{name}.in_sum2", (1, len(mean)), "F32", sums))
        tensors.append(file.Stored(f"{name}.counts", (1, 1), "F32", count))
    return file.write(path, "", describe, tensors)


def type_lines(types: Mapping[str, str]) -> str:
    r"""Types as `llama-quantize --tensor-type-file` reads them.

    >>> type_lines({"blk.0.attn_q.weight": "Q4_K"})
    '^blk\\.0\\.attn_q\\.weight$=q4_k\n'
    """
    return "".join(f"^{re.escape(n)}$={t.lower()}\n" for n, t in types.items())
