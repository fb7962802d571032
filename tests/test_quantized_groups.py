"""Checkpoints quantized by GPTQ and AWQ are read as the dense ones that they stand for."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from bytecap.errors import CheckpointError
from bytecap.model import checkpoint as module_of_checkpoints
from bytecap.model import dequantize
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline import memory
from conftest import SMALL, build
from quantized import Checkpoint

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each of the eight fields of a word holds, the lowest one first


def stream(codes, bits):
    """Words of 32 bits with the codes of each column one behind the other, made of one large integer a column."""
    out = []
    for column in codes.T.tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(column))
        out.append([whole >> (32 * k) & 0xFFFFFFFF for k in range(len(column) * bits // 32)])
    return signed(torch.tensor(out).T)


def signed(words):
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def gptq(shape, bits, group=GROUP, *, order=None, symmetric=False, off=1, dtype=torch.float16):
    """Tensors of a layer, and the value of every weight, one by one."""
    outputs, inputs = shape
    groups = -(-inputs // group)
    codes = torch.randint(0, 2**bits, (inputs, outputs))
    scales = ((torch.rand(groups, outputs) + 0.5) * 0.1 / 2**bits).to(dtype)
    zeros = (
        torch.full((groups, outputs), 2 ** (bits - 1)) if symmetric else torch.randint(off, 2**bits, (groups, outputs))
    )
    member = order if order is not None else [i // group for i in range(inputs)]
    value = torch.empty(outputs, inputs)
    for i in range(inputs):
        value[:, i] = scales[member[i]].float() * (codes[i] - zeros[member[i]]).float()
    parts = {"qweight": stream(codes, bits), "qzeros": stream((zeros - off).T, bits).T.contiguous(), "scales": scales}
    return parts | {"g_idx": torch.tensor(member, dtype=torch.int32)}, value


def awq(shape, group=GROUP):
    """The same for AWQ."""
    outputs, inputs = shape
    codes = torch.randint(0, 16, (inputs, outputs))
    zeros = torch.randint(0, 16, (inputs // group, outputs))
    scales = ((torch.rand(inputs // group, outputs) + 0.5) / 100).to(torch.float16)
    value = torch.empty(outputs, inputs)
    for i in range(inputs):
        value[:, i] = scales[i // group].float() * (codes[i] - zeros[i // group]).float()

    def packed(rows):
        words = torch.zeros(len(rows), outputs // 8, dtype=torch.int64)
        for column in range(outputs // 8):
            for place, output in enumerate(AWQ_ORDER):
                words[:, column] |= rows[:, 8 * column + output] << (4 * place)
        return signed(words)

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, value


@pytest.fixture
def checkpoint(tmp_path, tokenizer_json):
    torch.manual_seed(2)
    return lambda settings, module=None: Checkpoint(tmp_path / "source", settings, module, tokenizer_json)


def fill(c, make, names=None):
    """Put quantized layers into a checkpoint."""
    for name in names or c.linear():
        parts, value = make(tuple(c.dense[name].shape))
        c.put(name, value, **{name.replace("weight", n): t for n, t in parts.items()})
    return c


def wide():
    """A module in which codes of three bits fill whole words."""
    return build("rotary", tie_word_embeddings=False, hidden_size=64, intermediate_size=96)


def settings(method="gptq", bits=4, **more):
    return {"quant_method": method, "bits": bits, "group_size": GROUP, **more}


class TestGptq:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("said", [{}, {"checkpoint_format": "gptq"}, {"format": "gptq_v2"}])
    def test_widths_and_versions(self, checkpoint, bits, symmetric, said):
        c = checkpoint(settings(bits=bits, sym=symmetric, **said), wide())
        off = 0 if "gptq_v2" in said.values() else 1
        fill(c, lambda shape: gptq(shape, bits, symmetric=symmetric, off=off)).check()

    @pytest.mark.parametrize("bits", [3, 4])
    def test_order_of_activations(self, checkpoint, bits):
        c = checkpoint(settings(bits=bits, desc_act=True), wide())

        def make(shape):
            places = torch.randperm(shape[1])
            order = [0] * shape[1]
            for rank, i in enumerate(places.tolist()):
                order[i] = rank // GROUP
            return gptq(shape, bits, order=order)

        fill(c, make).check()

    @pytest.mark.parametrize("g_idx", ["missing", "zero"])
    def test_without_an_order(self, checkpoint, g_idx):
        """Some writers leave it out, or leave it empty, where groups follow one another."""

        def make(shape):
            parts, value = gptq(shape, 4)
            parts["g_idx"].zero_()
            return {n: t for n, t in parts.items() if g_idx == "zero" or n != "g_idx"}, value

        fill(checkpoint(settings()), make).check()

    def test_one_group(self, checkpoint):
        fill(checkpoint(settings(group_size=-1)), lambda shape: gptq(shape, 4, group=shape[1])).check()

    def test_a_last_group_that_is_smaller(self, checkpoint):
        fill(checkpoint(settings(group_size=40)), lambda shape: gptq(shape, 4, group=40)).check()

    def test_layers_with_widths_of_their_own(self, checkpoint):
        c = checkpoint(settings(dynamic={r"+:.*down_proj": {"bits": 8, "group_size": 64}}))
        wide = [n for n in c.linear() if "down_proj" in n]
        fill(c, lambda shape: gptq(shape, 8, group=64), wide)
        fill(c, lambda shape: gptq(shape, 4), [n for n in c.linear() if n not in wide]).check()

    def test_some_layers_and_the_head(self, checkpoint):
        c = checkpoint(settings(lm_head=True))
        fill(c, lambda shape: gptq(shape, 4), [*c.linear()[:3], "lm_head.weight"]).check()

    def test_biases(self, checkpoint):
        config = transformers.Qwen2Config(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=288, tie_word_embeddings=False,
        )  # fmt: skip
        c = checkpoint(settings(), transformers.AutoModelForCausalLM.from_config(config).eval())
        assert any(n.endswith(".bias") for n in c.dense)
        fill(c, lambda shape: gptq(shape, 4), [n for n in c.linear() if n.endswith("weight")]).check()

    def test_experts(self, checkpoint):
        config = transformers.MixtralConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=288, num_local_experts=3, tie_word_embeddings=False,
        )  # fmt: skip
        c = checkpoint(settings(), transformers.AutoModelForCausalLM.from_config(config).eval())
        names = [n for n in c.dense if ".experts." in n]
        assert len(names) == 9
        fill(c, lambda shape: gptq(shape, 4), names).check()

    @pytest.mark.slow
    def test_a_fit(self, checkpoint, texts, tmp_path):
        import bytecap

        source = fill(checkpoint(settings()), lambda shape: gptq(shape, 4)).write()
        found = bytecap.fit(
            source, 60_000, calibration=texts["calib"], evaluation=texts["val"], method="uniform",
            output=tmp_path / "a.bcap", **SMALL,
        )  # fmt: skip
        assert found.report["source_quantization"] == "gptq"


class TestAwq:
    @pytest.mark.parametrize("more", [{}, {"version": "gemm"}, {"version": "GEMM", "zero_point": True}])
    def test_gemm(self, checkpoint, more):
        fill(checkpoint(settings("awq", **more)), awq).check()

    def test_one_group(self, checkpoint):
        fill(checkpoint(settings("awq", group_size=-1)), lambda shape: awq(shape, shape[1])).check()


class TestSettingsBesideTheWeights:
    """AutoGPTQ and early AutoAWQ say what a checkpoint is in a file of their own, and nothing in config.json."""

    def written(self, checkpoint, method, said, *, off=1, keep=None):
        """A checkpoint whose config says `keep`, and the file beside it `said`."""
        c = checkpoint(keep)
        fill(c, awq if method == "awq" else lambda shape: gptq(shape, 4, off=off))
        path = c.directory / {"gptq": "quantize_config.json", "awq": "quant_config.json"}[method]
        path.write_text(said if isinstance(said, str) else json.dumps(said), "utf-8")
        return c

    @pytest.mark.parametrize("more", [{}, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}])
    @pytest.mark.parametrize("base", ["missing", None, "weights-of-a-stranger"])
    def test_gptq(self, checkpoint, more, base):
        """Weights lie in model.safetensors, in the file that is named, or under AutoGPTQ's own name."""
        said = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, **more}
        if base != "missing":
            said["model_file_base_name"] = base
        c = self.written(checkpoint, "gptq", said, off=0 if more else 1)
        dense = c.check()
        assert dense.dequantized == "gptq"
        if base != "missing":
            name = f"{base or f'gptq_model-4bit-{GROUP}g'}.safetensors"
            (c.directory / "model.safetensors").rename(c.directory / name)
            moved = load_checkpoint(c.directory)
            theirs = dense.module.state_dict()
            assert all(torch.equal(t, theirs[n]) for n, t in moved.module.state_dict().items())

    def test_shards(self, checkpoint):
        c = self.written(checkpoint, "gptq", {"bits": 4, "group_size": GROUP})
        theirs = c.check().module.state_dict()
        (c.directory / "model.safetensors").unlink()
        base, names = f"gptq_model-4bit-{GROUP}g.safetensors", sorted(c.tensors)
        owner = {n: f"{i % 2}.safetensors" for i, n in enumerate(names)}
        for shard in set(owner.values()):
            save_file({n: c.tensors[n] for n in names if owner[n] == shard}, c.directory / shard, {"format": "pt"})
        (c.directory / f"{base}.index.json").write_text(json.dumps({"weight_map": owner}), "utf-8")
        found = load_checkpoint(c.directory).module.state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in found.items())

    def test_awq(self, checkpoint):
        said = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
        assert self.written(checkpoint, "awq", said).check().dequantized == "awq"

    @pytest.mark.parametrize(("method", "said", "error"), [
        ("gptq", {"bits": 5}, "quantized with gptq at 5 bits, which is not read"),
        ("gptq", {"group_size": 128}, "quantized with gptq, which is not read"),
        ("gptq", {"bits": 4, "is_marlin_format": True}, "quantized with gptq marlin at 4 bits, which is not read"),
        ("gptq", {"bits": 4, "checkpoint_format": "x"}, "quantized with gptq x at 4 bits, which is not read"),
        ("awq", {"w_bit": 4, "version": "GEMV"}, "quantized with awq GEMV, which is not read"),
        ("gptq", "[1]", r"quantize_config\.json"), ("gptq", "{", r"quantize_config\.json"),
        ("gptq", "[" * 10**5, r"quantize_config\.json"), ("awq", '"x"', r"quant_config\.json"),
    ])  # fmt: skip
    def test_settings_that_are_not_read(self, checkpoint, method, said, error):
        with pytest.raises(CheckpointError, match=error):
            load_checkpoint(self.written(checkpoint, method, said).write())

    @pytest.mark.parametrize("base", [3, ["x"], "../x", "a/b", "", "x" * 300, "nul\0"])
    def test_names_that_are_none(self, checkpoint, base):
        c = self.written(checkpoint, "gptq", {"bits": 4, "group_size": GROUP, "model_file_base_name": base})
        c.write()
        (c.directory / "model.safetensors").rename(c.directory / "other.safetensors")
        with pytest.raises(CheckpointError, match=r"holds other\.safetensors, but weights are read from"):
            load_checkpoint(c.directory)

    def test_two_that_differ(self, checkpoint):
        """Zero points of one version are read as one less in the other: nothing in the tensors tells which it is."""
        said = {"bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"}
        c = self.written(checkpoint, "gptq", said, keep=settings(checkpoint_format="gptq"))
        with pytest.raises(
            CheckpointError, match=r"says gptq gptq, quantize_config\.json gptq gptq_v2: remove the one"
        ):
            load_checkpoint(c.write())
        (c.directory / "quantize_config.json").write_text(json.dumps({"bits": 4, "format": "gptq"}), "utf-8")
        c.check()

    @pytest.mark.parametrize("said", [{"bits": 4}, {"bits": 3, "checkpoint_format": "marlin"}, "["])
    def test_one_that_stayed_behind(self, checkpoint, said):
        """A dense checkpoint is dense, whatever lies beside it."""
        c = checkpoint(None)
        c.write()
        (c.directory / "quantize_config.json").write_text(said if said == "[" else json.dumps(said), "utf-8")
        assert not load_checkpoint(c.directory).dequantized

    def test_memory_is_planned_for_dense_weights(self, checkpoint):
        c = self.written(checkpoint, "gptq", {"bits": 4, "group_size": GROUP})
        wanted = sum(t.numel() for t in c.dense.values())
        assert wanted <= memory._parameters(memory._headers(c.write(), ())) < 1.2 * wanted


class TestMisfits:
    @pytest.mark.parametrize(("part", "change", "said"), [
        ("qweight", lambda t: t[:-1], "cannot be dequantized|holds"), ("qweight", lambda t: t[:, :-1], "scales of"),
        ("qzeros", lambda t: t[:-1], "zeros of shape"), ("qzeros", lambda t: t[:, :1], "zeros of shape"),
        ("scales", lambda t: t[:-1], "zeros of shape"), ("scales", lambda t: t.flatten(), "scales of"),
        ("g_idx", lambda t: t[:-1], "an order of shape"), ("g_idx", lambda t: t + 99, "an order of shape"),
        ("g_idx", lambda t: t - 1, "an order of shape"), ("qweight", lambda t: t[:0], "cannot be dequantized"),
        ("scales", lambda t: t[:, :0], "scales of"), ("qzeros", lambda t: t.flatten(), "with scales of"),
        ("qzeros", lambda t: t.long(), "zeros of int64"), ("qzeros", lambda t: t.half(), "zeros of float16"),
        ("scales", lambda t: t.int(), "scales of int32"), ("g_idx", lambda t: t + 0.5, "an order of shape"),
    ])  # fmt: skip
    def test_parts_that_do_not_fit(self, checkpoint, part, change, said):
        c = fill(checkpoint(settings()), lambda shape: gptq(shape, 4))
        name = c.linear()[0].replace("weight", part)
        c.tensors[name] = change(c.tensors[name]).contiguous()
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(c.write())

    @pytest.mark.parametrize("size", [0, 7, -1, "x", None, [1], True])
    @pytest.mark.parametrize("order", [False, True])
    def test_group_sizes_that_are_none(self, checkpoint, size, order):
        """Tensors say how many groups there are; another size is refused where it is needed."""

        def make(shape):
            parts, value = gptq(shape, 4)
            return {n: t for n, t in parts.items() if order or n != "g_idx"}, value

        c = fill(checkpoint(settings(group_size=size)), make)
        if size == 7 and not order:
            with pytest.raises(CheckpointError, match="7 in each"):
                load_checkpoint(c.write())
        else:
            c.check()

    @pytest.mark.parametrize("part", ["qzeros", "scales"])
    @pytest.mark.parametrize("method", ["gptq", "awq"])
    def test_a_part_is_missing(self, checkpoint, method, part):
        c = fill(checkpoint(settings(method)), awq if method == "awq" else lambda shape: gptq(shape, 4))
        name = c.linear()[0]
        del c.tensors[name.replace("weight", part)]
        with pytest.raises(
            CheckpointError, match=f"{name.removesuffix('weight')}.* the scale that {method} has .*missing"
        ):
            load_checkpoint(c.write())

    @pytest.mark.parametrize("method", ["gptq", "awq"])
    def test_without_a_config(self, checkpoint, method):
        c = fill(checkpoint(settings(method)), awq if method == "awq" else lambda shape: gptq(shape, 4))
        c.configure(quantization_config=None)
        with pytest.raises(CheckpointError, match=r"\.(g_idx|qweight), which belongs to quantized weights"):
            load_checkpoint(c.write())

    @pytest.mark.parametrize(("part", "change"), [
        ("qweight", lambda t: t[:-1]), ("qweight", lambda t: t[:, :-1]), ("qzeros", lambda t: t[:-1]),
        ("scales", lambda t: t[:, :-8]), ("scales", lambda t: t[:-1]), ("qweight", lambda t: t.flatten()),
        ("qzeros", lambda t: t.long()), ("scales", lambda t: t.byte()),
    ])  # fmt: skip
    def test_parts_of_awq_that_do_not_fit(self, checkpoint, part, change):
        c = fill(checkpoint(settings("awq")), awq)
        name = c.linear()[0].replace("weight", part)
        c.tensors[name] = change(c.tensors[name]).contiguous()
        with pytest.raises(CheckpointError, match="cannot be dequantized"):
            load_checkpoint(c.write())


def test_codes_that_cross_words():
    codes = torch.randint(0, 8, (64, 5))
    assert dequantize.fields(stream(codes, 3).T.contiguous(), 3).T.equal(codes.to(torch.int32))


@pytest.mark.parametrize("kept", [2**31, 0])
def test_every_weight_is_computed_once(checkpoint, monkeypatch, kept):
    """For its dtype, for the module and for the account; only what is too large to wait is computed again."""
    c, calls, formula = fill(checkpoint(settings()), lambda shape: gptq(shape, 4)), [], dequantize.gptq
    monkeypatch.setattr(dequantize, "gptq", lambda *parts: (calls.append(1), formula(*parts))[1])
    monkeypatch.setattr(module_of_checkpoints, "_KEPT", kept)
    c.check()
    assert len(calls) == len(c.linear()) * (1 if kept else 3)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 2), ("gptq", 4), ("gptq", 8), ("awq", 4), ("mxfp4", None)])
def test_memory_is_planned_for_dense_weights(checkpoint, method, bits):
    c = checkpoint(settings(method, bits) if bits else {"quant_method": method})
    if bits:
        fill(c, awq if method == "awq" else lambda shape: gptq(shape, bits))
    else:
        c.tensors["x_blocks"] = torch.zeros(3, 8, 2, 16, dtype=torch.uint8)
        c.dense["x"] = torch.zeros(3, 8, 64)
    wanted = sum(t.numel() for t in c.dense.values())
    assert wanted <= memory._parameters(memory._headers(c.write(), ())) < 1.2 * wanted
