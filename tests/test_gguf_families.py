"""Architectures and rotary embeddings in GGUF files: keys and tensors here, llama.cpp's own logits nightly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from bytecap.errors import CheckpointError
from bytecap.model.checkpoint import load_checkpoint
from bytecap.runtimes.gguf.export import write_plain
from bytecap.runtimes.gguf.file import read_units
from bytecap.runtimes.gguf.places import layout_of
from conftest import save

gguf = pytest.importorskip("gguf")
COMMON = {
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None, "initializer_range": 0.15,
}  # fmt: skip
TRAINED = {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED}
YARN = {"rope_type": "yarn", "factor": 4.0, **TRAINED}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.0, 4.0],
    "rope_theta": 10000.0, "original_max_position_embeddings": 256, "factor": 4.0,
}  # fmt: skip
WIDE = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
UNKNOWN = "<unk>"
MODELS = {
    "linear": ("Llama", {"rope_parameters": LINEAR}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn-factor": ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "longrope": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}),
    "qwen-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", WIDE),
    "gemma3": ("Gemma3Text", WIDE | {"num_hidden_layers": 6, "rope_parameters": GEMMA3}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_json):
    """Function: (model, layout, path) of a random model as an F32 file, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            family, changes = MODELS[kind]
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(**COMMON | changes)
            module = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            with torch.no_grad():
                for p in module.parameters():
                    if p.ndim == 1:
                        p.add_(0.1 * torch.randn_like(p))
            where = tmp_path_factory.mktemp(kind)
            model = load_checkpoint(save(module, where / "model", tokenizer_json))
            layout, path = layout_of(model), where / f"{kind}.gguf"
            write_plain(model, layout, path, "F32")
            made[kind] = model, layout, path
        return made[kind]

    return get


def keys(path):
    return {k: f.contents() for k, f in gguf.GGUFReader(str(path)).fields.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_holds_every_unit_bit_for_bit(exported, kind) -> None:
    model, layout, path = exported(kind)
    found = read_units(path, layout, model.units)
    assert found.keys() == {u.name for u in model.units}
    for unit in model.units:
        ours, theirs = found[unit.name], model.tensor(unit).numpy()
        assert np.allclose(ours, theirs, rtol=0, atol=2e-7), unit.name  # norms of Gemma move by one and back


def test_keys_of_scaled_rotary_embeddings(exported) -> None:
    found = keys(exported("linear")[2])
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)
    found = keys(exported("yarn")[2])
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.original_context_length"]) == ("yarn", 64)
    assert "llama.rope.scaling.attn_factor" not in found
    found = keys(exported("yarn-factor")[2])
    assert math.isclose(found["llama.rope.scaling.attn_factor"], 1.3 / (1 + 0.1 * math.log(4)), rel_tol=1e-6)
    found = keys(exported("longrope")[2])
    assert math.isclose(
        found["phi3.rope.scaling.attn_factor"], math.sqrt(1 + math.log(4) / math.log(256)), rel_tol=1e-6
    )


def test_factors_of_frequencies_are_tensors(exported) -> None:
    _, layout, path = exported("llama3")
    values = {p.name: p.values for p in layout.places}["rope_freqs.weight"]
    assert values.shape == (4,)
    assert np.allclose(values[[0, -1]], (1, 8), rtol=1e-6)
    assert "llama.rope.scaling.type" not in keys(path)
    names = {t.name for t in gguf.GGUFReader(str(exported("longrope")[2])).tensors}
    assert {"rope_factors_long.weight", "rope_factors_short.weight"} <= names


def test_rules_without_a_counterpart_are_named(tmp_path, tokenizer_json) -> None:
    for rope, words in (
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "by the rule 'dynamic', which llama.cpp does not"),
        (LLAMA3, "reads no factors in the architecture gemma2"),
    ):
        family = "Gemma2" if rope is LLAMA3 else "Llama"
        config = getattr(transformers, f"{family}Config")(**COMMON | {"rope_parameters": rope})
        model = load_checkpoint(
            save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / family, tokenizer_json)
        )
        with pytest.raises(CheckpointError, match=words):
            layout_of(model)


def test_experts_are_split_as_llama_cpp_wants_them(exported) -> None:
    model, layout, path = exported("mixtral")
    places = {p.name: p for p in layout.places}
    assert layout.architecture == "llama"
    assert places["blk.0.ffn_up_exps.weight"].shape == (4, 64, 32)
    assert places["blk.0.ffn_down_exps.weight"].shape == (4, 32, 64)
    both = model.module.get_parameter("model.layers.0.mlp.experts.gate_up_proj").numpy()
    stored = {t.name: t.data for t in gguf.GGUFReader(str(path)).tensors}
    assert np.array_equal(stored["blk.0.ffn_gate_exps.weight"].reshape(4, 64, 32), both[:, :64])
    assert np.array_equal(stored["blk.0.ffn_up_exps.weight"].reshape(4, 64, 32), both[:, 64:])
    found = keys(path)
    assert (found["llama.expert_count"], found["llama.expert_used_count"]) == (4, 2)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [48, 300])
def test_llama_cpp_computes_what_the_original_does(exported, kind, length) -> None:
    llama = pytest.importorskip("llama_cpp")
    model, _, path = exported(kind)
    ids = torch.randint(5, 280, (1, length), generator=torch.Generator().manual_seed(1))
    wanted = model.module(ids).logits[0]
    there = llama.Llama(
        str(path), n_ctx=256 if length <= 256 else 512, logits_all=True, verbose=False, n_threads=1, flash_attn=False,
        type_k=0, type_v=0,
    )  # fmt: skip
    there.eval(ids[0].tolist())
    found = torch.from_numpy(np.array(there.scores[:length]))
    rounded = kind.startswith("gemma")  # llama.cpp looks GELU up in a table of float16
    assert float((found - wanted).abs().max()) < (1e-3 if rounded else 1e-5) * float(wanted.abs().max())


def unigram(text, *, table=None, **changes):
    """Unigram tokenizer trained on a text, as JSON."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "</s>", UNKNOWN],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    made.train_from_iterator(text.splitlines(), trainer)
    found = json.loads(made.to_str())
    if table is not None:
        found["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": table},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]}  # fmt: skip
        found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
                                                                        found["pre_tokenizer"]]}  # fmt: skip
    return json.dumps(found | changes)


def fields(data):
    """Last value of every field of a protocol buffer that has a length."""
    found, at = {}, 0

    def number():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(data):
        tag = number()
        if tag & 7 == 2:
            size = number()
            found[tag >> 3] = data[at : at + size]
            at += size
        else:
            at += {0: 0, 1: 8, 5: 4}[tag & 7]
            number() if tag & 7 == 0 else None
    return found


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """Function: an F32 file of a random Llama with a tokenizer."""

    def get(tokenizer):
        where = tmp_path_factory.mktemp("tokens")
        config = transformers.LlamaConfig(**COMMON)
        model = load_checkpoint(save(transformers.AutoModelForCausalLM.from_config(config), where / "model", tokenizer))
        write_plain(model, layout_of(model), where / "a.gguf", "F32")
        return where / "a.gguf"

    return get


def test_a_unigram_tokenizer_is_the_t5_one(with_tokenizer, texts) -> None:
    found = keys(with_tokenizer(unigram(texts["calib"].read_text())))
    assert found["tokenizer.ggml.model"] == "t5"
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 2]
    assert len(found["tokenizer.ggml.scores"]) == 288
    assert found["tokenizer.ggml.unknown_token_id"] == 2
    assert (found["tokenizer.ggml.add_space_prefix"], found["tokenizer.ggml.remove_extra_whitespaces"]) == (True, False)
    assert found["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"normalizer": {"type": "Lowercase"}}, r"Unigram one of .* \(normalizer Lowercase\).*--template"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"\(pre_tokenizer Whitespace\)"),
        ({"pre_tokenizer": None}, r"\(pre_tokenizer without Metaspace\)"),
    ],
)
def test_unigram_rules_without_a_counterpart_are_named(with_tokenizer, texts, part, words) -> None:
    with pytest.raises(CheckpointError, match=words):
        with_tokenizer(unigram(texts["calib"].read_text(), **part))


@pytest.mark.nightly
@pytest.mark.parametrize("merged", [False, True])
def test_llama_cpp_cuts_text_as_the_unigram_tokenizer_does(with_tokenizer, texts, tmp_path, merged) -> None:
    import base64

    from tokenizers import Tokenizer

    llama = pytest.importorskip("llama_cpp")
    table = None
    if merged:
        pieces = pytest.importorskip("sentencepiece")
        prefix = tmp_path / "p"
        (tmp_path / "t.txt").write_text(texts["calib"].read_text())
        pieces.SentencePieceTrainer.train(
            input=str(tmp_path / "t.txt"),
            model_prefix=str(prefix),
            vocab_size=200,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        rules = fields(prefix.with_suffix(".model").read_bytes())[3]
        table = base64.b64encode(fields(rules)[2]).decode()
    tokenizer = unigram(texts["calib"].read_text(), table=table)
    there = llama.Llama(str(with_tokenizer(tokenizer)), vocab_only=True, verbose=False)
    here = Tokenizer.from_str(tokenizer)
    for text in (texts["val"].read_text(), "Zoë says ½ of  \uff46\uff55\uff4c\uff4c width,\tand 漢字 too", "a</s>b"):
        wanted = here.encode(text, add_special_tokens=False).ids
        assert there.tokenize(text.encode(), add_bos=False, special=True) == wanted, text[:50]
