"""Run cells, several at a time if asked; each writes one JSON line and is skipped if the line exists.

Every process keeps the model and the token sets it used last; statistics go through a store that all share. The file
of lines is written by one process only. A cell's key is the hash of all that its result depends on (the library's
source, without what only shows results, included), so a line is never taken for another run's.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bytecap.calibration.statistics import model_key, windows_key
from bytecap.errors import BudgetError, CheckpointError
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.evaluation import ByWindow, compare_models
from bytecap.model.forward import longest_first
from bytecap.model.sources import load_sets
from bytecap.model.texts import TokenSets
from bytecap.pipeline.stages import fit_sets
from bytecap.progress import Reporter, Silent
from bytecap.report.lines import Record, append, blamed_lines, read_lines
from bytecap.system.cache import blamed, digest, library
from bytecap_lab.compare.specs import ComparisonSetting, RunSpec, read_method
from bytecap_lab.compare.task_scores import task_scores


@dataclass(frozen=True)
class Task:
    """A cell with everything that a process needs to run it."""

    spec: RunSpec
    setting: ComparisonSetting
    store: Path | None
    command: str
    key: str
    order: int


@lru_cache(maxsize=1)
def model_of(path: str) -> Model:
    """Load a model; it is kept until another one is asked for."""
    return load_checkpoint(path)


@lru_cache(maxsize=1)
def _sets(path: str, seed: int, setting: ComparisonSetting) -> TokenSets:
    return load_sets(
        model_of(path), setting.calibration or None, setting.evaluation or None, window=setting.window,
        tokens=setting.tokens, evaluation_tokens=setting.evaluation_tokens, seed=seed, device=setting.device,
        reporter=Silent(),
    )  # fmt: skip


def directory_key(directory: str) -> str:
    """Hash the weights and the config of a directory, file by file."""
    names = sorted(p for p in Path(directory).iterdir() if p.suffix in {".safetensors", ".json"})
    return digest([[p.name, file_key(p)] for p in names])


def file_key(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tasks(specs: Sequence[RunSpec], setting: ComparisonSetting, store: Path | None, command: str) -> Iterator[Task]:
    """Return every cell with its key."""
    hashes: dict[str, str] = {}
    for order, spec in enumerate(specs):
        if spec.model not in hashes:
            hashes[spec.model] = model_key(model_of(spec.model))
        sets = _sets(spec.model, spec.seed, setting)
        parts: list[Any] = [hashes[spec.model], spec.method, spec.budget, setting.device]
        parts += [windows_key([w for t in sets.evaluation for w in t.windows]), [t.name for t in sets.evaluation]]
        parts += [file_key(Path(t)) for t in setting.tasks]
        if spec.directory:
            parts += [directory_key(spec.directory)]
        else:
            own = spec.method.partition(":")[0]
            parts += [file_key(Path(own))] if own.endswith(".py") else []
            parts += [spec.seed, windows_key(sets.statistics), windows_key(sets.correction)]
        yield Task(spec, setting, store, command, digest(library(), *parts), order)


def run_all(
    specs: Sequence[RunSpec],
    setting: ComparisonSetting,
    *,
    path: Path | None = None,
    store: Path | None = None,
    jobs: int = 1,
    command: str = "",
    reporter: Reporter | None = None,
) -> list[Record]:
    """Return records of cells and of their texts, after running the missing ones.

    Args:
        specs: what to run.
        setting: of all of them.
        path: file of JSON lines; finished cells are taken from it, new ones appended.
        store: directory of statistics.
        jobs: processes.
        command: for the record.
        reporter: told about progress.

    Raises:
        BytecapError: a cell failed for another reason than its budget; what is finished is in the file.
    """
    reporter = reporter or Silent()
    known = {r["key"]: r for r in (read_lines(path) if path is not None else []) if isinstance(r.get("key"), str)}
    wanted = list(tasks(specs, setting, store, command))
    missing = [t for t in wanted if t.key not in known]
    if len(missing) < len(wanted):
        reporter.note(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {path} already")
    with reporter.step("runs", max(1, len(missing))) as advance:
        for records in _results(missing, jobs):
            fresh = [r for r in records if r["key"] not in known]
            known |= {r["key"]: r for r in fresh}
            append(path, fresh)
            advance(1)
    model_of.cache_clear()
    _sets.cache_clear()
    with blamed_lines(path):
        runs = [known[t.key] | {"order": t.order} for t in wanted]
        return [known[k] for k in dict.fromkeys(r["texts_key"] for r in runs if "texts_key" in r)] + runs


def _results(missing: Sequence[Task], jobs: int) -> Iterator[list[Record]]:
    """Yield records as they are finished."""
    if jobs <= 1 or len(missing) <= 1:
        for task in missing:
            yield run(task)
        return
    model_of.cache_clear()
    _sets.cache_clear()
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        futures: list[Future[list[Record]]] = [pool.submit(run, task) for task in missing]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run(task: Task) -> list[Record]:
    """Run a cell; returns its record behind that of its texts."""
    spec, started, cpu = task.spec, time.perf_counter(), time.process_time()
    model, sets = model_of(spec.model), _sets(spec.model, spec.seed, task.setting)
    record: Record = {
        "record": "run", "key": task.key, "order": task.order, "model": spec.model, "method": spec.method,
        "budget_bytes": spec.budget,
        "seed": None if spec.directory else spec.seed, "setting": asdict(task.setting), "command": task.command,
        "host": host(task.setting.device), "versions": versions(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    try:
        with blamed(task.store):
            found, windows = _external(task, model, sets) if spec.directory else _fitted(task, model, sets)
    except BudgetError as exc:
        return [record | {"refused": str(exc), "floor_bytes": exc.floor}]
    texts = _texts(model, sets, windows)
    record |= found | {"texts_key": texts["key"]}
    record["texts"] = [{"name": t.name, "kl": _short(w.kl), "nats": _short(w.nats)}
                       for t, w in zip(sets.evaluation, windows, strict=True)]  # fmt: skip
    record |= {"seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    return [texts, record]


def _fitted(task: Task, model: Model, sets: TokenSets) -> tuple[Record, Sequence[ByWindow]]:
    spec, method_spec = task.spec, read_method(task.spec.method)
    config = FitConfig(
        spec.budget, method=method_spec.name, device=task.setting.device, seed=spec.seed, paths=method_spec.paths,
        options=method_spec.options, store=task.store, reporter=Silent(),
    )  # fmt: skip
    result = fit_sets(model, sets, config)
    kept = {k: v for k, v in result.report.items() if k in _KEPT}
    kept["file_sha256"] = hashlib.sha256(result.data).hexdigest()
    return kept | _tasks(task, model, result.load_model), result.windows


@lru_cache(maxsize=1)
def _original_scores(path: str, tasks: tuple[str, ...], device: str) -> Mapping[str, Any]:
    return task_scores(model_of(path).module, model_of(path), tasks, device)


def _tasks(task: Task, model: Model, module: Callable[[], Any]) -> Record:
    """Return scores on tasks, of the original and of a module, question by question; nothing where none are asked."""
    paths, device = task.setting.tasks, task.setting.device
    if not paths:
        return {}
    original = _original_scores(task.spec.model, paths, device)
    return {"tasks": task_scores(module(), model, paths, device), "tasks_original": original}


_KEPT = (
    "file_bytes", "plan", "lossless", "parameters", "bits_per_parameter", "predicted_delta_nats", "slope_nats_per_byte",
    "duality_gap_nats", "floor_bytes", "ideal_bytes", "statistics_tokens", "correction_tokens", "evaluation_tokens",
    "same_top1", "paths",
)  # fmt: skip


def _external(task: Task, model: Model, sets: TokenSets) -> tuple[Record, Sequence[ByWindow]]:
    spec, device = task.spec, task.setting.device
    other = load_checkpoint(spec.directory)
    ours, theirs = model.config().get("vocab_size"), other.config().get("vocab_size")
    if ours != theirs:
        raise CheckpointError(f"{spec.directory} has a vocabulary of {theirs} tokens, {spec.model} one of {ours}")
    model.module.to(device)
    other.module.to(device)
    parts = [compare_models(model.module, other.module, t, device=device) for t in sets.evaluation]
    found = {
        "external": spec.directory, "file_bytes": spec.budget, "parameters": model.parameters,
        "bits_per_parameter": 8 * spec.budget / max(1, model.parameters),
        "evaluation_tokens": sum(p.tokens for p in parts), "same_top1": sum(p.same_top1 for p in parts) / len(parts),
    }  # fmt: skip
    found |= _tasks(task, model, lambda: other.module)
    return found, [p.windows for p in parts if p.windows is not None]


def _texts(model: Model, sets: TokenSets, windows: Sequence[ByWindow]) -> Record:
    """Return the record that all runs on the same evaluation tokens share."""
    texts = [
        {
            "name": t.name, "tokens": w.tokens.astype(int).tolist(), "bytes": w.bytes.astype(int).tolist(),
            "original": _short(w.original), "documents": [x.document for x in longest_first(t.windows)],
        }
        for t, w in zip(sets.evaluation, windows, strict=True)
    ]  # fmt: skip
    key = digest("texts", model.name, *[[t["name"], t["tokens"], t["bytes"], t["documents"]] for t in texts],
                 windows_key([w for t in sets.evaluation for w in t.windows]))  # fmt: skip
    return {"record": "texts", "key": key, "model": model.name, "parameters": model.parameters, "texts": texts}


def _short(values: Any) -> list[float]:
    """Round to nine digits, which are enough for differences and half the bytes."""
    return [float(f"{v:.9g}") for v in values]


def host(device: str) -> str:
    """Describe the machine for the record."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> Mapping[str, str]:
    """Return the versions of libraries that numbers may depend on."""
    names = ("torch", "numpy", "transformers")
    return {"bytecap": library(), "python": platform.python_version(), **{n: version(n) for n in names}}


def command_line() -> str:
    """Return the running command as it was typed."""
    import shlex

    name = Path(sys.argv[0]).name
    return shlex.join(["bytecap" if name == "__main__.py" else name, *sys.argv[1:]])
