"""Choose the model that is best at a size: several models under one cap, by bits per byte on the same bytes.

Bits per byte do not depend on a tokenizer, so a large model at few bits and a small one at many can be compared.
Work is saved in three steps. A model whose floor is above a cap is out before any text is read, and originals are
scored before anything is fitted. Short fits, on few calibration tokens and without a long search, rank the others at
every cap, the best original first. Only the best of them are fitted whole. At no step is a model fitted whose original
scores worse than a file that is there already: a file is hardly ever better than what it was made of. `contenders.py`
has the first step and the bytes that are scored.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bytecap.errors import BudgetError, BytecapError, TextError, UsageError
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.defaults import WINDOW
from bytecap.model.sources import Paths, as_paths
from bytecap.pipeline.artifact import Artifact
from bytecap.pipeline.contenders import (
    EVALUATION_BYTES,
    FINALISTS,
    SHORT_TOKENS,
    Entry,
    Limits,
    Toll,
    attempt,
    check_any,
    consider,
    contenders,
    original_bits,
    pieces,
    toll_of,
)
from bytecap.pipeline.fit import fit_config
from bytecap.pipeline.stages import check
from bytecap.progress import Reporter, reporter_for, warn
from bytecap.sizes import format_size, parse_size
from bytecap.system.cache import Store
from bytecap.system.collisions import refuse_collisions

_ALL = 2**40  # evaluation tokens: the pieces are scored whole


@dataclass(repr=False)
class Choice:
    """The best file at a cap, and how all models did.

    Attributes:
        report: every figure, as `--json` prints it: `rows` has one entry for each model and budget.
        best: the file.
        name: its model, as it was given.
    """

    report: dict[str, Any]
    best: Artifact
    name: str

    def __repr__(self) -> str:
        return f"Choice({self.name}: {self.best!r})"


def choose(
    models: Sequence[Path | str],
    budget: int | str,
    *,
    evaluation: Paths = None,
    output: Path | str | None = None,
    budgets: Sequence[int | str] = (),
    calibration: Paths = None,
    tokens: int | None = None,
    evaluation_bytes: int = EVALUATION_BYTES,
    short_tokens: int = SHORT_TOKENS,
    finalists: int = FINALISTS,
    window: int = WINDOW,
    method: str = "bytecap",
    effort: int | None = None,
    device: str = "auto",
    seed: int = 0,
    store: Store | Path | str | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
) -> Choice:
    """Fit several models under one cap and keep the file with the fewest bits per byte.

    Args:
        models: Hugging Face directories, hub ids, `.gguf` files or `demo`.
        budget: cap on the file: bytes, `3MB` or `3MiB`.
        evaluation: text files to compare on, documents separated by form feed; embedded general text by default.
        output: file to write the best to.
        budgets: further caps to compare at, for the curves; nothing is written for them.
        calibration: as of `fit`; each model's own default by default.
        tokens: most calibration tokens of whole fits.
        evaluation_bytes: most bytes to compare on, over all texts.
        short_tokens: calibration tokens of short fits.
        finalists: models that are fitted whole at each budget.
        window: predicted tokens in a window.
        method: of all fits.
        effort: of whole fits, by default as of `fit`; short ones have 0.
        device: `auto`, `cpu` or `cuda`.
        seed: of every random choice.
        store: directory of finished steps.
        progress: show bars.
        reporter: told about progress in place of the bars.

    Raises:
        UsageError: no model, a model twice, or an option that cannot be understood.
        BudgetError: no model fits the cap.
        BytecapError: of the models that fit, none could be fitted; the first one's reason.
    """
    with tempfile.TemporaryDirectory(prefix="bytecap-") as place:
        whole = FitConfig(
            parse_size(budget), calibration=calibration, evaluation=as_paths(evaluation), output=output, tokens=tokens,
            evaluation_tokens=_ALL, window=window, method=method, effort=effort, device=device, seed=seed,
            store=store or Path(place) / "store", reporter=reporter_for(reporter, progress),
        )  # fmt: skip
        limits = Limits(evaluation_bytes, short_tokens, finalists)
        return _chosen(models, sorted({parse_size(budget), *map(parse_size, budgets)}), whole, limits, Path(place))


def _chosen(
    models: Sequence[Path | str], caps: Sequence[int], config: FitConfig, limits: Limits, place: Path
) -> Choice:
    """Return what `choose` returns: the config is that of whole fits at the cap, with the texts that are given."""
    cap, said, given, output = parse_size(config.budget), config.reporter, as_paths(config.evaluation), config.output
    assert said is not None  # noqa: S101 (`choose` gives one)
    entries = contenders(models, caps)
    inputs = {"an evaluation text": given, "a calibration text": as_paths(config.calibration)}
    refuse_collisions({"-o": output}, {**inputs, **{f"the model {e.given}": e.given for e in entries}})
    whole = replace(config, evaluation=pieces(given, limits.evaluation_bytes, place, said), output=None)
    check(whole)
    short = replace(whole, tokens=limits.short_tokens, effort=0 if whole.method == "bytecap" else whole.effort)
    for entry in entries:
        _opened(entry, short, said)
    check_any(entries, cap)
    for entry in sorted(entries, key=lambda e: e.original):
        _shortened(entry, entries, short, said)
    check_any(entries, cap)
    _select(entries, caps, limits.finalists)
    for entry in sorted(entries, key=lambda e: _order(e, cap)):
        _finished(entry, entries, short, whole, said)
    best = _best(entries, cap)
    if output is not None:
        best.whole[cap].save(output)
        said.note(f"wrote {output}: {format_size(len(best.whole[cap].data))} ({best.name})")
    report = _report(entries, caps, cap, best, whole, [str(p) for p in given])
    return Choice(report, best.whole[cap], best.given)


def _bits(artifact: Artifact, tolls: Sequence[Toll]) -> dict[str, Any]:
    """Return bits per byte of a file and its original on the whole of every text, as unweighted means."""
    file: list[float] = []
    original: list[float] = []
    errors: list[float] = []
    for text, toll in zip(artifact.report["texts"], tolls, strict=True):
        if text["bytes"] + toll.unscored != toll.bytes:
            raise TextError(
                f"{artifact.report['model']}: {text['bytes']} bytes of {text['name']} were scored, not "
                f"{toll.bytes - toll.unscored}: its figures cannot be compared"
            )
        for kind, into in (("artifact", file), ("original", original)):
            into.append((text[f"nats_{kind}"] * text["tokens"] / math.log(2) + toll.bits) / toll.bytes)
        errors.append(text["bpb_stderr"] * text["bytes"] / toll.bytes)
    n = len(file)
    return {
        "file_bytes": len(artifact.data), "bpb": sum(file) / n, "bpb_original": sum(original) / n,
        "bpb_stderr": math.sqrt(sum(e * e for e in errors)) / n, "kl_nats": artifact.report["kl_nats"],
        "evaluation_bytes": sum(t.bytes for t in tolls), "seconds": artifact.report["seconds"],
    }  # fmt: skip


def _opened(entry: Entry, config: FitConfig, reporter: Reporter) -> None:
    """Read a model, leave it out where its floor is above the cap, and score its original."""
    consider(
        entry, config, reporter, lambda model: original_bits(entry, model, config, reporter) if entry.left() else None
    )
    for budget, row in entry.rows.items():
        if row.get("below_floor"):
            reporter.note(f"{entry.name} is out at {budget:,} bytes: {row['out']}")


def _outdone(entry: Entry, entries: Sequence[Entry], kinds: Sequence[str]) -> None:
    """Leave a model out where its original scores no better than a file of another one."""
    for budget in entry.left():
        there = [e.rows[budget][k]["bpb"] for e in entries for k in kinds if e is not entry and k in e.rows[budget]]
        if there and entry.original >= min(there):
            entry.out(f"its original has {entry.original:.4f} bits per byte, more than the best file here", [budget])


def _shortened(entry: Entry, entries: Sequence[Entry], config: FitConfig, reporter: Reporter) -> None:
    """Give a model a short fit at the caps where it may still be the best."""
    _outdone(entry, entries, ("short",))
    if entry.left():
        attempt(entry, reporter, lambda: _fit(entry, load_checkpoint(entry.given), config, "short", entry.left()))


def _fit(entry: Entry, model: Model, config: FitConfig, kind: str, budgets: Sequence[int]) -> None:
    """Fit a model at some budgets, whose statistics the store shares; keeps the files."""
    tolls = [toll_of(model, path) for path in as_paths(config.evaluation)] if budgets else []
    for budget in budgets:
        try:
            artifact: Artifact = fit_config(model, replace(config, budget=budget))[0]
        except BudgetError as exc:
            entry.rows[budget] |= {"floor_bytes": exc.floor, "below_floor": True}
            entry.out(str(exc), [budget])
            continue
        entry.rows[budget][kind] = _bits(artifact, tolls)
        (entry.whole if kind == "whole" else entry.short)[budget] = artifact


def _select(entries: Sequence[Entry], caps: Sequence[int], finalists: int) -> None:
    """Leave out all but the best short fits at every budget."""
    for budget in caps:
        ranked = sorted((e for e in entries if budget in e.left()), key=lambda e: _short(e, budget))
        for e in ranked[finalists:]:
            e.out(f"its short fit is not among the best {finalists}", [budget])


def _short(entry: Entry, budget: int) -> float:
    return float(entry.rows[budget]["short"]["bpb"])


def _order(entry: Entry, cap: int) -> float:
    """Return a key by which the most promising model comes first, so that others may be left out because of it."""
    return _short(entry, cap) if cap in entry.left() else math.inf


def _finished(entry: Entry, entries: Sequence[Entry], short: FitConfig, config: FitConfig, reporter: Reporter) -> None:
    """Fit a model whole where it may still be the best; a whole fit that would be the short one is that."""
    _outdone(entry, entries, ("whole",))
    if not entry.left():
        return
    if replace(short, reporter=None) == replace(config, reporter=None):
        for budget in entry.left():
            entry.whole[budget], entry.rows[budget]["whole"] = entry.short[budget], entry.rows[budget]["short"]
        return
    try:
        _fit(entry, load_checkpoint(entry.given), config, "whole", entry.left())
    except BytecapError as exc:
        warn(reporter, f"the whole fit of {entry.name} failed, so its short fits stand: {exc}")
        for budget in set(entry.left()) - set(entry.whole):
            entry.whole[budget] = entry.short[budget]
            entry.rows[budget] |= {"whole": entry.rows[budget]["short"], "whole_failed": str(exc)}


def _best(entries: Sequence[Entry], budget: int) -> Entry:
    """Return the model with the fewest bits per byte at a budget."""
    there = [e for e in entries if budget in e.whole]
    if not there:
        raise UsageError(
            "no model could be fitted. " + "; ".join(f"{e.name}: {e.rows[budget]['out']}" for e in entries)
        )
    return min(there, key=lambda e: float(e.rows[budget]["whole"]["bpb"]))


def _report(
    entries: Sequence[Entry], caps: Sequence[int], cap: int, best: Entry, config: FitConfig, texts: list[str]
) -> dict[str, Any]:
    """Return every figure of a choice."""
    envelope = []
    for budget in caps:
        if any(budget in e.whole for e in entries):
            winner = _best(entries, budget)
            winner.rows[budget]["best"] = True
            envelope.append({"budget_bytes": budget, "model": winner.name, **_figures(winner.rows[budget]["whole"])})
    return {
        "budget_bytes": cap, "budgets": list(caps), "best": best.name, "model": best.given,
        **_figures(best.rows[cap]["whole"]), "envelope": envelope,
        "rows": [r for e in entries for r in e.rows.values()],
        "evaluation": texts, "evaluation_bytes": best.rows[cap]["whole"]["evaluation_bytes"],
        "method": config.method, "effort": config.effort, "seed": config.seed, "fit": best.whole[cap].report,
    }  # fmt: skip


def _figures(scored: Mapping[str, Any]) -> dict[str, Any]:
    return {k: scored[k] for k in ("file_bytes", "bpb", "bpb_stderr")}
