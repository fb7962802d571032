"""Which tensor of a GGUF file holds which rows of which unit.

Names come from gguf-py's tensor map. Row orders and offsets come from transformers, which reads GGUF files: its
processor of an architecture is shown numbered rows, and where they end up says how llama.cpp orders them (rotary
rotary layout of queries and keys). An architecture that transformers does not read needs a template.
Experts that a checkpoint keeps in one tensor are split as llama.cpp wants them. Omitted: tensors that a conversion
computes, other than rotary factors; they need a template too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CheckpointError
from bytecap.model.checkpoint import Model
from bytecap.runtimes.gguf import library
from bytecap.runtimes.gguf.rope import factors_of
from bytecap.types import Unit

Array = npt.NDArray[Any]

# llama.cpp leaves these as they are, whatever their shape (llama-quant.cpp): routers, positions, convolutions
EXACT = re.compile(r"(_norm\.weight|ffn_gate_inp\.weight|position_embd\.weight|token_types\.weight|conv1d?\.weight)$")


@dataclass(frozen=True)
class Place:
    """One tensor of a file.

    Attributes:
        name: in the file.
        unit: which unit's values it holds; empty where the values are the template's own.
        shape: outermost dimension first.
        rows: row of the unit's matrix for every row of the file's; None keeps their order.
        offset: added to the unit's values.
        values: its values where no unit holds them.
    """

    name: str
    unit: str
    shape: tuple[int, ...]
    rows: npt.NDArray[np.intp] | None = None
    offset: float = 0.0
    values: Array | None = None

    @property
    def cols(self) -> int:
        """Values of a row."""
        return self.shape[-1]

    @property
    def parameters(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    @property
    def matrix(self) -> bool:
        """Return whether block formats may hold the tensor."""
        return len(self.shape) >= 2 and not EXACT.search(self.name)

    def to_file(self, matrix: Array) -> Array:
        """(rows, cols) of the file from the unit's matrix."""
        found = matrix
        if self.rows is not None:  # of a vector, its values
            found = matrix[self.rows] if len(self.shape) > 1 else matrix[:, self.rows]
        return found + self.offset if self.offset else found

    def to_unit(self, found: Array, matrix: Array) -> None:
        """Put (rows, cols) of the file where they belong in the unit's matrix."""
        values = found - self.offset if self.offset else found
        if self.rows is not None and len(self.shape) == 1:
            matrix[0, self.rows] = values.reshape(-1)
        else:
            matrix[slice(None) if self.rows is None else self.rows] = values.reshape(-1, matrix.shape[1])


@dataclass(frozen=True)
class Layout:
    """All tensors of a file.

    Attributes:
        architecture: as llama.cpp calls it.
        places: in file order.
    """

    architecture: str
    places: tuple[Place, ...]

    def of(self, unit: str) -> list[Place]:
        """Places of a unit."""
        return [p for p in self.places if p.unit == unit]


# models that transformers reads under another name than its own: llama.cpp's architecture, and whose keys it takes
_LIKE = {"mixtral": ("llama", "mistral"), "gemma": ("gemma", "gemma2")}


def read_like(kind: str) -> str:
    """Kind of model whose keys in transformers' table a kind has."""
    return _LIKE[kind][1] if kind in _LIKE else kind


def architecture_of(model: Model) -> str:
    """llama.cpp's name of a model's architecture.

    Raises:
        CheckpointError: transformers or gguf-py do not know it.
    """
    known: Mapping[str, Mapping[str, Any]] = library("transformers.integrations.ggml").GGUF_CONFIG_MAPPING
    names = set(library().MODEL_ARCH_NAMES.values())
    kind = str(model.config().get("model_type", ""))
    base = kind.removesuffix("_text")
    if base in _LIKE:
        return _LIKE[base][0]
    if base in known:
        for name in (base, base.replace("_", ""), base.replace("_", "-")):
            if name in names:
                return name
        for name, mapping in known.items():  # read just like another one
            if name in names and mapping == known[base]:
                return name
    raise CheckpointError(
        f"{model.name} is a {kind or 'model without a model_type'}: no direct way into GGUF is known for it. Convert "
        "it with llama.cpp's convert_hf_to_gguf.py --outtype f16 and give that file with --template"
    )


def blocks_of(config: Any) -> int:
    """Number of layers that a config names."""
    return int(getattr(config, "num_hidden_layers", 0))


def layout_of(model: Model) -> Layout:
    """Layout of a model that gguf-py and transformers know.

    Raises:
        CheckpointError: they do not know the architecture, or have no name for a tensor.
    """
    architecture = architecture_of(model)
    gguf = library()
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    config = model.module.config
    names = gguf.get_tensor_name_map(arch, blocks_of(config))
    processor = _processor("gemma2" if architecture == "gemma" else architecture, config)
    found, missing = [], []
    for unit in model.units:
        stacked = _experts(unit, names)
        found += stacked
        if stacked:
            continue
        name = file_name(unit, names)
        if name is None:
            missing.append(unit.name)
            continue
        rows, cols = unit.matrix_shape
        shape = (cols,) if len(unit.shape) < 2 else (rows, cols)
        found.append(Place(name, unit.name, shape, *_moved(processor, name, shape)))
    if missing:
        raise CheckpointError(
            f"gguf-py has no name for {_some(missing)} of the architecture {architecture}; give a file converted by "
            "llama.cpp with --template"
        )
    factors = factors_of(config, architecture, model.name)
    found += [Place(n, "", v.shape, values=v) for n, v in factors.items()]
    return Layout(architecture, tuple(found))


def _experts(unit: Unit, names: Any) -> list[Place]:
    """Tensors of all experts of a layer, if the unit is such: gate and up are one tensor in a checkpoint."""
    base, _, part = unit.name.rpartition(".")
    if len(unit.shape) != 3 or not base.endswith(".experts") or unit.transposed:
        return []
    count, rows, cols = unit.shape
    halves = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    mapped = [names.get_name(f"{base}.{h}") for h in halves]
    if None in mapped:
        return []
    each = rows // len(halves)
    numbers = np.arange(count * rows).reshape(count, len(halves), each)
    order = [None] if len(halves) == 1 else [np.ascontiguousarray(numbers[:, i].reshape(-1)) for i in range(2)]
    return [Place(f"{m}.weight", unit.name, (count, each, cols), o) for m, o in zip(mapped, order, strict=True)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def file_name(unit: Unit, names: Any) -> str | None:
    """Name in the file by gguf-py's map; of a tied table that of the embedding."""
    found = []
    for name in (unit.name, *unit.aliases):
        base, _, suffix = name.rpartition(".")
        mapped = names.get_name(base) if suffix in {"weight", "bias"} else None
        if mapped is not None:
            found.append(f"{mapped}.{suffix}")
    return min(found, key=lambda n: n.startswith("output"), default=None)


def _processor(architecture: str, config: Any) -> Any:
    """Return the changes that transformers makes to an architecture's tensors when it reads them, or None."""
    module = library("transformers.modeling_gguf_pytorch_utils")
    kind = module.TENSOR_PROCESSORS.get(architecture)
    keys = ("num_attention_heads", "num_key_value_heads", "hidden_size", "n_head")
    return None if kind is None else kind(config={k: getattr(config, k, None) for k in keys})


def _moved(processor: Any, name: str, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.intp] | None, float]:
    """Row order and offset of a tensor, seen from what reading makes of numbered rows and of zeros."""
    if processor is None:
        return None, 0.0
    if len(shape) == 1:
        numbered = np.arange(shape[0], dtype=np.float32)
        came = processor.process(np.zeros(shape, np.float32), name).weights
        offset = -float(came.reshape(-1)[0])
        order = processor.process(numbered, name).weights + offset
        return _inverse(order, numbered), offset
    numbered = np.arange(shape[0], dtype=np.float32)[:, None]
    order = np.asarray(processor.process(numbered, name, parsed_parameters={"tensors": {}}).weights)
    return (_inverse(order[:, 0], numbered[:, 0]) if order.shape == numbered.shape else None), 0.0


def _inverse(order: Array, plain: Array) -> npt.NDArray[np.intp] | None:
    """Return the order that rows are stored in, if it is another one."""
    return None if np.array_equal(order, plain) else np.argsort(order).astype(np.intp)
