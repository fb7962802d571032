"""Compare a coded model with its original on evaluation texts and on calibration's held-out windows, for a report.

On a real model the distance between the text that calibrates and the text that counts moves quality more than any
quantizer does. So a report has both: cross-entropy of the original (how the model sees a text) and KL of the result,
on every calibration text's own windows that no statistic has seen, beside the same for every evaluation text. Costs
one more pass over the tokens of correction factors, and no byte of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bytecap.job import Job
from bytecap.model.calibration_text import SELF
from bytecap.model.evaluation import ByWindow, Comparison, compare_texts
from bytecap.model.texts import TokenSets
from bytecap.progress import Reporter
from bytecap.system.ranks import ALONE, Ranks

_FEW = 4096  # tokens of statistics, below which text of the model's own helps on text like the user's, too
_NARROW = 1.25  # times the KL on calibration's own windows, from which evaluation is told to be unlike them


@dataclass(frozen=True)
class Comparisons:
    """Comparisons of a coded model with its original.

    Attributes:
        parts: one for each evaluation text.
        held: one for each calibration text, on its windows that no statistic has seen.
    """

    parts: list[Comparison]
    held: list[Comparison]

    @property
    def windows(self) -> tuple[ByWindow, ...]:
        """Scores of the evaluation texts by window."""
        return tuple(p.windows for p in self.parts if p.windows is not None)


def compare(
    original: nn.Module, coded: nn.Module, sets: TokenSets, device: str, reporter: Reporter, ranks: Ranks = ALONE
) -> Comparisons:
    """Compare a coded model with its original on evaluation texts and on calibration's held-out windows.

    Args:
        original: the model as it was.
        coded: the model as it is read back.
        sets: texts.
        device: torch device.
        reporter: told about progress.
        ranks: processes that share the windows.
    """
    held = sets.correction_texts()
    with reporter.step("evaluation", sum(t.tokens for t in (*sets.evaluation, *held))) as advance:
        found = compare_texts(
            original, coded, [*sets.evaluation, *held], device=device, progress=advance, ranks=ranks
        )  # fmt: skip
    return Comparisons(found[: len(sets.evaluation)], found[len(sets.evaluation) :])


def mean_comparison(parts: Sequence[Comparison]) -> Comparison:
    """Return the unweighted mean over texts, with the standard errors of independent texts."""
    n = len(parts)
    values: dict[str, Any] = {}
    for key in parts[0].__dict__:
        items = [getattr(p, key) for p in parts]
        if key == "name":
            values[key] = "mean"
        elif key == "windows":
            values[key] = None
        elif key in {"tokens", "bytes"}:
            values[key] = sum(items)
        elif key.endswith("stderr"):
            values[key] = math.sqrt(sum(x * x for x in items)) / n
        else:
            values[key] = sum(items) / n
    return Comparison(**values)


def quality(parts: Sequence[Comparison], held: Sequence[Comparison] = ()) -> dict[str, Any]:
    """Return measured figures as a report has them: means over the evaluation texts, every text, and their distance.

    Args:
        parts: on evaluation texts.
        held: on calibration's held-out windows.
    """
    mean = mean_comparison(parts)
    keys = (
        "bpb_original", "bpb_artifact", "bpb_stderr", "nats_original", "nats_artifact", "nats_temperature",
        "temperature", "kl_nats", "kl_stderr", "same_top1",
    )  # fmt: skip
    return {k: getattr(mean, k) for k in keys} | {
        "measured_delta_nats": mean.delta_nats, "measured_delta_stderr": mean.delta_stderr,
        "evaluation_tokens": mean.tokens, "texts": [p.as_dict() for p in parts],
        **(_distance(mean, held) if held else {}),
    }  # fmt: skip


def say_narrow(job: Job, report: Mapping[str, Any]) -> None:
    """Note that the user's text is little or unlike the evaluation text, and that samples beside it may help.

    On small-s0 with 8,192 tokens of one kind, a quarter of samples beside them took 16% off the mean KL of three kinds
    and added 4% on that kind's own held-out windows, so it is for the user to decide; with 3,072 tokens as many of
    samples and general text took 12% off on that kind, too (`results/widening.jsonl`).

    Args:
        job: names texts.
        report: of the finished file.
    """
    given, found = job.config.calibration, report.get("text_distance")
    names = [given] if isinstance(given, str | Path) else given if isinstance(given, list | tuple) else ()
    if not found or not names or not all(isinstance(n, str | Path) for n in names) or SELF in job.sets.sources:
        return
    tokens = sum(w.predicted for w in job.sets.statistics)
    if tokens < _FEW:
        job.reporter.note(
            f"a calibration text of {tokens:,} tokens is fitted too closely: more text, or --calib self beside yours, "
            "is likely to lower the KL on text like it, too"
        )
        return
    here, there = found["calibration_kl"], found["evaluation_kl"]
    if there > _NARROW * here:
        job.reporter.note(
            f"the evaluation text is unlike the calibration text: KL {there:.3g} on it, {here:.3g} on windows of "
            "calibration that no statistic has seen; text like it, or --calib self beside yours, may lower it"
        )


def _distance(mean: Comparison, held: Sequence[Comparison]) -> dict[str, Any]:
    """Return calibration's held-out texts, and their mean by tokens beside the mean over evaluation texts.

    By tokens, because that is how statistics weigh them.
    """
    total = sum(h.tokens for h in held)
    nats, kl = (sum(getattr(h, k) * h.tokens for h in held) / total for k in ("nats_original", "kl_nats"))
    return {
        "calibration_held_out": [h.as_dict() for h in held],
        "text_distance": {
            "calibration_nats": nats, "evaluation_nats": mean.nats_original,
            "calibration_kl": kl, "evaluation_kl": mean.kl_nats,
        },
    }  # fmt: skip
