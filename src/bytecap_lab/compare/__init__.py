"""Compare methods at equal bytes on equal tokens: run them, then pair their figures.

Runs are cells of model, method, budget and calibration seed (`specs`), made and kept by `runs`; `pairs` takes
differences document by document, `envelope` finds bytes at equal quality, `figures` puts all of it into
`compare.json`. Whoever needs other cells asks `run_all`: what is finished is never run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytecap.errors import UsageError
from bytecap.model.sources import Paths
from bytecap.progress import Reporter, reporter_for
from bytecap.report.lines import blamed_lines
from bytecap.report.plain import finite, write_figures
from bytecap.system.atomic import make_directory
from bytecap.system.collisions import refuse_pages
from bytecap_lab.compare.figures import summarize
from bytecap_lab.compare.specs import ComparisonSetting, External, RunSpec, grid, read_external, read_method
from bytecap_lab.compare.task_scores import names_of
from bytecap_lab.study import Study

SHOWS_ONLY = "module"

METHODS = ("bytecap", "golf", "owq", "radio", "uniform")
BUDGETS = ("3bpp", "3.5bpp", "4bpp", "5bpp")
TOKENS, EVALUATION_TOKENS = 16_384, 16_384


def compare(
    models: Sequence[Path | str] | Path | str,
    output: Path | str | None = None,
    *,
    budgets: Sequence[str | int] = BUDGETS,
    methods: Sequence[str] = METHODS,
    seeds: int | Sequence[int] = 1,
    externals: Sequence[str | External] = (),
    calibration: Paths = None,
    evaluation: Paths = None,
    tokens: int = TOKENS,
    evaluation_tokens: int = EVALUATION_TOKENS,
    window: int = 512,
    device: str = "auto",
    jobs: int = 1,
    store: Path | str | None = None,
    report: Path | str | None = None,
    tasks: Sequence[Path | str] = (),
    command: str = "",
    progress: bool | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Run every method, budget and calibration seed on every model; docs/compare.md describes the result.

    Args:
        models: Hugging Face directories, hub ids, or `demo`.
        output: directory for `runs.jsonl`, `compare.json`, `compare.html` and the statistics; None keeps nothing.
        budgets: sizes, or bits per parameter (`3.5bpp`).
        methods: names, with options as in `owq:published`; differences are taken to the first one.
        seeds: number of calibration seeds, or which.
        externals: `NAME:DIR:BYTES` of models somebody else made.
        calibration: text files; the embedded text if None.
        evaluation: text files, one for each workload; the embedded text if None.
        tokens: most tokens for statistics.
        evaluation_tokens: most tokens for evaluation.
        window: predicted tokens in a window.
        device: `auto`, `cpu` or `cuda`.
        jobs: processes.
        store: directory of statistics; `output`/store by default.
        report: page to write besides or instead of `output`/compare.html.
        tasks: task files of lm-evaluation-harness, scored beside KL.
        command: for the record.
        progress: show progress bars; by default on a terminal and in a notebook.
        reporter: told about progress in place of the bars.

    Raises:
        BytecapError: an unknown name, or a run that failed; finished runs are kept.
    """
    from bytecap.pipeline.stages import choose_device

    reporter = reporter_for(reporter, progress)
    study = Study.of("compare", models, output, report=report, store=store, calibration=calibration,
                     evaluation=evaluation, reporter=reporter)  # fmt: skip
    questions = _checked(tasks)
    specs = _specs(study.models, methods, budgets, seeds, externals)
    target = choose_device(device)
    setting = ComparisonSetting(study.calibration, study.evaluation, tokens, evaluation_tokens, window, target,
                                questions)  # fmt: skip
    return _run(study, specs, setting, jobs, report, command, reporter)


def _checked(tasks: Sequence[Path | str]) -> tuple[str, ...]:
    """Return paths of task files, each of which defines a task."""
    paths = tuple(str(t) for t in tasks)
    if paths:
        names_of(paths)
    return paths


def _run(
    study: Study, specs: Sequence[RunSpec], setting: ComparisonSetting, jobs: int, report: Path | str | None,
    command: str, reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Run what is missing, and write the figures of all."""
    from bytecap_lab.compare.runs import run_all

    directory = study.directory()
    lines = directory and directory / "runs.jsonl"
    records = run_all(specs, setting, path=lines, store=study.store, jobs=jobs, command=command, reporter=reporter)
    with blamed_lines(lines):
        return _write(summarize(records), directory, report, reporter)


def _specs(
    models: Sequence[str], methods: Sequence[str], budgets: Sequence[str | int], seeds: int | Sequence[int],
    externals: Sequence[str | External],
) -> list[RunSpec]:  # fmt: skip
    """Return all runs of a comparison; refuses what cannot be read before any model is loaded."""
    from bytecap_lab.compare.runs import model_of

    if not methods or not budgets:
        raise UsageError("there is nothing to compare: give at least one method and one budget")
    for method in methods:
        read_method(method)
    others = [e if isinstance(e, External) else read_external(e, models) for e in externals]
    drawn = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    specs = grid(models, list(methods), list(budgets), drawn, [model_of(n).parameters for n in models])
    return specs + [RunSpec(e.model, e.name, e.bytes, directory=e.directory) for e in others]


def render(
    runs: Path | str, output: Path | str | None = None, *, report: Path | str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make the figures and the page of finished runs from their JSON lines; later lines replace equal earlier ones.

    Raises:
        UsageError: the file holds no run.
    """
    from bytecap.report.lines import read_lines

    refuse_pages(output, "compare", report, None, {"--from": runs})
    records = read_lines(Path(runs))
    if not any(r["record"] == "run" for r in records):
        raise UsageError(f"{runs} holds no runs")
    directory = make_directory(output) if output is not None else None
    with blamed_lines(Path(runs)):
        return _write(summarize(records), directory, report, reporter_for(reporter))


def _write(
    found: dict[str, Any], directory: Path | None, report: Path | str | None, reporter: Reporter
) -> dict[str, Any]:  # fmt: skip
    """Write `compare.json` and the page; returns the figures as JSON can hold them."""
    from bytecap.report.comparison import page

    clean: dict[str, Any] = finite(found)
    for path in write_figures(clean, page, directory, "compare", report):
        reporter.note(f"wrote {path}")
    return clean
