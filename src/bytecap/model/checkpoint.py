"""A checkpoint on disk, read strictly: Hugging Face directories with safetensors, single or sharded.

Pickle checkpoints are refused, damaged files and non-finite weights are reported with the tensor's name.
Tied tensors are found by shared storage in the built model and become one `Unit`.

Structure comes from module types (`nn.Linear`, `nn.Embedding`, transformers' `Conv1D`) and shared storage;
no architecture is named here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bytecap.errors import CheckpointError
from bytecap.model.linears import linear_weights
from bytecap.system import allocator
from bytecap.types import Unit

if TYPE_CHECKING:
    import torch

_Values = TypeVar("_Values", np.ndarray[Any, Any], "torch.Tensor")
_STACKED = 16  # smallest side of a matrix in a stack of them
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip
_WIDTHS = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass
class Model:
    """A model ready for measuring.

    Attributes:
        module: the torch module, float32, in evaluation mode.
        units: its stored tensors, in state-dict order.
        files: side files kept in the artifact (`config.json`, `tokenizer.json`, ...) as bytes.
        name: for messages.
    """

    module: torch.nn.Module
    units: tuple[Unit, ...]
    files: dict[str, bytes]
    name: str

    @property
    def parameters(self) -> int:
        """Unique parameters: tied tensors count once."""
        return sum(u.parameters for u in self.units)

    def tensor(self, unit: Unit) -> torch.Tensor:
        """The live parameter or buffer of a unit."""
        return _named_tensors(self.module)[unit.name]

    def embeddings(self) -> set[str]:
        """Names of the units that are embedding tables."""
        names = {alias: u.name for u in self.units for alias in (u.name, *u.aliases)}
        return {names[n] for n, (_, kind) in linear_weights(self.module).items() if kind == "embedding"}

    def config(self) -> dict[str, Any]:
        """The parsed `config.json`, or an empty dictionary."""
        return dict(json.loads(self.files["config.json"])) if "config.json" in self.files else {}


def demo_directory() -> Path:
    """The embedded model's directory."""
    return Path(str(resources.files("bytecap") / "data" / "demo"))


def resolve(model: Path | str) -> Path:
    """A directory for a path, the word `demo`, or a hub id.

    Raises:
        CheckpointError: nothing is there.
    """
    if str(model) == "demo":
        return demo_directory()
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix in _PICKLES:
            raise CheckpointError(_pickle_message(path))
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and *.safetensors")
    if str(model).count("/") == 1 and not str(model).startswith((".", "/")):
        return _from_hub(str(model))
    raise CheckpointError(f"no model at {path}: the directory does not exist")


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as exc:
        raise CheckpointError(
            f"no directory {name}, and no hub model of that name could be fetched ({type(exc).__name__})"
        ) from exc


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle checkpoint, which can run code when it is loaded and is refused; convert it with "
        "`save_pretrained(..., safe_serialization=True)` or safetensors.torch.save_file"
    )


SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tying.json",
)  # fmt: skip


def read_side_files(directory: Path) -> dict[str, bytes]:
    """Config and tokenizer files of a model directory.

    Raises:
        CheckpointError: there is no readable `config.json`.
    """
    config = directory / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{directory} holds no config.json, so it is not a Hugging Face model directory")
    try:
        parsed = json.loads(config.read_bytes())
    except ValueError as exc:
        raise CheckpointError(f"{config} is not valid JSON: {exc}") from exc
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{config} holds no JSON object")
    return {n: (directory / n).read_bytes() for n in SIDE_FILES if (directory / n).is_file()}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: one, or the shards its index names.

    Raises:
        CheckpointError: there are none, a shard is missing, or only pickles are there.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            missing = [s for s in shards if not (directory / s).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CheckpointError(f"{index} is not a valid shard index") from exc
        if missing:
            raise CheckpointError(f"{index} names {missing[0]}, which is missing ({len(missing)} of {len(shards)})")
        return [directory / s for s in shards]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(p for p in directory.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(_pickle_message(pickles[0]))
        raise CheckpointError(f"{directory} holds no *.safetensors weights")
    return files


def check_safetensors(path: Path) -> dict[str, dict[str, Any]]:
    """Header of a safetensors file, after checking that every tensor lies inside the file.

    Raises:
        CheckpointError: truncated or corrupt; the message names the first bad tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 2 or length > size - 8:
            raise CheckpointError(f"{path} is not a safetensors file or is truncated ({size} bytes)")
        try:
            header = json.loads(f.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            spans = {k: (int(v["data_offsets"][0]), int(v["data_offsets"][1])) for k, v in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
            raise CheckpointError(f"{path} has a corrupt safetensors header: {exc}") from exc
    at = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if not 0 <= start <= stop <= size - 8 - length:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} needs bytes {start}..{stop} of {size - 8 - length}"
            )
        shape, dtype = entries[name].get("shape"), entries[name].get("dtype")
        if dtype in _WIDTHS and (not isinstance(shape, list) or stop - start != _WIDTHS[dtype] * math.prod(shape)):
            raise CheckpointError(f"{path} is corrupt: tensor {name} of {dtype} {shape} takes {stop - start} bytes")
        if start != at:
            raise CheckpointError(f"{path} is corrupt: tensor {name} begins at byte {start}, not at {at}")
        at = stop
    if at != size - 8 - length:
        raise CheckpointError(f"{path} is corrupt: {size - 8 - length - at} bytes are left over behind its tensors")
    return entries


def check_finite(units: tuple[Unit, ...], module: torch.nn.Module) -> None:
    """Refuse infinities and NaN, naming tensor and index."""
    import torch

    tensors = _named_tensors(module)
    for unit in units:
        tensor = tensors[unit.name]
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            index = tuple(int(i) for i in bad.nonzero()[0])
            value = float(tensor[index] if index else tensor)
            raise CheckpointError(f"tensor {unit.name} holds {value} at index {list(index)}")


def load_model(model: Path | str, *, begin: Callable[[dict[str, bytes]], None] | None = None) -> Model:
    """Read, check and build a model from a directory.

    Args:
        model: Hugging Face directory, hub id, or `demo`.
        begin: given the side files before the model is built, to work on them meanwhile.

    Raises:
        CheckpointError: missing, corrupt, not finite, pickle, or of a kind transformers cannot build.
    """
    directory = resolve(model)
    files = read_side_files(directory)
    if begin is not None:
        begin(files)
    dtypes: dict[str, str] = {}
    for path in weight_files(directory):
        dtypes.update({name: str(entry["dtype"]) for name, entry in check_safetensors(path).items()})
    module = build_module(directory)
    units = find_units(module, dtypes)
    check_finite(units, module)
    return Model(module, units, files, str(model))


def build_module(directory: Path) -> torch.nn.Module:
    """The float32 module of a model directory, built by transformers."""
    try:
        import torch
        import transformers

        from bytecap.model import tying
    except ImportError as exc:
        raise CheckpointError("models need the extra packages: pip install 'bytecap[hf]'") from exc
    if (directory / tying.FILE).is_file():
        module = module_from_config(directory)
        tying.fill(module, weight_files(directory))
        return module
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        built: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as exc:
        if allocator.is_shortage(exc):
            raise
        raise CheckpointError(f"cannot build the model in {directory}: {_first_line(exc)}") from exc
    module = built[0]
    found: dict[str, Any] = built[1]
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise CheckpointError(
            f"{directory}: tensor {name} has shape {list(stored)}, the model of config.json wants {list(wanted)}"
        )
    if found["missing_keys"]:
        raise CheckpointError(
            f"{directory} lacks tensor {min(found['missing_keys'])} ({len(found['missing_keys'])} missing in all)"
        )
    return freeze(module)


def freeze(module: torch.nn.Module) -> torch.nn.Module:
    """Evaluation mode, no gradients."""
    module.eval()
    if hasattr(module, "config"):  # keys and values of windows scored once would only fill memory
        module.config.use_cache = False  # type: ignore[union-attr]
    for p in module.parameters():
        p.requires_grad_(False)
    return module


def _first_line(exc: BaseException) -> str:
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)


def _named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every name in the state dict with its live tensor, tied names included."""
    return dict(module.state_dict(keep_vars=True))


def find_units(module: torch.nn.Module, dtypes: dict[str, str] | None = None) -> tuple[Unit, ...]:
    """Units of a module in state-dict order; tensors that share storage become one.

    Args:
        module: any module.
        dtypes: source dtype of each name; the live dtype is used for names it lacks.
    """
    dtypes = dtypes or {}
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    tensors = _named_tensors(module)
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else (id(tensor), tuple(tensor.shape))
        groups.setdefault(key, []).append(name)
    linears = linear_weights(module)
    units = []
    for names in groups.values():
        kinds = {linears[n][1] for n in names if n in linears}
        dtype = next((dtypes[n] for n in names if n in dtypes), DTYPES.get(str(tensors[names[0]].dtype), "F32"))
        units.append(
            Unit(
                name=names[0],
                shape=tuple(tensors[names[0]].shape),
                dtype=dtype,
                aliases=tuple(names[1:]),
                transposed=kinds == {"conv1d"},
                linear=bool(kinds),
                stacked=not kinds and _is_stack(tensors[names[0]]),
            )
        )
    return tuple(units)


def _is_stack(tensor: torch.Tensor) -> bool:
    """Whether a tensor that no linear module owns is a stack of matrices: kernels of convolutions are smaller."""
    return tensor.ndim == 3 and min(tensor.shape[1:]) >= _STACKED


def as_matrix(unit: Unit, values: _Values) -> _Values:
    """Stored tensor -> (rows, cols) as coders see it, an array or a torch tensor."""
    rows, cols = unit.matrix_shape
    turned = unit.transposed and len(unit.shape) >= 2
    return values.reshape(cols, rows).T if turned else values.reshape(rows, cols)


def module_from_config(directory: Path) -> torch.nn.Module:
    """An untrained float32 module of a config, for decoded values to be put into."""
    try:
        import torch
        import transformers

        from bytecap.model import tying
    except ImportError as exc:
        raise CheckpointError("models need the extra packages: pip install 'bytecap[hf]'") from exc
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as exc:
        if allocator.is_shortage(exc):
            raise
        raise CheckpointError(f"cannot build a model from {directory}/config.json: {_first_line(exc)}") from exc
    tying.tie_as_described(module, directory)
    return freeze(module)
