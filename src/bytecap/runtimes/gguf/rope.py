"""Scaled rotary embeddings as llama.cpp knows them: keys, and tensors of factors.

Linear scaling and YaRN are keys; `llama3` and LongRoPE are tensors by which frequencies are divided. Frequencies and
attention factors come from transformers' own functions, so whatever defaults a config leaves out are theirs.
Omitted: rules without a counterpart in llama.cpp (dynamic NTK, proportional), which not even its converter can write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CheckpointError
from bytecap.runtimes.gguf import library

_PLAIN = (None, "default")
_KNOWN = ("linear", "yarn", "llama3", "longrope")


def scaling_of(config: Any, model: str) -> Mapping[str, Any]:
    """Rotary parameters of a config that scales them; empty where it does not.

    Raises:
        CheckpointError: llama.cpp has no such rule, or layers differ in a way it has no key for.
    """
    whole = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {k: r for k, r in whole.items() if isinstance(r, dict)} or {"": whole}
    scaled = {k: r for k, r in kinds.items() if _rule(r) not in _PLAIN}
    if not scaled:
        return {}
    kind, found = next(iter(scaled.items()))
    rule = _rule(found)
    if rule not in _KNOWN:
        raise CheckpointError(
            f"{model} scales its rotary embedding by the rule {rule!r}, which llama.cpp does not have: there are "
            f"{', '.join(_KNOWN)}"
        )
    if len(scaled) > 1 or (kind and (kind != "full_attention" or rule != "linear")):
        raise CheckpointError(
            f"{model} scales the rotary embedding of its layers in several ways ({', '.join(scaled)}): give a file "
            "converted by llama.cpp with --template"
        )
    return found


def _rule(found: Mapping[str, Any]) -> Any:
    return found.get("rope_type", found.get("type"))


def write_scaling(writer: Any, config: Any, model: str) -> None:
    """Write the keys of a scaled rotary embedding, if it is one."""
    found = scaling_of(config, model)
    rule, kinds = _rule(found), library().RopeScalingType
    if rule in {"linear", "yarn"}:
        writer.add_rope_scaling_type(kinds(rule))
        writer.add_rope_scaling_factor(float(found["factor"]))
    if rule in {"yarn", "longrope"}:
        writer.add_rope_scaling_orig_ctx_len(_trained(config, found))
    if rule == "longrope":
        writer.add_rope_scaling_attn_factors(float(_frequencies(config, rule)[1]))
    if rule == "yarn":
        # llama.cpp multiplies by 1 + 0.1 ln(factor) itself
        share = _frequencies(config, rule)[1] / (1 + 0.1 * math.log(float(found["factor"])))
        if abs(share - 1) > 1e-6:
            writer.add_rope_scaling_attn_factors(float(share))
        for name in ("beta_fast", "beta_slow"):
            if found.get(name) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(float(found[name]))


def factors_of(config: Any, architecture: str, model: str) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of factors by name in the file.

    Raises:
        CheckpointError: llama.cpp reads none for this architecture.
    """
    found = scaling_of(config, model)
    rule = _rule(found)
    if rule == "llama3":
        plain = _plain(config, found)
        arrays = {"ROPE_FREQS": plain / _frequencies(config, rule)[0]}
    elif rule == "longrope":
        arrays = {f"ROPE_FACTORS_{k.upper()}": np.array(found[f"{k}_factor"]) for k in ("long", "short")}
    else:
        return {}
    gguf = library()
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    tensors = {k: getattr(gguf.MODEL_TENSOR, k) for k in arrays}
    if not set(tensors.values()) <= set(gguf.MODEL_TENSORS[arch]):
        raise CheckpointError(
            f"{model} scales its rotary embedding by the rule {rule!r}, for which llama.cpp reads no factors in the "
            f"architecture {architecture}"
        )
    return {f"{gguf.TENSOR_NAMES[tensors[k]]}.weight": v.astype(np.float32) for k, v in arrays.items()}


def _frequencies(config: Any, rule: str) -> tuple[npt.NDArray[np.float64], float]:
    """Frequencies and the factor of attention by transformers' rule."""
    rules = library("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    values, factor = rules[rule](config, "cpu")
    return values.double().numpy(), float(factor)


def _plain(config: Any, found: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Frequencies without scaling."""
    count = len(_frequencies(config, "llama3")[0])
    return float(found["rope_theta"]) ** -(np.arange(count) / count)


def _trained(config: Any, found: Mapping[str, Any]) -> int:
    """Positions before scaling."""
    value = found.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(value or config.max_position_embeddings)
