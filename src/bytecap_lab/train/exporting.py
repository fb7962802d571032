"""Put a trained module into one file: `PQuantLinear` branches exactly, the rest under the bytes that are left.

Both branches of a layer are one unit: a `binary` base, and `columns` or `rows` of signed bytes over it. The base
holds a sign for the weights under the 8-bit branch too, one bit for each that nothing reads (3% of a layer with 5% of
its columns wide): the price of needing nothing new in the format.

>>> from bytecap_lab.train import replace
>>> module = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64, bias=False))
>>> replace(module)
['1']
>>> {name: len(s.data) for name, s in sections(module).items()}
{'1.weight': 532}
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from bytecap.errors import UsageError
from bytecap.format.coders.binary import CODER as BINARY
from bytecap.format.coders.binary import NO_MEAN, Binary
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.overlays.columns import CODER as COLUMNS
from bytecap.format.overlays.rows import CODER as ROWS
from bytecap.job import Section
from bytecap.job.config import FitConfig, configured
from bytecap_lab.train.convert import inference
from bytecap_lab.train.pquant import PQuantLinear

if TYPE_CHECKING:
    from bytecap.pipeline.artifact import Artifact


def section(layer: PQuantLinear) -> Section:
    """Both branches of a layer as one section."""
    found = layer.branches()
    signs = (found.signs > 0).cpu().numpy().astype(np.int64)
    base = BINARY.encode(Binary(signs, 2, found.sizes.cpu().numpy(), np.zeros(0, np.float16), NO_MEAN))
    if not layer.wide:
        return Section(BINARY.tag, base)
    over = COLUMNS if layer.axis == "in" else ROWS
    codes, scales = found.codes.cpu().numpy().astype(np.int8), found.scales.cpu().numpy()
    places = np.arange(layer.wide)
    most = layer.in_features if layer.axis == "in" else layer.out_features
    data = over.encode(places, codes, most, scales)
    return Section(STACK.tag, STACK.encode((BINARY.tag, base), [(over.tag, data)]))


def sections(module: nn.Module) -> dict[str, Section]:
    """Sections of all `PQuantLinear` layers by unit name, for the option `given` of `bytecap.fit`."""
    found = {
        f"{name}.weight" if name else "weight": section(layer)
        for name, layer in module.named_modules()
        if isinstance(layer, PQuantLinear)
    }
    if not found:
        raise UsageError(f"{type(module).__name__} holds no PQuantLinear: fit it with bytecap.fit")
    return found


@configured
def export(module: nn.Module, path: Path | str | None, config: FitConfig) -> Artifact:
    """Write a trained module into one file of at most `budget` bytes.

    Decoded weights of `PQuantLinear` layers are equal to those of the forward pass bit for bit. All other parameters
    are coded by a method under the bytes that are left, measured with the quantized layers in place. The file fits
    `inference(module)`: `bytecap.load_into(path, inference(module))`. The options are those of `bytecap.fit`.

    Args:
        module: trained module; left as it is.
        path: where to write; None keeps the result in memory.
        config: the options of `bytecap.fit`.

    Raises:
        UsageError: there is no `PQuantLinear`. BudgetError: the branches and the least of the rest do not fit.
    """
    from bytecap.pipeline.fit_module import fit_module

    return fit_module(inference(module), replace(config, output=path, given=sections(module)))
