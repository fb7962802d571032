"""List models that compete under caps, with their floors and the bytes on which all of them are scored.

Every model is scored on the same bytes: the texts are cut into the same pieces before any tokenizer sees them. A model
without a leading token gives no probability to the first token of a piece; it pays for that token as if all of its
vocabulary were equally likely, so that each figure is the length of a code for the whole text. A tokenizer that loses
part of the text (capitals, accents, spaces) would make it shorter, so its model is left out.

`plan` stops there: it says what `choose` would fit, in seconds instead of hours. Omitted: fits (`choose.py`).
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bytecap.errors import BudgetError, BytecapError, TextError, UsageError
from bytecap.job.config import FitConfig
from bytecap.model import tokenizer as door
from bytecap.model.calibration_text import general
from bytecap.model.checkpoint import Model, load_checkpoint
from bytecap.model.defaults import WINDOW
from bytecap.model.evaluation import evaluate
from bytecap.model.inputs import vocabulary_of
from bytecap.model.sources import Paths, as_paths, check_model, encoder, first_token, window_limit
from bytecap.model.texts import check_known, load_text, read_documents
from bytecap.model.tokenization import read_tokenizer
from bytecap.pipeline.artifact import Artifact
from bytecap.pipeline.stages import check, choose_device, open_model
from bytecap.progress import Reporter, reporter_for, warn
from bytecap.sizes import parse_size

EVALUATION_BYTES = 65_536
SHORT_TOKENS = 8_192
FINALISTS = 2
_LOST = 1e-3  # share of a text's characters that a tokenizer may change, such as a space in front or composed accents


@dataclass
class Entry:
    """One model on its way through the steps.

    Attributes:
        given: the model, as it was given.
        name: for tables.
        rows: figures by budget in bytes.
        whole: whole fits by budget in bytes.
        short: short fits by budget in bytes, which stand in for whole ones that fail.
        original: bits per byte of the model before any coding, infinite until it is scored.
    """

    given: str
    name: str
    rows: dict[int, dict[str, Any]]
    whole: dict[int, Artifact] = field(default_factory=dict)
    short: dict[int, Artifact] = field(default_factory=dict)
    original: float = math.inf

    def out(self, reason: str, budgets: Iterable[int] | None = None) -> None:
        """Leave the model out, at some budgets or at all that nothing else has been said about."""
        for budget in self.rows if budgets is None else budgets:
            self.rows[budget].setdefault("out", reason)

    def left(self) -> list[int]:
        """Budgets that the model is still in for."""
        return [b for b, row in self.rows.items() if "out" not in row]


@dataclass(frozen=True)
class Toll:
    """The part of a text that a model gives no probability to: first tokens where there is no leading one.

    Attributes:
        bytes: of the whole text.
        unscored: bytes of those tokens.
        bits: paid for them.
        tokens: of the whole text.
    """

    bytes: int
    unscored: int
    bits: float
    tokens: int = 0


@dataclass(frozen=True)
class Limits:
    """How much of the text is compared on, and how many models are fitted how well."""

    evaluation_bytes: int
    short_tokens: int
    finalists: int

    def __post_init__(self) -> None:
        if min(self.evaluation_bytes, self.short_tokens, self.finalists) < 1:
            raise UsageError("evaluation_bytes, short_tokens and finalists are at least 1")


def contenders(models: Sequence[Path | str], caps: Sequence[int]) -> list[Entry]:
    """Return the models with their names."""
    given = [models] if isinstance(models, str | Path) else list(models)
    if not given:
        raise UsageError("give at least one MODEL (demo is the embedded one) to choose from")
    seen: dict[str, str] = {}
    for model in map(str, given):
        place = str(Path(model).resolve()) if Path(model).exists() else model
        if place in seen:
            raise UsageError(
                f"the model {model} is named twice" + (f" (as {seen[place]})" if seen[place] != model else "")
            )
        seen[place] = model
    short = [Path(m).name or str(m) for m in given]
    names = [s if short.count(s) == 1 else str(m) for s, m in zip(short, given, strict=True)]
    return [
        Entry(str(m), n, {b: {"model": n, "budget_bytes": b} for b in caps}) for m, n in zip(given, names, strict=True)
    ]


def pieces(paths: Sequence[Path], most: int, place: Path, reporter: Reporter) -> list[Path]:
    """Write the bytes that every model is scored on: an even part of the front of every document."""
    if not paths:
        warn(reporter, "no --eval given: documents of the embedded general text stand in; the best depends on the text")
    read = [(p.name, read_documents(p)) for p in paths] or [("general.txt", general(held=True))]
    found = []
    for number, (name, documents) in enumerate(read):
        share = min(1.0, most / len(read) / sum(len(d.encode()) for d in documents))
        cut = [d.encode()[: max(1, int(len(d.encode()) * share))].decode(errors="ignore") for d in documents]
        if not any(d.strip() for d in cut):
            raise TextError(f"{most} bytes of {name} hold no text: compare on more")
        folder = place / str(number)
        folder.mkdir()
        (folder / name).write_bytes("\f".join(d for d in cut if d.strip()).encode())
        found.append(folder / name)
    return found


def toll_of(model: Model, path: Path) -> Toll:
    """Return what a model leaves unscored of a text."""
    documents = read_documents(path)
    whole, first, unscored, tokens = sum(len(d.encode()) for d in documents), first_token(model.files), 0, 0
    vocabulary, tokenizer, lost = vocabulary_of(model.module), read_tokenizer(model.files), 0
    for document, (ids, sizes) in zip(documents, encoder(model.files)(documents), strict=True):
        if not ids[first is not None :]:
            raise TextError(f"the tokenizer of {model.name} gives no token for a document of {path.name}")
        check_known(ids, vocabulary, path.name)
        lost += _lost(tokenizer, document, ids)
        unscored += sizes[0]
        tokens += len(ids)
    if lost > _LOST * sum(map(len, documents)):
        raise TextError(
            f"the tokens of {model.name} do not give back {lost:,} characters of {path.name} (its tokenizer changes "
            "case, accents or spaces, or lacks letters), so its bits per byte are of another text"
        )
    missing = len(documents) if first is None else 0
    return Toll(whole, unscored, missing * math.log2(vocabulary or 1), tokens)


def _lost(tokenizer: Any, document: str, ids: Sequence[int]) -> int:
    """Return how many characters of a document its tokens do not give back, wherever they stood."""
    if getattr(tokenizer, "decoder", None) is not None:
        back = door.decode(tokenizer, ids)
    else:
        back = tokenizer.normalizer.normalize_str(document) if tokenizer.normalizer is not None else document
    return sum((Counter(document) - Counter(back)).values())


def _check_floors(entry: Entry, model: Model, config: FitConfig) -> None:
    """Leave a model out at caps below its smallest file."""
    asked = check(config)
    for budget, row in entry.rows.items():
        row["parameters"] = model.parameters
        try:
            row["floor_bytes"] = open_model(replace(asked, config=replace(config, budget=budget)), model).floor
        except BudgetError as exc:
            row |= {"floor_bytes": exc.floor, "below_floor": True}
            entry.out(f"its smallest file has {exc.floor:,} bytes", [budget])


def consider(entry: Entry, config: FitConfig, reporter: Reporter, use: Callable[[Model], object]) -> None:
    """Read a model, look at its floors and go on with it; where that fails it is left out, and the reason is said."""
    reporter.note(f"{entry.name}: reading")

    def work() -> None:
        model = load_checkpoint(entry.given)
        _check_floors(entry, model, config)
        use(model)

    attempt(entry, reporter, work)


def attempt(entry: Entry, reporter: Reporter, work: Callable[[], object]) -> None:
    """Do something with a model; where that fails the model is left out, and the reason is said."""
    try:
        work()
    except BytecapError as exc:
        entry.out(str(exc))
        warn(reporter, f"{entry.name} is left out: {exc}")


def original_bits(entry: Entry, model: Model, config: FitConfig, reporter: Reporter) -> None:
    """Score a model before any coding, on the bytes on which its files are scored."""
    check_model(model)
    encode, known, window = encoder(model.files), vocabulary_of(model.module), window_limit(model, config.window)
    device, found = choose_device(config.device), list[float]()
    model.module.to(device)
    for path in as_paths(config.evaluation):
        toll, text = toll_of(model, path), load_text(path, encode, window=window, vocabulary=known)
        with reporter.step(f"original on {text.name}", text.tokens) as advance:
            score = evaluate(model.module, text, device=device, progress=advance)
        found.append((score.nats * score.tokens / math.log(2) + toll.bits) / toll.bytes)
    entry.original = sum(found) / len(found)
    for row in entry.rows.values():
        row["bpb_original"] = entry.original


def check_any(entries: Sequence[Entry], cap: int) -> None:
    """Refuse a cap that no model fits."""
    if any(cap in e.left() for e in entries):
        return
    reasons = "; ".join(f"{e.name}: {e.rows[cap]['out']}" for e in entries)
    floors = [int(e.rows[cap]["floor_bytes"]) for e in entries if e.rows[cap].get("below_floor")]
    if floors:
        raise BudgetError(f"no model fits {cap:,} bytes. {reasons}", min(floors))
    raise UsageError(f"no model can be fitted. {reasons}")


def _count(entry: Entry, texts: Sequence[Path], model: Model) -> None:
    """Note how many tokens the texts have for a model."""
    tokens = sum(toll_of(model, t).tokens for t in texts)
    for row in entry.rows.values():
        row["evaluation_tokens"] = tokens


def plan(
    models: Sequence[Path | str],
    budget: int | str,
    *,
    evaluation: Paths = None,
    budgets: Sequence[int | str] = (),
    evaluation_bytes: int = EVALUATION_BYTES,
    short_tokens: int = SHORT_TOKENS,
    finalists: int = FINALISTS,
    window: int = WINDOW,
    method: str = "bytecap",
    device: str = "auto",
    progress: bool | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Say which models can meet which caps, and what `choose` would fit; nothing is fitted.

    The arguments are those of `bytecap.choose`.

    Returns:
        What `--dry-run --json` prints: `rows`, one for each model and cap, with `parameters`, `floor_bytes`,
        `bits_per_parameter` of the cap, `evaluation_tokens`, and `out` or `planned`; at most how many `short_fits` and
        `whole_fits` there would be.

    Raises:
        UsageError: no model, a model twice, or an option that cannot be understood. BudgetError: no model fits the cap.
    """
    cap, said = parse_size(budget), reporter_for(reporter, progress)
    caps, limits = sorted({cap, *map(parse_size, budgets)}), Limits(evaluation_bytes, short_tokens, finalists)
    entries = contenders(models, caps)
    with tempfile.TemporaryDirectory(prefix="bytecap-") as place:
        texts = pieces(as_paths(evaluation), limits.evaluation_bytes, Path(place), said)
        config = FitConfig(
            cap, evaluation=list(texts), tokens=short_tokens, window=window, method=method, device=device, reporter=said
        )
        check(config)
        for entry in entries:
            consider(entry, config, said, partial(_count, entry, texts))
        size = sum(len(d.encode()) for t in texts for d in read_documents(t))
    check_any(entries, cap)
    left = {b: [e for e in entries if b in e.left()] for b in caps}
    for b, there in left.items():
        planned = "short and whole fit" if len(there) <= finalists else f"short fit, the best {finalists} whole"
        for e in there:
            e.rows[b] |= {"bits_per_parameter": 8 * b / e.rows[b]["parameters"], "planned": planned}
    return {
        "dry_run": True, "budget_bytes": cap, "budgets": caps, "rows": [r for e in entries for r in e.rows.values()],
        "short_fits": sum(map(len, left.values())),
        "whole_fits": sum(min(finalists, len(there)) for there in left.values()),
        "evaluation": [str(p) for p in as_paths(evaluation)], "evaluation_bytes": size, "method": method,
    }  # fmt: skip
