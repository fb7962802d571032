"""Quantized weights whose tensors and settings are changed at random are read, or refused by an error of ours."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from bytecap.errors import BytecapError
from bytecap.model.fileset import read_headers
from bytecap.model.quantized_checkpoint import dense, roughly_dense
from quantized import dense_words, float8, integers
from test_quantized_groups import awq, gptq
from test_quantized_mlx import affine

SIDE = (64, 64)
STEM = "model.layers.0.mlp.up_proj."
WEIGHT = f"{STEM}weight"
VALUES = [None, 0, -1, 1, 2**31, 10**30, 1.5, float("nan"), "x", "", [], [1], [0, 0], {}, {"a": 1}, True, 3, 5, 7, 16,
          "gptq_v2", "marlin", [2**40, 1], [16, 16], [1e9, 1]]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32,
          torch.uint32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e8m0fnu]  # fmt: skip


def compressed(form, **weights):
    group = {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, "group_size": 16, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def schemes():
    """(key of config.json, or the name of a file beside it; settings; tensors) of a weight in every scheme."""
    torch.manual_seed(0)
    config, weight, order = "quantization_config", torch.randn(SIDE), (torch.randperm(64) // 16).int()
    codes, grid, _ = float8(weight)
    yield config, {"quant_method": "fp8", "weight_block_size": [16, 24]}, {WEIGHT: codes, f"{WEIGHT}_scale_inv": grid}
    whole, scale, zero, _ = integers(weight, 4, 16, True)
    beside = {f"{WEIGHT}_scale": scale, f"{WEIGHT}_g_idx": order}
    yield config, compressed("pack-quantized"), {
        f"{WEIGHT}_packed": dense_words(whole, 4), f"{WEIGHT}_shape": torch.tensor(SIDE),
        f"{WEIGHT}_zero_point": dense_words(zero.T, 4).T, **beside,
    }  # fmt: skip
    yield config, compressed("int-quantized", num_bits=8), {
        WEIGHT: whole.to(torch.int8), f"{WEIGHT}_zero_point": zero.to(torch.int8), **beside
    }  # fmt: skip
    yield config, compressed("nvfp4-pack-quantized", type="float"), {
        f"{WEIGHT}_packed": torch.randint(0, 256, (64, 32), dtype=torch.uint8),
        f"{WEIGHT}_scale": torch.rand(64, 4).to(torch.float8_e4m3fn), f"{WEIGHT}_global_scale": torch.tensor([9.0]),
    }  # fmt: skip
    parts = {STEM + n: t for n, t in gptq(SIDE, 4, 16)[0].items()}
    yield config, {"quant_method": "gptq", "bits": 4, "group_size": 16}, parts
    yield "quantize_config.json", {"bits": 4, "group_size": 16}, parts
    yield config, {"quant_method": "awq", "bits": 4}, {STEM + n: t for n, t in awq(SIDE, 16)[0].items()}
    words, scales, biases, _ = affine(SIDE, 4, 16)
    yield "quantization", {"group_size": 16, "bits": 4}, {
        WEIGHT: words, f"{STEM}scales": scales, f"{STEM}biases": biases
    }  # fmt: skip
    packed = torch.randint(0, 256, (2, 8, 2, 16), dtype=torch.uint8)
    yield config, {"quant_method": "mxfp4"}, {"x_blocks": packed, "x_scales": packed[..., 0] // 8 + 100}
    said = {"quant_type": "nf4", "blocksize": 64, "shape": SIDE, "nested_blocksize": 16, "nested_offset": 0.1}
    yield config, {"load_in_4bit": True}, {
        WEIGHT: packed.reshape(-1, 1).repeat(4, 1), f"{WEIGHT}.absmax": packed.flatten()[:64], f"{WEIGHT}.quant_map":
        torch.randn(16), f"{WEIGHT}.nested_absmax": torch.rand(4), f"{WEIGHT}.nested_quant_map": torch.randn(256),
        f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
    }  # fmt: skip
    yield config, {"load_in_8bit": True}, {
        WEIGHT: whole.to(torch.int8), f"{STEM}SCB": torch.rand(64), f"{WEIGHT}_format": torch.tensor(0).byte()
    }  # fmt: skip


def changed(tensor, rng):
    """A tensor with another shape, another type or other bytes."""
    kind = rng.randrange(7)
    if kind == 0:
        return tensor.to(rng.choice(DTYPES))
    if kind == 1:
        return torch.zeros([rng.choice((0, 1, 2, 3, 16, 64)) for _ in range(rng.randrange(4))], dtype=tensor.dtype)
    if kind == 2:
        size = tensor.numel() * tensor.element_size()
        return torch.randint(0, 256, (size,), dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)
    if tensor.ndim == 0:
        return tensor[None]
    return (tensor[:-1], tensor.flatten(), tensor[..., :0], tensor.transpose(0, -1))[kind - 3]


def other(settings, rng):
    """Settings with another value somewhere, or without one."""
    if not isinstance(settings, dict) or not settings or rng.random() < 0.3:
        return rng.choice(VALUES)
    key = rng.choice(sorted(settings))
    if rng.random() < 0.2:
        return {k: v for k, v in settings.items() if k != key}
    return {**settings, key: other(settings[key], rng)}


def test_every_scheme_is_read_as_it_is(tmp_path):
    for key, settings, tensors in schemes():
        found = outcome(tmp_path, key, settings, tensors)
        assert len(found._weights) == 1, settings


def outcome(directory, key, settings, tensors):
    config = {"model_type": "llama", "dtype": "bfloat16"} | ({} if key.endswith(".json") else {key: settings})
    (directory / "quantize_config.json").unlink(missing_ok=True)
    if key.endswith(".json"):
        (directory / key).write_text(json.dumps(settings), "utf-8")
    content = json.dumps(config).encode()
    (directory / "config.json").write_bytes(content)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors")
    headers = read_headers(directory)[0]
    roughly_dense(config, headers, directory)
    return dense(content, headers, directory, 1 << 20)


@pytest.mark.parametrize("count", [
    pytest.param(400, marks=pytest.mark.slow), pytest.param(20_000, marks=pytest.mark.nightly)
])  # fmt: skip
def test_changes_end_in_values_or_in_an_error_of_ours(tmp_path, count):
    rng, every, refused = random.Random(count), list(schemes()), 0  # noqa: S311 (no secret)
    torch.manual_seed(count)
    for number in range(count):
        key, settings, tensors = every[number % len(every)]
        tensors = dict(tensors)
        for _ in range(rng.randrange(1, 3)):
            name, kind = rng.choice(sorted(tensors)), rng.random()
            if kind < 0.65:
                tensors[name] = changed(tensors[name], rng)
            elif kind < 0.75 and len(tensors) > 1:
                tensors.pop(name)
            else:
                settings = other(settings, rng)
        try:
            outcome(tmp_path, key, settings, tensors)
        except BytecapError:
            refused += 1
    assert refused > count // 3
