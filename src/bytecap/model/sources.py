"""Load the texts of a job as token windows, with samples and embedded texts where none are given.

Without `--calib` the model's own samples and the embedded general text are used, without `--eval` documents of the
general text that calibration never reads; the embedded model has texts of its own. The job says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bytecap.errors import TextError, UsageError
from bytecap.model.calibration_text import (
    GENERAL,
    SELF,
    SELF_MOST,
    SELF_SHARE,
    WORDS,
    Sampler,
    Source,
    general,
    parse,
    texts_of,
)
from bytecap.model.checkpoint import Model, demo_directory
from bytecap.model.defaults import EVALUATION_TOKENS, SAMPLED_TOKENS, SAMPLED_WORK, TOKENS, WINDOW
from bytecap.model.inputs import check_causal, facts, run_as_configured, vocabulary_of
from bytecap.model.linears import of_transformers
from bytecap.model.texts import (
    Encoder,
    Text,
    TokenSets,
    Window,
    leading,
    load_documents,
    load_text,
    split_sets,
    tokenizer_encoder,
)
from bytecap.model.tokenization import read_tokenizer
from bytecap.progress import Reporter, warn

Paths = str | Path | Iterable[str | Path] | None

CORRECTION_TOKENS = 8_192
RECOVERY_TOKENS = 2**23  # most of them
DEMO = "demo"
_BEGINNING = 8  # tokens by which windows are told apart


def encoder(files: dict[str, bytes]) -> Encoder:
    """Return the encoder of documents from a model's side files.

    Raises:
        CheckpointError: there is no readable tokenizer.
    """
    return tokenizer_encoder(read_tokenizer(files), first_token(files))


def first_token(files: dict[str, bytes]) -> int | None:
    """Return the token put in front of every document: the config's `bos_token_id`, if it names one."""
    return facts(files).first


def window_limit(model: Model, window: int) -> int:
    """Return the window length that the model's positions allow."""
    return min(window, facts(model.files).positions or window)


def check_model(model: Model) -> None:
    """Refuse a model that is not causal, before any work.

    Raises:
        CheckpointError: it sees the next token.
    """
    with run_as_configured(model.name):
        check_causal(model.module, model.name, vocabulary_of(model.module), facts(model.files).positions)


def as_paths(paths: Paths) -> list[Path]:
    """Return one path or several as a list.

    Raises:
        UsageError: something else than a path is among them.
    """
    if paths is None:
        return []
    if isinstance(paths, str | Path):
        return [Path(paths)]
    found = list(paths)
    for path in found:
        if not isinstance(path, str | Path):
            raise UsageError(f"a checkpoint is calibrated on text files; {type(path).__name__} is no name of one")
    return [Path(path) for path in found]


def embedded(
    calibration: Sequence[Path], evaluation: Sequence[Path], *, own: bool = False, evaluates: bool = True
) -> str:
    """Say what stands in where texts are missing; nothing where both are given.

    `own`: the model has texts of its own. `evaluates`: a text for evaluation is read.

    >>> embedded([], [Path("a.txt")])
    'no --calib given: samples of the model itself and the embedded general text stand in'
    """
    needs = (("--calib", calibration, True), ("--eval", evaluation, evaluates))
    missing = [n for n, given, needed in needs if needed and not given]
    if own and missing:
        return f"no {' and no '.join(missing)} given: the embedded SQLite documentation stands in"
    said = []
    if "--calib" in missing:
        said.append("no --calib given: samples of the model itself and the embedded general text stand in")
    if "--eval" in missing:
        said.append("no --eval given: documents of the embedded general text that nothing is fitted on stand in")
    return "; ".join(said)


def named(
    calibration: Paths, evaluation: Paths, reporter: Reporter, models: Iterable[Any] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of calibration and evaluation texts, and warn where embedded ones stand in."""
    calib, held = as_paths(calibration), as_paths(evaluation)
    if missing := embedded(calib, held, own={str(m) for m in models} == {DEMO}):
        warn(reporter, missing)
    return tuple(map(str, calib)), tuple(map(str, held))


def load_sets(
    model: Model,
    calibration: Paths,
    evaluation: Paths,
    *,
    window: int = WINDOW,
    tokens: int | None = None,
    evaluation_tokens: int = EVALUATION_TOKENS,
    correction_tokens: int = CORRECTION_TOKENS,
    seed: int = 0,
    device: str = "cpu",
    sampler: Sampler | None = None,
    reporter: Reporter,
) -> TokenSets:
    """Load the three disjoint token sets of a job.

    Args:
        model: whose tokenizer is used.
        calibration: text files for statistics and correction factors, or words, see `bytecap.model.calibration_text`.
        evaluation: text files nothing is fitted on.
        window: predicted tokens in a window.
        tokens: most tokens for statistics; `default_tokens` by default.
        evaluation_tokens: most tokens for evaluation, over all texts; with 0 no text is read for it.
        correction_tokens: most tokens for correction factors and other measurements besides; may be 0.
        seed: order in which calibration windows are drawn.
        device: torch device that `self` is sampled on.
        sampler: gives windows sampled from the model; `sampled` by default.
        reporter: told when embedded texts stand in.
    """
    check_model(model)
    encode, known = encoder(model.files), vocabulary_of(model.module)
    window, calib, held = window_limit(model, window), as_paths(calibration), as_paths(evaluation)
    tokens = tokens or default_tokens(model, calib, device)
    wanted = tokens + correction_tokens
    evaluates = evaluation_tokens > 0
    if missing := embedded(calib, held, own=model.name == DEMO, evaluates=evaluates):
        warn(reporter, f"{missing}; quality on your text depends on it")
    if model.name == DEMO:
        calib, held = calib or [demo_directory() / "calib.txt"], held or [demo_directory() / "val.txt"]
    sources = parse(calib) if calib else default_sources(model, wanted, device)
    shares = {s.name: max(1, round(wanted * s.weight / sum(x.weight for x in sources))) for s in sources}
    draw = sampler or partial(sampled, model, window=window, seed=seed, device=device, reporter=reporter)
    evaluated: list[Text] = []
    if evaluates:
        most = max(1, evaluation_tokens // max(1, len(held)))
        evaluated = [load_text(p, encode, window=window, limit=most, vocabulary=known) for p in held] or [
            load_documents(GENERAL, general(held=True), encode, window=window, limit=most, vocabulary=known)
        ]
    sets = split_sets(
        texts_of(sources, encode, draw, window=window, shares=shares, vocabulary=known), evaluated,
        tokens=tokens, correction_tokens=correction_tokens, seed=seed, weights=[s.weight for s in sources],
    )  # fmt: skip
    report_sets(sets, reporter)
    return sets


def _streams(model: Model) -> bool:
    """Return whether a model's values stay on disk; torch is imported here, so that names of texts need none."""
    from bytecap.model import streaming

    return streaming.of(model.module) is not None


def default_tokens(model: Model, calibration: Sequence[Path], device: str) -> int:
    """Most tokens for statistics: more where they are samples made on a GPU, which cost little and overfit less.

    Args:
        model: larger models get fewer, since every token is a pass through all parameters.
        calibration: texts that are given.
        device: torch device.
    """
    if calibration or model.name == DEMO or device != "cuda" or not of_transformers(model.module):
        return TOKENS
    affordable = int(SAMPLED_WORK / model.parameters)
    return max(TOKENS, min(SAMPLED_TOKENS, affordable))


def default_sources(model: Model, wanted: int, device: str) -> tuple[Source, ...]:
    """Sources where no calibration text is given: the model's own samples, where it can be sampled, and `general`.

    Sampling is slow on a processor, so samples are fewer there; weights follow, and nothing is read twice.
    """
    if not _can_be_sampled(model):
        return (Source(GENERAL),)
    own = min(SELF_SHARE * wanted, SELF_MOST[device])
    return (Source(SELF, own / wanted), Source(GENERAL, 1 - own / wanted))


def sampled(
    model: Model,
    tokens: int,
    *,
    window: int,
    seed: int,
    device: str,
    reporter: Reporter,
    firsts: Sequence[int] | None = None,
) -> tuple[Window, ...]:
    """Sample windows from the model, each from a first token drawn evenly.

    Args:
        model: of transformers.
        tokens: at least so many predicted tokens together.
        window: predicted tokens in a window.
        seed: of the sampling.
        device: torch device to sample on.
        reporter: told about progress.
        firsts: tokens that windows may begin with; the whole vocabulary by default.

    Raises:
        UsageError: the model cannot be sampled from.
    """
    from bytecap.model.sampling import sample

    if _streams(model):
        raise UsageError(f"{SELF} samples token by token, which takes a model that is in memory; give a text instead")
    rows = vocabulary_of(model.module)
    if not of_transformers(model.module) or (firsts is None and rows is None):
        raise UsageError(f"{SELF} samples from a language model of transformers, and this is none; give a text instead")
    with reporter.step("sampling", 1):
        model.module.to(device)
        return sample(model.module, firsts or range(rows or 0), tokens, window=window, seed=seed, device=device)


def recovery_texts(model: Model, calibration: Sequence[Path]) -> list[Path]:
    """Return the texts to recover on where none are named: the calibration's, or what stands in for them.

    Weights do not count: recovery reads far more than statistics, and every source has to give all it has.
    """
    if calibration:
        return [Path(s.name) for s in parse(calibration)]
    if model.name == DEMO:
        return [demo_directory() / "calib.txt"]
    return [Path(word) for word in WORDS if word == GENERAL or _can_be_sampled(model)]


def _can_be_sampled(model: Model) -> bool:
    """Whether a model writes text of its own: one that is streamed would be read anew for every token."""
    return of_transformers(model.module) and not _streams(model)


def with_recovery(
    model: Model,
    sets: TokenSets,
    texts: Paths,
    *,
    window: int = WINDOW,
    seed: int = 0,
    device: str = "cpu",
    sampler: Callable[..., Sequence[Window]] | None = None,
    reporter: Reporter,
) -> TokenSets:
    """Add windows of texts to recover on to the sets, without those that evaluation and correction hold.

    Windows are told apart by how they begin: of a text that was read in part only, the last one may be cut short.

    Args:
        model: whose tokenizer is used.
        sets: the other sets.
        texts: text files, or the words `self` and `general`; none leaves the sets as they are.
        window: predicted tokens in a window.
        seed: order of the windows, and of the sampling.
        device: torch device to sample on.
        sampler: gives windows with at least so many tokens, sampled from the model, that begin with any of `firsts`;
            `sampled` by default.
        reporter: told how many tokens there are.

    Raises:
        TextError: nothing is left.
        UsageError: the model cannot be sampled from.
    """
    paths = as_paths(texts)
    if not paths:
        return sets
    length, sources = window_limit(model, window), parse(paths)
    draw = sampler or partial(sampled, model, window=length, seed=seed, device=device, reporter=reporter)
    firsts = sorted({w.tokens[0] for w in sets.statistics})
    share = RECOVERY_TOKENS // len(sources)
    read = texts_of(
        sources, encoder(model.files),
        lambda tokens: draw(tokens, firsts=firsts), window=length,
        shares={s.name: SELF_MOST[device] if s.name == SELF else share for s in sources},
        vocabulary=vocabulary_of(model.module),
    )  # fmt: skip
    found = {w.tokens: w for t in read for w in t.windows}
    taken = {w.tokens[:_BEGINNING] for held in (sets.correction, *(t.windows for t in sets.evaluation)) for w in held}
    left = [w for tokens, w in found.items() if tokens[:_BEGINNING] not in taken]
    if not left:
        raise TextError(f"the recovery text {paths[0]} holds nothing that evaluation does not hold as well")
    random.Random(seed).shuffle(left)  # noqa: S311 (sampling, not cryptography)
    recovery = tuple(leading(left, RECOVERY_TOKENS))
    dropped = f" ({len(found) - len(left)} windows of other sets dropped)" if len(left) < len(found) else ""
    reporter.note(f"tokens: {_count(recovery):,} for recovery{dropped}")
    return replace(sets, recovery=recovery)


def report_sets(sets: TokenSets, reporter: Reporter) -> None:
    """Say what the sets hold; of sets that the job does without, nothing."""
    counts = {
        "statistics": _count(sets.statistics), "correction factors": _count(sets.correction),
        "evaluation": sum(t.tokens for t in sets.evaluation),
    }  # fmt: skip
    held = [f"{n:,} for {what}" for what, n in counts.items() if n]
    disjoint = {2: "; the two sets are disjoint", 3: "; the three sets are disjoint"}.get(len(held), "")
    dropped = f" ({sets.dropped} repeated windows dropped)" if sets.dropped else ""
    reporter.note(f"tokens: {', '.join(held)}{disjoint}{dropped}")


def _count(windows: Any) -> int:
    return sum(w.predicted for w in windows)
