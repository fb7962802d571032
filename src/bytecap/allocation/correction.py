"""Measure correction factors, the ratio of the real loss to the quadratic prediction.

The coded values of all units of one role (the same matrix in every block) are put into the model with everything
else intact and the KL to the original is measured on held-out tokens; `kappa = KL / sum D` corrects the prediction.
Measured unit by unit, factors within a role agree within their noise (LOG.md, 2026-11-22), and one role costs as
much to measure as one unit. Factors are shrunk towards their mean in proportion to their standard error.
Omitted: interactions between roles, which one factor for the fully coded model absorbs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from bytecap.allocation.gathered import gathered
from bytecap.allocation.planner import Planner, State
from bytecap.format.decoder import from_matrix
from bytecap.model.evaluation import kl_each
from bytecap.model.forward import rough_products
from bytecap.model.quantized_copy import Lazy, Values, as_stored
from bytecap.model.texts import Window
from bytecap.progress import Advance
from bytecap.system.ranks import ALONE, Ranks

TOKENS = 4096  # that factors are measured on
_ROUGH_BITS = 5  # a weight


@dataclass(frozen=True)
class Factor:
    """A ratio of measured to predicted loss, and its standard error."""

    kappa: float
    stderr: float

    @staticmethod
    def of(measured: tuple[float, float], predicted: float) -> Factor:
        """Return the factor of a measured loss, with its standard error, which may be NaN, over a prediction."""
        (kl, stderr), predicted = measured, max(predicted, 1e-12)
        return Factor(kl / predicted, stderr / predicted if math.isfinite(stderr) else kl / predicted)


def is_rough(planner: Planner, state: State) -> bool:
    """Return whether a state's errors are so large that passes that measure them may be rough (`rough_products`).

    Emulated on two models (LOG.md, 2026-11-30), rough products change such a KL by at most 0.3% below this rate.
    """
    return 8 * state.rate < _ROUGH_BITS * planner.parameters


def unit_values(planner: Planner, state: State, names: Sequence[str] | None = None) -> Values:
    """Return decoded values in stored layout, each decoded when it is read, on a GPU where the unit is there.

    All ranks have to ask for the same, since integers that one of them has are brought to all.
    """
    state = gathered(planner, state, planner.names if names is None else names)
    units = {p.unit.name: p.unit for p in planner.matrices} | {v.unit.name: v.unit for v in planner.vectors}

    def make(name: str) -> npt.NDArray[Any] | Tensor:
        found = planner.decode_there(state, name)
        if found is None:
            return from_matrix(units[name], planner.decode(state, name))
        return as_stored(units[name], found).contiguous()

    return Lazy(planner.names if names is None else names, make)


def measure(
    planner: Planner,
    state: State,
    original: nn.Module,
    quantized_copy: nn.Module,
    windows: Sequence[Window],
    *,
    device: str,
    advance: Advance,
    ranks: Ranks = ALONE,
) -> dict[str, Factor]:
    """Measure the factor of every unit, one role at a time.

    Args:
        planner: prepared units.
        state: operating point.
        original: untouched model.
        quantized_copy: equal model whose values may be replaced; restored afterwards.
        windows: tokens that neither statistics nor evaluation use.
        device: torch device.
        advance: called with the share of a role that is done.
        ranks: processes that share the passes.
    """
    found: dict[str, Factor] = {}
    groups = roles(planner)
    values = {role: unit_values(planner, state, names) for role, names in groups.items()}
    with rough_products(device, wanted=is_rough(planner, state)):
        measured = kl_each(original, quantized_copy, values, windows, device=device, advance=advance, ranks=ranks)
    for role, names in groups.items():
        found |= dict.fromkeys(names, Factor.of(measured[role], sum(state.distortions[n] for n in names)))
    return found


def role_name(name: str) -> str:
    """Return a unit's name without the numbers in it.

    >>> role_name("layers.12.mlp.weight")
    'layers.#.mlp.weight'
    """
    return re.sub("[0-9]+", "#", name)


def roles(planner: Planner) -> dict[str, list[str]]:
    """Group units by role: the same shape and name, except for numbers in it; all vectors are one role."""
    groups: dict[str, list[str]] = {}
    for item in planner.matrices:
        groups.setdefault(f"{role_name(item.unit.name)} {item.unit.shape}", []).append(item.unit.name)
    if planner.vectors:
        groups["vectors"] = [v.unit.name for v in planner.vectors]
    return groups


def shrunk(factors: Mapping[str, Factor]) -> dict[str, float]:
    """Shrink factors in the logarithm towards their mean, by their reliability; the mean level stays.

    >>> f = shrunk({"a": Factor(2.0, 0.01), "b": Factor(0.5, 0.01)})
    >>> round(f["a"], 2), round(f["b"], 2)
    (2.0, 0.5)
    """
    names = [n for n, f in factors.items() if f.kappa > 0]
    if not names:
        return dict.fromkeys(factors, 1.0)
    logs = np.log([factors[n].kappa for n in names])
    noise = np.array([(factors[n].stderr / factors[n].kappa) ** 2 for n in names])
    mean = float(np.average(logs, weights=1 / (noise + 0.01)))
    spread = max(1e-9, float(np.mean((logs - mean) ** 2 - noise)))
    values = {
        n: math.exp(mean + (x - mean) * spread / (spread + e)) for n, x, e in zip(names, logs, noise, strict=True)
    }
    return {n: float(np.clip(values.get(n, math.exp(mean)), 0.05, 20.0)) for n in factors}
