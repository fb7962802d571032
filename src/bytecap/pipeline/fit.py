"""The pipeline: a checkpoint in, one file under a hard byte cap out, read back and measured.

`fit` is the whole job on one screen; every step is a module of its own (docs/tour.md is the reading order).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bytecap import methods
from bytecap.errors import BudgetError, UsageError
from bytecap.format import container
from bytecap.format.codefiles import Code
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.coders.exact import WIDTH
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.container import Contents, FileSection, UnitSection
from bytecap.format.decoder import Ideal, decode_each, decode_units
from bytecap.format.ledger import Entry, by_path, by_unit
from bytecap.format.wire.shared_objects import share_lists
from bytecap.job import Job, Method, Outcome, Section
from bytecap.job.effort import effort_of
from bytecap.methods.preencoded import run_rest
from bytecap.methods.rate_control import allowed_slack
from bytecap.model.checkpoint import Model, as_matrix, demo_directory, load_model
from bytecap.model.determinism import ask_for_order
from bytecap.model.evaluation import ByWindow, Comparison, compare, mean_comparison, paired_stderr
from bytecap.model.quantized_copy import load_values, twin_of
from bytecap.model.sources import EVALUATION_TOKENS, TOKENS, WINDOW, Paths, load_sets, with_recovery
from bytecap.model.texts import TokenSets
from bytecap.pipeline import background, pack_code
from bytecap.progress import Reporter, Silent
from bytecap.recovery.sections import tune_sections
from bytecap.sizes import format_size, parse_size
from bytecap.system import allocator
from bytecap.system.atomic import write_atomically
from bytecap.system.cache import Store

_NONE: Mapping[str, Section] = {}


@dataclass
class Artifact:
    """A finished file.

    Attributes:
        contents: what is in it.
        data: its bytes.
        report: every figure of the job, as `--json` prints it.
        windows: scores of every evaluation text by window; none after a dry run.
        before: what would have been written without recovery, where that is something else.
    """

    contents: Contents
    data: bytes
    report: dict[str, Any] = field(default_factory=dict)
    windows: tuple[ByWindow, ...] = ()
    before: bytes | None = None

    def save(self, path: Path | str) -> int:
        """Write atomically; returns the size in bytes."""
        return write_atomically(self.data, Path(path))

    def ledger(self) -> list[Entry]:
        """Owner and kind of every byte."""
        return container.ledger(self.contents)

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """Decoded values by name, aliases included."""
        return decode_units(self.contents)


def fit(
    model: Model | Path | str,
    budget: int | str,
    *,
    calibration: Paths = None,
    evaluation: Paths = None,
    method: str = "bytecap",
    device: str = "auto",
    seed: int = 0,
    output: Path | str | None = None,
    dry_run: bool = False,
    tokens: int = TOKENS,
    evaluation_tokens: int = EVALUATION_TOKENS,
    window: int = WINDOW,
    tokenizer: bool = True,
    config: bool = True,
    code: Code | Sequence[Path | str] = (),
    paths: Sequence[str] | None = None,
    recover: str | None = None,
    recover_text: Paths = None,
    options: dict[str, Any] | None = None,
    store: Path | str | None = None,
    reporter: Reporter | None = None,
) -> Artifact:
    """Put a model into one file of at most `budget` bytes; raises a `BytecapError`, and writes nothing then.

    Args:
        model: Hugging Face directory, hub id, `demo`, or a loaded `Model`.
        budget: bytes, or text such as `3MB` or `3MiB`.
        calibration: text files, documents separated by form feed; the embedded text if None.
        evaluation: text files nothing is fitted on; the embedded text if None.
        method: `bytecap`, `golf`, `uniform`, `owq` or `radio`.
        device: `auto`, `cpu` or `cuda`.
        seed: of every random choice.
        output: where to write; None keeps the result in memory.
        dry_run: predict, write and evaluate nothing.
        tokens: most tokens for statistics.
        evaluation_tokens: most tokens for evaluation.
        window: predicted tokens in a window.
        tokenizer: keep tokenizer files inside.
        config: keep config files inside.
        code: source files to keep inside, counted packed, or what `bytecap.pipeline.pack_code.pack` made of them.
        paths: exception paths the allocator may choose from, or `all`; the default menu if None.
        recover: steps (`600`) or time (`10m`) for tuning what was coded; none if None.
        recover_text: text files to tune on, or `self` for samples of the model's own; the calibration texts if None.
        options: ingredients of the coder, see `bytecap.quantization.quantizer.Options`.
        store: directory in which steps are kept as they are finished, so that a killed run can be started again and
            goes on from there; nothing is kept if None.
        reporter: told about progress.
    """
    reporter = reporter or Silent()
    begin = background.start if tokenizer else None  # packed while the model is built

    def sets(loaded: Model) -> TokenSets:
        found = load_sets(
            loaded, calibration, evaluation, window=window, tokens=tokens, evaluation_tokens=evaluation_tokens,
            seed=seed, reporter=reporter)  # fmt: skip
        tuning = (recover_text or calibration or demo_directory() / "calib.txt") if recover is not None else None
        return with_recovery(
            loaded, found, tuning, window=window, seed=seed, device=choose_device(device), reporter=reporter
        )

    return fit_sets(
        lambda: model if isinstance(model, Model) else load_model(model, begin=begin), budget, sets,
        method=method, device=device, seed=seed, output=output, dry_run=dry_run, tokenizer=tokenizer, config=config,
        code=code, paths=paths, recover=recover, options=options, store=store, reporter=reporter)  # fmt: skip


def fit_sets(
    model: Callable[[], Model],
    budget: int | str,
    sets: Callable[[Model], TokenSets],
    *,
    method: str = "bytecap",
    device: str = "auto",
    seed: int = 0,
    output: Path | str | None = None,
    dry_run: bool = False,
    tokenizer: bool = True,
    config: bool = True,
    code: Code | Sequence[Path | str] = (),
    paths: Sequence[str] | None = None,
    recover: str | None = None,
    options: dict[str, Any] | None = None,
    store: Store | Path | str | None = None,
    given: Mapping[str, Section] | None = None,
    reporter: Reporter,
) -> Artifact:
    """`fit` for any model and any sets, both made when cheaper arguments have been checked.

    Statistics are taken from `store` and kept there, so that several fits on the same tokens share them. Units with a
    section in `given` are stored as that; the model must hold its values.
    """
    started = time.perf_counter()
    asked, source = parse_size(budget), code if isinstance(code, Code) else pack_code.pack(code)
    reporter.note(f"budget: {format_size(asked)}")
    run, target, menu = methods.find(method), choose_device(device), methods.menu_of(paths, method)
    allocator.spare(target)
    effort, kept = effort_of(recover), store if isinstance(store, Store) else Store(store)
    loaded = model()
    files = side_files(loaded, tokenizer=tokenizer, config=config) + source.sections
    about = {"budget": asked, "method": method.rpartition(":")[2]}  # of FILE.py:CALLABLE no path
    with source.floor(asked), allocator.stated(loaded.parameters):
        size, coded = sizer(loaded, files, about), given or {}
        floor = check_floor(loaded, size, limit := asked - source.reserve, coded)
        job = Job(
            loaded, sets(loaded), limit, size, target, seed, reporter, options or {}, dry_run, menu, effort, kept, coded
        )
        result = _solve(job, run, files, about)
    if not dry_run:
        with allocator.stated(loaded.parameters):
            _deliver(result, job, output)
    result.report |= source.report(asked) | {"floor_bytes": floor, "seconds": round(time.perf_counter() - started, 3)}
    return result


def make_job(model: Model, sets: TokenSets, budget: int, device: str, seed: int, reporter: Reporter) -> Job:
    """A job as `fit` would work on, to be looked at."""
    allocator.spare(device)
    size = sizer(model, side_files(model), {"budget": budget, "method": "bytecap"})
    check_floor(model, size, budget)
    return Job(model, sets, budget, size, device, seed, reporter)


def _deliver(result: Artifact, job: Job, output: Path | str | None) -> None:
    """Write the file and measure what was written."""
    if output is not None:
        result.save(output)
        job.reporter.note(f"wrote {output}: {format_size(len(result.data))}")
    parts, ideal = _measure(result.data, job)
    result.report |= {"ideal_bytes": ideal} | quality(parts)
    if job.recover is not None:
        plain = _measure(result.before, job)[0] if result.before is not None else parts
        before = quality(plain)
        keys = ("kl_nats", "kl_stderr", "measured_delta_nats", "measured_delta_stderr", "bpb_artifact")
        kl, nats = (paired_stderr(parts, plain, what) for what in ("kl", "nats"))
        result.report["without_recovery"] = {
            **{k: before[k] for k in keys}, "kl_difference_stderr": kl, "delta_difference_stderr": nats,
        }  # fmt: skip
    result.windows = tuple(p.windows for p in parts if p.windows is not None)


def _solve(job: Job, run: Method, files: tuple[FileSection, ...], about: dict[str, Any]) -> Artifact:
    """The finished bytes and their report, quality not yet measured."""
    stored = None if job.given else _lossless(job.model, files, about, job.budget, job.reporter)
    job.model.module.to(job.device)
    outcome = Outcome({}, b"", 0.0, 0.0, 0.0, "lossless")
    if stored is None:
        outcome = run_rest(run, job)
        if outcome.sections and job.recover is not None and _untuned(job, outcome, about["method"]):
            outcome = tune_sections(job, outcome)
        if outcome.sections:
            outcome = _with_lists(outcome, job.model)
            stored = _contents(job.model, files, about, outcome, job.budget, about["method"])
    before = None
    if outcome.before is not None:
        plain = _with_lists(replace(outcome, sections=outcome.before[0], tables=outcome.before[1]), job.model)
        before = container.serialize(_contents(job.model, files, about, plain, job.budget, about["method"]))
    result = Artifact(stored, container.serialize(stored)) if stored else Artifact(Contents((), b"", (), {}), b"")
    result.before = before
    result.report = _report(result, job.model, outcome, job.budget, about["method"], job.sets, job.seed)
    return result


def _untuned(job: Job, outcome: Outcome, method: str) -> bool:
    """Whether sections may hold something continuous that the method itself has not tuned: layers, or any at all.

    Where sections are given nothing is tuned: they are stored as they are.
    """
    return not job.given and (method != "bytecap" or any(s.tag == STACK.tag for s in outcome.sections.values()))


def _with_lists(outcome: Outcome, model: Model) -> Outcome:
    """Lists of positions that several stacks have in common stored once, where that is smaller."""
    shapes = {u.name: u.matrix_shape for u in model.units}
    stacks = {n: (shapes[n], s.data) for n, s in outcome.sections.items() if s.tag == STACK.tag}
    changed, objects = share_lists(stacks, outcome.objects)
    sections = {n: Section(s.tag, changed.get(n, s.data)) for n, s in outcome.sections.items()}
    return replace(outcome, sections=sections, objects=objects)


def choose_device(device: str) -> str:
    """Torch device of `auto`, `cpu` or `cuda`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in {"cpu", "cuda"}:
        raise UsageError(f"unknown device {device!r}: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch sees no CUDA device")
    if device == "cuda":
        ask_for_order()
    return device


def side_files(model: Model, *, tokenizer: bool = True, config: bool = True) -> tuple[FileSection, ...]:
    """Config and tokenizer as they are stored."""
    kept = {n: d for n, d in model.files.items() if (tokenizer if container.is_tokenizer(n) else config)}
    return tuple(FileSection(n, background.packed(n, d)) for n, d in kept.items())


def sizer(model: Model, files: tuple[FileSection, ...], about: dict[str, Any]) -> Callable[..., int]:
    """File size as a function of sections, tables and shared objects."""

    def size(sections: dict[str, Section], tables: bytes, objects: tuple[bytes, ...] = ()) -> int:
        units = tuple(UnitSection(u, sections[u.name].tag, sections[u.name].data) for u in model.units)
        return len(container.serialize(Contents(units, tables, files, about, objects=objects)))

    return size


def _contents(
    model: Model, files: tuple[FileSection, ...], about: dict[str, Any], outcome: Outcome, budget: int, method: str
) -> Contents:
    units = tuple(UnitSection(u, outcome.sections[u.name].tag, outcome.sections[u.name].data) for u in model.units)
    contents = Contents(units, outcome.tables, files, about, objects=outcome.objects)
    total = len(container.serialize(contents))
    if total > budget:
        raise BudgetError(f"method {method} cannot get below {total} bytes; the budget is {budget}", total)
    return contents


def _lossless(
    model: Model, files: tuple[FileSection, ...], about: dict[str, Any], budget: int, reporter: Reporter
) -> Contents | None:
    """The losslessly coded model, if it fits the budget."""
    raw = sum(u.parameters * {"F64": 8, "F32": 4}.get(u.dtype, 2) for u in model.units)
    if budget < 0.4 * raw:  # entropy coding takes a third off bfloat16 weights, never more than half off any
        return None
    units = []
    with reporter.step("lossless size", len(model.units)) as advance:
        for u in model.units:
            values = as_matrix(u, model.tensor(u).detach().cpu().numpy())
            narrowed = u.dtype not in WIDTH or (u.dtype == "F64" and values.dtype != np.float64)
            dtype = "F32" if narrowed else u.dtype
            units.append(UnitSection(replace(u, dtype=dtype), EXACT.tag, EXACT.encode(values, dtype)))
            advance(1)
    contents = Contents(tuple(units), b"", files, {**about, "lossless": True})
    total = len(container.serialize(contents))
    if total > budget:
        return None
    reporter.note(f"the budget holds the model losslessly ({total:,} bytes): stored without any loss")
    return contents


def check_floor(
    model: Model, size: Callable[[dict[str, Section], bytes], int], budget: int, given: Mapping[str, Section] = _NONE
) -> int:
    """The smallest reachable file; refuses a budget below it, naming who holds the floor."""
    sections = {u.name: given.get(u.name) or Section(*methods.smallest_section(u)) for u in model.units}
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


def _measure(data: bytes, job: Job) -> tuple[list[Comparison], int]:
    """Read finished bytes back and score them against the original; also the file's ideal size."""
    model, contents, ideal = job.model, container.parse(data), Ideal()
    twin = twin_of(model.module)
    threads = 1 if job.device == "cpu" else torch.get_num_threads()  # on a processor memory is what is short
    for unit, values in decode_each(contents, ideal, threads=threads):
        load_values(twin, {unit.name: values})
    allocator.release()
    with job.reporter.step("evaluation", sum(t.tokens for t in job.sets.evaluation)) as advance:
        parts = [compare(model.module, twin, t, device=job.device, progress=advance) for t in job.sets.evaluation]
    return parts, ideal.bytes(len(data))


def _report(
    result: Artifact, model: Model, outcome: Outcome, budget: int, method: str, sets: Any, seed: int
) -> dict[str, Any]:
    entries = result.ledger()
    return {
        "model": model.name, "method": method, "plan": outcome.plan, "seed": seed,
        "budget_bytes": budget, "file_bytes": len(result.data), "slack_bytes": budget - len(result.data),
        "allowed_slack_bytes": allowed_slack(budget), "ideal_bytes": None,
        "parameters": model.parameters, "bits_per_parameter": 8 * len(result.data) / max(1, model.parameters),
        "predicted_delta_nats": outcome.predicted, "slope_nats_per_byte": outcome.slope,
        "duality_gap_nats": outcome.gap, "lossless": outcome.plan == "lossless",
        **({"recovery": outcome.recovery} if outcome.recovery else {}),
        "largest_units": [(line.unit, line.bytes) for line in by_unit(entries)[:5]],
        "paths": by_path(entries), "margin": outcome.margin or None,
        "statistics_tokens": sum(w.predicted for w in sets.statistics),
        "correction_tokens": sum(w.predicted for w in sets.correction),
    }  # fmt: skip


def quality(parts: list[Comparison]) -> dict[str, Any]:
    """Measured figures as a report has them: means over the texts, and every text."""
    mean = mean_comparison(parts)
    keys = (
        "bpb_original", "bpb_artifact", "bpb_stderr", "nats_original", "nats_artifact", "nats_temperature",
        "temperature", "kl_nats", "kl_stderr", "same_top1",
    )  # fmt: skip
    return {k: getattr(mean, k) for k in keys} | {
        "measured_delta_nats": mean.delta_nats, "measured_delta_stderr": mean.delta_stderr,
        "evaluation_tokens": mean.tokens, "texts": [p.as_dict() for p in parts],
    }  # fmt: skip
