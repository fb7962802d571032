"""Keys of a GGUF file: what llama.cpp must know about an architecture besides its tensors.

Keys and the config values they stand for come from transformers' table of GGUF files, and are written with gguf-py.
A few that the table leaves out are written where the config has a value for them. Scaled rotary embeddings are in
`rope`.
"""

from __future__ import annotations

from typing import Any

from bytecap.model.checkpoint import Model
from bytecap.runtimes.gguf import library
from bytecap.runtimes.gguf.places import Layout, read_like
from bytecap.runtimes.gguf.rope import write_scaling

# config value -> key, for what the table leaves out
_MORE = {
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window", "head_dim": "attention.key_length",
    "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
}  # fmt: skip
# names that every config of transformers answers to, for keys whose own name it does not have
_COMMON = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}  # fmt: skip


def write_keys(writer: Any, model: Model, layout: Layout) -> None:
    """Write the architecture's keys.

    Raises:
        CheckpointError: llama.cpp has no counterpart of its rotary embedding.
    """
    config: Any = model.module.config
    architecture = layout.architecture
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    write_scaling(writer, config, model.name)
    table = library("transformers.integrations.ggml").GGUF_CONFIG_MAPPING
    kind = read_like(str(config.model_type).removesuffix("_text"))
    pairs = {key: name for key, name in table[kind].items() if name is not None}
    pairs |= {key: name for name, key in _MORE.items() if name not in pairs.values()}
    if "attention.key_length" in pairs and "attention.value_length" not in pairs:
        pairs["attention.value_length"] = pairs["attention.key_length"]
    for key, name in pairs.items():
        value = _value(config, name, kinds)
        if value is None and key in _COMMON:
            value = getattr(config, _COMMON[key], None)
        if value is None and key == "feed_forward_length":
            value = next(p.shape[0] for p in layout.places if p.name.endswith("ffn_up.weight"))
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        add = writer.add_float32 if isinstance(value, float) or key in _FLOATS else writer.add_uint32
        add(f"{architecture}.{key}", value)


_FLOATS = {"rope.freq_base", "attn_logit_softcapping", "final_logit_softcapping"}


def _value(config: Any, name: str, ropes: list[dict[str, Any]]) -> Any:
    """A config's value, which may be inside its rotary parameters."""
    found = getattr(config, name, None)
    return found if found is not None else next((r[name] for r in ropes if name in r), None)
