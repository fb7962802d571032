"""How passes are cut into batches, and how rough their products may be."""

import pytest
import torch

from bytecap.model.forward import GPU_BATCHES, batch_tokens, many_tokens, rough_products
from bytecap.model.texts import Window


@pytest.mark.parametrize(
    ("device", "wanted", "inside"), [("cpu", True, "highest"), ("cuda", False, "highest"), ("cuda:1", True, "high")]
)
def test_products_are_rough_on_a_gpu_alone_and_only_inside(device, wanted, inside):
    before = torch.get_float32_matmul_precision()
    with rough_products(device, wanted=wanted):
        assert torch.get_float32_matmul_precision() == (before if inside == "highest" else inside)
    assert torch.get_float32_matmul_precision() == before


def test_a_gpu_takes_larger_batches_but_several():
    one = batch_tokens(1000)
    assert many_tokens(1000, "cpu") == many_tokens(1000, "cpu", [Window((1, 2), 1)]) == one
    assert many_tokens(1000, "cuda") == GPU_BATCHES * one
    few, many = [Window(tuple(range(101)), 1)] * 200, [Window(tuple(range(101)), 1)] * 2000
    assert many_tokens(1000, "cuda", few) == 200 * 100 // GPU_BATCHES
    assert many_tokens(1000, "cuda", many) == GPU_BATCHES * one
    assert many_tokens(1000, "cuda", few[:1]) == one
