"""Build a tiny random model of any architecture that transformers knows, from its config class alone.

No architecture is described here. A config's attributes are set to small values by their names, nested configs
likewise; the few classes whose attributes depend on one another in other ways have an entry in `CHANGES`.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 288
# A small value for every attribute of one of these names, unless the attribute is None or False by default.
SIZES: dict[str, Any] = {
    name: value
    for value, names in (
        (64,
         ("hidden_size n_embd d_model dim embedding_size word_embed_proj_dim emb_dim hidden_dim embed_dim "
         "dim_model input_dim lru_width attention_hidden_size backbone_hidden_size output_hidden_size "
         "projection_dim n_embed out_hidden_size hidden_size_global")),
        (64,
         ("intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim inner_dim "
         "moe_intermediate_size shared_expert_intermediate_size expert_hidden_dim dim_ff "
         "shared_intermediate_size moe_shared_expert_intermediate_size intermediate_size_mlp dff "
         "ffn_hidden_size block_ff_dim feed_forward_size expert_ffn_hidden_size feed_forward_proj_dim "
         "first_k_dense_intermediate_size hidden_size_per_layer_input")),
        (2,
         ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_decoder_layers "
         "num_encoder_layers num_blocks")),
        (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
        (2, "num_key_value_heads num_kv_heads multi_query_group_num linear_num_key_heads linear_num_value_heads"),
        (16,
         ("head_dim d_kv attention_head_dim dim_head v_head_dim qk_nope_head_dim global_head_dim swa_head_dim "
         "linear_key_head_dim linear_value_head_dim q_lora_rank kv_lora_rank mamba_dt_rank")),
        (8, "qk_rope_head_dim rotary_dim state_size mamba_d_state ssm_state_size index_topk patch_size"),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "num_experts_per_tok moe_k moe_top_k moe_topk num_experts_per_token top_k_experts"),
        (1, "n_group topk_group num_expert_group n_shared_experts first_k_dense_replace num_nextn_predict_layers"),
        (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
        (256,
         ("max_position_embeddings n_positions n_ctx max_sequence_length seq_length max_seq_len "
         "original_max_position_embeddings max_target_positions context_length")),
        (32,
         ("sliding_window attention_window_size chunk_size mamba_chunk_size attention_chunk_size window_size "
         "local_attention image_size")),
        (0, "num_kv_shared_layers"),
        (0.1, "initializer_range init_std"),
    )
    for name in names.split()
}  # fmt: skip
# Attributes that some classes leave None and cannot do without.
NEEDED = {
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts",
    "num_experts_per_tok",
    "n_shared_experts",
}
TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id", "unk_token_id")
_MLA = {"head_dim": 8}  # these call the rotated part of a head by that name
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_HYBRID = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
    "attention_head_dim": 32, "num_key_value_heads": 4,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "axk1": _MLA, "deepseek_v3": _MLA, "longcat_flash": _MLA, "youtu": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "zamba": _HYBRID,
    "zamba2": {**_HYBRID, "n_mamba_heads": 8, "mamba_headdim": 16, "adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32],
                 "attention_head_size": 16, "attn_layers": ["local", "local"], "local_attn_chunk_length": 32,
                 "num_buckets": 4},
    "blt": {"encoder_hash_byte_group_vocab": 300},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {"per_layer_config": {"1": {"head_dim": 24, "qk_nope_head_dim": 16}}, "index_n_heads": 4,
                        "index_head_dim": 16, "shared_experts_intermediate_size": 64},
    "gemma3n_text": {"intermediate_size": [64, 64]},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
                       "indexer_compress_ratio": 4, "ngram_vocab_size_base": 300, "hc_lowrank": 16},
    "roc_bert": {"shape_vocab_size": 32, "pronunciation_vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def config(name: str) -> Any:
    """A tiny config of a model type, by its attributes' names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name]
    plain = cls()
    return cls(**_small(plain) | CHANGES.get(name, {}))


def _small(plain: Any) -> dict[str, Any]:
    """Arguments that make a config like `plain` small."""
    found: dict[str, Any] = {}
    renamed = {v: k for k, v in getattr(plain, "attribute_map", {}).items()}
    written = plain.to_dict()
    for key, value in written.items():
        if key in {"layer_types", "mlp_layer_types"} and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            found[key] = (kinds * 2)[:2]
        elif isinstance(value, dict) and hasattr(getattr(plain, key, None), "to_dict"):
            found[key] = _small(getattr(plain, key))
        elif (key in SIZES or renamed.get(key) in SIZES) and (_is_number(value) or (value is None and key in NEEDED)):
            found[key] = SIZES[key] if key in SIZES else SIZES[renamed[key]]
        elif key in TOKENS and value is not None:
            found[key] = 0
        elif key == "pad_token_id" and value is not None:
            found[key] = 1
    if "kv_lora_rank" in found:  # latent attention: keys of all heads, a part of them rotated
        found |= {"num_key_value_heads": 4, **({"qk_head_dim": 24} if "qk_head_dim" in written else {})}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
