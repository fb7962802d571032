"""Read a checkpoint strictly: a Hugging Face directory with safetensors, single or sharded, or a GGUF file.

Pickle checkpoints are refused, damaged files and non-finite weights are reported with the tensor's name.
Tied tensors are found by shared storage in the built model and become one `Unit`.

Structure comes from module types (`nn.Linear`, `nn.Embedding`, transformers' `Conv1D`) and shared storage;
no architecture is named here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecap.errors import BytecapError, CheckpointError
from bytecap.model import gguf_file
from bytecap.model.bounds import Shapes
from bytecap.model.building import (
    causal_lm,
    check_fits,
    check_holds,
    filled,
    plain_config,
    pretrained,
    quiet,
    read_config,
)
from bytecap.model.fileset import HUB_FILES, PICKLES, pickle_message, weight_files
from bytecap.model.linears import linear_weights, place_of
from bytecap.system import allocator
from bytecap.types import Unit

if TYPE_CHECKING:
    import torch

    from bytecap.model.quantized_checkpoint import Dequantized

_KEPT = 2**31  # bytes of dequantized weights that wait for the module they go into
_STACKED = 16  # smallest side of a matrix in a stack of them
DTYPES = {
    "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip


@dataclass
class Model:
    """A model ready for measuring.

    Attributes:
        module: the torch module, float32, in evaluation mode.
        units: its stored tensors, in state-dict order.
        files: side files kept in the artifact (`config.json`, `tokenizer.json`, ...) as bytes.
        name: for messages.
        notes: what reading it found that the user should know.
        rounded: names of tensors whose source has more bits than float32.
        rebuilt: whether the side files describe the module, so that a file alone is enough to build it again.
        dequantized: method that the source is quantized with; empty where it is not.
    """

    module: torch.nn.Module
    units: tuple[Unit, ...]
    files: dict[str, bytes]
    name: str
    notes: tuple[str, ...] = ()
    rounded: frozenset[str] = frozenset()
    rebuilt: bool = False
    dequantized: str = ""

    @property
    def parameters(self) -> int:
        """Return the number of parameters; tied tensors count once."""
        return sum(u.parameters for u in self.units)

    def tensor(self, unit: Unit) -> torch.Tensor:
        """Return the live parameter or buffer of a unit."""
        return tensors_of(self.module)[unit.name]

    def embeddings(self) -> set[str]:
        """Return the names of the units that are embedding tables."""
        names = {alias: u.name for u in self.units for alias in (u.name, *u.aliases)}
        return {names[n] for n, (_, kind) in linear_weights(self.module).items() if kind == "embedding"}

    def config(self) -> dict[str, Any]:
        """Return the parsed `config.json`, or an empty dictionary."""
        return dict(json.loads(self.files["config.json"])) if "config.json" in self.files else {}


def demo_directory() -> Path:
    """Return the embedded model's directory."""
    return Path(str(resources.files("bytecap") / "data" / "demo"))


def resolve(model: Path | str) -> Path:
    """Find the directory or `.gguf` file of a path, the word `demo`, or a hub id.

    Raises:
        CheckpointError: nothing is there.
    """
    if str(model) == "demo":
        return demo_directory()
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix == gguf_file.SUFFIX:
            return path
        if path.suffix in PICKLES:
            raise CheckpointError(pickle_message(path))
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and *.safetensors")
    if str(model).count("/") == 1 and not str(model).startswith((".", "/")):
        return _from_hub(str(model))
    raise CheckpointError(f"no model at {path}: the directory does not exist")


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as exc:
        raise CheckpointError(
            f"no directory {name}, and no hub model of that name could be fetched ({type(exc).__name__}): check the "
            "name and the network, or fetch it first and give its directory"
        ) from exc


def check_finite(units: tuple[Unit, ...], module: torch.nn.Module) -> None:
    """Refuse infinities and NaN in parameters, naming tensor and index; buffers are stored exactly with theirs."""
    from bytecap.model.finite import check  # which imports torch; this module must not

    tensors, buffers = tensors_of(module), dict(module.named_buffers(remove_duplicate=False))
    for unit in (u for u in units if u.name not in buffers):
        check(unit.name, tensors[unit.name])


def load_checkpoint(
    model: Path | str,
    *,
    begin: Callable[[dict[str, bytes]], None] | None = None,
    allow_unused: Sequence[str] = (),
) -> Model:
    """Read, check and build a model from a directory.

    Args:
        model: Hugging Face directory, `.gguf` file, hub id, or `demo`.
        begin: given the side files before the model is built, to work on them meanwhile.
        allow_unused: names or patterns of tensors and files that are meant to be left out.

    Raises:
        CheckpointError: missing, corrupt, not finite, pickle, of a kind transformers cannot build, or not read whole.
    """
    from bytecap.model.accounting import account  # which import torch; this module must not
    from bytecap.model.opening import opened

    directory = resolve(model)
    if directory.suffix == gguf_file.SUFFIX and directory.is_file():
        return _of_gguf(directory, begin)
    source = opened(directory, str(model), begin, allow_unused, keep=_KEPT)
    module = build_module(directory, source.shapes, source.dense)
    found = account(module, source.headers, allow_unused, values=source.dense.values if source.dense else None)
    units = find_units(module, found.dtypes)
    check_finite(units, module)
    return Model(
        module,
        units,
        source.files | found.files,
        str(model),
        notes=(*source.notes, *found.notes),
        rounded=found.rounded,
        rebuilt=True,
        dequantized=source.dense.method if source.dense else "",
    )


def _of_gguf(path: Path, begin: Callable[[dict[str, bytes]], None] | None) -> Model:
    """Read the model of a GGUF file, dequantized."""
    tensors, files, notes = gguf_file.read(path)
    if begin is not None:
        begin(files)
    module = _filled(files, tensors, path)
    units = find_units(module, gguf_file.dtypes(tensors))
    check_finite(units, module)
    return Model(module, units, files, str(path), notes=notes, rebuilt=True, dequantized="gguf")


def _filled(files: dict[str, bytes], tensors: dict[str, Any], path: Path) -> torch.nn.Module:
    """Build a plain float32 module of a config and put tensors into it."""
    import torch

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_bytes(files["config.json"])
        check_holds(read_config(Path(directory)), {n: tuple(t.shape) for n, t in tensors.items()}, str(path))
        module = module_from_config(Path(directory))
    stored = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in tensors.items():
            stored[name].copy_(tensor)
    return freeze(module)


def build_module(directory: Path, shapes: Shapes, dense: Dequantized | None = None) -> torch.nn.Module:
    """Build the float32 module of a model directory by transformers.

    Args:
        directory: of the model.
        shapes: of all tensors of its weight files; a config that asks for far more is refused before it is built.
        dense: reads the tensors of a quantized one.
    """
    try:
        import torch
        import transformers  # noqa: F401 (said here if it is missing)

        from bytecap.model import tying
        from bytecap.model.accounting import refuse_unread
    except ImportError as exc:
        raise CheckpointError("models need the extra packages: pip install 'bytecap[hf]'") from exc
    tied = (directory / tying.FILE).is_file()
    check_size(directory, shapes, tied)
    if tied:
        module = module_from_config(directory)
        tying.fill(module, weight_files(directory))
        return freeze(module)
    quiet()
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    try:
        built: Any = (
            pretrained(directory, **options)
            if dense is None
            else filled(plain_config(directory), {n: dense.value(n) for n in shapes}, **options)
        )
    except Exception as exc:
        if allocator.is_shortage(exc) or isinstance(exc, BytecapError):
            raise
        raise CheckpointError(f"cannot build the model in {directory}: {_first_line(exc)}") from exc
    module = built[0]
    found: dict[str, Any] = built[1]
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise CheckpointError(
            f"{directory}: tensor {name} has shape {list(stored)}, the model of config.json wants {list(wanted)}"
        )
    if found["missing_keys"]:
        for name in sorted(found["unexpected_keys"]):  # codes of such weights are under other names
            if (refusal := refuse_unread(name, directory)) is not None:
                raise refusal
        missing, others = found["missing_keys"], sorted(found["unexpected_keys"])
        beside = (
            f", and holds {others[0]}, which the model of config.json has no place for: rename it" if others else ""
        )
        raise CheckpointError(f"{directory} lacks tensor {min(missing)} ({len(missing)} missing in all){beside}")
    return freeze(module)


def check_size(directory: Path, shapes: Shapes, tied: bool) -> None:
    """Compare what a config asks for with what the weight files hold, before anything is allocated."""
    try:
        check_holds(plain_config(directory), shapes, str(directory), tied=tied)
    except Exception as exc:
        if allocator.is_shortage(exc) or isinstance(exc, BytecapError):
            raise
        raise CheckpointError(f"cannot build the model in {directory}: {_first_line(exc)}") from exc


def freeze(module: torch.nn.Module, *, cache: bool = False) -> torch.nn.Module:
    """Set evaluation mode without gradients, and without the cache of keys and values unless it is asked for."""
    module.eval()
    if hasattr(module, "config") and not cache:  # windows scored once would only fill it
        module.config.use_cache = False  # type: ignore[union-attr]
    for p in module.parameters():
        p.requires_grad_(False)
    return module


def _first_line(exc: BaseException) -> str:
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every name of the state dict with its live tensor, tied names included, extra state left out."""
    return {n: t for n, t in module.state_dict(keep_vars=True).items() if not n.endswith("_extra_state")}


def is_lazy(tensor: torch.Tensor) -> bool:
    """Return whether a parameter has no shape before the first pass."""
    from torch.nn.parameter import is_lazy as lazy

    return bool(lazy(tensor))


def unready(tensor: torch.Tensor) -> str:
    """Say why a tensor holds no values; an empty text if it does."""
    if is_lazy(tensor):
        return "lazy: run one batch through the module first"
    if tensor.is_meta:
        return "on the meta device: load its weights first"
    kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    if kind != "strided":
        return f"a tensor of the layout {kind}: make it dense first"
    return (
        "" if not tensor.numel() or _address(tensor) else f"a {type(tensor).__name__}: make it an ordinary tensor first"
    )


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's values lie; 0 of subclasses that keep them in other tensors, sharded or quantized."""
    try:
        return int(tensor.data_ptr())
    except RuntimeError:
        return 0


def find_units(module: torch.nn.Module, dtypes: dict[str, str] | None = None) -> tuple[Unit, ...]:
    """Find the units of a module in state-dict order; tensors that share storage become one.

    Args:
        module: any module.
        dtypes: source dtype of each name; the live dtype is used for names it lacks.
    """
    dtypes = dtypes or {}
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    tensors = tensors_of(module)
    for name, tensor in tensors.items():
        groups.setdefault(place_of(tensor), []).append(name)
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
    """Return whether a tensor outside linear modules is a stack of matrices; kernels of convolutions are smaller."""
    return tensor.ndim == 3 and min(tensor.shape[1:]) >= _STACKED


def module_from_config(
    directory: Path, shapes: Shapes | None = None, name: str = "", held: int | None = None
) -> torch.nn.Module:
    """Build an untrained float32 module of a config, for decoded values to be put into.

    Args:
        directory: with `config.json`, and perhaps `tying.json`.
        shapes: of the tensors that will be put in, by every name; they are compared before anything is allocated.
        name: of what they come from, for messages.
        held: number of values that are stored, where several names mean one tensor.
    """
    try:
        import transformers  # noqa: F401 (said here if it is missing)

        from bytecap.model import tying
    except ImportError as exc:
        raise CheckpointError("models need the extra packages: pip install 'bytecap[hf]'") from exc
    try:
        config = read_config(directory, name)
        if shapes is not None:
            check_fits(config, shapes, name, held=held, prepare=lambda m: tying.tie_as_described(m, directory))
        module = causal_lm(config)
    except Exception as exc:
        if isinstance(exc, BytecapError) or (allocator.is_shortage(exc) and shapes is None):
            raise
        raise CheckpointError(f"cannot build a model from {name or directory}/config.json: {_first_line(exc)}") from exc
    tying.tie_as_described(module, directory)
    return freeze(module, cache=True)
