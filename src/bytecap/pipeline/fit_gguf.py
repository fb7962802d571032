"""`fit --format gguf`: the best GGUF file of at most so many bytes.

The job is that of `bytecap.pipeline.fit`, with block formats for coders: statistics, every type of every tensor as a
measured curve, one slope, correction factors from the real loss, one slope again, rounding, the file, and its quality
read back from disk.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bytecap.calibration.statistics import moments
from bytecap.errors import BudgetError
from bytecap.format.ledger import by_unit
from bytecap.job import Job
from bytecap.job.config import FitConfig, configured
from bytecap.job.effort import effort_of
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.defaults import TOKENS
from bytecap.model.quantized_copy import Values
from bytecap.model.sources import Paths, as_paths, load_sets
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.pipeline.formats import format_of
from bytecap.pipeline.quality import Comparisons, quality, say_narrow
from bytecap.pipeline.runtime_model import RuntimeModel, calibrated, gain, job_of, measure, opened
from bytecap.pipeline.stages import choose_device
from bytecap.progress import Reporter, reporter_for
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.gguf import file, library
from bytecap.runtimes.gguf.export import describer, importance, type_lines, write_imatrix
from bytecap.runtimes.gguf.export import plain as exact
from bytecap.runtimes.gguf.menu import WHOLE, Item, allowed, parse_types
from bytecap.runtimes.gguf.places import Layout, Place, layout_of
from bytecap.runtimes.gguf.plan import CODING, data_of, solve
from bytecap.runtimes.gguf.solve import Found, figures
from bytecap.runtimes.gguf.template import GgufTemplate, read_template
from bytecap.runtimes.gguf.tuning import tune_blocks
from bytecap.sizes import format_size, parse_budget
from bytecap.system.atomic import write_atomically

WIDE = 256  # columns of a block of the finer types


@dataclass(frozen=True)
class _Frame:
    """The parts of a file that are fixed before calibration: tensors, metadata, sizes."""

    layout: Layout
    describe: file.Describe
    types: Mapping[str, tuple[str, ...]]
    head: int
    rest: int

    @property
    def fixed(self) -> int:
        """Bytes of all that types do not compete for."""
        return self.head + self.rest


def fit_gguf_configs(
    model: Model | Path | str, configs: Sequence[FitConfig], *, quantized: bool = False
) -> list[RuntimeModel]:
    """Fit a checkpoint to a GGUF file for each config; they differ in their budgets.

    `quantized`: the template is the file that the model was read from, whatever its types.
    """
    first = configs[0]
    menu, _ = parse_types(first.types), effort_of(first.recover)
    library()
    with opened(model, [replace(c, format=c.format or "gguf") for c in configs]) as loaded:
        path = first.template
        template = None if path is None else read_template(Path(path), loaded, quantized=quantized)
        found: list[RuntimeModel] = []
        for c in configs:
            frame = _frame(loaded, menu, c.pure, template, reporter_for(c.reporter, c.progress))
            found.append(_fit_one(loaded, frame, c))
    return found


@configured
def fit_gguf(model: Model | Path | str, config: FitConfig) -> RuntimeModel:
    """Put a model into a GGUF file of at most `budget` bytes; raises a `BytecapError`, and writes nothing then.

    `options` may hold `held_tokens`, the most tokens for the Hessian that judges.

    Args:
        model: Hugging Face directory, hub id, `demo`, or a loaded `bytecap.model.checkpoint.Model`.
        config: the options, documented below.
    """
    format_of(replace(config, format="gguf"))
    return fit_gguf_configs(model, [config])[0]


def _fit_one(model: Model, frame: _Frame, config: FitConfig) -> RuntimeModel:
    """One fit of a loaded model, from its texts to the measured file."""
    started, cap = time.perf_counter(), parse_budget(config.budget, model.parameters)
    floor, job = _check_floor(frame, cap), job_of(model, config)
    items = calibrated(job, frame.layout, frame.types, CODING)
    plain = solve(job, cap - frame.fixed, items)
    tuned = job.recover is not None and not config.dry_run
    found, record = tune_blocks(job, frame.layout, items, CODING, plain) if tuned else (plain, {})
    output = None if config.output is None or config.dry_run else Path(config.output)
    result = _finish(job, frame, items, (found, plain), output)
    result.report |= {"recovery": record} if record else {}
    result.report |= {"floor_bytes": floor, "seconds": round(time.perf_counter() - started, 3)}
    if config.emit is not None:
        write_atomically(type_lines(result.types).encode(), Path(config.emit))
        result.report["emitted"] = str(config.emit)
    return result


def _frame(
    model: Model, menu: tuple[str, ...], pure: bool, template: GgufTemplate | None, reporter: Reporter
) -> _Frame:
    """Names, metadata, what types compete for, and the bytes of the rest."""
    layout = template.layout if template is not None else layout_of(model)
    types, other = {}, []
    for place in layout.places:
        if place.matrix and place.unit:
            types[place.name], changed = allowed(place, menu, pure=pure)
            other += [place] if changed else []
    if other:
        reporter.note(
            f"{len(other)} tensors such as {other[0].name} have rows of {other[0].cols} columns, which the chosen "
            f"types cannot hold: they take one of {', '.join(types[other[0].name]).lower()}"
        )
    narrow = [p for p in layout.places if p.name in types and p.cols % WIDE]
    if narrow:
        reporter.note(
            f"{len(narrow)} of {len(types)} matrices have rows that are no multiple of {WIDE} columns "
            f"({narrow[0].name}: {narrow[0].cols}): only types with blocks of 32 can hold them, none below "
            f"{_narrowest():g} bits"
        )

    describe = describer(model, layout, None if template is None else template.write_keys)
    blank = [_stored(p, None, types) for p in layout.places]
    head = file.head_bytes(layout.architecture, describe, blank)
    rest = sum(file.padded(b.bytes) for b in blank if b.name not in types)
    return _Frame(layout, describe, types, head, rest)


def _stored(place: Place, type_: str | None, types: Mapping[str, tuple[str, ...]], data: Any = None) -> file.Stored:
    """A place in a type: its own, the smallest that may hold it, or F32 where types do not compete."""
    name = type_ or (types[place.name][0] if place.name in types else "F32")
    return file.Stored(place.name, place.shape, name, data)


def _check_floor(frame: _Frame, cap: int) -> int:
    """The smallest reachable file; refuses a cap below it, naming who holds the floor and what goes lower."""
    matrices = [p for p in frame.layout.places if p.name in frame.types]
    least = {p.name: _least(p, frame.types[p.name]) for p in matrices}
    floor = frame.fixed + sum(n for n, _ in least.values())
    if floor <= cap:
        return floor
    top = sorted(least, key=lambda n: -least[n][0])[:3]
    free = {p.name: _least(p, allowed(p, parse_types(None), pure=False)[0]) for p in matrices}
    lowest = frame.fixed + sum(n for n, _ in free.values())
    kinds = sorted({free[n][1].lower() for n in free if free[n][0] < least[n][0]})
    lower = (
        f"--types {','.join(kinds)} would go down to {lowest:,}" if kinds else "no GGUF type is smaller for any of them"
    )
    narrow = [p.name for p in matrices if p.cols % WIDE]
    if narrow:
        lower += f", {len(narrow)} have rows that are no multiple of {WIDE} and stop at {_narrowest():g} bits"
    raise BudgetError(
        f"a budget of {cap:,} bytes is below the floor of {floor:,} of this format: metadata and tokenizer hold "
        f"{frame.head:,}, tensors in float32 {frame.rest:,}, the largest others "
        f"{', '.join(f'{n} {least[n][0]:,} as {least[n][1].lower()}' for n in top)}; {lower}; a .bcap file goes lower",
        floor,
    )


def _least(place: Place, types: Sequence[str]) -> tuple[int, str]:
    """Bytes of the smallest of some types, and which it is."""
    rows = place.parameters // place.cols
    return min((file.padded(file.type_bytes(t, rows, place.cols)), t) for t in types)


def _narrowest() -> float:
    """Bits of the smallest type for rows of 32 columns."""
    return min(f.bits for f in FORMATS.values() if f.block < WIDE)


def _finish(
    job: Job, frame: _Frame, items: Sequence[Item], found: tuple[Found, Found], output: Path | None
) -> RuntimeModel:
    """Write the file, read it back, measure it; the second plan is what would have been written without recovery."""
    best, plain = found
    types = {n: WHOLE[int(p.setting)] for n, p in best.plan.choice.items()}
    size = frame.fixed + int(best.plan.rate)
    report = _report(job, frame, items, best, types, size)
    result = RuntimeModel(report, types)
    if job.dry_run:
        return result
    with tempfile.TemporaryDirectory() as name:
        path = output or Path(name) / "model.gguf"
        written = file.write(path, frame.layout.architecture, frame.describe, _tensors(job.model, frame, types, best))
        assert written == size == path.stat().st_size <= job.budget  # noqa: S101 (planned to the byte)
        if output is not None:
            result.path = output
            job.reporter.note(f"wrote {output}: {format_size(size)}")
        result.entries = file.ledger(path)
        measured = _measured(job, frame, path)
        if best is not plain:
            other = Path(name) / "plain.gguf"
            file.write(other, frame.layout.architecture, frame.describe, _tensors(job.model, frame, types, plain))
            report["without_recovery"] = gain(measured.parts, _measured(job, frame, other).parts)
    report |= quality(measured.parts, measured.held)
    report["largest_units"] = [(x.unit, x.bytes) for x in by_unit(result.entries)[:5]]
    say_narrow(job, report)
    result.windows = measured.windows
    return result


def _tensors(model: Model, frame: _Frame, types: Mapping[str, str], found: Found) -> list[file.Stored]:
    """All tensors with their bytes, which are made as they are written where the model is streamed."""

    def one(p: Place) -> file.Stored:
        if p.name in types:
            return _stored(p, types[p.name], frame.types, data_of(types[p.name], found.rounded[p.name]))
        if p.name in found.vectors:
            return _stored(p, None, frame.types, file.encode_plain("F32", found.vectors[p.name]))
        return exact(model, p)

    def later(p: Place) -> file.Stored:
        return _stored(p, types.get(p.name), frame.types, lambda: one(p).data)

    if isinstance(model, StreamedModel):
        return [later(p) for p in frame.layout.places]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(one, frame.layout.places))


def _measured(job: Job, frame: _Frame, path: Path) -> Comparisons:
    """Scores of a file on disk."""
    read: Callable[..., Values] = file.read_each if isinstance(job.model, StreamedModel) else file.read_units
    values: Values = read(path, frame.layout, job.model.units)
    return measure(job.model, values, job.sets, job.device, job.reporter)


def _report(
    job: Job, frame: _Frame, items: Sequence[Item], found: Found, types: Mapping[str, str], size: int
) -> dict[str, Any]:
    counts = Counter(types.values())
    return {
        "format": "gguf", "architecture": frame.layout.architecture,
        "plan": ", ".join(f"{n} {t.lower()}" for t, n in sorted(counts.items(), key=lambda x: WHOLE.index(x[0]))),
        "head_bytes": frame.head, "float_bytes": frame.rest, "types": dict(types),
    } | figures(job, items, found, size)  # fmt: skip


def imatrix_of(
    model: Path | str, path: Path, *, calibration: Paths, tokens: int | None, guided: bool, device: str, seed: int,
    reporter: Reporter,
) -> tuple[int, int]:  # fmt: skip
    """Calibrate a model and write its importance matrix; returns bytes and tensors."""
    loaded, target = load_checkpoint(model), choose_device(device)
    layout = layout_of(loaded)
    sets = load_sets(
        loaded, calibration, None, tokens=tokens or TOKENS, evaluation_tokens=0, correction_tokens=0, seed=seed,
        reporter=reporter,
    )  # fmt: skip
    found = moments(Job(loaded, sets, 0, lambda *_: 0, target, reporter, FitConfig(0, seed=seed)), guided=guided)
    weights = importance(loaded, layout, found)
    names = [str(p) for p in as_paths(calibration)] or ["embedded"]
    return write_imatrix(path, weights, found.tokens, names), len(weights)
