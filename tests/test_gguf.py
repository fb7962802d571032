"""GGUF files: names, row orders, metadata, exact sizes, templates; what llama.cpp makes of them is nightly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import bytecap
from bytecap.errors import CheckpointError, NotAnArtifact, UsageError
from bytecap.format.ledger import total
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.fit_gguf import fit_gguf
from bytecap.runtimes.gguf.export import type_lines, write_plain
from bytecap.runtimes.gguf.file import Stored, encode_plain, ledger, read_tensors, read_units, type_bytes, write
from bytecap.runtimes.gguf.menu import allowed, parse_types
from bytecap.runtimes.gguf.places import Place, layout_of
from bytecap.runtimes.gguf.template import read_template
from bytecap.runtimes.gguf.tokenizer import pre_tokenizer
from conftest import SMALL, build, save

gguf = pytest.importorskip("gguf")
BUDGET = 27_000


@pytest.fixture(scope="module")
def made(model_directory, texts, tmp_path_factory):
    """A fitted file of a tiny model, and its report."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    found = bytecap.fit(
        model_directory("rotary"), BUDGET, format="gguf", calibration=texts["calib"], evaluation=texts["val"],
        output=path, **SMALL,
    )  # fmt: skip
    return found, path


@pytest.fixture(scope="module")
def exported(model_directory, tmp_path_factory):
    """Function: (model, layout, path) of a tiny model in a floating-point type."""

    def get(kind="rotary", type_="F32", **changes):
        model = load_checkpoint(model_directory(kind, **changes))
        path = tmp_path_factory.mktemp("plain") / f"{kind}.gguf"
        layout = layout_of(model)
        write_plain(model, layout, path, type_)
        return model, layout, path

    return get


@pytest.mark.parametrize("kind", ["rotary", "biased", "transposed"])
def test_an_export_holds_the_model_bit_for_bit(exported, kind) -> None:
    model, layout, path = exported(kind)
    assert {p.unit for p in layout.places} == {u.name for u in model.units}
    found = read_units(path, layout, model.units)
    for unit in model.units:
        assert np.array_equal(found[unit.name], model.tensor(unit).numpy()), unit.name


def test_rows_of_queries_and_keys_alternate_as_llama_rotates_them(exported) -> None:
    model, layout, path = exported()
    stored = {name: values for name, _, _, values in read_tensors(path)}
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        weight = model.module.get_parameter(f"model.layers.0.self_attn.{ours}.weight").numpy()
        half = len(weight) // heads // 2
        rows = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in range(2)]
        assert np.array_equal(stored[f"blk.0.{theirs}.weight"], weight[rows])
    assert np.array_equal(
        stored["blk.0.attn_v.weight"], model.module.get_parameter("model.layers.0.self_attn.v_proj.weight").numpy()
    )
    _, layout, _ = exported("biased")
    assert all(p.rows is None for p in layout.places)


def test_biases_of_queries_move_with_their_rows(exported) -> None:
    model, layout, path = exported("rotary", attention_bias=True)
    rows = {p.name: p.rows for p in layout.places}
    assert np.array_equal(rows["blk.0.attn_q.weight"], rows["blk.0.attn_q.bias"])
    found = read_units(path, layout, model.units)
    assert all(np.array_equal(found[u.name], model.tensor(u).numpy()) for u in model.units)


@pytest.mark.slow
def test_recovery_keeps_bytes_and_types_and_lowers_the_kl(model_directory, texts, tmp_path) -> None:
    out = tmp_path / "r.gguf"
    found = fit_gguf(
        model_directory("rotary"), 24_000, calibration=texts["calib"], evaluation=texts["val"], output=out,
        recover="30", **SMALL,
    )  # fmt: skip
    report = found.report
    before = report["without_recovery"]
    assert out.stat().st_size == report["file_bytes"] <= 24_000
    assert min(s["kl"] for s in report["recovery"]["stages"]) < report["recovery"]["kl_before"]
    assert report["kl_nats"] < before["kl_nats"] + 3 * before["kl_difference_stderr"]


def test_metadata_says_what_the_config_says(exported) -> None:
    model, _, path = exported()
    fields = {k: f.contents() for k, f in gguf.GGUFReader(str(path)).fields.items()}
    config = model.module.config
    assert fields["general.architecture"] == "llama"
    for key, name in {
        "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "attention.head_count_kv":
        "num_key_value_heads", "feed_forward_length": "intermediate_size", "context_length": "max_position_embeddings",
    }.items():  # fmt: skip
        assert fields[f"llama.{key}"] == getattr(config, name)
    vocabulary = json.loads(model.files["tokenizer.json"])["model"]["vocab"]
    assert [fields["tokenizer.ggml.tokens"][i] for i in vocabulary.values()] == list(vocabulary)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL


@pytest.mark.slow
def test_a_report_says_what_the_next_bytes_would_buy(made) -> None:
    moves = made[0].report["margin"]["next"]
    assert {m["unit"] for m in moves} <= set(made[0].types)
    assert 0 < sum(m["bytes"] for m in moves) <= 1000 + made[0].report["slack_bytes"]
    assert sum(m["nats"] for m in moves) < 0


def test_a_fit_keeps_the_cap_and_reads_back_what_it_reports(made) -> None:
    found, path = made
    report = found.report
    size = path.stat().st_size
    assert size == report["file_bytes"] <= BUDGET
    assert report["slack_bytes"] == BUDGET - size
    assert report["slack_bytes"] < max(report["allowed_slack_bytes"], 1) or not report["allowed_slack_bytes"]
    assert total(found.ledger()) == size == total(ledger(path))
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}
    assert all(types[n] == t for n, t in found.types.items())
    assert all(t == "F32" for n, t in types.items() if n not in found.types)
    assert 0 < report["kl_nats"] < 1
    assert report["distortion_held_out"] > 0


@pytest.mark.slow
def test_more_bytes_are_better_and_types_are_kept_to(model_directory, texts) -> None:
    common = {"calibration": texts["calib"], "evaluation": texts["val"], **SMALL}
    directory = model_directory("rotary")
    small, large = (fit_gguf(directory, n, types=["q4_0", "q8_0"], **common) for n in (24_000, 32_000))
    assert set(small.types.values()) | set(large.types.values()) <= {"Q4_0", "Q8_0"}
    assert large.report["kl_nats"] < small.report["kl_nats"]


@pytest.mark.slow
def test_wide_rows_take_super_blocks(tmp_path, tokenizer_json, texts) -> None:
    module = build("rotary", hidden_size=256, head_dim=16, intermediate_size=64, num_hidden_layers=1)
    directory = save(module, tmp_path / "wide", tokenizer_json)
    found = fit_gguf(directory, 90_000, calibration=texts["calib"], evaluation=texts["val"],
                     output=tmp_path / "a.gguf", **SMALL)  # fmt: skip
    assert set(found.types.values()) & {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "IQ4_XS"}
    assert (tmp_path / "a.gguf").stat().st_size <= 90_000


@pytest.mark.slow
def test_a_dry_run_writes_nothing(model_directory, texts, tmp_path) -> None:
    path = tmp_path / "none.gguf"
    found = fit_gguf(
        model_directory("rotary"), BUDGET, calibration=texts["calib"], output=path, dry_run=True, **SMALL
    )  # fmt: skip
    assert not path.exists()
    assert found.report["floor_bytes"] <= found.report["file_bytes"] <= BUDGET
    assert "kl_nats" not in found.report


def test_types_that_cannot_hold_a_tensor_are_never_swapped_in_silence() -> None:
    narrow = Place("blk.0.ffn_down.weight", "x", (8, 96))
    assert allowed(narrow, ("Q4_K", "Q8_0"), pure=True) == (("Q8_0",), False)
    found, changed = allowed(narrow, ("Q4_K", "Q6_K"), pure=False)
    assert changed
    assert set(found) == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"}
    with pytest.raises(UsageError, match=r"has 96 columns, which none of q4_k can hold; mxfp4, q4_0"):
        allowed(narrow, ("Q4_K",), pure=True)
    with pytest.raises(UsageError, match="unknown GGUF type q9_k"):
        parse_types(["q9_k"])


@pytest.mark.slow
def test_a_template_gives_names_rows_and_keys(exported, tmp_path, texts, model_directory) -> None:
    model, layout, path = exported(type_="F16")
    found = read_template(path, model).layout
    for a, b in zip(layout.places, found.places, strict=True):
        assert (a.name, a.shape) == (b.name, b.shape)
        if a.matrix:
            assert a.unit == b.unit
            assert (a.rows is None and b.rows is None) or np.array_equal(a.rows, b.rows)
    out = tmp_path / "t.gguf"
    fit_gguf(model_directory("rotary"), BUDGET, template=path, output=out, calibration=texts["calib"],
             evaluation=texts["val"], **SMALL)  # fmt: skip
    fields = [{k: f.contents() for k, f in gguf.GGUFReader(str(p)).fields.items() if "." in k} for p in (path, out)]
    assert {k for k in fields[0] if fields[0][k] != fields[1].get(k)} <= {"general.file_type"}
    assert fields[1]["tokenizer.ggml.merges"] == fields[0]["tokenizer.ggml.merges"]


def test_a_template_of_another_model_is_refused(exported, model_directory) -> None:
    _, _, path = exported()
    with pytest.raises(
        CheckpointError, match=r"is no conversion of .*does not hold .*unknown to the model are token_embd"
    ):
        read_template(path, load_checkpoint(model_directory("biased")))


def test_a_quantized_template_is_refused(made, model_directory) -> None:
    with pytest.raises(CheckpointError, match="a template must be F32, F16 or BF16"):
        read_template(made[1], load_checkpoint(model_directory("rotary")))


def test_architectures_without_a_direct_way_are_named(tmp_path, tokenizer_json) -> None:
    import transformers

    config = transformers.OlmoConfig(vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=4, pad_token_id=0, eos_token_id=0)  # fmt: skip
    directory = save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "olmo", tokenizer_json)
    with pytest.raises(CheckpointError, match=r"is a olmo: no direct way into GGUF.*--template"):
        layout_of(load_checkpoint(directory))


@pytest.mark.slow
def test_a_template_follows_rows_wherever_they_are(tmp_path, tokenizer_json, texts) -> None:
    """Experts, which the converter splits and stacks: every row is found by its values."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        initializer_range=0.15,
    )  # fmt: skip
    directory = save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "mix", tokenizer_json)
    model = load_checkpoint(directory)
    state = {k: v.numpy() for k, v in model.module.state_dict().items()}
    both = next(v for k, v in state.items() if k.endswith("experts.gate_up_proj"))
    down = next(v for k, v in state.items() if k.endswith("experts.down_proj"))
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"], "output.weight": state["lm_head.weight"],
        "output_norm.weight": state["model.norm.weight"], "blk.0.ffn_gate_exps.weight": both[:, :64],
        "blk.0.ffn_up_exps.weight": both[:, 64:], "blk.0.ffn_down_exps.weight": down,
        **{f"blk.0.attn_{x}.weight": state[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"},
        "blk.0.attn_output.weight": state["model.layers.0.self_attn.o_proj.weight"],
        "blk.0.ffn_gate_inp.weight": next(v for k, v in state.items() if "gate.weight" in k),
    }  # fmt: skip
    path = tmp_path / "f32.gguf"
    stored = [Stored(n, v.shape, "F32", encode_plain("F32", v.reshape(-1, v.shape[-1]))) for n, v in tensors.items()]
    write(path, "llama", lambda w: w.add_block_count(1), stored)
    layout = read_template(path, model).layout
    direct = {p.name: p for p in layout_of(model).places}
    owners = {p.name: p for p in layout.places}
    for name in (n for n in owners if "_exps" in n):
        assert (direct[name].unit, direct[name].shape) == (owners[name].unit, owners[name].shape)
        assert np.array_equal(direct[name].rows, owners[name].rows)
    assert owners["blk.0.ffn_gate_exps.weight"].unit == owners["blk.0.ffn_up_exps.weight"].unit
    assert owners["blk.0.ffn_gate_exps.weight"].rows.tolist() == [e * 128 + i for e in range(3) for i in range(64)]
    out = tmp_path / "q.gguf"
    found = fit_gguf(
        model, 80_000, template=path, calibration=texts["calib"], evaluation=texts["val"], output=out, **SMALL
    )
    assert "blk.0.ffn_gate_inp.weight" not in found.types
    assert out.stat().st_size <= 80_000
    assert 0 < found.report["kl_nats"] < 0.5


def test_pre_tokenizers_without_a_name_are_refused() -> None:
    plain = {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}
    assert pre_tokenizer(plain, "x") == "gpt-2"
    odd = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "a+"}},
                                                 {"type": "ByteLevel", "use_regex": False}]}  # fmt: skip
    for rule in (odd, {"type": "Whitespace"}, {"type": "ByteLevel", "use_regex": True, "add_prefix_space": True}):
        with pytest.raises(CheckpointError, match="--template"):
            pre_tokenizer({"pre_tokenizer": rule}, "x")


def test_floats_round_as_gguf_does() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for name in ("F16", "BF16"):
        kind = getattr(gguf.GGMLQuantizationType, name)
        assert np.array_equal(encode_plain(name, x), gguf.quantize(x, kind).view(np.uint8).reshape(4, -1))
        assert type_bytes(name, 4, 64) == 512


def test_no_gguf_file_and_damage(tmp_path, made) -> None:
    for name, data in (("a.gguf", b"nothing here"), ("b.gguf", made[1].read_bytes()[:200])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(NotAnArtifact, match=rf"{name} is no sound GGUF file"):
            ledger(tmp_path / name)


@pytest.mark.slow
def test_the_commands(run, refused, model_directory, texts, tmp_path) -> None:
    out, types = tmp_path / "c.gguf", tmp_path / "types.txt"
    words = ["--calib", texts["calib"], "--tokens", "1000", "--eval-tokens", "500"]
    fit = ["fit", model_directory("rotary"), "--budget", "27kB", *words]
    code, said, err = run(
        *fit, "--eval", texts["val"], "-o", out, "--emit", types, "--report", tmp_path / "c.html", "--json"
    )
    assert code == 0, err
    report = json.loads(said)
    assert report["format"] == "gguf"
    assert types.read_text() == type_lines(report["types"])
    assert (tmp_path / "c.html").stat().st_size > 1000
    code, said, _ = run("ledger", out, "--json")
    assert (code, json.loads(said)["file_bytes"]) == (0, out.stat().st_size)
    assert "the option paths is not for the format gguf" in refused(*fit, "-o", out, "--paths", "all")
    assert "the option types is not for the format bcap" in refused(*fit, "-o", tmp_path / "x.bcap", "--types", "q4_0")
    assert "unknown format 'onnx'" in refused(*fit, "-o", out, "--format", "onnx")
    assert "the format is gguf: name a file" in refused(*fit, "-o", tmp_path / "x.bcap", "--format", "gguf")
    matrix = tmp_path / "imatrix.gguf"
    code, said, err = run("imatrix", model_directory("rotary"), "-o", matrix, *words[:4])
    assert code == 0, err
    assert "for statistics" in said + err
    assert not any(word in said + err for word in ("evaluation", "--eval", "correction factors"))
    code, said, err = run("imatrix", model_directory("rotary"), "-o", matrix, *words[:4], "--json")
    assert code == 0, err
    tensors = {t.name: t.data for t in gguf.GGUFReader(str(matrix)).tensors}
    assert json.loads(said)["tensors"] == len(tensors) // 2 == len(report["types"])
    assert tensors["blk.0.attn_q.weight.in_sum2"].shape[-1] == 32
    assert (tensors["blk.1.ffn_down.weight.in_sum2"] > 0).all()


@pytest.mark.slow
def test_recoding(run, refused, exported, made, texts, tmp_path) -> None:
    assert "is quantized already" in refused("recode", made[1], "--budget", "25kB", "-o", tmp_path / "r.gguf")
    pytest.importorskip("accelerate")
    model, layout, path = exported()
    out = tmp_path / "r.gguf"
    code, said, err = run("recode", path, "--budget", "30kB", "-o", out, "--calib", texts["calib"],
                          "--eval", texts["val"], "--tokens", "1000", "--eval-tokens", "500", "--json")  # fmt: skip
    assert code == 0, err
    report = json.loads(said)
    assert out.stat().st_size == report["file_bytes"] <= 30_000
    assert 0 < report["kl_nats"] < 1
    found = read_units(out, layout, model.units)
    for unit in model.units:  # rows are where the original file has them
        a, b = found[unit.name].ravel(), model.tensor(unit).numpy().ravel()
        assert np.corrcoef(a, b)[0, 1] > 0.95, unit.name


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["rotary", "biased"])
def test_llama_cpp_computes_what_the_original_does(exported, kind) -> None:
    llama = pytest.importorskip("llama_cpp")
    model, _, path = exported(kind)
    ids = torch.arange(5, 69)[None]
    wanted = model.module(ids).logits[0]
    plain = {"n_ctx": 128, "logits_all": True, "verbose": False, "n_threads": 1, "flash_attn": False}
    there = llama.Llama(str(path), type_k=0, type_v=0, **plain)
    there.eval(ids[0].tolist())
    found = torch.from_numpy(np.array(there.scores[: ids.shape[1]]))
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.nightly
def test_llama_cpp_runs_a_fitted_file_as_predicted(made, model_directory, texts) -> None:
    llama = pytest.importorskip("llama_cpp")
    model = load_checkpoint(model_directory("rotary"))
    there = llama.Llama(str(made[1]), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    text = texts["val"].read_text()[:400]
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(model.files["tokenizer.json"].decode()).encode(text).ids
    assert there.tokenize(text.encode(), add_bos=False, special=False) == ids
    ids = [0, *ids[:200]]
    there.reset()
    there.eval(ids)
    q = torch.from_numpy(np.array(there.scores[: len(ids)])).log_softmax(-1)
    p = model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < kl < 2 * made[0].report["kl_nats"] + 0.003
