"""Put a model into a folder that a static server can offer: a page that runs it in the browser, all of it under a cap.

The cap counts every file of the folder: page, runtime, ledger and model. What the first three need is known before the
model is read; the rest is the budget of a GGUF fit (`bytecap.pipeline.fit_gguf`). The folder appears whole or not at
all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bytecap.errors import ArtifactError, BudgetError, UsageError
from bytecap.format.ledger import Entry
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.inputs import facts
from bytecap.pipeline.chat_form import chat_form
from bytecap.pipeline.fit_gguf import fit_gguf_configs
from bytecap.pipeline.formats import format_of
from bytecap.progress import Advance, Reporter, reporter_for, warn
from bytecap.runtimes.web.folder import LEDGER, MODEL, OWNERS, Site
from bytecap.runtimes.web.runtime import read_runtime
from bytecap.sizes import check_budget, format_size, parse_budget, split_budgets
from bytecap.system.collisions import refuse_collisions
from bytecap.system.directories import check_directory, replacing_directory

CONTEXT = 1024  # most tokens of prompt and text
OURS = ("index.html", MODEL, LEDGER)  # a folder with these may be replaced


@dataclass
class WebExport:
    """A finished folder.

    Attributes:
        report: every figure, as `--json` prints it; `fit` is that of the model.
        path: of the folder; None after a dry run.
        entries: file, owner (model, runtime, page, ledger) and bytes of everything that is in it.
    """

    report: dict[str, Any]
    path: Path | None = None
    entries: list[Entry] = field(default_factory=list)

    def ledger(self) -> list[Entry]:
        """File, owner and bytes of everything in the folder."""
        return self.entries


def export_web(model: Model | Path | str, config: FitConfig, *, runtime: Path | str | None = None) -> WebExport:
    """Write a folder of at most `config.budget` bytes whose page runs a model.

    Args:
        model: Hugging Face directory, hub id, `demo`, a `.gguf` file, or a loaded model.
        config: of the GGUF fit; `budget` caps the whole folder, `output` is its path.
        runtime: npm package of wllama; fetched by npm by default.

    Raises:
        UsageError: an option is not for this, or the runtime cannot be had.
        BudgetError: the cap is below what page, runtime and the smallest model need.
        OutputError: the folder cannot be written; nothing is left then.
    """
    config = _checked(config)
    path = Path(config.output) if config.output is not None and not config.dry_run else None
    if path is not None:
        check_directory(path, OURS)
        inputs = {"the model": model if isinstance(model, Path | str) else None, "the runtime": runtime}
        refuse_collisions({"-o": path}, inputs)
    taken = read_runtime(runtime)
    loaded = model if isinstance(model, Model) else load_checkpoint(model)
    cap = parse_budget(config.budget, loaded.parameters)
    context = min(CONTEXT, facts(loaded.files).positions or CONTEXT)
    chat = _chat(loaded, reporter_for(config.reporter, config.progress))
    site = Site(Path(loaded.name).name or loaded.name, context, cap, taken, chat)
    if path is None:
        return WebExport(_fitted(loaded, site, config, None))
    with replacing_directory(path, OURS) as made:
        report = _fitted(loaded, site, config, made / MODEL)
        data = (made / MODEL).read_bytes()
        files = site.files(len(data), hashlib.sha256(data).hexdigest())
        for name, content in files.items():
            (made / name).write_bytes(content)
        sizes = {p.name: p.stat().st_size for p in made.iterdir()}
        assert sum(sizes.values()) <= cap  # noqa: S101 (planned with every number at its longest)
    reporter_for(config.reporter, config.progress).note(f"wrote {path}: {format_size(sum(sizes.values()))}")
    return WebExport(_report(report, path, site, sizes), path, [Entry(n, _owner(n), s) for n, s in sizes.items()])


def _chat(model: Model, reporter: Reporter) -> dict[str, Any] | None:
    """Return the form of the model's conversations; None where it has none that a page can write."""
    try:
        form = chat_form(model.files, model.name)
    except ArtifactError as exc:
        warn(reporter, f"{exc}: the page continues texts and holds no conversations")
        return None
    return None if form is None else form.as_dict()


class _Inside:
    """A reporter for a fit inside the job, whose file lies where nobody is to look for it."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def step(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Report a step."""
        return self._reporter.step(name, total)

    def note(self, text: str) -> None:
        """Report a line, unless it says where the file is."""
        if not text.startswith("wrote "):
            self._reporter.note(text)

    def warn(self, text: str) -> None:
        """Pass a warning on."""
        warn(self._reporter, text)


def _checked(config: FitConfig) -> FitConfig:
    """Refuse options that are not for this before anything is read."""
    if isinstance(config.budget, str) and len(split_budgets(config.budget)) != 1:
        raise UsageError(f"one folder has one budget, not {config.budget!r}")
    check_budget(config.budget)
    if config.format not in {None, "gguf"}:
        raise UsageError(f"a page runs GGUF files, not the format {config.format}")
    if config.emit is not None:
        raise UsageError("the option emit is for GGUF files by themselves")
    config = replace(config, format="gguf")
    format_of(config)
    return config


def _fitted(model: Model, site: Site, config: FitConfig, path: Path | None) -> dict[str, Any]:
    """Fit the model to what the rest of the folder leaves; returns the fit's report."""
    left = site.budget - site.fixed
    said = f"page and runtime hold {site.fixed:,} of the {site.budget:,} bytes"
    if left < 1:
        raise BudgetError(f"{said}: nothing is left for a model", site.fixed + 1)
    reporter = reporter_for(config.reporter, config.progress)
    reporter.note(f"{said}: {left:,} are left for the model")
    inside = replace(config, budget=left, output=path, reporter=_Inside(reporter))
    try:
        report: dict[str, Any] = fit_gguf_configs(model, [inside])[0].report
    except BudgetError as exc:
        raise BudgetError(f"{said}; {exc}", site.fixed + exc.floor) from exc
    return {"fit": report, "fixed_bytes": site.fixed, "budget_bytes": site.budget, "model_budget_bytes": left}


def _owner(name: str) -> str:
    return OWNERS.get(name, "page")


def _report(report: Mapping[str, Any], path: Path, site: Site, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures of a finished folder."""
    owners: dict[str, int] = {}
    for name, size in sizes.items():
        owners[_owner(name)] = owners.get(_owner(name), 0) + size
    total = sum(sizes.values())
    return {
        "directory": str(path), "total_bytes": total, "slack_bytes": site.budget - total, "files": dict(sizes),
        "owners": owners, "runtime": site.runtime.version, "runtime_integrity": site.runtime.integrity, **report,
    }  # fmt: skip
