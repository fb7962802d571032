"""The dictionary of common side-file contents, known to writer and reader alike.

It is part of the format and must never be changed in place.

`TEMPLATE` is text in the manner of a Llama-like `config.json`, a `tokenizer_config.json` and a byte-level
`tokenizer.json`; deflate may refer back to it, so a config that follows custom costs only its numbers.
`WORDS` are common English words and word parts (and some of program code); the speller of tokens reads them
before it starts, so that it does not begin with no idea which letters follow which.

What it omits: other languages' words and other families' configs. Those pack too, only less tightly.

>>> b'"num_hidden_layers": ' in TEMPLATE, "function" in WORDS
(True, True)
"""

from __future__ import annotations

import json
import re
from typing import Any

_COMMON = """the of and to in is that it for was on with as be by at not are this from or have an had he his but they
which you we all were her she there been one their has would when who will more if no out so said what up
its about into than them can only other time new some could these two may then do first any my now such like
our over man me even most made after also did many before must through years where much your way well down
should because each just those people how too good very make world still see own work men day get here
between both life being under never same another know while last might great year off come since against go
came right used take three states himself few house use during without again place around however small
found thought part once general high upon say every does set number public system function return value
string error class self file name data list type test line import def int const static void true false null
index length result object param default code example order problem information development government
community university important different following something president require provide include change
continue process position question experience possible available service ing ed er ion tion ation ment ness
able ible ly al ive ous ful less est ity ies ance ence ter ver ther ight ound ould un re con com pro dis ex
en pre sub per inter trans st ch sh wh th qu pl tr cl str"""
WORDS = tuple(_COMMON.split())

_CONFIG = """architectures [
    "GPTNeoXForCausalLM"
    "GPT2LMHeadModel"
    "Qwen2ForCausalLM"
    "MistralForCausalLM"
    "LlamaForCausalLM"
  ];activation_function "gelu_new";attention_bias false;attention_dropout 0.0;attn_pdrop 0.1;bos_token_id 1;\
classifier_dropout 0.1;dtype "float16";dtype "float32";dtype "bfloat16";embd_pdrop 0.1;eos_token_id 2;\
head_dim 64;hidden_act "gelu";hidden_act "silu";hidden_dropout 0.0;hidden_size 768;initializer_range 0.02;\
intermediate_size 3072;layer_norm_eps 1e-05;layer_norm_epsilon 1e-05;max_position_embeddings 2048;\
max_window_layers 28;mlp_bias false;model_type "gpt_neox";model_type "gpt2";model_type "qwen2";\
model_type "llama";n_ctx 1024;n_embd 768;n_head 12;n_inner null;n_layer 12;n_positions 1024;\
num_attention_heads 12;num_hidden_layers 12;num_key_value_heads 4;pad_token_id null;\
partial_rotary_factor 0.25;reorder_and_upcast_attn false;resid_pdrop 0.1;scale_attn_weights true;\
summary_activation null;rms_norm_eps 1e-06;pretraining_tp 1;rms_norm_eps 1e-05;rope_scaling null;\
rope_theta 500000.0;sliding_window null;torch_dtype "float32";rope_parameters {
    "rope_theta": 10000.0,
    "rope_type": "default"
  };tie_word_embeddings true;transformers_version "4.57.1";use_cache true;use_parallel_residual true;\
use_sliding_window false;vocab_size 32000
}
"""
_TOKENIZER_CONFIG = """{"add_bos_token": true, "add_eos_token": false, "added_tokens_decoder": {"0": {"content": \
"<unk>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true}}, \
"errors": "replace", "tokenizer_class": "LlamaTokenizerFast", "tokenizer_class": "GPT2Tokenizer", \
"add_prefix_space": false, "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", \
"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", \
"model_max_length": 1024, "clean_up_tokenization_spaces": false}"""
_TOKENIZER: Any = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, c in enumerate(("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    ],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
            {"type": "Digits", "individual_digits": True},
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
        ],
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    },
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
}
_BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BPE: Any = {
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", **_BYTE_LEVEL},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", **_BYTE_LEVEL, "add_prefix_space": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    },
}


def _template() -> bytes:
    """Build deflate's preset dictionary of usual keys and values, commonest last; it is part of the format."""
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 324))]
    names = json.dumps(["<|endoftext|>", *letters], ensure_ascii=False, separators=(",", ":"))
    config = re.sub(r"(^|;)(\w+) ", r'\1"\2": ', _CONFIG).replace(";", ",\n  ")
    usual = json.dumps(_TOKENIZER, indent=2, ensure_ascii=False)[:-2] + json.dumps(_BPE, indent=2)[1:-6]
    end = ',\n    "vocab": ,\n    "merges": \n  }\n}'
    config = "{\n  " + config
    return (config + _TOKENIZER_CONFIG + names + usual + end).encode()


TEMPLATE = _template()
