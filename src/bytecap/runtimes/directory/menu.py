"""Every matrix in every scheme: bytes of the directory against distortion on windows held out, and rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bytecap.runtimes.blocks import Codes
from bytecap.runtimes.blocks.encode import Form, encode
from bytecap.runtimes.directory.contents import Contents
from bytecap.runtimes.directory.tensors import Tensor
from bytecap.runtimes.gguf.menu import Item
from bytecap.types import Curve, Point

_SAMPLE = 2**15  # weights by which a matrix is judged, in each of up to 19 schemes


@dataclass(frozen=True)
class Rounded:
    """A matrix in its scheme.

    Attributes:
        codes: None if it is not quantized.
        values: float32 (rows, cols), decoded.
        seen: distortion in the metric it was rounded by, nats per token.
        held: in that of the windows held out.
    """

    codes: Codes | None
    values: npt.NDArray[np.float32]
    seen: float
    held: float


def _round(contents: Contents, item: Item, scheme: str, form: Form) -> Rounded:
    layout = contents.layout(scheme, item.weight.shape[1])
    codes = None if layout is None else encode(item.weight, form, layout)
    values = plain_values(item.weight, contents.float_type) if codes is None else codes.values()
    error = torch.from_numpy(values - item.weight)
    return Rounded(codes, values, item.metric.distortion(error), item.held.distortion(error))


def plain_values(values: npt.NDArray[np.float32], float_type: str) -> npt.NDArray[np.float32]:
    """Values rounded to a 16-bit type."""
    data = np.frombuffer(Tensor("", float_type, values.shape, values).data(), "<u2")
    found = data.view("<f2").astype(np.float32) if float_type == "F16" else (data.astype("<u4") << 16).view("<f4")
    return np.asarray(found.reshape(values.shape), np.float32)


def round_to(contents: Contents, item: Item, setting: float) -> Rounded:
    """A matrix in the scheme of a point."""
    return _round(contents, item, contents.settings()[int(setting)], item.form())


def curve(contents: Contents, item: Item) -> Curve:
    """Measured points of a matrix: a point's setting is its scheme's place in `Contents.settings`."""
    part, factor = item.sampled(_SAMPLE)
    form, points, names = item.form(), [], contents.settings()
    rows, cols = item.weight.shape
    for scheme in item.types:
        lost = factor * _round(contents, part, scheme, form).held
        rate = contents.rate(item.place.name, scheme, (rows, cols))
        points.append(Point(rate, lost if math.isfinite(lost) else 0.0, names.index(scheme)))
    return Curve(item.place.name, tuple(sorted(points, key=lambda p: p.rate)))
