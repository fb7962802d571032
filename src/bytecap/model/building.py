"""The one door to transformers' automatic classes: configs and modules from files that anybody may have written.

Nothing else in the library calls `from_pretrained` or `from_config` (`tests/test_foreign_code.py` holds that). The door

- never runs code that a checkpoint brings or names: `trust_remote_code=False` is always said, so that nobody is asked
  on the terminal; attention and expert kernels of a hub repository (`attn_implementation: owner/repo`) and backbones
  that are fetched are refused, and kernels of installed packages that a config prefers give way to the library's own;
- compares names and shapes with those of an artifact before anything is allocated: a config of 400 bytes may ask for
  terabytes, or for a million layers. The module is built on torch's `meta` device, which holds no values, and its
  construction is ended when it registers more tensors than the artifact has.

What it omits: a bound on the time that a constructor spends before it registers anything. Counts that constructors turn
into lists are limited instead (`_COUNTS`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecap.errors import ArtifactError, CheckpointError

if TYPE_CHECKING:
    from torch import nn

Shapes = Mapping[str, tuple[int, ...]]

_OWN = {None, "eager", "sdpa", "grouped_mm", "batched_mm"}  # implementations that transformers itself contains
_IMPLEMENTATION = re.compile(
    r"_?(?:attn|attention|experts|moe|mlp|kernel)s?_implementation(?:_internal)?|use_kernels|kernel_config"
)
_OTHER_KINDS = {  # transformers' tables of the models that it has no causal class for, the most telling first
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "an encoder-decoder",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "a multimodal model",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "a multimodal model",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "an encoder",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "an encoder-decoder for speech",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "a model of images",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "a model of sound",
}
_COUNTS = re.compile(r"layer|block|head|expert|depth|stage")
_MOST_COUNT, _MOST_NUMBER = 1 << 16, 1 << 48
_SPARE_TENSORS, _SPARE_MODULES, _MODULES_PER_TENSOR = 256, 4096, 64
_SPARE_HIDDEN = 1 << 26  # values of buffers that no file stores, beside as many as the artifact holds


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """A JSON object of a side file.

    Raises:
        CheckpointError: it is not valid JSON, nested too deep, or something else.
    """
    try:
        value = json.loads(content)
    except RecursionError as exc:
        raise CheckpointError(f"{name} is nested too deep to be read") from exc
    except ValueError as exc:
        raise CheckpointError(f"{name} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds no JSON object")
    return value


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse a config that asks for code of others, or for absurd counts.

    Raises:
        CheckpointError: the message names the key and what to do.
    """
    for key, value in _entries(config):
        if _IMPLEMENTATION.fullmatch(key) and any("/" in str(v) or ":" in str(v) for v in _leaves(value)):
            raise CheckpointError(
                f"{name}: {key} asks for code from elsewhere, {value!r}, which is never run; remove the key"
            )
        if key in {"use_kernels", "use_pretrained_backbone"} and value:
            raise CheckpointError(f"{name}: {key} asks for what has to be fetched; set it to false")
        if isinstance(value, int) and not isinstance(value, bool):
            most = _MOST_COUNT if _COUNTS.search(key) and not key.endswith(("_id", "_dim", "_size")) else _MOST_NUMBER
            if abs(value) > most:
                raise CheckpointError(f"{name}: {key} is {str(value)[:40]}, more than {most:,}; no model is that large")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, Mapping):
            yield from ((str(k), v) for k, v in inner.items())
            waiting.extend(inner.values())
        elif isinstance(inner, list):
            waiting.extend(inner)


def _leaves(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


def read_config(directory: Path, name: str = "") -> Any:
    """The transformers config of a directory's `config.json`.

    Args:
        directory: that holds it.
        name: of what it belongs to, for messages; the directory by default.

    Raises:
        CheckpointError: it asks for code of others, or is of no causal language model. Whatever transformers raises
            for configs it cannot read.
    """
    import transformers

    path = directory / "config.json"
    said = f"{name or directory}/config.json"
    parsed = parse_object(path.read_bytes(), said)
    check_config(parsed, said)
    if "auto_map" in parsed and not _known(parsed.get("model_type")):
        raise CheckpointError(
            f"{said}: the model type {parsed.get('model_type')!r} is code of the checkpoint's own (auto_map), which is "
            "never run; build the module yourself and use --factory"
        )
    transformers.logging.set_verbosity_error()
    _check_type(parsed.get("model_type"), said)
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    for kind in ("_attn_implementation", "_experts_implementation"):  # `flash_attention_2` may mean a hub's kernel
        if getattr(config, kind, None) not in _OWN:
            setattr(config, kind, None)
    return config


def _known(kind: Any) -> bool:
    """Return whether transformers itself has a type of model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _check_type(kind: Any, said: str) -> None:
    """Refuse a `model_type` of which transformers has no causal language model, and say what it is and what to do.

    Args:
        kind: the type, or whatever stands in its place.
        said: the file, for messages.

    Raises:
        CheckpointError: it is missing, unknown, or of another kind.
    """
    import transformers

    if not isinstance(kind, str) or not kind:
        raise CheckpointError(f"{said} has no model_type: name one that transformers knows, or fit a module instead")
    if not _known(kind):
        raise CheckpointError(
            f"{said}: transformers {transformers.__version__} does not know the model type {kind!r}; update "
            "transformers, or build the module yourself and use --factory"
        )
    from transformers.models.auto import configuration_auto, modeling_auto

    if configuration_auto.CONFIG_MAPPING[kind] in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    what = next((w for table, w in _OTHER_KINDS.items() if kind in getattr(modeling_auto, table, ())), "")
    found = f"model_type {kind!r} is {what}" if what else f"model_type {kind!r} is none of a causal language model"
    raise CheckpointError(
        f"{said}: {found}, AutoModelForCausalLM has no class for it, so it scores no text; fit it as a module with a "
        "loss of your own"
    )


def causal_lm(config: Any) -> nn.Module:
    """An untrained float32 language model of a config."""
    import torch
    import transformers

    module: nn.Module = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    )
    return module


def pretrained(directory: Path, **options: Any) -> Any:
    """Build a directory's model by `AutoModelForCausalLM.from_pretrained`, without running its code."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, config=read_config(directory), local_files_only=True, trust_remote_code=False, use_safetensors=True,
        **options,
    )  # fmt: skip


def check_fits(config: Any, shapes: Shapes, name: str, *, prepare: Any = None) -> None:
    """Compare the module of a config with an artifact's tensors, before anything is allocated.

    Args:
        config: of transformers.
        shapes: of all tensors of the artifact, by every name they have.
        name: of the artifact, for messages.
        prepare: called with the module built on `meta`, to change it as it is changed after it is built.

    Raises:
        ArtifactError: a name is missing on one side, a shape differs, or the module is far larger; the first is named.
    """
    import torch

    with bounded(len(shapes), name), torch.device("meta"):
        module = causal_lm(config)
        if prepare is not None:
            prepare(module)
    tensors = dict(module.state_dict(keep_vars=True))
    known = {id(tensors[n]) for n in shapes if n in tensors}
    wrong = [f"its config.json has no tensor {n}" for n in shapes if n not in tensors]
    wrong += [f"it lacks tensor {n}" for n, t in tensors.items() if n not in shapes and id(t) not in known]
    wrong += [
        f"tensor {n} is {list(shape)}, and {list(tensors[n].shape)} by its config.json"
        for n, shape in shapes.items()
        if n in tensors and tuple(tensors[n].shape) != tuple(shape)
    ]
    if wrong:
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ArtifactError(f"{name} does not hold the model of its config.json: {wrong[0]}{more}")
    hidden = sum(b.numel() for n, b in module.named_buffers() if n not in tensors)
    most = _SPARE_HIDDEN + sum(t.numel() for t in tensors.values())
    if hidden > most:
        raise ArtifactError(
            f"{name}: its config.json asks for {hidden:,} values besides the weights, at most {most:,} fit"
        )


@contextlib.contextmanager
def bounded(tensors: int, name: str) -> Iterator[None]:
    """End the construction of modules that register far more tensors or modules than an artifact has tensors.

    Raises:
        ArtifactError: within the block, out of the constructor.
    """
    from torch.nn.modules import module as hooks

    left = {"tensors": tensors + _SPARE_TENSORS, "modules": _SPARE_MODULES + _MODULES_PER_TENSOR * tensors}

    def count(kind: str) -> None:
        left[kind] -= 1
        if left[kind] < 0:
            raise ArtifactError(
                f"{name}: its config.json asks for more {kind} than belong to {tensors:,} stored tensors"
            )

    def tensor(*_: Any) -> None:
        count("tensors")

    def module(*_: Any) -> None:
        count("modules")

    handles = [
        hooks.register_module_parameter_registration_hook(tensor),
        hooks.register_module_buffer_registration_hook(tensor),
        hooks.register_module_module_registration_hook(module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
