"""Define the stages of every fit, whatever the model is and wherever its tokens come from.

`check` reads the options, `open_model` sizes what is fixed and refuses a budget below the floor, `finish` runs the
method, writes the file and measures it. Between the three the caller loads the model and reads its tokens:
`bytecap.pipeline.fit` (checkpoints and texts), `fit_module` (modules and batches), `fit_shards` (factories and shards).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bytecap import methods
from bytecap.allocation.unused import check_choice
from bytecap.errors import BudgetError, UsageError
from bytecap.format import container
from bytecap.format.codefiles import Code
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.container import Contents, FileSection, UnitSection
from bytecap.format.decoder import Ideal
from bytecap.format.ledger import by_overlay, by_unit
from bytecap.format.wire.shared_objects import share_lists
from bytecap.job import Job, Method, Outcome, Section
from bytecap.job.base import Installed
from bytecap.job.config import FitConfig
from bytecap.job.effort import Effort, effort_of
from bytecap.methods.preencoded import run_rest
from bytecap.methods.rate_control import allowed_slack
from bytecap.model import streaming
from bytecap.model.checkpoint import Model
from bytecap.model.determinism import ask_for_order
from bytecap.model.evaluation import paired_stderr
from bytecap.model.rebuilt import written
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.texts import TokenSets
from bytecap.pipeline import background, pack_code, several, update
from bytecap.pipeline.artifact import Artifact, FiledArtifact
from bytecap.pipeline.formats import FILE
from bytecap.pipeline.lossless import lossless
from bytecap.pipeline.quality import Comparisons, compare, quality, say_narrow
from bytecap.pipeline.update import Frame
from bytecap.progress import Recorder
from bytecap.quantization.options import EFFORTS
from bytecap.recovery.sections import tune_sections
from bytecap.sizes import check_budget, format_size, parse_budget, parse_size
from bytecap.system import allocator
from bytecap.system.cache import Store

_NONE: Mapping[str, Section] = {}


@dataclass(frozen=True)
class Asked:
    """Checked options of a fit, before anything is loaded.

    Attributes:
        config: the options as they were given.
        method: the function behind the method's name.
        device: torch device.
        paths: overlays to choose from.
        recover: how long to tune what was coded, or None.
        store: where finished steps are kept.
        code: source files, packed.
        base: the file that an update stands on, or None.
        reporter: told about progress; keeps the warnings.
    """

    config: FitConfig
    method: Method
    device: str
    paths: tuple[str, ...]
    recover: Effort | None
    store: Store
    code: Code
    base: Installed | None
    reporter: Recorder

    @property
    def method_name(self) -> str:
        """Return the name of the method; of FILE.py:CALLABLE without the path."""
        return self.config.method.rpartition(":")[2]


@dataclass(frozen=True)
class Opened:
    """A loaded model under a budget that it can meet.

    Attributes:
        asked: the options.
        model: the model.
        budget: cap on the file in bytes.
        frame: what the file holds beside units.
        size: file size for given sections, tables section, and shared objects if there are any.
        floor: the smallest reachable file in bytes.
    """

    asked: Asked
    model: Model
    budget: int
    frame: Frame
    size: Callable[..., int]
    floor: int

    def job(self, sets: TokenSets) -> Job:
        """The job that the method works on."""
        asked, limit = self.asked, self.budget - self.asked.code.reserve
        return Job(
            self.model, sets, limit, self.size, asked.device, asked.reporter, asked.config, asked.paths, asked.recover,
            asked.store, asked.base,
        )  # fmt: skip


def check(config: FitConfig) -> Asked:
    """Read every option that needs no model.

    Raises:
        UsageError: an option cannot be understood. CodeError: a source file cannot be packed.
    """
    check_budget(config.budget)
    check_choice(config.unused)
    if config.layout != FILE:
        raise UsageError(f"the layout {config.layout} is for checkpoints: a module has no config beside it")
    if config.memory is not None:
        parse_size(config.memory)
    if config.effort is not None and config.effort not in range(len(EFFORTS)):
        raise UsageError(f"there is no effort {config.effort}: it goes from 0 (fast) to {len(EFFORTS) - 1} (best)")
    if config.recover_text and config.recover is None:
        raise UsageError("the option recover_text is read by recover: say how long with recover='10m' or a number")
    run, device = methods.find(config.method), choose_device(config.device)
    paths, effort = methods.menu_of(config.paths, config.method), effort_of(config.recover)
    code = config.code if isinstance(config.code, Code) else pack_code.pack(config.code)
    store = several.store_of(config)
    reporter = Recorder(several.reporter_of(config))
    allocator.spare(device)
    return Asked(config, run, device, paths, effort, store, code, update.base_of(config), reporter)


def open_model(asked: Asked, model: Model) -> Opened:
    """Size what is fixed.

    Raises:
        BudgetError: the budget is below the floor.
    """
    config, budget = asked.config, parse_budget(asked.config.budget, model.parameters)
    asked.reporter.note(f"budget: {format_size(budget)}")
    for note in model.notes:
        asked.reporter.note(note)
    about = {"budget": budget, "method": asked.method_name}
    if asked.base is not None:
        asked.base.check(model.units, model.name)
    files = side_files(model, tokenizer=config.tokenizer, config=config.config, base=asked.base)
    frame = update.frame((*files, *asked.code.sections), about, asked.base)
    size = partial(_size, model, frame)
    with asked.code.floor(budget), _stated(model):
        floor = check_floor(model, size, budget - asked.code.reserve, config.given, on_base=asked.base is not None)
    return Opened(asked, model, budget, frame, size, floor)


def finish(opened: Opened, sets: TokenSets, started: float) -> Artifact:
    """Run the method, write the file, and measure what was written.

    Args:
        opened: the model under its budget.
        sets: its tokens.
        started: `time.perf_counter()` when the job began.

    Raises:
        BytecapError: nothing is written then.
    """
    asked, job = opened.asked, opened.job(sets)
    with asked.code.floor(opened.budget), _stated(opened.model):
        result = _solve(job, asked.method, opened.frame)
    if not asked.config.dry_run:
        with _stated(opened.model):
            _deliver(result, job, asked.config.output)
    several.pass_on(job.ranks, asked.reporter)
    seconds = round(time.perf_counter() - started, 3)
    result.report |= asked.code.report(opened.budget)
    result.report |= {"floor_bytes": opened.floor, "seconds": seconds, "warnings": list(asked.reporter.warnings)}
    return result


def fit_sets(model: Model, sets: TokenSets, config: FitConfig) -> Artifact:
    """Fit a loaded model on tokens that were read before."""
    started = time.perf_counter()
    return finish(open_model(check(config), model), sets, started)


def make_job(model: Model, sets: TokenSets, config: FitConfig) -> Job:
    """Make the job that `fit` would work on, for inspection."""
    return open_model(check(config), model).job(sets)


def _stated(model: Model) -> AbstractContextManager[None]:
    """Say what memory a job needs where it ends."""
    return allocator.stated(model.parameters, streamed=isinstance(model, StreamedModel))


def _deliver(result: Artifact, job: Job, output: Path | str | None) -> None:
    """Write the file and measure what was written."""
    if output is not None and job.ranks.first:
        result.save(output)
        job.reporter.note(f"wrote {output}: {format_size(result.length)}")
    found, ideal = _measure(result.read(), result.length, job)
    result.report |= {"ideal_bytes": ideal} | quality(found.parts, found.held)
    if result.report["predicted_delta_nats"] is None:  # left to this evaluation
        result.report["predicted_delta_nats"] = result.report["text_distance"]["calibration_kl"]
    say_narrow(job, result.report)
    if job.recover is not None:
        before_it = result.before
        other = found if before_it is None else _measure(before_it.read(), before_it.length, job)[0]
        plain = other.parts
        before = quality(plain)
        keys = ("kl_nats", "kl_stderr", "measured_delta_nats", "measured_delta_stderr", "bpb_artifact")
        kl, nats = (paired_stderr(found.parts, plain, what) for what in ("kl", "nats"))
        result.report["without_recovery"] = {
            **{k: before[k] for k in keys}, "kl_difference_stderr": kl, "delta_difference_stderr": nats,
        }  # fmt: skip
    result.windows = found.windows


def _solve(job: Job, run: Method, frame: Frame) -> Artifact:
    """Return the finished bytes and their report, before quality is measured."""
    stored, method = None if job.given else lossless(job.model, frame, job), str(frame.about["method"])
    streamed = streaming.of(job.model.module)
    (job.model.module if streamed is None else streamed).to(job.device)
    outcome = Outcome({}, b"", 0.0, 0.0, 0.0, "lossless")
    if stored is None:
        outcome = run_rest(run, job)
        if outcome.sections and job.recover is not None and _untuned(job, outcome, method):
            outcome = tune_sections(job, outcome)
        if outcome.sections:
            outcome = _with_lists(outcome, job.model)
            stored = _contents(job.model, frame, outcome, job.budget)
    before = None
    if outcome.before is not None:
        plain = _with_lists(replace(outcome, sections=outcome.before[0], tables=outcome.before[1]), job.model)
        before = _artifact(job.model, _contents(job.model, frame, plain, job.budget))
    result = _artifact(job.model, stored)
    result.before = before
    result.report = _report(result, job, outcome, method)
    return result


def _artifact(model: Model, contents: Contents | None) -> Artifact:
    """The finished file; in a work file where the model is streamed."""
    if contents is None:
        return Artifact(Contents((), b"", (), {}), b"")
    if isinstance(model, StreamedModel):
        return FiledArtifact(model.scratch.write(container.pieces(contents)), model.scratch)
    return Artifact(contents, container.serialize(contents))


def _untuned(job: Job, outcome: Outcome, method: str) -> bool:
    """Return whether sections may hold continuous values that the method itself has not tuned.

    Where sections are given nothing is tuned: they are stored as they are.
    """
    return (
        not job.given
        and job.base is None
        and (method != "bytecap" or any(s.tag == STACK.tag for s in outcome.sections.values()))
    )


def _with_lists(outcome: Outcome, model: Model) -> Outcome:
    """Store lists of positions that several stacks share once, where that is smaller."""
    shapes = {u.name: u.matrix_shape for u in model.units}
    stacks = {n: (shapes[n], s.data) for n, s in outcome.sections.items() if s.tag == STACK.tag}
    changed, objects = share_lists(stacks, outcome.objects)
    sections = {n: Section(s.tag, changed[n]) if n in changed else s for n, s in outcome.sections.items()}
    return replace(outcome, sections=sections, objects=objects)


def choose_device(device: str) -> str:
    """Choose the torch device for `auto`, `cpu` or `cuda`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in {"cpu", "cuda"}:
        raise UsageError(f"unknown device {device!r}: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch sees no CUDA device")
    if device == "cuda":
        ask_for_order()
    return device


def side_files(
    model: Model, *, tokenizer: bool = True, config: bool = True, base: Installed | None = None
) -> tuple[FileSection, ...]:
    """Return config and tokenizer as they are stored; without bytes where the base holds the same."""
    kept = {n: d for n, d in model.files.items() if (tokenizer if container.is_tokenizer(n) else config)}
    held = base.files if base is not None else {}
    return tuple(FileSection(n, b"" if held.get(n) == d else background.packed(n, d)) for n, d in kept.items())


def _size(
    model: Model, frame: Frame, sections: dict[str, Section], tables: bytes, objects: tuple[bytes, ...] = ()
) -> int:
    """Return the file size of sections, tables and shared objects."""
    return container.size(frame.contents(model.units, sections, tables, objects))


def _contents(model: Model, frame: Frame, outcome: Outcome, budget: int) -> Contents:
    contents = frame.contents(model.units, outcome.sections, outcome.tables, outcome.objects)
    total = container.size(contents)
    if total > budget:
        method = frame.about["method"]
        raise BudgetError(f"method {method} cannot get below {total} bytes; the budget is {budget}", total)
    return contents


def check_floor(
    model: Model,
    size: Callable[[dict[str, Section], bytes], int],
    budget: int,
    given: Mapping[str, Section] = _NONE,
    *,
    on_base: bool = False,
) -> int:
    """Return the smallest reachable file size; a budget below it is refused, naming the largest units."""
    sections = {
        u.name: given.get(u.name) or (update.AS_IN_BASE if on_base else Section(*methods.smallest_section(u)))
        for u in model.units
    }
    floor = size(sections, b"")
    if floor > budget:
        units = tuple(UnitSection(u, sections[u.name].tag, sections[u.name].data) for u in model.units)
        rest = floor - sum(len(u.data) for u in units)
        top = ", ".join(f"{u.unit.name} {len(u.data)}" for u in sorted(units, key=lambda u: -len(u.data))[:3])
        raise BudgetError(
            f"a budget of {budget:,} bytes is below the floor of {floor:,}: config, tokenizer and index hold {rest:,}, "
            f"the largest units {top} (--no-tokenizer and --no-config leave files out)",
            floor,
        )
    return floor


def _measure(contents: Contents, size: int, job: Job) -> tuple[Comparisons, int]:
    """Read finished bytes back and score them against the original; also the file's ideal size."""
    model, ideal = job.model, Ideal()
    if job.base is not None:
        contents = job.base.on(contents)
    threads = 1 if job.device == "cpu" else torch.get_num_threads()  # on a processor memory is what is short
    quantized_copy = written(model, contents, observe=ideal, threads=threads)
    allocator.release()
    found = compare(model.module, quantized_copy, job.sets, job.device, job.reporter, job.ranks)
    return found, ideal.bytes(size)


def _report(result: Artifact, job: Job, outcome: Outcome, method: str) -> dict[str, Any]:
    entries, model, budget, sets = result.ledger(), job.model, job.budget, job.sets
    return {
        "model": model.name, "method": method, "plan": outcome.plan, "seed": job.seed,
        "budget_bytes": budget, "file_bytes": result.length, "slack_bytes": budget - result.length,
        "allowed_slack_bytes": allowed_slack(budget), "ideal_bytes": None,
        "parameters": model.parameters, "bits_per_parameter": 8 * result.length / max(1, model.parameters),
        "predicted_delta_nats": outcome.predicted, "slope_nats_per_byte": outcome.slope,
        "duality_gap_nats": outcome.gap, "lossless": outcome.plan == "lossless" and not model.rounded,
        **({"source_quantization": model.dequantized} if model.dequantized else {}),
        **({"recovery": outcome.recovery} if outcome.recovery else {}),
        **(update.report(job.base, result) if job.base is not None else {}),
        **({"targets": outcome.targets} if outcome.targets else {}),
        "largest_units": [(line.unit, line.bytes) for line in by_unit(entries)[:5]],
        "paths": by_overlay(entries), "margin": outcome.margin or None,
        "calibration_texts": [{"name": n, "tokens": t} for n, t in sets.drawn],
        "statistics_tokens": sum(w.predicted for w in sets.statistics),
        "correction_tokens": sum(w.predicted for w in sets.correction),
    }  # fmt: skip
