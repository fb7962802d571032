"""Try a path on a unit at an amount: predict its cost and gain, and code the section it becomes.

Three kinds of path. `step` is the base itself at a finer step of the whole tensor, and the yardstick of every path;
`coarser` is the same in the other direction, the yardstick of what gives bytes back. Overlays are layers over the base
(`bytecap.quantization.overlays`), recodings take its place (`bytecap_lab.rd_curves.paths`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bytecap.format.coders import coder, run
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.wire.shared_objects import LIST_ENTRY
from bytecap.job import Section
from bytecap.progress import Advance
from bytecap.quantization.overlays import Applied, Overlay, check_names, overlays, thinned
from bytecap.sizes import in_groups
from bytecap.system.cache import Store, digest
from bytecap.system.threads import NESTED, in_threads
from bytecap_lab.rd_curves.base import Base, Rounded
from bytecap_lab.rd_curves.expansion import Expansion
from bytecap_lab.rd_curves.operating_point import MOST_SETTINGS, OperatingPoint
from bytecap_lab.rd_curves.paths import Recoded, coded, recodings, values_of

EXPANSION = (
    0.2  # weight of the expansion in `OverlayCandidate.alone`; the metric's forecast has the rest (LOG.md, 2026-11-22)
)
STEP, COARSER = "step", "coarser"
_TOGETHER = 2**27  # weights that are priced side by side, at some 20 bytes each
Choice = tuple[str, str, int]  # path, unit and index of the setting
STEPS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # octaves finer
COARSE = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 3.0)  # octaves coarser


@dataclass(frozen=True)
class OverlayCandidate:
    """The predicted cost and gain of a path on one unit at one amount.

    Attributes:
        path: its id.
        unit: name.
        index: into the path's settings for this unit.
        setting: the setting in words.
        bytes: estimated growth of the section.
        gain: predicted nats per token recovered by many units together: curvature and correction factor.
        slope: predicted nats per token from the KL's slope alone.
        alone: predicted nats per token recovered if this unit alone changes: the weighted mean of `gain` and of the
            KL's expansion, slope less curvature.
        side: bytes of side information within the growth.
        share: share of the unit's weights that is protected.
        stream: number of the stream whose channels it protects, else -1.
        list: stream, amount and precision, which all units on the stream take together; of a recoding, the scope and
            the object that its units share.
    """

    path: str
    unit: str
    index: int
    setting: str
    bytes: float
    gain: float
    slope: float
    alone: float
    side: int
    share: float
    stream: int = -1
    list: str = ""


@dataclass(frozen=True)
class Real:
    """A unit as it would be stored.

    Attributes:
        section: tag and bytes.
        values: float32 (rows, cols), decoded from the section by the reader's coders.
        side: bytes of side information within the section's growth.
        share: share of the unit's weights that is protected.
        objects: shared objects it refers to, by number.
    """

    section: Section
    values: npt.NDArray[np.float32]
    side: int
    share: float
    objects: Mapping[int, bytes] = field(default_factory=dict)


def known(names: Sequence[str] | None) -> list[str]:
    """Paths of these names in this order, `step` always first and `coarser` before recodings; all by default.

    Raises:
        UsageError: unknown; the message suggests the nearest one.
    """
    every = [*sorted(overlays()), *sorted(recodings())]
    check_names(names or (), [STEP, COARSER, *every])
    wanted = list(dict.fromkeys(n for n in names if n not in (STEP, COARSER))) if names else every
    coarser = COARSER in (names or ()) or any(n in recodings() for n in wanted)
    return [STEP, *([COARSER] if coarser else []), *wanted]


def ladder(path: str, base: Base, name: str, most_settings: int = MOST_SETTINGS) -> Sequence[Any]:
    """Return the settings of a path on a unit, cheapest first; long ladders are thinned evenly, keeping both ends.

    Those of recodings are short, and whole.
    """
    if path in (STEP, COARSER):
        return STEPS if path == STEP else COARSE
    if path in recodings():
        return recodings()[path].settings(base, name)
    return thinned(overlays()[path].settings(base.problems[name], base.units[name].values), most_settings)


@dataclass(frozen=True)
class Tried:
    """A unit under a path, as far as a prediction needs it.

    Attributes:
        growth: estimated growth of the section, with its part of what units share.
        values: float32 (rows, cols), as a reader gives them.
        side, share: see `Real`.
    """

    growth: float
    values: Tensor
    side: int
    share: float


def attempt(operating_point: OperatingPoint, path: str, wanted: Mapping[str, tuple[int, Any]]) -> dict[str, Tried]:
    """Code units by a path, each at (index, setting)."""
    base = operating_point.base
    if path in recodings():
        recoded = coded(base, path, wanted)
        values = values_of(base, recoded)
        return {n: _recoded(operating_point, n, r, values[n]) for n, r in recoded.items()}
    found = {}
    for name, (rounded, applied) in _try(base, path, {n: s for n, (_, s) in wanted.items()}).items():
        growth = rounded.estimate - base.units[name].estimate
        found[name] = Tried(growth, rounded.values, 0, 1.0)
        if applied is not None:
            growth += STACK.growth(rounded.estimate, applied.data)
            found[name] = Tried(growth, applied.values, applied.side, applied.share)
    return found


def _recoded(operating_point: OperatingPoint, name: str, recoded: Recoded, values: Tensor) -> Tried:
    """Return what a prediction needs of a recoded unit."""
    common = sum(len(o) + LIST_ENTRY for o in recoded.objects.values()) / recoded.users
    growth = len(recoded.section.data) - len(operating_point.sections[name].data) + common
    return Tried(growth, values, recoded.side, recoded.share)


def _try(base: Base, path: str, wanted: Mapping[str, Any]) -> dict[str, tuple[Rounded, Applied | None]]:
    """Base coding and layer of units at one setting each."""
    if path in (STEP, COARSER):
        (octaves,) = set(wanted.values())
        found = base.round([base.problems[n] for n in wanted], octaves if path == STEP else -octaves)
        return {n: (r, None) for n, r in zip(wanted, found, strict=True)}
    method: Overlay = overlays()[path]
    below = base.round([method.before(base.problems[n], s) for n, s in wanted.items()], 0.0)

    def over(item: tuple[tuple[str, Any], Rounded]) -> tuple[Rounded, Applied]:
        (name, setting), rounded = item
        return rounded, method.after(base.problems[name], rounded.values.clone(), setting)

    pairs = list(zip(wanted.items(), below, strict=True))
    layers = in_threads(over, pairs, most=NESTED)  # most of it is brotli, some of it decompositions
    return dict(zip(wanted, layers, strict=True))


def candidates(
    operating_point: OperatingPoint,
    path: str,
    store: Store,
    advance: Advance,
    units: Sequence[str] | None = None,
    most_settings: int | None = None,
) -> dict[str, list[OverlayCandidate]]:
    """Predict one path on every unit; returns candidates by unit name, none where it cannot apply.

    Args:
        operating_point: where the paths start.
        path: its id.
        store: looked into first.
        advance: called with the number of units done.
        units: to be tried; all by default.
        most_settings: of a unit, evenly spread over its ladder; all by default.
    """
    names = list(operating_point.base.problems) if units is None else list(units)
    keys = {n: digest(operating_point.key, "offers", path, n, most_settings or 0) for n in names}
    found: dict[str, list[OverlayCandidate]] = {}
    missing = []
    for name, key in keys.items():
        kept = store.get(key)
        if kept is None:
            missing.append(name)
        else:
            found[name] = [OverlayCandidate(**o) for o in kept]
            advance(1)
    for group in in_groups(missing, lambda n: operating_point.base.problems[n].unit.parameters, _TOGETHER):
        found |= _promises(operating_point, path, group, advance, most_settings)
    for name in missing:
        store.put(keys[name], [asdict(o) for o in found[name]])
    return {n: found[n] for n in names}


def _promises(
    operating_point: OperatingPoint, path: str, names: Sequence[str], advance: Advance, most_settings: int | None
) -> dict[str, list[OverlayCandidate]]:
    """Offers of units, one amount after the other: equally shaped units are coded together."""
    base = operating_point.base
    ladders = {n: list(enumerate(ladder(path, base, n, operating_point.most_settings))) for n in names}
    tried = {n: _few(r, most_settings or len(r)) for n, r in ladders.items()}
    found: dict[str, list[OverlayCandidate]] = {n: [] for n in names}
    expansions = {n: _expansion(operating_point, n) for n, r in tried.items() if r}
    longest = max((len(r) for r in tried.values()), default=0)
    for at in range(longest):
        wanted = {n: r[at] for n, r in tried.items() if at < len(r)}
        for name, unit in attempt(operating_point, path, wanted).items():
            index, setting = wanted[name]
            found[name].append(_candidate(operating_point, path, name, index, setting, unit, expansions[name]))
        advance(len(names) / longest)
    return found


def _expansion(operating_point: OperatingPoint, name: str) -> Expansion:
    base = operating_point.base
    slope = operating_point.slopes.gradients[name]
    return Expansion.at(base.problems[name], base.units[name].values, slope, base.device)


def _few(ladder: Sequence[Any], most: int) -> Sequence[Any]:
    """Return at most so many settings: both ends and between, or the cheapest alone."""
    return thinned(ladder, most) if most > 1 else ladder[:1]


def _candidate(
    operating_point: OperatingPoint, path: str, name: str, index: int, setting: Any, tried: Tried, expansion: Expansion
) -> OverlayCandidate:
    by = expansion.of(tried.values)
    gain = operating_point.base.kappa.get(name, 1.0) * by.metric
    alone = EXPANSION * (by.slope - operating_point.slopes.factors[name] * by.curved) + (1 - EXPANSION) * gain
    stream = getattr(setting, "stream", -1)
    listed = f"{stream} {setting.count} {setting.bits}" if stream >= 0 else getattr(setting, "shared", "")
    return OverlayCandidate(path, name, index, _words(path, setting), float(tried.growth), gain, by.slope, alone,
                            tried.side, float(tried.share), stream, listed)  # fmt: skip


def _words(path: str, setting: Any) -> str:
    if path in (STEP, COARSER):
        return f"{setting:g} octaves {'finer' if path == STEP else 'coarser'}"
    return f"{setting} states" if isinstance(setting, int) else str(setting)


def realise(operating_point: OperatingPoint, wanted: Iterable[Choice]) -> dict[Choice, Real]:
    """Code units of paths with the real coders, all together and none twice, and decode them.

    Args:
        operating_point: where the paths start.
        wanted: path, unit and index of the setting.
    """
    base, choices = operating_point.base, list(dict.fromkeys(wanted))
    units, found = {n: base.problems[n].unit for _, n, _ in choices}, dict[Choice, Real]()
    for (path, index), names in _alike([c for c in choices if c[0] in recodings()]).items():
        recoded = coded(base, path, {n: (index, ladder(path, base, n)[index]) for n in names})
        for name in names:  # decoded one by one: units may read different objects of one number
            r, values = recoded[name], values_of(base, {name: recoded[name]})[name]
            found[path, name, index] = Real(r.section, values.numpy(), r.side, r.share, r.objects)
    tried = _tried(operating_point, [c for c in choices if c not in found])
    below = base.sections([r for r, _ in tried.values()])
    sections = {
        c: s if a is None else Section(STACK.tag, STACK.encode((s.tag, s.data), [(a.tag, a.data)]))
        for (c, (_, a)), s in zip(tried.items(), below, strict=True)
    }
    decoded = run([coder(s.tag).decode(s.data, units[n].matrix_shape, units[n].dtype, base.shared)
                   for (_, n, _), s in sections.items()])  # fmt: skip
    for (c, (_, a)), array in zip(tried.items(), decoded, strict=True):
        found[c] = Real(sections[c], array, a.side if a else 0, float(a.share) if a else 1.0)
    return {c: found[c] for c in choices}


def _tried(operating_point: OperatingPoint, choices: Sequence[Choice]) -> dict[Choice, tuple[Rounded, Applied | None]]:
    """Return base coding and layer of choices that are no recodings; what shares a setting is rounded together."""
    base, found = operating_point.base, dict[Choice, tuple[Rounded, Applied | None]]()
    for (path, index), names in _alike(choices).items():
        mine = {n: ladder(path, base, n, operating_point.most_settings)[index] for n in names}
        found |= {(path, n, index): t for n, t in _try(base, path, mine).items()}
    return {c: found[c] for c in choices}


def _alike(choices: Sequence[Choice]) -> dict[tuple[str, int], list[str]]:
    """Return the units of every path and index."""
    found: dict[tuple[str, int], list[str]] = {}
    for path, name, index in choices:
        found.setdefault((path, index), []).append(name)
    return found
