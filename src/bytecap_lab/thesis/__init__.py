"""Put the thesis to the test: eight registered experiments (docs/thesis.md) on models and bases.

`runner` measures what experiments need, `bench` and `measures` do the measuring over the curves' machinery,
`evidence` reads the lines, `experiments` judge them one by one, `verdicts` puts verdicts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecap.errors import UsageError
from bytecap.model.sources import Paths, as_paths
from bytecap.progress import Reporter, reporter_for
from bytecap.report.plain import finite, write_figures
from bytecap.system.atomic import make_directory
from bytecap.system.collisions import refuse_pages
from bytecap_lab.study import Study

if TYPE_CHECKING:
    from bytecap_lab.thesis.bench import BenchSetting
    from bytecap_lab.thesis.runner import Task

SHOWS_ONLY = "module"

TOKENS, EVALUATION_TOKENS = 16_384, 8_192
BUDGET, SEEDS, MOST_SETTINGS = "3bpp", 3, 4


def thesis(
    models: Sequence[Path | str] | Path | str,
    output: Path | str | None = None,
    *,
    only: Sequence[str] | None = None,
    bases: Sequence[str] = ("grid", "golf"),
    budget: str = BUDGET,
    calibration: Paths = None,
    evaluation: Paths = None,
    tokens: int = TOKENS,
    evaluation_tokens: int = EVALUATION_TOKENS,
    window: int = 512,
    seeds: int = SEEDS,
    rungs: int = MOST_SETTINGS,
    units: int | None = None,
    device: str = "auto",
    jobs: int = 1,
    store: Path | str | None = None,
    report: Path | str | None = None,
    command: str = "",
    progress: bool | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Run all registered experiments on all models; docs/thesis-run.md describes the result.

    Args:
        models: Hugging Face directories, hub ids, `demo`, or `FILE.py:CALLABLE:DIRECTORY`, whose file is run.
        output: directory for `thesis.jsonl`, `thesis.json`, `thesis.html` and the store; None keeps nothing.
        only: experiments by name or number; all by default.
        bases: `grid`, `golf`.
        budget: of the file: a size, or bits per parameter.
        calibration: text files, one a workload; the embedded text if None.
        evaluation: text files; the embedded text if None.
        tokens: most tokens for statistics.
        evaluation_tokens: most tokens for evaluation, over all texts.
        window: predicted tokens in a window.
        seeds: calibration seeds that rankings are made with.
        rungs: most settings that an overlay is tried with on a unit.
        units: matrices of a role that all arms act on, evenly spread over the blocks; all by default.
        device: `auto`, `cpu` or `cuda`.
        jobs: processes.
        store: directory of statistics and points; `output`/store by default.
        report: page to write besides or instead of `output`/thesis.html.
        command: for the record.
        progress: show progress bars; by default on a terminal and in a notebook.
        reporter: told about progress in place of the bars.

    Raises:
        BytecapError: an unknown name, or a measurement that failed; finished ones are kept.
    """
    from bytecap.pipeline.stages import choose_device
    from bytecap_lab.thesis import bench, runner

    reporter = reporter_for(reporter, progress)
    study = Study.of("thesis", models, output, report=report, store=store, calibration=calibration,
                     evaluation=evaluation, reporter=reporter)  # fmt: skip
    target, texts = choose_device(device), (study.calibration, study.evaluation)
    setting = bench.BenchSetting(*texts, budget, tokens, evaluation_tokens, window, seeds, rungs, target, units)
    records = runner.measure_all(_tasks(study, bases, only, setting, command), jobs=jobs, reporter=reporter)
    return _write(records, only, study.directory(), report, reporter, [runner.file_of(study.directory())])


def _tasks(
    study: Study, bases: Sequence[str], only: Sequence[str] | None, setting: BenchSetting, command: str
) -> list[Task]:
    """Return what is to be measured, and make the directory of its lines."""
    from bytecap_lab.rd_curves.operating_point import check_base
    from bytecap_lab.thesis.runner import file_of, tasks

    if not bases:
        raise UsageError("there is nothing to test: give at least one base")
    needs, based = _needs(only), [check_base(b) for b in bases]
    return list(tasks(study.models, based, needs, setting, file_of(study.directory()), study.store, command))


def _needs(only: Sequence[str] | None) -> list[str]:
    """Return the measurements that experiments need, each once."""
    from bytecap_lab.thesis.experiments import chosen

    return list(dict.fromkeys(n for m in chosen(only).values() for n in m.NEEDS))


def render(
    lines: Sequence[Path | str] | Path | str, output: Path | str | None = None, *, only: Sequence[str] | None = None,
    report: Path | str | None = None, reporter: Reporter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make verdicts and page from lines alone; later lines replace earlier ones of the same model and base.

    Raises:
        UsageError: there is no measurement in them.
    """
    from bytecap.report.lines import read_lines

    paths = as_paths(lines if isinstance(lines, str | Path) else list(lines))
    refuse_pages(output, "thesis", report, None, {"--from": paths})
    records = [r for p in paths for r in read_lines(p)]
    if not any(r["record"] == "measure" for r in records):
        raise UsageError(f"{', '.join(map(str, paths))} holds no measurement of the thesis")
    directory = make_directory(output) if output is not None else None
    return _write(records, only, directory, report, reporter_for(reporter), paths)


def _write(
    records: Sequence[Any], only: Sequence[str] | None, directory: Path | None, report: Path | str | None,
    reporter: Reporter, lines: Sequence[Path | None],
) -> dict[str, Any]:  # fmt: skip
    """Judge, write `thesis.json` and the page; returns the verdicts as JSON can hold them."""
    from bytecap.report.lines import blamed_lines
    from bytecap.report.thesis import page
    from bytecap_lab.thesis.verdicts import judge

    with blamed_lines(*lines):
        found: dict[str, Any] = finite(judge(records, only))
        for path in write_figures(found, page, directory, "thesis", report):
            reporter.note(f"wrote {path}")
    return found
