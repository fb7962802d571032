"""Measure models on bases, several benches at a time; each line is written once and skipped if it exists.

A line's key is the hash of all it depends on (the library's source, without what only judges and shows, included).
Processes append their own lines as they are finished, under a lock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bytecap.errors import BudgetError
from bytecap.model.checkpoint import Model
from bytecap.progress import Reporter, Silent
from bytecap.report.lines import append, blamed_lines, read_lines
from bytecap.system.cache import Store, blamed, digest, library
from bytecap_lab.compare.pairs import clusters, fold
from bytecap_lab.compare.runs import directory_key, file_key, host, versions
from bytecap_lab.thesis.bench import Bench, BenchSetting
from bytecap_lab.thesis.measures import measures
from bytecap_lab.thesis.models import Origin, directory_of, load, origin

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A model on a base, with the measurements to make.

    Attributes:
        model: as given.
        base: `grid` or `golf`.
        setting: of the bench.
        wanted: measurement -> key.
        path: file of lines, or None.
        store: directory of statistics and points, or None.
        command: for the record.
    """

    model: str
    base: str
    setting: BenchSetting
    wanted: dict[str, str]
    path: Path | None
    store: Path | None
    command: str


@lru_cache(maxsize=1)
def _model(spec: str, device: str) -> Model:
    found = load(spec)
    found.module.to(device)
    return found


def tasks(
    models: Sequence[str], bases: Sequence[str], needs: Sequence[str], setting: BenchSetting, path: Path | None,
    store: Path | None, command: str,
) -> Iterator[Task]:  # fmt: skip
    """One for each model and base, with keys."""
    code = library()
    texts = [[file_key(Path(p)) for p in files] or ["demo"] for files in (setting.calibration, setting.evaluation)]
    names = [[Path(p).name for p in files] for files in (setting.calibration, setting.evaluation)]
    plain = asdict(replace(setting, calibration=(), evaluation=()))
    sources = {n: _source(measures()[n]) for n in needs}
    for model in models:
        directory = directory_of(model)
        code_of = [file_key(Path(model.partition(".py:")[0] + ".py"))] if ".py:" in model else []
        own = digest(directory_key(str(directory)), code_of)
        for base in bases:
            wanted = {n: digest("thesis", code, sources[n], own, base, n, texts, names, plain) for n in needs}
            yield Task(model, base, setting, wanted, path, store, command)


def _source(measure: Callable[..., Any]) -> str:
    """Hash of the file that a measurement is written in: it may be an experiment's own."""
    return file_key(Path(measure.__code__.co_filename))


def measure_all(wanted: Sequence[Task], *, jobs: int = 1, reporter: Reporter | None = None) -> list[Record]:
    """Records of all tasks, measured where they are missing.

    Args:
        wanted: from `tasks`, all with the same file of lines.
        jobs: processes.
        reporter: told about progress.

    Raises:
        BytecapError: a measurement failed for another reason than its budget; what is finished is in the file.
    """
    reporter = reporter or Silent()
    path = wanted[0].path if wanted else None
    known = {r["key"]: r for r in (read_lines(path) if path is not None else []) if isinstance(r.get("key"), str)}
    total = sum(len(t.wanted) for t in wanted)
    there = sum(k in known for t in wanted for k in t.wanted.values())
    if there:
        reporter.note(f"{there} of {total} measurements are in {path} already")
    missing = []
    for t in wanted:
        left = {n: k for n, k in t.wanted.items() if k not in known}
        if left:
            missing.append(replace(t, wanted=left))
    for records in _results(missing, jobs, reporter):
        known |= {r["key"]: r for r in records}
    _model.cache_clear()
    with blamed_lines(path):
        runs = [known[k] for t in wanted for k in t.wanted.values() if k in known]
        return [known[k] for k in dict.fromkeys(r["texts_key"] for r in runs if "texts_key" in r)] + runs


def _results(missing: Sequence[Task], jobs: int, reporter: Reporter) -> Iterator[list[Record]]:
    if jobs <= 1 or len(missing) <= 1:
        for task in missing:
            yield list(run(task, reporter))
        return
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        with reporter.step("models and bases", len(missing)) as advance:
            for future in as_completed([pool.submit(_run_list, t) for t in missing]):
                yield future.result()
                advance(1)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_list(task: Task) -> list[Record]:
    return list(run(task, Silent()))


def run(task: Task, reporter: Reporter) -> Iterator[Record]:
    """Lines of a task, appended to the file one by one as they are measured."""
    model, store = _model(task.model, task.setting.device), Store(task.store)
    bench = Bench(model, task.base, task.setting, store, reporter)
    texts: Record | None = None
    for name, key in task.wanted.items():
        started = time.process_time()
        record = _head(task, name, key)
        try:
            with blamed(task.store):
                texts = texts or _texts(bench)
                record |= {"texts_key": texts["key"], **measures()[name](bench)}
        except BudgetError as exc:
            record |= {"refused": str(exc), "floor_bytes": exc.floor}
        record["cpu_seconds"] = round(time.process_time() - started, 2)
        fresh = [record] if texts is None else [texts, record]
        with store.lock("thesis"):
            append(task.path, fresh)
        yield from fresh


def _head(task: Task, name: str, key: str) -> Record:
    found: Origin = origin(task.model)
    return {
        "record": "measure", "key": key, "what": name, "model": task.model, "base": task.base,
        "recipe": found.recipe, "training_seed": found.seed, "registration": found.registration,
        "setting": asdict(task.setting), "command": task.command, "host": host(task.setting.device),
        "versions": dict(versions()), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _texts(bench: Bench) -> Record:
    """Tokens of every text, cluster by cluster, in the order of all other sums."""
    texts = []
    for text in bench.operating_point.job.sets.evaluation:
        of, word = clusters({"documents": [w.document for w in text.windows]})
        texts.append(
            {"name": text.name, "errors_over": word, "tokens": fold([w.predicted for w in text.windows], of).tolist()}
        )
    return {"record": "texts", "key": digest("thesis texts", json.dumps(texts)), "texts": texts}


def file_of(directory: Path | None) -> Path | None:
    """Return the file of a directory's lines."""
    return directory and directory / "thesis.jsonl"
