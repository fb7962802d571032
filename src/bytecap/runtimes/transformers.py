"""Register bytecap with transformers, so that `from_pretrained` loads directories that hold `model.bcap`.

Importing this module is all that is needed::

    import bytecap.runtimes.transformers
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("DIR")  # or a hub id, or pipeline("text-generation", "DIR")

The values are decoded into a temporary safetensors file, which transformers then loads as it does any other: so dtype,
device maps, names of checkpoints and tied tensors are its own business, and the model is an ordinary one afterwards,
which can be trained and saved. Before that every tensor of the model is looked up in the file, since transformers fills
in random values for tensors that it does not find.

With `quantization_config=BytecapConfig(resident="coded")` weights stay coded in memory (`bytecap.model.resident`).
transformers then loads one value in every parameter's place, which says on which device and in which dtype it wants
that parameter. Omitted: offloading, and coded weights on several devices.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bytecap.errors import ArtifactError, CheckpointError, OutputError, UsageError
from bytecap.format import updates
from bytecap.format.container import VERSION, Contents
from bytecap.format.decoder import Units, decode_units, side_files
from bytecap.format.sidefiles import source_tensors
from bytecap.model.from_artifact import RESIDENT
from bytecap.model.resident import keep_coded
from bytecap.runtimes import hub
from bytecap.runtimes.directory.tensors import Tensor, write
from bytecap.types import Unit

_VALUES = "values.safetensors"
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers makes by size

if not hasattr(HfQuantizer, "update_attn_implementation"):
    raise UsageError(
        f"this version of transformers is too old for {hub.FILE} (its quantizers see no config): pip install -U "
        "transformers, or bytecap unpack"
    )


@register_quantization_config(hub.METHOD)
class BytecapConfig(QuantizationConfigMixin):
    """The `quantization_config` of a directory, and what may be asked for when it is loaded.

    Args:
        resident: `decoded`, or `coded`: weights stay coded in memory and each block is decoded just before it runs.
        format: version of the artifact's format; that of this reader by default.

    Raises:
        UsageError: `resident` is neither, or this version of transformers would not pass it on.
    """

    def __init__(self, *, resident: str = "decoded", format: str | None = None) -> None:  # noqa: A002 (a key of the file)
        if resident not in RESIDENT:
            raise UsageError(f"resident={resident!r} is neither decoded nor coded")
        if resident == "coded" and not hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):
            raise UsageError("this version of transformers passes no options to plug-ins: pip install -U transformers")
        self.quant_method: Any = hub.METHOD
        self.format = format or ".".join(map(str, VERSION))
        self.resident = resident

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **more: Any) -> Any:
        """Read the `quantization_config` of a `config.json`.

        Raises:
            VersionError: it names a format that this reader does not know. UsageError: see above.
        """
        given = {**config_dict, **more}
        hub.check_format(given, "quantization_config of config.json")
        made = cls(resident=given.get("resident", "decoded"), format=given["format"])
        return (made, {}) if return_unused_kwargs else made

    @property
    def dequantize(self) -> bool:
        """Whether the loaded model is an ordinary one."""
        return self.resident == "decoded"

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a loader's argument decides, and not the directory's own config."""
        return {"resident": self.resident}


_taking: Any = auto  # its tuple of configs whose loading attributes are taken from the caller
if hasattr(_taking, "LOADING_ATTRIBUTES_CONFIG_TYPES"):
    _taking.LOADING_ATTRIBUTES_CONFIG_TYPES += (BytecapConfig,)


@register_quantizer(hub.METHOD)
class BytecapQuantizer(HfQuantizer):
    """The steps of loading that differ from those of an ordinary checkpoint."""

    def __init__(self, quantization_config: BytecapConfig, **given: Any) -> None:
        super().__init__(quantization_config, **given)
        if not self.pre_quantized:
            raise UsageError(
                f"BytecapConfig loads directories that hold {hub.FILE}; bytecap fit --layout hub writes one"
            )
        self._coded = quantization_config.resident == "coded"
        self._values: tempfile.TemporaryDirectory[str] | None = None
        self._contents: Contents | None = None
        self._name = self._prefix = ""
        self._shapes: dict[str, torch.Size] = {}

    def update_device_map(self, device_map: Any) -> Any:
        """Refuse offloading to disk, since values are gone after loading, and several devices for coded ones."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in {str(p) for p in places}:
            raise UsageError(f"{hub.FILE} cannot be offloaded to disk: bytecap unpack writes a directory that can")
        if self._coded and device_map in _SPREAD:  # coded weights are small: one device holds them
            return {"": torch.accelerator.current_accelerator() or "cpu"}
        if self._coded and len({str(p) for p in places}) > 1:
            raise UsageError("weights that stay coded are on one device: give device_map={'': DEVICE}, or load decoded")
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the index by which transformers finds the weights, in place of the sentence for those without us."""
        config.transformers_weights = hub.SHARDS
        if getattr(config, "dtype", None) is None:
            config.dtype = "float32"
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **given: Any
    ) -> Any:
        """Decode the file, and put the decoded values in its place on the list of files to load."""
        del given
        found = [i for i, f in enumerate(checkpoint_files or ()) if Path(f).name == hub.FILE]
        if checkpoint_files is None or len(checkpoint_files) != 1 or not found:
            raise CheckpointError(f"{hub.SHARDS} does not name {hub.FILE} alone: write the directory again")
        path = Path(checkpoint_files[0])
        if not path.is_file():
            raise CheckpointError(f"{path.parent} holds no {hub.FILE}, which its config.json names")
        hub.check_alone(path.parent)
        contents, self._name = updates.read(path), str(path)
        prefix = _check(contents, model, self._name)
        if self._coded:
            self._contents, self._prefix, tensors = contents, prefix, _placeholders(contents, model)
            self._shapes = _emptied(model)
        else:
            tensors = _tensors(contents, model)
        try:
            self._values = tempfile.TemporaryDirectory(prefix="bytecap-", ignore_cleanup_errors=True)
            target = Path(self._values.name) / _VALUES
            with target.open("wb") as f:
                write(f, tensors, "pt")
        except OSError as exc:
            raise OutputError(f"cannot write the decoded values of {path} to {tempfile.gettempdir()}: {exc}") from exc
        checkpoint_files[0] = str(target)
        return model

    def _process_model_after_weight_loading(self, model: Any, **given: Any) -> Any:
        """Remove the decoded values and every trace of the loading from the model's config."""
        del given
        if self._values is not None:
            self._values.cleanup()
            self._values = None
        if "disk" in {str(p) for p in (getattr(model, "hf_device_map", None) or {}).values()}:
            raise UsageError(f"{hub.FILE} cannot be offloaded to disk: bytecap unpack writes a directory that can")
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        if self._contents is not None:
            device = _reshaped(model, self._shapes)
            keep_coded(model, self._contents, device=device, dtype=None, name=self._name, prefix=self._prefix)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Return that the loaded model can be saved: it is an ordinary one.

        Raises:
            UsageError: its weights are coded.
        """
        del safe_serialization
        if self._coded:
            raise UsageError(
                f"{self._name} stays coded in memory: copy its directory, or load it decoded and save that"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """Return whether the loaded model can be trained: weights that stay coded cannot."""
        return not self._coded


def _check(contents: Contents, model: Any, name: str) -> str:
    """Check that a model has the file's tensors and no other ones.

    Returns:
        What the names in the file have in front of the model's own, where the model lacks its head.

    Raises:
        ArtifactError: the model has a tensor that the file lacks, or of another shape.
    """
    shapes = {n: u.unit.shape for u in contents.units for n in (u.unit.name, *u.unit.aliases)}
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    for key, shape in wanted.items():
        held = shapes.get(key, shapes.get(prefix + key))
        if held is None:
            raise ArtifactError(f"{name} holds no tensor {key} of {type(model).__name__}, which would be random")
        if held != shape:
            raise ArtifactError(f"{name} holds {key} as {list(held)}, and config.json asks for {list(shape)}")
    if any(prefix + key in shapes for key in wanted):
        return prefix
    for held_name in (u.unit.name for u in contents.units):  # of a model without its head the rest has no place
        if held_name not in wanted:
            raise ArtifactError(f"{name} holds tensor {held_name}, which {type(model).__name__} lacks")
    return ""


def _tensors(contents: Contents, model: Any) -> list[Tensor]:
    """Decode the tensors of the checkpoint."""
    values = decode_units(contents, aliases=False)
    units = {u.unit.name: u.unit for u in contents.units}
    files = side_files(contents)
    if source_tensors.FILE in files:
        found = source_tensors.tensors(files[source_tensors.FILE], values)
    else:
        found = {n: (v, n, None) for n, v in values.items()}
    for unit in units.values():
        found |= dict.fromkeys(_aliases(unit, model), (values[unit.name], unit.name, None))
    return [Tensor(n, _dtype(v, units[u].dtype), v.shape, v) for n, (v, u, _) in found.items()]


def _aliases(unit: Unit, model: Any) -> list[str]:
    """Return a unit's names that are tied in the file and not by the model's config."""
    wanted, tied = model.state_dict().keys(), getattr(model, "all_tied_weights_keys", None) or ()
    return [a for a in unit.aliases if a in wanted and a not in tied]


def _dtype(values: np.ndarray[Any, Any], stored: str) -> str:
    """Return the dtype that holds decoded values exactly."""
    return {4: "F32", 8: "F64"}[values.dtype.itemsize] if values.dtype.kind == "f" else stored


def _placeholders(contents: Contents, model: Any) -> list[Tensor]:
    """Return one value, which is not a number, in every parameter's place, and the values of buffers."""
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    decode, found = Units(contents), []
    for section in decode.sections:
        unit = section.unit
        for name in (unit.name, *_aliases(unit, model)):
            if name.removeprefix(f"{model.base_model_prefix}.") in parameters or name in parameters:
                found.append(Tensor(name, "F32", (1,), np.full(1, np.nan, np.float32)))
            else:
                values = decode([section])[0][1]
                found.append(Tensor(name, _dtype(values, unit.dtype), values.shape, values))
    return found


def _emptied(model: nn.Module) -> dict[str, torch.Size]:
    """Give every parameter of a model a single value; returns the shapes they had, by name."""
    shapes: dict[str, torch.Size] = {}
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        shapes[name] = parameter.shape
        if parameter not in fresh:
            fresh[parameter] = nn.Parameter(torch.empty(1, dtype=parameter.dtype, device="meta"), requires_grad=False)
        _register(model, name, fresh[parameter])
    return shapes


def _reshaped(model: nn.Module, shapes: dict[str, torch.Size]) -> torch.device:
    """Give parameters their shapes back, without values; returns the device on which they were loaded."""
    devices = set()
    for name, shape in shapes.items():
        loaded = model.get_parameter(name)
        devices.add(loaded.device)
        empty = nn.Parameter(torch.empty(shape, dtype=loaded.dtype, device="meta"), requires_grad=False)
        _register(model, name, empty)
    return devices.pop()


def _register(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, parameter)
