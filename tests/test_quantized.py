"""Quantized checkpoints are read as the dense ones that they stand for: float8, MXFP4; and what is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import bytecap
from bytecap.errors import CheckpointError
from bytecap.model.checkpoint import load_checkpoint
from conftest import SMALL
from quantized import E2M1, QUANTIZED, Checkpoint, float8


@pytest.fixture
def checkpoint(tmp_path, tokenizer_json):
    torch.manual_seed(1)
    return lambda settings, module=None: Checkpoint(tmp_path / "source", settings, module, tokenizer_json)


def block_scaled(c, scale=torch.float32, suffix="_scale_inv", side=(16, 24)):
    for name in c.linear():
        codes, grid, value = float8(c.dense[name], side, scale)
        parts = {name: codes, name.removesuffix(".weight") + suffix if suffix[0] == "." else name + suffix: grid}
        c.put(name, value, **parts)
    return c


FLOAT8 = {"quant_method": "fp8", "weight_block_size": [16, 24], "activation_scheme": "dynamic"}


class TestFloat8:
    @pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
    @pytest.mark.parametrize("suffix", ["_scale_inv", ".scale"])
    def test_blocks(self, checkpoint, scale, suffix):
        found = block_scaled(checkpoint(FLOAT8), scale, suffix).check()
        kinds = {u.dtype for u in found.units if u.name.endswith("q_proj.weight")}
        assert kinds == ({"BF16"} if scale == torch.float8_e8m0fnu else {"F32"})
        assert json.loads(found.files["config.json"])["dtype"] == "float32"

    def test_rows(self, checkpoint):
        c = checkpoint({"quant_method": "fbgemm_fp8"})
        for name in c.linear():
            codes, grid, value = float8(c.dense[name], (1, 10**6))
            c.put(name, value, **{name: codes, f"{name}_scale": grid})
        c.check()

    def test_one_scale_and_scales_of_activations(self, checkpoint):
        c = checkpoint(FLOAT8 | {"weight_block_size": None, "activation_scheme": "static"})
        for name in c.linear():
            codes, grid, value = float8(c.dense[name], (10**6, 10**6))
            beside = name.replace("weight", "activation_scale")
            c.put(name, value, **{name: codes, f"{name}_scale_inv": grid.reshape(()), beside: torch.tensor(0.5)})
        assert any("activations stay floats" in n for n in c.check().notes)

    def test_experts_are_stacked(self, checkpoint):
        config = transformers.MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=288, num_local_experts=3, num_experts_per_tok=2,
        )  # fmt: skip
        c = checkpoint(FLOAT8, transformers.AutoModelForCausalLM.from_config(config).eval())
        for name in [n for n in c.dense if ".experts." in n]:
            codes, grid, value = float8(c.dense[name])
            c.put(name, value, **{name: codes, f"{name}_scale_inv": grid})
        found = c.check()
        assert any(u.stacked for u in found.units)

    def test_as_transformers_does_it(self, checkpoint):
        """Where blocks are whole, its own dequantizing gives the same values."""
        c = block_scaled(checkpoint(FLOAT8 | {"weight_block_size": [16, 16]}), side=(16, 16))
        found = c.check()
        settings = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=[16, 16])
        other = transformers.AutoModelForCausalLM.from_pretrained(
            c.directory, quantization_config=settings, dtype=torch.float32
        )
        theirs = other.state_dict()
        for name, tensor in found.module.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name

    @pytest.mark.slow
    def test_fit_load_and_unpack(self, checkpoint, texts, tmp_path, run):
        c = block_scaled(checkpoint(FLOAT8))
        path = tmp_path / "m.bcap"
        options = {"calibration": texts["calib"], "evaluation": texts["val"], "output": path, **SMALL}
        report = bytecap.fit(c.write(), "10MB", **options).report
        assert report["lossless"] is True
        assert report["source_quantization"] == "fp8"
        out = tmp_path / "out"
        assert run("unpack", path, "-o", out)[0] == 0
        written = load_file(out / "model.safetensors")
        assert written.keys() == c.dense.keys()
        for name, value in c.dense.items():
            assert torch.equal(written[name].float(), value), name
        assert QUANTIZED not in json.loads((out / "config.json").read_text("utf-8"))
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(again.lm_head.weight, c.dense["lm_head.weight"])

    @pytest.mark.slow
    def test_streamed(self, checkpoint, texts, tmp_path):
        c = block_scaled(checkpoint(FLOAT8))
        options = {"calibration": texts["calib"], "evaluation": texts["val"], **SMALL}
        reports = [
            bytecap.fit(c.write(), 60_000, output=tmp_path / f"{i}.bcap", memory=m, **options).report
            for i, m in enumerate((None, "1MB"))
        ]
        assert [r["source_quantization"] for r in reports] == ["fp8", "fp8"]
        assert reports[0]["kl_nats"] == pytest.approx(reports[1]["kl_nats"], rel=0.2)

    @pytest.mark.parametrize(
        ("block", "said"),
        [
            ([0, 16], "below 1"),
            ("x", "not two numbers"),
            ([16], "not two numbers"),
            ([2**60, 16], "no model is that large"),
            ([2**40, 16], "cannot be dequantized"),
        ],
    )
    def test_absurd_blocks(self, checkpoint, block, said):
        c = block_scaled(checkpoint(FLOAT8 | {"weight_block_size": block}))
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(c.write())

    def test_a_weight_without_its_scale(self, checkpoint):
        c = block_scaled(checkpoint(FLOAT8))
        del c.tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
        with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored as F8_E4M3, and the scale .* is missing"):
            load_checkpoint(c.write())

    def test_a_scale_without_its_weight(self, checkpoint):
        c = block_scaled(checkpoint(FLOAT8))
        c.tensors["model.layers.9.mlp.up_proj.weight_scale_inv"] = torch.ones(4, 2)
        with pytest.raises(CheckpointError, match=r"layers\.9\.mlp\.up_proj\.weight_scale_inv, which belongs"):
            load_checkpoint(c.write())

    def test_scales_without_a_config(self, checkpoint):
        c = block_scaled(checkpoint(FLOAT8))
        c.configure(**{QUANTIZED: None})
        with pytest.raises(CheckpointError, match=r"which belongs to quantized weights|no weight without its scale"):
            load_checkpoint(c.write())

    def test_scales_of_another_shape(self, checkpoint):
        c = block_scaled(checkpoint(FLOAT8))
        c.tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(5, 7)
        with pytest.raises(CheckpointError, match=r"up_proj\.weight cannot be dequantized .*scales of shape \[5, 7\]"):
            load_checkpoint(c.write())

    def test_infinite_scales(self, checkpoint):
        c = block_scaled(checkpoint(FLOAT8))
        c.tensors["model.layers.0.mlp.up_proj.weight_scale_inv"].fill_(float("inf"))
        with pytest.raises(CheckpointError, match=r"up_proj\.weight holds"):
            load_checkpoint(c.write())


class TestMxfp4:
    @pytest.fixture
    def source(self, checkpoint):
        config = transformers.GptOssConfig(
            hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, vocab_size=288, num_local_experts=3, num_experts_per_tok=2, sliding_window=16,
        )  # fmt: skip
        c = checkpoint({"quant_method": "mxfp4"}, transformers.AutoModelForCausalLM.from_config(config).eval())
        for name in [n for n in c.dense if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, cols, rows = c.dense[name].shape
            codes = torch.randint(0, 16, (experts, rows, cols // 32, 32))
            scales = torch.randint(118, 124, (experts, rows, cols // 32), dtype=torch.uint8)
            value = E2M1[codes] * torch.exp2(scales.float() - 127)[..., None]
            packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            c.put(name, value.reshape(experts, rows, cols).transpose(1, 2), **{
                f"{name}_blocks": packed, f"{name}_scales": scales,
            })  # fmt: skip
            c.dense[name] = c.dense[name].contiguous()
        return c

    def test_experts(self, source):
        found = source.check()
        assert {u.dtype for u in found.units if u.name.endswith(("gate_up_proj", "down_proj"))} == {"BF16"}

    def test_as_transformers_does_it(self, source):
        found = load_checkpoint(source.write())
        settings = transformers.Mxfp4Config(dequantize=True)
        other = transformers.AutoModelForCausalLM.from_pretrained(
            source.directory, quantization_config=settings, dtype=torch.float32
        )
        theirs = other.state_dict()
        for name, tensor in found.module.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name

    def test_shapes_that_do_not_fit(self, source):
        name = "model.layers.0.mlp.experts.down_proj_scales"
        source.tensors[name] = source.tensors[name][:, :3].contiguous()
        with pytest.raises(CheckpointError, match=r"down_proj cannot be dequantized from \S+down_proj_blocks"):
            load_checkpoint(source.write())


class TestRefused:
    def test_layers_that_are_shared(self, checkpoint):
        c = block_scaled(checkpoint(FLOAT8))
        c.write()
        (c.directory / "tying.json").write_text("{}", "utf-8")
        with pytest.raises(
            CheckpointError, match=r"shares layers by tying\.json and is quantized, which no file can be"
        ):
            load_checkpoint(c.directory)

    @pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
    def test_names_with_a_prefix(self, checkpoint, prefix):
        c = checkpoint(None)
        c.tensors = {prefix + n: t for n, t in c.tensors.items()}
        said = rf"lacks tensor lm_head\.weight \(\d+ missing in all\), and holds {prefix}lm_head\.weight, .*: rename it"
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(c.write())

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"quant_method": "gptq", "bits": 5}, "gptq at 5 bits, which is not read .*gptqmodel"),
            ({"quant_method": "gptq"}, "gptq, which is not read .*gptqmodel"),
            ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq marlin at 4 bits, .*gptqmodel"),
            ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "gptq marlin at 4 bits, which is not read"),
            ({"quant_method": "gptq", "bits": 4, "checkpoint_format": ["x"]}, r"gptq \['x'\] at 4 bits, which"),
            ({"quant_method": "gptq", "bits": 4, "format": "gptq_p"}, "gptq gptq_p at 4 bits, which is not read"),
            (
                {"method": "gptq", "bits": 4, "format": "gptq", "checkpoint_format": "gptq_v2"},
                "gptq gptq or gptq_v2 at",
            ),
            ({"quant_method": "awq", "bits": 8}, "awq at 8 bits, which is not read .*gptqmodel"),
            ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq gemv at 4 bits, which is not read"),
            ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "awq llm-awq at 4 bits, which is not read"),
            ({"quant_method": "awq", "bits": 4, "version": {"a": 1}}, "awq {'a': 1} at 4 bits, which is not read"),
            ({"quant_method": "quanto"}, "quanto, which is not read .*optimum-quanto"),
            ({"quant_method": ["fp8"]}, "which is not read"),
            ({"quant_method": 3}, "3, which is not read"),
            ({"bits": 4}, "an unnamed method at 4 bits"),
        ],
    )
    @pytest.mark.parametrize("nested", [False, True])
    def test_by_name(self, checkpoint, settings, said, nested):
        c = checkpoint(settings)
        if nested:
            c.configure(**{QUANTIZED: None, "text_config": {QUANTIZED: settings}})
        with pytest.raises(CheckpointError, match=f"is quantized with .*{said}.*dequantized"):
            load_checkpoint(c.write())
