"""Hold a model in another program's format, and the steps that `fit_gguf` and `fit_directory` share.

Both open a model, whole or streamed, take tokens from texts, round tensors by one Hessian, judge them by a second one
from held-out windows, and read what they wrote back from disk before they measure it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bytecap.calibration import finite
from bytecap.calibration.collectors import Use
from bytecap.calibration.statistics import moments
from bytecap.calibration.streamed import probe_streamed
from bytecap.format.ledger import Entry
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.job.effort import effort_of
from bytecap.model import streaming
from bytecap.model.checkpoint import Model
from bytecap.model.evaluation import Comparison, paired_stderr
from bytecap.model.quantized_copy import Values, copy_of, load_values
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.texts import TokenSets
from bytecap.pipeline import memory
from bytecap.pipeline.quality import Comparisons, compare, quality
from bytecap.pipeline.stages import choose_device
from bytecap.pipeline.token_sets import token_sets
from bytecap.progress import Reporter, reporter_for
from bytecap.runtimes.gguf.menu import Item, choose_shrinkage, items_of
from bytecap.runtimes.gguf.places import Layout
from bytecap.runtimes.gguf.rounding import Coding, choose_spans
from bytecap.runtimes.gguf.stored import StoredMetric, stored_items
from bytecap.sizes import check_budget, parse_budget
from bytecap.system.cache import Store

HELD_TOKENS = 16_384  # for the Hessian that judges, and for correction factors


@dataclass
class RuntimeModel:
    """A finished GGUF file or directory.

    Attributes:
        report: every figure of the job, as `--json` prints it.
        types: type of every tensor by name.
        path: where it was written; None after a dry run or without an output.
        entries: owner and kind of every byte.
        windows: evaluation by window, one for each text.
    """

    report: dict[str, Any]
    types: dict[str, str]
    path: Path | None = None
    entries: list[Entry] = field(default_factory=list)
    windows: tuple[Any, ...] = ()

    def ledger(self) -> list[Entry]:
        """Owner and kind of every byte."""
        return self.entries


def held_tokens(config: FitConfig) -> int:
    """Most tokens for the Hessian that judges: `held_tokens` of the config's options."""
    return int((config.options or {}).get("held_tokens", HELD_TOKENS))


@contextmanager
def opened(model: Model | Path | str, configs: Sequence[FitConfig]) -> Iterator[Model]:
    """Open a model for fits that differ in their budgets, on the device that they say; streamed if it is large."""
    for c in configs:
        check_budget(c.budget)
    first, device = configs[0], choose_device(configs[0].device)
    reporter = reporter_for(first.reporter, first.progress)
    with memory.opened(model, first, device, reporter, None) as loaded:
        try:
            (streaming.of(loaded.module) or loaded.module).to(device)
            yield loaded
        finally:
            if isinstance(loaded, StreamedModel) and loaded is not model:
                loaded.scratch.close()  # nothing that a job returns reads work files


def job_of(model: Model, config: FitConfig) -> Job:
    """Return the job of one fit, with its tokens."""
    device, reporter = choose_device(config.device), reporter_for(config.reporter, config.progress)
    store = config.store if isinstance(config.store, Store) else Store(config.store)
    sets = token_sets(model, config, device, store, reporter, correction_tokens=held_tokens(config))
    cap, recover = parse_budget(config.budget, model.parameters), effort_of(config.recover)
    return Job(model, sets, cap, lambda *_: 0, device, reporter, config, recover=recover, store=store)


def calibrated(job: Job, layout: Layout, types: Mapping[str, tuple[str, ...]], coding: Coding) -> list[Item]:
    """Tensors with their metrics, how far these are shrunk, and in which order columns are coded.

    Args:
        job: tokens to calibrate on, and those held out.
        layout: every tensor's place.
        types: what each may be stored as.
        coding: the family of formats.
    """
    if isinstance(job.model, StreamedModel):
        items = _streamed(job, job.model, layout, types)
    else:
        seen = moments(job)
        held = moments(replace(job, sets=replace(job.sets, statistics=job.sets.correction)))
        items = items_of(job.model, layout, seen, held, types, job.device)
    with job.reporter.step("shrinkage of statistics", len({i.role for i in items})) as advance:
        return choose_spans(coding, choose_shrinkage(items, advance))


def _streamed(job: Job, model: StreamedModel, layout: Layout, types: Mapping[str, tuple[str, ...]]) -> list[Item]:
    """The tensors of a streamed model, their metrics in work files."""
    kept: list[dict[str, StoredMetric]] = []
    for windows in (job.sets.statistics, job.sets.correction):
        tokens, found = sum(w.predicted for w in windows), dict[str, StoredMetric]()

        def sink(name: str, uses: list[Use], tokens: int = tokens, found: dict[str, StoredMetric] = found) -> None:
            finite.check_uses(name, uses)
            found[name] = StoredMetric(uses, tokens, model.scratch)

        with job.reporter.step("statistics", tokens) as advance:
            probe_streamed(
                model.streamed, model.units, windows, sink=sink, scratch=model.scratch, seed=job.seed,
                progress=advance, note=job.reporter.note,
            )  # fmt: skip
        kept.append(found)
    both = {n: (kept[0].get(n), kept[1].get(n)) for n in kept[0].keys() | kept[1].keys()}
    return stored_items(model, layout, both, types, job.device)


def measure(model: Model, values: Values, sets: TokenSets, device: str, reporter: Reporter) -> Comparisons:
    """Scores of values read back from disk against the original, one for each text."""
    quantized_copy = copy_of(model.module)
    load_values(quantized_copy, values)
    return compare(model.module, quantized_copy, sets, device, reporter)


def gain(parts: list[Comparison], before: list[Comparison]) -> dict[str, Any]:
    """Quality without recovery, and standard errors of the differences to what it became."""
    return quality(before) | {
        "kl_difference_stderr": paired_stderr(parts, before, "kl"),
        "delta_difference_stderr": paired_stderr(parts, before, "nats"),
    }
