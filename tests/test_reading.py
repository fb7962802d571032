"""Every tensor of every file of a checkpoint is accounted for, and comes back under its own name, shape and dtype."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bytecap
from bytecap import ArtifactError, CheckpointError
from bytecap.format.sidefiles import source_tensors
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.rebuilt import written
from bytecap.pipeline.export import directory_files
from conftest import SMALL, build, save
from stored import contents_of

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14}  # fmt: skip
CONVERTED = {  # families whose tensors the library stacks, splits or renames
    "MixtralConfig": {"num_local_experts": 4},
    "OlmoeConfig": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
    "DeepseekV3Config": {**ROUTED, **LATENT, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "GPTNeoXConfig": {},
    "JambaConfig": {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
                    "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
                    "use_mamba_kernels": False},
    "Gemma3Config": {"text_config": {**SHAPE, "head_dim": 16, "sliding_window": 16}, "vision_config": EYES},
}  # fmt: skip


def family(name, **changes):
    import transformers

    shape = {} if name == "Gemma3Config" else SHAPE
    if name == "GPTNeoXConfig":
        shape = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**shape, **CONVERTED[name], **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def unpacked(model, directory):
    directory.mkdir()
    for name, content in directory_files(contents_of(model))[0].items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def plain(tmp_path, tokenizer_json):
    """A directory of a model whose head is its own, to be spoiled."""
    return save(build("rotary", tie_word_embeddings=False), tmp_path / "plain", tokenizer_json)


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def add(directory, tensors, name="model.safetensors"):
    path = directory / name
    held = load_file(path) if path.is_file() else {}
    save_file(held | tensors, path, metadata={"format": "pt"})


class TestRoundTrip:
    @pytest.mark.parametrize("name", CONVERTED)
    def test_names_shapes_and_dtypes_of_families_that_are_converted(self, tmp_path, name):
        source = tmp_path / "source"
        family(name).to(torch.bfloat16).save_pretrained(source)
        model = load_checkpoint(source)
        before, after = (
            load_file(source / "model.safetensors"),
            load_file(unpacked(model, tmp_path / "out") / "model.safetensors"),
        )
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype, key
            assert torch.equal(tensor, after[key]), key
        assert {u.dtype for u in model.units} == {"BF16"}
        again = load_checkpoint(tmp_path / "out")
        assert all(torch.equal(model.tensor(u), again.tensor(u)) for u in model.units)

    def test_ordinary_checkpoints_need_no_description(self, model_directory):
        assert source_tensors.FILE not in load_checkpoint(model_directory("rotary")).files

    def test_several_dtypes(self, plain, tmp_path):
        tensors = load_file(plain / "model.safetensors")
        kinds = (torch.bfloat16, torch.float32, torch.float16)
        mixed = {n: t.to(torch.bfloat16).to(kinds[i % 3]) for i, (n, t) in enumerate(tensors.items())}
        save_file(mixed, plain / "model.safetensors", metadata={"format": "pt"})
        after = load_file(unpacked(load_checkpoint(plain), tmp_path / "out") / "model.safetensors")
        assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in mixed.items()}
        written_config = (tmp_path / "out" / "config.json").read_bytes()
        assert written_config == (plain / "config.json").read_bytes()

    def test_dtypes_that_differ_inside_one_stack(self, tmp_path):
        source = tmp_path / "source"
        family("MixtralConfig").to(torch.bfloat16).save_pretrained(source)
        held = load_file(source / "model.safetensors")
        wide = next(n for n in held if "experts.1.w2" in n)
        save_file({**held, wide: held[wide].float()}, source / "model.safetensors", metadata={"format": "pt"})
        after = load_file(unpacked(load_checkpoint(source), tmp_path / "out") / "model.safetensors")
        assert {n for n, t in after.items() if t.dtype == torch.float32} == {wide}

    @pytest.mark.slow
    def test_a_tied_head_is_written_where_the_source_has_it(self, tmp_path, tokenizer_json):
        source = save(build("rotary"), tmp_path / "source", tokenizer_json)
        held = load_file(source / "model.safetensors")
        table = held.pop("model.embed_tokens.weight")
        for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
            tensors = held | {n: table.clone() for n in names}
            save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
            model = load_checkpoint(source)
            assert [u.aliases for u in model.units if u.aliases] == [("lm_head.weight",)]
            out = tmp_path / f"out{len(names)}"
            assert load_file(unpacked(model, out) / "model.safetensors").keys() == tensors.keys()

    @pytest.mark.slow
    def test_a_checkpoint_without_the_models_prefix(self, model_directory, tmp_path):
        source = shutil.copytree(model_directory("transposed"), tmp_path / "source")
        held = {n.removeprefix("transformer."): t for n, t in load_file(source / "model.safetensors").items()}
        save_file(held, source / "model.safetensors", metadata={"format": "pt"})
        after = load_file(unpacked(load_checkpoint(source), tmp_path / "out") / "model.safetensors")
        assert after.keys() == held.keys()


class TestTied:
    """A config that says tied, and a head of its own."""

    @pytest.fixture
    def untied(self, plain):
        change_config(plain, tie_word_embeddings=True)
        return plain

    @pytest.mark.slow
    def test_what_is_measured_is_what_is_loaded(self, untied, texts, tmp_path):
        path = tmp_path / "m.bcap"
        options = {"calibration": texts["calib"], "evaluation": texts["val"], "output": path, **SMALL}
        report = bytecap.fit(untied, "10MB", **options).report
        assert report["lossless"] is True
        assert report["kl_nats"] == 0
        values, module = bytecap.load(path), bytecap.load_model(path)
        for name, tensor in module.state_dict().items():
            np.testing.assert_array_equal(tensor, values[name])
        assert not np.array_equal(values["lm_head.weight"], values["model.embed_tokens.weight"])

    @pytest.mark.slow
    def test_the_module_of_a_file_has_its_own_settings_back(self, untied, texts, tmp_path):
        path = tmp_path / "m.bcap"
        change_config(untied, use_cache=True)
        (untied / "generation_config.json").write_text('{"eos_token_id": [3, 4], "max_new_tokens": 7}', "utf-8")
        options = {"calibration": texts["calib"], "evaluation": texts["val"], "output": path, **SMALL}
        bytecap.fit(untied, 60_000, method="uniform", **options)
        module = bytecap.load_model(path)
        assert module.config.use_cache is True
        assert module.config.name_or_path == ""
        assert module.generation_config.max_new_tokens == 7
        assert module.generation_config.eos_token_id == [3, 4]

    def test_a_buffer_that_the_file_gives_otherwise_is_an_error(self, untied):
        model = load_checkpoint(untied)
        next(b for n, b in model.module.named_buffers() if "inv_freq" in n).mul_(2)
        with pytest.raises(ArtifactError, match="inv_freq otherwise than the model"):
            written(model, contents_of(model), observe=None, threads=1)


class TestUnused:
    def test_overlays_beyond_the_config(self, plain):
        change_config(plain, num_hidden_layers=1)
        with pytest.raises(
            CheckpointError, match=r"holds tensor model\.layers\.1\.\S+, which the model .* no place"
        ) as e:
            load_checkpoint(plain)
        assert "--allow-unused 'model.layers.1.*'" in str(e.value)
        model = load_checkpoint(plain, allow_unused=["model.layers.1.*"])
        assert any("model.layers.1.mlp.up_proj.weight" in n for n in model.notes)

    def test_a_layer_that_the_library_ignores(self, tmp_path):
        """DeepSeek's layer that predicts a second token is left out by transformers without a word."""
        source = tmp_path / "source"
        family("DeepseekV3Config").save_pretrained(source)
        add(source, {"model.layers.61.eh_proj.weight": torch.zeros(32, 64)})
        with pytest.raises(CheckpointError, match=r"model\.layers\.61\.eh_proj\.weight"):
            load_checkpoint(source)
        assert load_checkpoint(source, allow_unused=["model.layers.61.*"]).notes

    @pytest.mark.parametrize(
        "name", ["weight_scale", "weight_scale_inv", "weight_zero_point", "qzeros", "g_idx", "SCB", "scales"]
    )
    @pytest.mark.parametrize("allow", [(), ("*",)])
    def test_scales_are_always_refused(self, plain, name, allow):
        add(plain, {f"model.layers.0.mlp.up_proj.{name}": torch.full((64, 1), 1e-3)})
        with pytest.raises(CheckpointError, match=f"{name}, which belongs to quantized weights.*dequantized"):
            load_checkpoint(plain, allow_unused=allow)

    @pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
    def test_weights_stored_as_integers_are_refused(self, plain, kind):
        held = load_file(plain / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        save_file({**held, name: held[name].to(kind)}, plain / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name} is stored as .* no weight without its scale"):
            load_checkpoint(plain)

    @pytest.mark.parametrize("where", ["model.safetensors", "adapter_model.safetensors"])
    @pytest.mark.parametrize("allow", [(), ("*",)])
    def test_adapters_are_always_refused(self, plain, where, allow):
        add(plain, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, where)
        with pytest.raises(CheckpointError, match="merge"):
            load_checkpoint(plain, allow_unused=allow)

    def test_an_adapter_alone(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}", "utf-8")
        with pytest.raises(CheckpointError, match="merge"):
            load_checkpoint(tmp_path)

    def test_what_the_library_computes_needs_no_place(self, plain):
        model = load_checkpoint(plain)
        table = next(b for n, b in model.module.named_buffers() if n.endswith("rotary_emb.inv_freq"))
        add(plain, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": table.clone() for i in (0, 1)})
        assert load_checkpoint(plain).units == model.units
        add(plain, {"model.layers.1.self_attn.rotary_emb.inv_freq": table * 2})
        with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.rotary_emb\.inv_freq .* other values"):
            load_checkpoint(plain)

    def test_masks_of_old_checkpoints_need_no_place(self, model_directory, tmp_path):
        source = shutil.copytree(model_directory("transposed"), tmp_path / "source")
        mask = torch.ones(64, 64).tril().reshape(1, 1, 64, 64)
        add(source, {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})
        with pytest.raises(CheckpointError, match="masked_bias"):  # the library knows the one and not the other
            load_checkpoint(source)
        held = load_file(source / "model.safetensors")
        del held["transformer.h.0.attn.masked_bias"]
        save_file(held, source / "model.safetensors", metadata={"format": "pt"})
        load_checkpoint(source)

    def test_a_tensor_that_is_missing(self, plain):
        held = load_file(plain / "model.safetensors")
        del held["model.norm.weight"]
        save_file(held, plain / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lacks tensor model\.norm\.weight"):
            load_checkpoint(plain)


class TestFileSet:
    def test_a_second_copy_of_other_precision_is_left_alone(self, plain):
        held = load_file(plain / "model.safetensors")
        save_file({n: t.half() for n, t in held.items()}, plain / "model.fp16.safetensors")
        model = load_checkpoint(plain)
        assert {u.dtype for u in model.units} == {"F32"}
        assert any("model.fp16.safetensors is not read" in n for n in model.notes)
        assert all(torch.equal(model.tensor(u), held[u.name]) for u in model.units)

    def test_a_second_file_with_tensors_of_its_own_is_refused(self, plain):
        save_file({"mtp.weight": torch.zeros(3)}, plain / "more.safetensors")
        with pytest.raises(CheckpointError, match=r"more\.safetensors holds tensor mtp\.weight"):
            load_checkpoint(plain)
        load_checkpoint(plain, allow_unused=["more.safetensors"])
        load_checkpoint(plain, allow_unused=["mtp.*"])

    def test_one_file_beside_an_index_of_shards(self, plain, tmp_path, tokenizer_json):
        """transformers reads the single file then; so do we, and shards that hold something else are refused."""
        many = save(build("rotary", seed=1), tmp_path / "many", tokenizer_json, max_shard_size="20KB")
        for path in many.glob("model*"):
            shutil.copy(path, plain / path.name)
        held = load_file(plain / "model.safetensors")
        model = load_checkpoint(plain)
        assert all(torch.equal(model.tensor(u), held[u.name]) for u in model.units)
        assert any("is not read" in n for n in model.notes)
        index = json.loads((plain / "model.safetensors.index.json").read_text("utf-8"))
        index["weight_map"]["mtp.weight"] = index["weight_map"]["model.norm.weight"]
        (plain / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        with pytest.raises(CheckpointError, match=r"mtp\.weight, which is in none of the files read"):
            load_checkpoint(plain)

    def test_a_tensor_in_two_shards(self, tmp_path, tokenizer_json):
        many = save(build("rotary"), tmp_path / "many", tokenizer_json, max_shard_size="20KB")
        one, two = sorted(many.glob("model-*"))[:2]
        name, tensor = next(iter(load_file(one).items()))
        add(many, {name: tensor + 1}, two.name)
        with pytest.raises(CheckpointError, match="both hold tensor"):
            load_checkpoint(many)

    @pytest.mark.parametrize("name", ["other.safetensors", "../model.safetensors", 3])
    def test_weights_that_the_config_names(self, plain, name):
        change_config(plain, transformers_weights=name)
        with pytest.raises(CheckpointError, match="names the weights"):
            load_checkpoint(plain)

    def test_float64_is_read_whole_or_said(self, plain):
        held = load_file(plain / "model.safetensors")
        name = "model.norm.weight"
        save_file({**held, name: held[name].double()}, plain / "model.safetensors", metadata={"format": "pt"})
        assert not load_checkpoint(plain).rounded
        save_file({**held, name: held[name].double() / 3}, plain / "model.safetensors", metadata={"format": "pt"})
        model = load_checkpoint(plain)
        assert model.rounded == {name}
        assert any("rounded" in n for n in model.notes)


class TestOtherFiles:
    def test_a_directory_of_gguf_files_says_what_to_give(self, plain):
        (plain / "model.safetensors").rename(plain / "model.gguf")
        with pytest.raises(CheckpointError, match=r"model\.gguf and no safetensors: give the file"):
            load_checkpoint(plain)
        (plain / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"model\.gguf and no config"):
            load_checkpoint(plain)
