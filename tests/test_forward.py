"""How passes are cut into batches, and how rough their products may be."""

import pytest
import torch

from bytecap.model.forward import (
    GPU_BATCHES,
    batch_tokens,
    fast_dtype,
    is_far_faster,
    many_tokens,
    rough_products,
)
from bytecap.model.sampling import _autocast
from bytecap.model.texts import Window


@pytest.mark.parametrize(
    ("device", "wanted", "inside"), [("cpu", True, "highest"), ("cuda", False, "highest"), ("cuda:1", True, "high")]
)
def test_products_are_rough_on_a_gpu_alone_and_only_inside(device, wanted, inside):
    before = torch.get_float32_matmul_precision()
    with rough_products(device, wanted=wanted):
        assert torch.get_float32_matmul_precision() == (before if inside == "highest" else inside)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("native", [False, True])
def test_products_are_in_bfloat16_only_where_it_is_native(native, monkeypatch):
    """torch says of a GPU that emulates it that it is supported."""
    fast = torch.bfloat16 if native else torch.float32
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    assert fast_dtype(torch.device("cpu")) is fast
    assert not is_far_faster(torch.device("cpu"))
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0) if native else (7, 5))
    assert fast_dtype(torch.device("cuda")) is fast
    assert is_far_faster(torch.device("cuda:0")) is native
    with _autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")


def test_a_gpu_takes_larger_batches_but_several():
    one = batch_tokens(1000)
    assert many_tokens(1000, "cpu") == many_tokens(1000, "cpu", [Window((1, 2), 1)]) == one
    assert many_tokens(1000, "cuda") == GPU_BATCHES * one
    few, many = [Window(tuple(range(101)), 1)] * 200, [Window(tuple(range(101)), 1)] * 2000
    assert many_tokens(1000, "cuda", few) == 200 * 100 // GPU_BATCHES
    assert many_tokens(1000, "cuda", many) == GPU_BATCHES * one
    assert many_tokens(1000, "cuda", few[:1]) == one
