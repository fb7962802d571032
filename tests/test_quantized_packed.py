"""Checkpoints quantized by compressed-tensors and bitsandbytes are read as the dense ones that they stand for."""

import inspect
import json

import pytest
import torch

from bytecap.errors import CheckpointError
from bytecap.model import dequantize
from bytecap.model.checkpoint import load_checkpoint
from quantized import E2M1, Checkpoint, dense_words, float8, integers, words


@pytest.fixture
def checkpoint(tmp_path, tokenizer_json):
    torch.manual_seed(1)
    return lambda settings, module=None: Checkpoint(tmp_path / "source", settings, module, tokenizer_json)


class TestCompressedTensors:
    def settings(self, form, **weights):
        group = {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, "symmetric": True, **weights}}
        return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
                "ignore": ["lm_head"], "quantization_status": "compressed"}  # fmt: skip

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("zeros", [False, True])
    @pytest.mark.parametrize("group", [16, 32])
    def test_packed(self, checkpoint, bits, zeros, group):
        c = checkpoint(self.settings("pack-quantized", num_bits=bits, group_size=group, strategy="group"))
        for name in c.linear():
            codes, scale, zero, value = integers(c.dense[name], bits, group, zeros)
            parts = {
                f"{name}_packed": words(codes, bits),
                f"{name}_scale": scale,
                f"{name}_shape": torch.tensor(codes.shape),
            }
            if zeros:
                parts[f"{name}_zero_point"] = words(zero.T, bits).T
            c.put(name, value, **parts)
        c.check()

    @pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
    def test_plain_integers(self, checkpoint, form):
        c = checkpoint(self.settings(form, num_bits=8, strategy="channel"))
        for name in c.linear():
            codes, scale, zero, value = integers(c.dense[name], 8, c.dense[name].shape[1], zeros=True)
            c.put(name, value, **{
                name: codes.to(torch.int8), f"{name}_scale": scale, f"{name}_zero_point": zero.to(torch.int8)
            })  # fmt: skip
        c.check()

    def test_float8(self, checkpoint):
        c = checkpoint(self.settings("float-quantized", num_bits=8, type="float", strategy="channel"))
        for name in c.linear():
            codes, grid, value = float8(c.dense[name], (1, 10**6), torch.bfloat16)
            c.put(name, value, **{name: codes, f"{name}_scale": grid})
        c.check()

    @pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
    def test_four_bit_floats(self, checkpoint, kind):
        c = checkpoint(self.settings(f"{kind}-pack-quantized", type="float"))
        group = 16 if kind == "nvfp4" else 32
        for name in c.linear():
            rows, cols = c.dense[name].shape
            codes = torch.randint(0, 16, (rows, cols))
            packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
            parts = {f"{name}_packed": packed}
            if kind == "nvfp4":
                whole = torch.tensor([900.0])
                scale = (torch.rand(rows, cols // group) * 200).to(torch.float8_e4m3fn)
                factor = scale.float() / whole
                parts |= {f"{name}_scale": scale, f"{name}_global_scale": whole}
            else:
                scale = torch.randint(118, 124, (rows, cols // group), dtype=torch.uint8)
                factor = torch.exp2(scale.float() - 127)
                parts |= {f"{name}_scale": scale}
            c.put(name, E2M1[codes] * factor.repeat_interleave(group, 1), **parts)
        c.check()

    @pytest.mark.parametrize("shape", [[2**40, 2**40], [-1, 32], [64], [64, 33], [0, 0]])
    def test_absurd_shapes(self, checkpoint, shape):
        c = checkpoint(self.settings("pack-quantized", group_size=32))
        name = c.linear()[0]
        codes, scale, _, value = integers(c.dense[name], 4, 32, False)
        parts = {f"{name}_packed": words(codes, 4), f"{name}_scale": scale, f"{name}_shape": torch.tensor(shape)}
        c.put(name, value, **parts)
        with pytest.raises(CheckpointError, match="cannot be dequantized"):
            load_checkpoint(c.write())

    @pytest.mark.parametrize("form", ["marlin-24", "sparse-24-bitmask", "mxfp6-pack-quantized"])
    def test_formats_that_are_not_read(self, checkpoint, form):
        with pytest.raises(CheckpointError, match=f"quantized with compressed-tensors {form}, which is not read"):
            load_checkpoint(checkpoint(self.settings(form)).write())

    def order(self, cols, group):
        """The group of every column, in the order of activations: as many columns in each."""
        return (torch.randperm(cols) // group).to(torch.int32)

    def ordered(self, c, name, bits, group, zeros, order):
        """Codes and values of a matrix whose columns are grouped in any order, one column after the other."""
        codes, scale, zero, _ = integers(c.dense[name], bits, group, zeros)
        value = torch.empty(codes.shape)
        for i, member in enumerate(order.tolist()):
            value[:, i] = scale[:, member].float() * (codes[:, i] - zero[:, member]).float()
        return codes, scale, zero, value

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("zeros", [False, True])
    @pytest.mark.parametrize("actorder", ["group", "dynamic", True])
    def test_groups_in_the_order_of_activations(self, checkpoint, bits, zeros, actorder):
        c = checkpoint(self.settings("pack-quantized", num_bits=bits, group_size=16, actorder=actorder))
        for name in c.linear():
            order = self.order(c.dense[name].shape[1], 16)
            codes, scale, zero, value = self.ordered(c, name, bits, 16, zeros, order)
            parts = {f"{name}_packed": words(codes, bits), f"{name}_scale": scale, f"{name}_g_idx": order}
            if zeros:
                parts[f"{name}_zero_point"] = words(zero.T, bits).T
            c.put(name, value, **parts, **{f"{name}_shape": torch.tensor(codes.shape)})
        c.check()

    def test_plain_integers_in_the_order_of_activations(self, checkpoint):
        c = checkpoint(self.settings("int-quantized", num_bits=8, group_size=16, actorder="group"))
        for name in c.linear():
            order = self.order(c.dense[name].shape[1], 16)
            codes, scale, zero, value = self.ordered(c, name, 8, 16, True, order)
            c.put(name, value, **{
                name: codes.to(torch.int8), f"{name}_scale": scale, f"{name}_zero_point": zero.to(torch.int8),
                f"{name}_g_idx": order,
            })  # fmt: skip
        c.check()

    @pytest.mark.parametrize("actorder", ["static", "weight", None])
    @pytest.mark.parametrize("unset", [False, True])
    def test_orders_that_leave_groups_as_they_are(self, checkpoint, actorder, unset):
        """Columns were only rounded in another order; a `g_idx` that was never set is -1."""
        c = checkpoint(self.settings("pack-quantized", group_size=16, actorder=actorder))
        for name in c.linear():
            codes, scale, _, value = integers(c.dense[name], 4, 16, False)
            parts = {f"{name}_g_idx": torch.full(codes.shape[1:], -1)} if unset else {}
            c.put(name, value, **parts, **{
                f"{name}_packed": words(codes, 4), f"{name}_scale": scale, f"{name}_shape": torch.tensor(codes.shape),
            })  # fmt: skip
        c.check()

    @pytest.mark.parametrize(("change", "said"), [
        (lambda t: t[:-1], "g_idx of shape"), (lambda t: t[None], "g_idx of shape"), (lambda t: t.float(), "g_idx of"),
        (lambda t: t + 1, "does not divide"), (lambda t: t - 2, "does not divide"), (lambda t: t * 0, "does"),
        (lambda t: t.clamp(max=0), "does not divide"), (lambda t: t + 10**6, "does not divide"),
        (lambda t: torch.tensor([0, 0, *range(len(t) - 2)], dtype=torch.int32) // 16, "does not divide"),
    ])  # fmt: skip
    def test_orders_that_are_none(self, checkpoint, change, said):
        c = checkpoint(self.settings("pack-quantized", group_size=16, actorder="group"))
        name = c.linear()[0]
        codes, scale, _, value = integers(c.dense[name], 4, 16, False)
        order = change(torch.arange(codes.shape[1], dtype=torch.int32) // 16).contiguous()
        c.put(name, value, **{
            f"{name}_packed": words(codes, 4), f"{name}_scale": scale, f"{name}_shape": torch.tensor(codes.shape),
            f"{name}_g_idx": order,
        })  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"{name} cannot be dequantized .*{said}"):
            load_checkpoint(c.write())

    def test_floats_with_an_order(self, checkpoint):
        c = checkpoint(self.settings("mxfp4-pack-quantized", type="float"))
        name = c.linear()[0]
        rows, cols = c.dense[name].shape
        c.put(name, c.dense[name], **{
            f"{name}_packed": torch.zeros(rows, cols // 2, dtype=torch.uint8), f"{name}_g_idx": torch.zeros(cols),
            f"{name}_scale": torch.zeros(rows, cols // 32, dtype=torch.uint8),
        })  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"{name}_packed holds floats and {name}_g_idx an order"):
            load_checkpoint(c.write())

    @pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
    def test_widths_that_cross_words(self, checkpoint, bits):
        c = checkpoint(self.settings("pack-quantized", num_bits=bits, group_size=16))
        for name in c.linear():
            codes, scale, zero, value = integers(c.dense[name], bits, 16, zeros=True)
            zero = zero.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            value = (codes - zero.repeat_interleave(16, 1)).float() * scale.float().repeat_interleave(16, 1)
            c.put(name, value, **{
                f"{name}_packed": dense_words(codes, bits), f"{name}_scale": scale,
                f"{name}_shape": torch.tensor(codes.shape), f"{name}_zero_point": dense_words(zero.T, bits).T,
            })  # fmt: skip
        c.check()

    @pytest.mark.parametrize("cols", [40, 64])
    def test_words_with_gaps(self, cols):
        """Early versions put ten codes of three bits into a word: another number of words, or refused."""
        codes = torch.randint(-4, 4, (4, cols))
        scale, shape = torch.ones(4, 1), torch.tensor([4, cols])
        with pytest.raises(dequantize.Misfit, match="with gaps as without" if cols == 40 else "at .3. bits"):
            dequantize.packed_integers(words(codes, 3), scale, shape, None, (3,))

    def test_as_the_package_does_it(self):
        self.compare("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32})
        self.compare("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32})
        self.compare("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"})
        self.compare("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"})

    @pytest.mark.parametrize("bits", [3, 4, 8])
    @pytest.mark.parametrize("zeros", [False, True])
    def test_an_order_as_the_package_has_it(self, bits, zeros):
        """Columns are sorted by group, computed by the package, and put back, as its versions with a `g_idx` do it."""
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import dequantize as theirs

        args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=16, symmetric=not zeros)
        codes, scale, zero, _ = integers(torch.randn(24, 64), bits, 16, zeros)
        zero = zero.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        order, scale = self.order(64, 16), scale.float()
        offsets = zero.to(torch.int8) if zeros else None
        places = order.argsort(stable=True)
        said = {"g_idx": order} if "g_idx" in inspect.signature(theirs).parameters else {}
        given = codes.to(torch.int8) if said else codes.to(torch.int8)[:, places]
        wanted = theirs(given, scale, offsets, args, **said)
        wanted = wanted if said else wanted[:, places.argsort()]
        packed = dense_words(zero.T, bits).T.contiguous() if zeros else None
        parts = dense_words(codes, bits), scale, torch.tensor(codes.shape), packed, (bits,), order
        assert torch.equal(dequantize.packed_integers(*parts), wanted)

    def compare(self, form, weights):
        package = pytest.importorskip("compressed_tensors.compressors")
        from compressed_tensors.quantization import QuantizationScheme

        scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
        weight = torch.randn(48, 64)
        group = weights.get("group_size", 64)
        scale = weight.reshape(48, -1, group).abs().amax(-1) / {3: 3.0, 4: 7.0, 8: 120.0}[weights["num_bits"]]
        compressor = package.BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        theirs = compressor.decompress(dict(stored), scheme)["weight"]
        if form == "pack-quantized":
            parts = stored["weight_packed"], stored["weight_scale"], stored["weight_shape"]
            ours = dequantize.packed_integers(*parts, None, (weights["num_bits"],))
        else:
            ours = dequantize.integers(stored["weight"], stored["weight_scale"], None)
        assert torch.equal(ours, theirs.float())


class TestBitsAndBytes:
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_four_bits(self, checkpoint, kind, nested):
        c = checkpoint({"load_in_4bit": True, "bnb_4bit_quant_type": kind})
        for name in c.linear():
            self.four_bits(c, name, kind, nested)
        c.check()

    def four_bits(self, c, name, kind, nested, **state):
        book, inner = torch.randn(16).sort().values, torch.randn(256).sort().values
        weight = c.dense[name]
        codes = torch.randint(0, 16, (weight.numel(),))
        parts = {f"{name}.quant_map": book}
        said = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        count = -(-weight.numel() // 64)
        if nested:
            indices, tops = torch.randint(0, 256, (count,), dtype=torch.uint8), torch.rand(-(-count // 16))
            said |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.125}
            maxima = inner[indices.long()] * tops.repeat_interleave(16)[:count] + 0.125
            parts |= {f"{name}.absmax": indices, f"{name}.nested_absmax": tops, f"{name}.nested_quant_map": inner}
        else:
            maxima = torch.rand(count)
            parts |= {f"{name}.absmax": maxima}
        content = torch.tensor(list(json.dumps(said | state).encode()), dtype=torch.uint8)
        parts[f"{name}.quant_state.bitsandbytes__{kind}"] = content
        parts[name] = (16 * codes[0::2] + codes[1::2]).to(torch.uint8)[:, None]
        value = book[codes] * maxima.repeat_interleave(64)[: weight.numel()]
        c.put(name, value.reshape(weight.shape), **parts)

    def test_eight_bits(self, checkpoint):
        c = checkpoint({"load_in_8bit": True, "quant_method": "bitsandbytes"})
        for name in c.linear():
            weight = c.dense[name]
            top = weight.abs().amax(1)
            codes = (weight / top[:, None] * 127).round()
            parts = {name: codes.to(torch.int8), name.replace("weight", "SCB"): top}
            parts[f"{name}_format"] = torch.tensor(0, dtype=torch.uint8)
            c.put(name, codes * (top / 127)[:, None], **parts)
        c.check()

    @pytest.mark.parametrize("state", [
        {"shape": [2**40, 2**40]}, {"shape": []}, {"shape": None}, {"blocksize": 0}, {"blocksize": 2**60},
        {"nested_blocksize": 2**60}, {"nested_offset": "x"}, {"shape": [10**400]},
    ])  # fmt: skip
    def test_absurd_states(self, checkpoint, state):
        c = checkpoint({"load_in_4bit": True, "quant_method": "bitsandbytes"})
        self.four_bits(c, c.linear()[0], "nf4", True, **state)
        with pytest.raises(CheckpointError, match="cannot be dequantized"):
            load_checkpoint(c.write())

    def test_as_the_package_does_it(self):
        functional = pytest.importorskip("bitsandbytes.functional")
        weight = torch.randn(96, 64)
        for kind in ("nf4", "fp4"):
            for nested in (False, True):
                packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
                theirs = functional.dequantize_4bit(packed, state)
                parts = state.as_dict(packed=True)
                said = dequantize.parse_state(parts[f"quant_state.bitsandbytes__{kind}"])
                inner = [parts["nested_absmax"], parts["nested_quant_map"]] if nested else []
                ours = dequantize.code_book(packed, parts["absmax"], parts["quant_map"], said, inner)
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
