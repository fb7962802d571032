"""NVFP4 as compressed-tensors stores it: codes of E2M1 in groups of 16 columns under a float8 scale.

A weight is `code * scale / global scale`, where a code is one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, two
in a byte, the scale is an E4M3 (a float8 of 4 digits, at most 448), and the global scale a float32 of the whole matrix.
vLLM joins projections and takes the largest of their global scales for all of them, so one number serves every matrix
here: 2^8, under which a group's largest weight may be 3.7e-4 to 10.5 at full precision. It is a power of two, so that
readers, whatever type they multiply in, find the very same weights.

>>> values = np.array([0.0, 2.0**-9, 1.0, 448.0], np.float32)
>>> bytes_of(values).tolist(), bool((of_bytes(bytes_of(values)) == values).all())
([0, 1, 56, 126], True)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks import BlockFormat, Codes
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.directory import Arrays, Spec, split

NAME, FORMAT = "nvfp4", "nvfp4-pack-quantized"
GROUP = 16
GLOBAL = 2.0**8
_LEVELS = FORMATS["MXFP4"].levels  # codes in halves
_HALF = 0.5 / GLOBAL  # of a stored scale is that of a level


def _table() -> npt.NDArray[np.float32]:
    """Return the values of E4M3 from 0 up to 448, whose bytes are 0 to 126."""
    byte = np.arange(127)
    exponent, digits = byte >> 3, (byte & 7) / 8
    found = np.where(exponent == 0, digits * 2.0**-6, (1 + digits) * 2.0 ** (exponent - 7))
    return np.asarray(found, np.float32)


_E4M3 = _table()


def bytes_of(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return the bytes of numbers that E4M3 can hold, none below 0."""
    return np.searchsorted(_E4M3, scales).astype(np.uint8)


def of_bytes(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the numbers of bytes; 127 is no number."""
    sign = np.where(data & 128, np.float32(-1), np.float32(1))
    return np.asarray(sign * np.append(_E4M3, np.float32(np.nan))[data & 127], np.float32)


def layout() -> BlockFormat:
    """Return the block format."""
    return BlockFormat(NAME, GROUP // 2 + 1, GROUP, GROUP, -12, 12, (), levels=_LEVELS, float_type="E4M3")


def weights() -> dict[str, Any]:
    """Return the configuration's description of the scheme."""
    return {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": GROUP,
        "dynamic": False, "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip


def specs(rows: int, cols: int) -> tuple[Spec, ...]:
    """Tensors of a matrix: packed codes, scales, the global scale."""
    return (
        Spec("weight_packed", "U8", (rows, cols // 2)), Spec("weight_scale", "F8_E4M3", (rows, cols // GROUP)),
        Spec("weight_global_scale", "F32", (1,)),
    )  # fmt: skip


def arrays(codes: Codes) -> Arrays:
    """Contents of these tensors."""
    return Arrays(
        lambda: _packed(codes), lambda: bytes_of(np.asarray(codes.scale / _HALF, np.float32)),
        lambda: np.array([GLOBAL], np.float32),
    )  # fmt: skip


def _packed(codes: Codes) -> npt.NDArray[np.uint8]:
    """Codes, the first column of two in the low half of a byte."""
    size = np.searchsorted(np.array(_LEVELS[7:]), np.abs(codes.codes)).astype(np.uint8)
    stored = size | np.where(codes.codes < 0, np.uint8(8), np.uint8(0))
    packed: npt.NDArray[np.uint8] = stored[:, ::2] | (stored[:, 1::2] << np.uint8(4))
    return packed


def codes_of(tensors: Sequence[npt.NDArray[Any]]) -> Codes:
    """A matrix from the contents of its tensors, whatever its global scale."""
    packed, scales, whole = tensors
    form = layout()
    stored = np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)
    size = np.array(_LEVELS[7:], np.int8)[stored & 7]
    found = np.where(stored & 8, -size, size).astype(np.int8)
    scale = (of_bytes(scales.view(np.uint8)) / np.float32(whole[0]) / np.float32(2)).astype(np.float32)
    return Codes(form, found, *split(found.view(np.uint8), form), scale, np.zeros_like(scale))
