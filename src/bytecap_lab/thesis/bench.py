"""A bench holds a model on a base; every measurement of the thesis goes through one.

What is asked twice is measured once: statistics, operating point, candidates, points are kept in the store under what
they depend on, see `bytecap_lab.rd_curves`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.model.checkpoint import Model
from bytecap.model.evaluation import ByWindow
from bytecap.model.forward import longest_first
from bytecap.model.sources import load_sets
from bytecap.model.texts import TokenSets, Window
from bytecap.progress import Reporter
from bytecap.quantization.overlays import overlays
from bytecap.sizes import parse_budget
from bytecap.system.cache import Store
from bytecap_lab.compare.pairs import clusters
from bytecap_lab.rd_curves.choose import spend
from bytecap_lab.rd_curves.operating_point import OperatingPoint, build, make_job
from bytecap_lab.rd_curves.plans import tried_units
from bytecap_lab.rd_curves.points import MeasuredPick, Pick, at_base, measure
from bytecap_lab.rd_curves.trial import STEP, STEPS, OverlayCandidate, candidates, ladder
from bytecap_lab.thesis.amounts import AMOUNTS, GLOBAL

STRUCTURED = ("columns", "rows", "channels")
IRREGULAR = ("outliers",)
FloatArray = npt.NDArray[np.float64]
Chosen = Mapping[str, OverlayCandidate]


@dataclass(frozen=True)
class BenchSetting:
    """The settings that all benches share.

    Attributes:
        calibration: text files, one a workload; none for the embedded text.
        evaluation: text files; none for the embedded text.
        budget: of the file, such as `3bpp`.
        tokens: most tokens for statistics.
        evaluation_tokens: most tokens for evaluation, over all texts.
        window: predicted tokens in a window.
        seeds: calibration seeds that rankings are made with.
        rungs: most settings that an overlay is tried with on a unit.
        device: `cpu` or `cuda`.
        units: matrices of a role that all arms act on, see `bytecap_lab.rd_curves.plans`; None for all.
    """

    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    budget: str
    tokens: int
    evaluation_tokens: int
    window: int
    seeds: int
    rungs: int
    device: str
    units: int | None = None


class Bench:
    """A model on a base, and the measurements it allows.

    Args:
        model: on the setting's device.
        base: `grid` or `golf`.
        setting: texts, budget and the like.
        store: where measured things are kept.
        reporter: told about progress.
    """

    def __init__(self, model: Model, base: str, setting: BenchSetting, store: Store, reporter: Reporter) -> None:
        self.model, self.base, self.setting, self.store, self.reporter = model, base, setting, store, reporter

    def sets(self, seed: int = 0, calibration: Sequence[str] | None = None) -> TokenSets:
        """Token sets of a calibration seed, from all calibration texts or from some."""
        s = self.setting
        return load_sets(
            self.model, list(s.calibration if calibration is None else calibration) or None, list(s.evaluation) or None,
            window=s.window, tokens=s.tokens, evaluation_tokens=s.evaluation_tokens, seed=seed, device=s.device,
            reporter=self.reporter,
        )  # fmt: skip

    @property
    def budget(self) -> int:
        """Bytes of the whole file."""
        return parse_budget(self.setting.budget, self.model.parameters)

    @cached_property
    def operating_point(self) -> OperatingPoint:
        """The base at its operating point."""
        job = make_job(self.model, self.sets(), self.budget, self.setting.device, 0, self.reporter)
        return build(job, self.base, self.store, self.setting.rungs)

    @cached_property
    def units(self) -> list[str]:
        """Names of the matrices that arms act on; all others stay at the base."""
        return tried_units(self.operating_point, self.setting.units)

    @cached_property
    def acted_bytes(self) -> int:
        """Bytes of their sections at the base, of which amounts are shares."""
        return sum(len(self.operating_point.sections[n].data) for n in self.units)

    @cached_property
    def windows(self) -> list[Window]:
        """All evaluation windows."""
        return [w for t in self.operating_point.job.sets.evaluation for w in t.windows]

    @cached_property
    def _cluster(self) -> npt.NDArray[np.int64]:
        """Cluster of every window in the order of measured points, numbered through all texts."""
        number: dict[int, int] = {}
        first = 0
        for text in self.operating_point.job.sets.evaluation:
            of, _ = clusters({"documents": [w.document for w in text.windows]})
            number |= {id(w): first + int(c) for w, c in zip(text.windows, of, strict=True)}
            first += int(of.max()) + 1
        return np.array([number[id(w)] for w in longest_first(self.windows)])

    def fold(self, values: FloatArray) -> list[float]:
        """Sums over windows to sums over the clusters of all texts."""
        found = np.bincount(self._cluster, values, int(self._cluster.max()) + 1)
        return [float(f"{v:.7g}") for v in found]

    @cached_property
    def at_base(self) -> ByWindow:
        """Scores of the base."""
        return at_base(self.operating_point, self.windows, self.store)

    @cached_property
    def candidates(self) -> dict[str, dict[str, list[OverlayCandidate]]]:
        """Promises by path and unit."""
        names = [STEP, *sorted(overlays())]
        found = {}
        with self.reporter.step(f"promises on {self.base}", len(names) * len(self.units)) as advance:
            for name in names:
                found[name] = candidates(self.operating_point, name, self.store, advance, self.units)
        return found

    @property
    def exceptions(self) -> list[str]:
        """Paths that are no finer steps."""
        return [n for n in self.candidates if n != STEP]

    def choose(self, paths: Sequence[str], room: float) -> dict[str, OverlayCandidate]:
        """Choose what these paths together buy for so many bytes, unit by unit, by falling promise."""
        merged = {n: [o for p in paths for o in self.candidates[p][n]] for n in self.units}
        return spend(merged, room)

    def measure(self, picks: Sequence[Pick], name: str) -> list[MeasuredPick]:
        """Picks on real bytes and decoded values."""
        with self.reporter.step(f"{name} on {self.base}", max(1, len(picks))) as advance:
            return measure(self.operating_point, picks, self.windows, self.store, advance)

    def arm(self, name: str) -> list[dict[str, Any]]:
        """Measured points of an arm, by rising amount; equal ones once."""
        everything = {"ranked": list(self.candidates), "exceptions": self.exceptions, "structured": STRUCTURED,
                      "irregular": IRREGULAR} if name != "global" else {}  # fmt: skip
        if name == "global":
            chosen: list[Chosen] = []
            picks = [self.everywhere(octave) for octave in GLOBAL]
        else:
            plans = [self.choose(everything[name], a * self.acted_bytes) for a in AMOUNTS]
            chosen = [p for i, p in enumerate(plans) if p and p not in plans[:i]]
            picks = [pick(c) for c in chosen]
        found = self.measure(picks, name)
        nominal = [self._nominal(c) for c in chosen] or [0.0] * len(found)
        return [
            {"bytes": m.bytes, "side_bytes": m.side + m.heads, "layer_bytes": m.layers + m.heads, "nominal_bytes": n,
             "units": len(m.growth), "paths": _count(p), "kl": self.recovered(m)}
            for m, n, p in zip(found, nominal, picks, strict=True)
        ]  # fmt: skip

    def everywhere(self, octave: float) -> Pick:
        """Every matrix at the same fraction of an octave finer."""
        return Pick(dict.fromkeys(self.units, (STEP, STEPS.index(octave))))

    def recovered(self, measured: MeasuredPick) -> list[float]:
        """KL taken away, summed over each cluster's tokens."""
        return self.fold(self.at_base.kl - measured.kl)

    def setting_of(self, candidate: OverlayCandidate) -> Any:
        """Return the setting that a candidate gives its unit."""
        return ladder(candidate.path, self.operating_point.base, candidate.unit, self.operating_point.most_settings)[
            candidate.index
        ]

    def _nominal(self, chosen: Chosen) -> float:
        """Bytes of protected weights at their width, nothing else counted."""
        total = 0.0
        for o in chosen.values():
            bits = getattr(self.setting_of(o), "bits", 0) if o.path in (*STRUCTURED, *IRREGULAR) else 0
            total += o.share * self.operating_point.base.problems[o.unit].unit.parameters * bits / 8
        return total


def pick(chosen: Chosen) -> Pick:
    """Turn candidates into a choice to measure."""
    return Pick({n: (o.path, o.index) for n, o in chosen.items()})


def _count(picked: Pick) -> dict[str, int]:
    """Units by path."""
    names = [p for p, _ in picked.chosen.values()]
    return {n: names.count(n) for n in dict.fromkeys(names)}
