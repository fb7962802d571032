"""Register bytecap with transformers, so that `from_pretrained` loads directories that hold `model.bcap`.

Importing this module is all that is needed::

    import bytecap.runtimes.transformers
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("DIR")  # or a hub id, or pipeline("text-generation", "DIR")

The values are decoded into a temporary safetensors file, which transformers then loads as it does any other: so dtype,
device maps, names of checkpoints and tied tensors are its own business, and the model is an ordinary one afterwards,
which can be trained and saved. Before that every tensor of the model is looked up in the file, since transformers fills
in random values for tensors that it does not find. Omitted: weights that stay coded in memory, and offloading to disk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bytecap.errors import ArtifactError, CheckpointError, OutputError, UsageError
from bytecap.format import updates
from bytecap.format.container import Contents
from bytecap.format.decoder import decode_units, side_files
from bytecap.format.sidefiles import source_tensors
from bytecap.runtimes import hub
from bytecap.runtimes.directory.tensors import Tensor, write

_VALUES = "values.safetensors"

if not hasattr(HfQuantizer, "update_attn_implementation"):
    raise UsageError(
        f"this version of transformers is too old for {hub.FILE} (its quantizers see no config): pip install -U "
        "transformers, or bytecap unpack"
    )


@register_quantization_config(hub.METHOD)
class BytecapConfig(QuantizationConfigMixin):
    """The `quantization_config` of a directory.

    Attributes:
        quant_method: always `bytecap`.
        format: version of the artifact's format.
        dequantize: tells transformers that the loaded model is an ordinary one.
    """

    def __init__(self, **given: Any) -> None:
        hub.check_format(given, "quantization_config of config.json")
        self.quant_method: Any = hub.METHOD
        self.format = str(given["format"])
        self.dequantize = True


@register_quantizer(hub.METHOD)
class BytecapQuantizer(HfQuantizer):
    """The steps of loading that differ from those of an ordinary checkpoint."""

    def __init__(self, quantization_config: BytecapConfig, **given: Any) -> None:
        super().__init__(quantization_config, **given)
        self._values: tempfile.TemporaryDirectory[str] | None = None

    def update_device_map(self, device_map: Any) -> Any:
        """Refuse offloading to disk: the decoded values are gone after loading."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in {str(p) for p in places}:
            raise UsageError(f"{hub.FILE} cannot be offloaded to disk: bytecap unpack writes a directory that can")
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
        tensors = _tensors(updates.read(path), model, str(path))
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
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Return that the loaded model can be saved: it is an ordinary one."""
        del safe_serialization
        return True

    @property
    def is_trainable(self) -> bool:
        """Return that the loaded model can be trained."""
        return True


def _tensors(contents: Contents, model: Any, name: str) -> list[Tensor]:
    """Decode the tensors of the checkpoint, after checking that the model has no other ones.

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
    if not any(prefix + key in shapes for key in wanted):  # of a model without its head the rest has no place
        for held_name in (u.unit.name for u in contents.units):
            if held_name not in wanted:
                raise ArtifactError(f"{name} holds tensor {held_name}, which {type(model).__name__} lacks")
    values = decode_units(contents, aliases=False)
    units = {u.unit.name: u.unit for u in contents.units}
    files = side_files(contents)
    if source_tensors.FILE in files:
        found = source_tensors.tensors(files[source_tensors.FILE], values)
    else:
        found = {n: (v, n, None) for n, v in values.items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for unit in units.values():  # tied in the file and not by the config
        found |= {a: (values[unit.name], unit.name, None) for a in unit.aliases if a in wanted and a not in tied}
    return [Tensor(n, _dtype(v, units[u].dtype), v.shape, v) for n, (v, u, _) in found.items()]


def _dtype(values: np.ndarray[Any, Any], stored: str) -> str:
    """Return the dtype that holds decoded values exactly."""
    return {4: "F32", 8: "F64"}[values.dtype.itemsize] if values.dtype.kind == "f" else stored
