"""The one door to transformers' automatic classes: configs and modules from files that anybody may have written.

Nothing else in the library calls `from_pretrained` or `from_config` (`tests/test_foreign_code.py` holds that). The door

- never runs code that a checkpoint brings or names: `trust_remote_code=False` is always said, so that nobody is asked
  on the terminal; attention and expert kernels of a hub repository (`attn_implementation: owner/repo`) and backbones
  that are fetched are refused, and kernels of installed packages that a config prefers give way to the library's own;
- compares names and shapes with those of an artifact before anything is allocated: a config of 400 bytes may ask for
  terabytes, or for a million layers. The module is built on torch's `meta` device, which holds no values, and its
  construction is ended when it registers more tensors than the artifact has.

`bytecap.model.bounds` has the limits. What it omits: a bound on the time of a single call of compiled code.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecap.errors import ArtifactError, CheckpointError
from bytecap.model.bounds import Shapes, bounded, check_counts, check_values, hurried

if TYPE_CHECKING:
    from torch import nn

_QUIET = threading.RLock()
_READERS = 16  # names of one stored tensor, on the average over all values
_SPLIT = 4  # tensors that the library makes of one of a checkpoint's
_OWN = {None, "eager", "sdpa", "grouped_mm", "batched_mm"}  # implementations that transformers itself contains
_IMPLEMENTATION = re.compile(
    r"_?(?:attn|attention|experts|moe|mlp|kernel)s?_implementation(?:_internal)?|use_kernels|kernel_config"
)
_PLAIN_OUTPUTS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
_OTHER_KINDS = {  # transformers' tables of the models that it has no causal class for, the most telling first
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "an encoder-decoder",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "a multimodal model",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "a multimodal model",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "an encoder",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "an encoder-decoder for speech",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "a model of images",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "a model of sound",
}


def quiet() -> None:
    """Let transformers say nothing on the terminal: what it says may quote files that anybody may have written."""
    import transformers

    transformers.logging.set_verbosity(logging.CRITICAL + 1)
    transformers.logging.disable_progress_bar()


@contextmanager
def unheard() -> Iterator[None]:
    """Keep standard error quiet, since some progress bars of other libraries cannot be turned off.

    One thread at a time: what two of them put back at the end would not be what was there before both.
    """
    with _QUIET, redirect_stderr(io.StringIO()):
        yield


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
    check_counts(_entries(config), name)


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
    quiet()
    _check_type(parsed.get("model_type"), said)
    with hurried(CheckpointError(f"{said} takes minutes to be read")):
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    for kind in ("_attn_implementation", "_experts_implementation"):  # `flash_attention_2` may mean a hub's kernel
        if getattr(config, kind, None) not in _OWN:
            setattr(config, kind, None)
    for key, value in _PLAIN_OUTPUTS.items():
        setattr(config, key, value)
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
    found = f"model_type {kind!r} is {what}" if what else f"model_type {kind!r} names no causal language model"
    raise CheckpointError(
        f"{said}: {found}, AutoModelForCausalLM has no class for it, so it scores no text; fit it as a module with a "
        "loss of your own"
    )


@contextmanager
def without_values() -> Iterator[None]:
    """Let modules that are built meanwhile have parameters on the `meta` device; buffers get their values."""
    from torch import nn
    from torch.nn.modules import module as hooks

    def empty(_module: nn.Module, _name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = hooks.register_module_parameter_registration_hook(empty)
    try:
        yield
    finally:
        handle.remove()


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

    with unheard():
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, config=read_config(directory), local_files_only=True, trust_remote_code=False,
            use_safetensors=True, **options,
        )  # fmt: skip


def plain_config(directory: Path) -> Any:
    """The transformers config of a directory without what it says of quantization: weights are read as dense ones."""
    config = read_config(directory)
    for part in parts(config):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def parts(config: Any) -> Iterator[Any]:
    """Yield a config, and then those that are nested in it: JSON objects, or transformers' own ones.

    >>> [sorted(p) for p in parts({"text_config": {"a": 1, "b": {}}, "c": [{}]})]
    [['c', 'text_config'], ['a', 'b'], []]
    """
    found = [config]
    for part in found:
        yield part  # which may lose what it holds meanwhile
        if isinstance(part, dict):
            found += [v for v in part.values() if isinstance(v, dict)]
        else:
            found += [v for v in vars(part).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]


def filled(config: Any, tensors: dict[str, Any], **options: Any) -> Any:
    """Build the model of a config with the tensors of a checkpoint, as `from_pretrained` would from its files."""
    import torch

    with torch.device("meta"):
        kind: Any = type(causal_lm(config))
    return kind.from_pretrained(
        None, config=config, state_dict=tensors, local_files_only=True, trust_remote_code=False, **options
    )


def check_fits(config: Any, shapes: Shapes, name: str, *, held: int | None = None, prepare: Any = None) -> None:
    """Compare the module of a config with an artifact's tensors, before anything is allocated.

    Args:
        config: of transformers.
        shapes: of all tensors of the artifact, by every name they have.
        name: of the artifact, for messages.
        held: number of values that are stored; by default no tensor has a second name.
        prepare: called with the module built on `meta`, to change it as it is changed after it is built.

    Raises:
        ArtifactError: a name is missing on one side, a shape differs, or the module is far larger; the first is named.
    """
    import torch

    with bounded(len(shapes), name), torch.device("meta"):
        module = causal_lm(config)
        full = module.state_dict(keep_vars=True)
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
    if held is None:
        held = sum(math.prod(s) for s in shapes.values())
    check_values(module, full, held, name, ArtifactError, _READERS)


def check_holds(config: Any, shapes: Shapes, name: str, *, tied: bool = False) -> None:
    """Compare the module of a config with a checkpoint's weight files, before anything is allocated.

    Names are not compared one by one: the library may know a checkpoint's tensors by other ones. So numbers of tensors
    and values are compared here; every tensor is accounted for after it was read.

    Args:
        config: of transformers.
        shapes: of all tensors of the files.
        name: of the checkpoint, for messages.
        tied: several of the module's tensors may be read from one of the files'.

    Raises:
        CheckpointError: the module would be far larger than the files.
    """
    import torch

    each = _READERS if tied else _SPLIT
    with bounded(each * len(shapes), name, CheckpointError), torch.device("meta"):
        module = causal_lm(config)
    held = sum(math.prod(s) for s in shapes.values())
    check_values(module, module.state_dict(keep_vars=True), held, name, CheckpointError, each)
