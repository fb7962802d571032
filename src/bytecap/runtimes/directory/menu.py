"""Schemes of a directory as a coding: bytes of the directory against distortion on windows held out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks import FloatArray
from bytecap.runtimes.directory.contents import Contents
from bytecap.runtimes.directory.tensors import Tensor
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.rounding import Coding

_SAMPLE = 2**15  # weights by which a matrix is judged, in each of up to 19 schemes


def plain_values(values: npt.NDArray[np.float32], float_type: str) -> npt.NDArray[np.float32]:
    """Values rounded to a 16-bit type."""
    data = np.frombuffer(Tensor("", float_type, values.shape, values).data(), "<u2")
    found = data.view("<f2").astype(np.float32) if float_type == "F16" else (data.astype("<u4") << 16).view("<f4")
    return np.asarray(found.reshape(values.shape), np.float32)


def coding_of(contents: Contents) -> Coding:
    """The schemes of a directory's family."""

    def plain(name: str, weight: FloatArray) -> FloatArray:
        del name
        return plain_values(weight, contents.float_type)

    def rate(item: Item, name: str) -> int:
        rows, cols = item.shape
        return contents.rate(item.place.name, name, (rows, cols))

    return Coding(contents.settings(), contents.layout, plain, rate, _SAMPLE)
