"""NVFP4 of compressed-tensors: bytes, scales, and what a reader makes of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecap.runtimes.blocks.encode import encode, prepare
from bytecap.runtimes.directory import family, nvfp4

CT = family("compressed-tensors")
LAYOUT = nvfp4.layout()
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def decoded(arrays):
    """Weights of packed tensors by the words of the format, in torch."""
    packed, scales, whole = (torch.from_numpy(a) for a in arrays)
    stored = torch.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1).long()
    values = E2M1[stored & 7] * torch.where(stored & 8 > 0, -1.0, 1.0)
    scale = scales.view(torch.float8_e4m3fn).float() / whole
    return (values.reshape(len(packed), -1, 16) * scale[..., None]).reshape(len(packed), -1)


def rounded(weight):
    weight = np.ascontiguousarray(weight, np.float32)
    return encode(weight, prepare(torch.eye(weight.shape[1])), LAYOUT)


def test_scales_are_float8() -> None:
    every = np.arange(256).astype(np.uint8)
    theirs = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(nvfp4.of_bytes(every), theirs, equal_nan=True)
    assert np.array_equal(nvfp4.bytes_of(theirs[:127]), every[:127])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-12, 1e-5, 0.02, 1.0, 40.0]))
def test_packed_bytes_hold_the_very_weights(seed, size) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((5, 64)) * size
    weight[0], weight[1], weight[2, :16] = 0, -size, 0
    weight[3, 7] *= 100
    codes = rounded(weight)
    arrays = CT.arrays(codes)
    assert [a.shape for a in arrays] == [s.shape for s in CT.specs(LAYOUT, 5, 64)]
    assert arrays[1].max() < 127  # no sign, and a number
    assert np.array_equal(decoded(arrays).numpy(), codes.values())
    assert np.array_equal(CT.codes(LAYOUT, arrays).values(), codes.values())


def test_other_global_scales_are_read() -> None:
    packed, scales, _ = CT.arrays(rounded(np.random.default_rng(0).standard_normal((4, 32))))
    other = (packed, scales, np.array([1536.0], np.float32))
    assert np.allclose(CT.codes(LAYOUT, other).values(), decoded(other).numpy(), rtol=1e-6)


def test_the_largest_weight_may_take_the_last_level_but_one() -> None:
    """With 4 as the largest level all of these are exact; with 6 a weight of 3 would lie in the middle of two."""
    weight = np.tile([4.0, -3, 2, 1.5, 1, 0.5, 3, 0, 3, -3, 3, 3, -4, 2, 3, 3], (1, 2)) / 32
    assert np.array_equal(rounded(weight).values(), weight.astype(np.float32))


def test_what_config_says() -> None:
    def said(**schemes):
        return CT.config({}, schemes, [])["quantization_config"]

    whole, both, old = said(a="nvfp4"), said(a="nvfp4", b="w4g32"), said(b="w4g32")
    assert whole["format"] == "nvfp4-pack-quantized"
    assert both["format"] == "mixed-precision"
    by_module = {g["targets"][0]: g["format"] for g in both["config_groups"].values()}
    assert by_module == {"a": "nvfp4-pack-quantized", "b": "pack-quantized"}
    assert old["format"] == "pack-quantized"
    assert not any("format" in g for found in (whole, old) for g in found["config_groups"].values())
    assert CT.read({"quantization_config": both}) == {"a": "nvfp4", "b": "w4g32"}


@pytest.mark.parametrize("cols", [8, 24, 40])
def test_rows_that_are_no_groups_of_16(cols) -> None:
    assert CT.layout("nvfp4", cols, "BF16") is None
    assert "nvfp4" not in CT.menu()
