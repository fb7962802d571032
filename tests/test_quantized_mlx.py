"""Checkpoints quantized by MLX are read as the dense ones that they stand for."""

import pytest
import torch

from bytecap.errors import CheckpointError
from bytecap.model import dequantize
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline import memory
from conftest import build
from quantized import QUANTIZED, Checkpoint, dense_words


@pytest.fixture
def checkpoint(tmp_path, tokenizer_json):
    torch.manual_seed(3)

    def get(said, module=None, *, both=True):
        c = Checkpoint(tmp_path / "source", said if both else None, module, tokenizer_json)
        c.configure(quantization=said)
        return c

    return get


def affine(shape, bits, group, dtype=torch.bfloat16):
    """Words, scales, biases, and the value of every weight, one by one."""
    rows, cols = shape
    codes = torch.randint(0, 2**bits, shape)
    scales, biases = ((torch.randn(rows, cols // group) / 20).to(dtype) for _ in range(2))
    value = torch.empty(shape)
    for i in range(cols):
        value[:, i] = codes[:, i].float() * scales[:, i // group].float() + biases[:, i // group].float()
    return dense_words(codes - 2 ** (bits - 1), bits).view(torch.uint32), scales, biases, value


def fill(c, names, bits, group):
    for name in names:
        words, scales, biases, value = affine(tuple(c.dense[name].shape), bits, group)
        stem = name.removesuffix("weight")
        c.put(name, value, **{name: words, f"{stem}scales": scales, f"{stem}biases": biases})
    return c


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 16), (5, 32), (6, 16), (8, 32)])
def test_widths(checkpoint, bits, group, both):
    c = checkpoint({"group_size": group, "bits": bits, "mode": "affine"}, both=both)
    assert fill(c, c.linear(), bits, group).check().dequantized == "mlx"


def test_tables_and_heads(checkpoint):
    c = checkpoint({"group_size": 32, "bits": 4})
    fill(c, ["model.embed_tokens.weight", "lm_head.weight", *c.linear()], 4, 32).check()


def test_a_tied_table(checkpoint):
    c = checkpoint({"group_size": 32, "bits": 4}, build("rotary", tie_word_embeddings=True))
    fill(c, ["model.embed_tokens.weight"], 4, 32).check()


def test_modules_with_sizes_of_their_own_and_none(checkpoint):
    c = checkpoint({"group_size": 32, "bits": 4})
    first, second, *rest = c.linear()
    own = {first.removesuffix(".weight"): {"group_size": 16, "bits": 8}, second.removesuffix(".weight"): False}
    for key in (QUANTIZED, "quantization"):
        c.configure(**{key: {"group_size": 32, "bits": 4, **own}})
    fill(fill(c, [first], 8, 16), rest, 4, 32).check()


@pytest.mark.parametrize(("said", "error"), [
    ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "quantized with mlx mxfp4 at 4 bits, which is not read .*mlx-lm"),
    ({"group_size": 32, "bits": 4, "x": {"mode": ["a"]}}, r"quantized with mlx \['a'\] at 4 bits, which is not read"),
    ({"group_size": 32, "bits": 8}, "for 8 bits in groups of 32"),
    ({"group_size": 16, "bits": 4}, "in groups of 16"),
    ({"group_size": 0, "bits": 4}, "in groups of 0 are none of MLX"),
    ({"group_size": "x", "bits": 4}, "are none of MLX"),
    ({"group_size": 32, "bits": True}, "are none of MLX"),
    ({"group_size": 32, "bits": 12}, "12 bits in groups of 32 are none of MLX"),
    ({"group_size": 2**47, "bits": 4}, "for 4 bits in groups of 140737488355328"),
    ({"group_size": 32, "bits": 10**30}, "no model is that large"),
])  # fmt: skip
def test_settings_that_do_not_fit(checkpoint, said, error):
    c = checkpoint(said)
    with pytest.raises(CheckpointError, match=error):
        load_checkpoint(fill(c, c.linear(), 4, 32).write())


@pytest.mark.parametrize(("part", "change", "said"), [
    ("scales", lambda t: t[:-1], "cannot be dequantized"),
    ("scales", lambda t: t.int(), "cannot be dequantized"),
    ("biases", lambda t: t[:, :0], "cannot be dequantized"),
    ("weight", lambda t: t.view(torch.int32)[:, :3].contiguous().view(torch.uint32), "cannot be dequantized"),
    ("biases", None, "the scale that mlx has beside it is missing"),
])  # fmt: skip
def test_parts_that_do_not_fit(checkpoint, part, change, said):
    c = checkpoint({"group_size": 32, "bits": 4})
    fill(c, c.linear(), 4, 32)
    name = c.linear()[0].replace("weight", part)
    held = c.tensors.pop(name)
    if change is not None:
        c.tensors[name] = change(held).contiguous()
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(c.write())


def test_memory_is_planned_for_dense_weights(checkpoint):
    c = checkpoint({"group_size": 32, "bits": 4})
    fill(c, c.linear(), 4, 32)
    wanted = sum(t.numel() for t in c.dense.values())
    assert wanted <= memory._parameters(memory._headers(c.write(), ())) < 1.2 * wanted


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_as_the_package_does_it(bits):
    core = pytest.importorskip("mlx.core")
    import numpy as np

    parts = core.quantize(core.array(torch.randn(16, 128).numpy()), group_size=32, bits=bits)
    theirs = torch.from_numpy(np.array(core.dequantize(*parts, group_size=32, bits=bits)))
    ours = dequantize.affine(*(torch.from_numpy(np.array(p)) for p in parts), 32, bits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
