"""Measure points: code real sections, decode them, put them into the base's model, score it window by window.

Points are measured some at a time, so that the original runs once for all of them, and each is kept in the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bytecap.calibration.statistics import windows_key
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.decoder import from_matrix
from bytecap.format.wire.shared_objects import LIST_ENTRY, share_lists
from bytecap.job import Section
from bytecap.model.evaluation import ByWindow, by_window
from bytecap.model.texts import Window
from bytecap.progress import Advance
from bytecap.sizes import in_groups
from bytecap.system.cache import Store, digest
from bytecap_lab.rd_curves.operating_point import OperatingPoint
from bytecap_lab.rd_curves.trial import Choice, Real, realise

FloatArray = npt.NDArray[np.float64]
_TOGETHER = 12  # points measured in one pass over the original
_VALUES = {"cpu": 2**26, "cuda": 2**29}  # float32 values they may hold together


@dataclass(frozen=True)
class Pick:
    """A choice to measure: a path and the index of its setting, by unit name."""

    chosen: Mapping[str, tuple[str, int]]

    @property
    def choices(self) -> dict[str, Choice]:
        """The choice of every unit, by name."""
        return {n: (path, n, index) for n, (path, index) in self.chosen.items()}

    def real(self, operating_point: OperatingPoint) -> dict[str, Real]:
        """The units as they would be stored, in the order of `chosen`."""
        found = realise(operating_point, self.choices.values())
        return {n: found[c] for n, c in self.choices.items()}


@dataclass(frozen=True)
class MeasuredPick:
    """One pick on real bytes and decoded values.

    Attributes:
        growth: bytes by which each chosen unit's section grew.
        lists: bytes of what the units share: lists of positions, codebooks, decoders.
        side: bytes of side information within the growth.
        share: share of all matrices' weights that is protected.
        kl: KL to the original summed over each window's tokens, (windows,) in nats.
        nats: negative log-likelihood likewise.
        layers: bytes of all layers; `side` is a part of them.
        heads: bytes of the layers' headers.
    """

    growth: dict[str, int]
    side: int
    share: float
    kl: FloatArray
    nats: FloatArray
    lists: int = 0
    layers: int = 0
    heads: int = 0

    @property
    def bytes(self) -> int:
        """Bytes spent."""
        return sum(self.growth.values()) + self.lists


def at_base(operating_point: OperatingPoint, windows: Sequence[Window], store: Store) -> ByWindow:
    """Scores of the base itself; per-window arrays in the order of every point's."""
    key = digest(operating_point.key, "base", windows_key(windows))
    kept = store.get(key)
    if kept is None:
        found = by_window(
            operating_point.job.model.module,
            operating_point.quantized_copy,
            {"": {}},
            windows,
            device=operating_point.job.device,
        )[""]
        kept = {k: v.tolist() for k, v in found.__dict__.items()}
        store.put(key, kept)
    return ByWindow(**{k: np.array(v) for k, v in kept.items()})


def measure(
    operating_point: OperatingPoint, picks: Sequence[Pick], windows: Sequence[Window], store: Store, advance: Advance
) -> list[MeasuredPick]:
    """Every pick, measured on windows.

    Args:
        operating_point: where the paths start.
        picks: what to measure; equal ones are measured once.
        windows: plain windows.
        store: looked into first.
        advance: called with the number of points done, in fractions.
    """
    texts = windows_key(windows)
    keys = [digest(operating_point.key, "point", texts, dict(p.chosen)) for p in picks]
    kept: dict[str, Any] = {k: store.get(k) for k in dict.fromkeys(keys)}
    advance(sum(kept[k] is not None for k in keys))
    missing = {k: p for k, p in zip(keys, picks, strict=True) if kept[k] is None}
    parameters = sum(p.unit.parameters for p in operating_point.base.problems.values())
    sizes = {k: sum(operating_point.base.problems[n].unit.parameters for n in p.chosen) for k, p in missing.items()}
    most = _VALUES[torch.device(operating_point.job.device).type]
    for group in in_groups(missing, sizes.__getitem__, most, _TOGETHER):
        coded = realise(operating_point, [c for k in group for c in missing[k].choices.values()])
        reals = {k: {n: coded[c] for n, c in missing[k].choices.items()} for k in group}
        units = {n: p.unit for n, p in operating_point.base.problems.items()}
        values = {k: {n: from_matrix(units[n], r.values) for n, r in real.items()} for k, real in reals.items()}
        scores = by_window(
            operating_point.job.model.module,
            operating_point.quantized_copy,
            values,
            windows,
            device=operating_point.job.device,
            advance=advance,
        )
        for k, real in reals.items():
            kept[k] = _entry(operating_point, real, scores[k], parameters)
            store.put(k, kept[k])
    return [
        MeasuredPick(
            e["growth"],
            e["side"],
            e["share"],
            np.array(e["kl"]),
            np.array(e["nats"]),
            e["lists"],
            e["layers"],
            e["heads"],
        )
        for e in (kept[k] for k in keys)
    ]


def _entry(
    operating_point: OperatingPoint, real: Mapping[str, Real], scores: ByWindow, parameters: int
) -> dict[str, Any]:
    layers = [overlay_bytes(r.section) for r in real.values()]
    protected = sum(r.share * operating_point.base.problems[n].unit.parameters for n, r in real.items())
    shapes = {n: operating_point.base.problems[n].unit.matrix_shape for n in real}
    stacks = {n: (shapes[n], r.section.data) for n, r in real.items() if r.section.tag == STACK.tag}
    stored, lists = share_lists(stacks)
    lists += tuple({i: o for r in real.values() for i, o in r.objects.items()}.values())
    return {
        "growth": {
            n: len(stored.get(n, r.section.data)) - len(operating_point.sections[n].data) for n, r in real.items()
        },
        "lists": sum(len(o) + LIST_ENTRY for o in lists),
        "side": sum(r.side for r in real.values()), "share": protected / max(1, parameters),
        "layers": sum(n for n, _ in layers), "heads": sum(n for _, n in layers),
        "kl": scores.kl.tolist(), "nats": scores.nats.tolist(),
    }  # fmt: skip


def overlay_bytes(section: Section) -> tuple[int, int]:
    """Return the bytes of a section's layers, and of headers that are stored only because there are layers."""
    if section.tag != STACK.tag:
        return 0, 0
    parts = STACK.parts(section.data)
    layers = sum(len(data) for _, _, data in parts[1:])
    return layers, len(section.data) - layers - len(parts[0][2])
