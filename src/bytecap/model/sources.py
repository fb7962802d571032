"""Model and texts of a job: tokenizer, windows, and the embedded texts as a stand-in.

Without `--calib` or `--eval` the embedded model's own texts are used, and the job says so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bytecap.errors import CheckpointError, TextError, UsageError
from bytecap.model.checkpoint import Model, demo_directory
from bytecap.model.linears import of_transformers
from bytecap.model.sampling import sample
from bytecap.model.texts import Encoder, TokenSets, Window, leading, load_text, split_sets, tokenizer_encoder
from bytecap.progress import Reporter

Paths = str | Path | Sequence[str | Path] | None

WINDOW = 512
TOKENS = 131_072  # statistics; results/calibration.jsonl has the curve behind this number
CORRECTION_TOKENS = 8_192
EVALUATION_TOKENS = 32_768
RECOVERY_TOKENS = 2**23  # most of them
SELF = "self"  # in place of a text to recover on: the model's own samples
SELF_TOKENS = {"cpu": 2**15, "cuda": 2**20}
_BEGINNING = 8  # tokens by which windows are told apart


def encoder(files: dict[str, bytes]) -> Encoder:
    """Encoder of documents from a model's side files.

    Raises:
        CheckpointError: there is no readable `tokenizer.json`.
    """
    if "tokenizer.json" not in files:
        raise CheckpointError("the model has no tokenizer.json, so texts cannot be turned into tokens")
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        raise CheckpointError("texts need the extra packages: pip install 'bytecap[hf]'") from exc
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    except Exception as exc:
        raise CheckpointError(f"tokenizer.json cannot be read: {exc}") from exc
    return tokenizer_encoder(tokenizer, first_token(files))


def first_token(files: dict[str, bytes]) -> int | None:
    """Token put in front of every document: the config's `bos_token_id`, if it names one."""
    import json

    config: dict[str, Any] = json.loads(files.get("config.json", b"{}"))
    token = config.get("bos_token_id")
    return token if isinstance(token, int) else None


def window_limit(model: Model, window: int) -> int:
    """Window length the model's positions allow."""
    positions = model.config().get("max_position_embeddings") or model.config().get("n_positions")
    return min(window, int(positions)) if positions else window


def as_paths(paths: Paths) -> list[Path]:
    """One path or several, as a list."""
    if paths is None:
        return []
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]


def embedded(calibration: Sequence[Path], evaluation: Sequence[Path]) -> str:
    """Where embedded texts stand in, as a warning; nothing where both are given.

    >>> embedded([], [Path("a.txt")])
    'warning: no --calib given: the embedded SQLite documentation stands in'
    """
    missing = [n for n, given in (("--calib", calibration), ("--eval", evaluation)) if not given]
    return (
        f"warning: no {' and no '.join(missing)} given: the embedded SQLite documentation stands in" if missing else ""
    )


def named(calibration: Paths, evaluation: Paths, reporter: Reporter) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of calibration and evaluation texts, for settings; says where embedded ones stand in."""
    calib, held = as_paths(calibration), as_paths(evaluation)
    if missing := embedded(calib, held):
        reporter.note(missing)
    return tuple(map(str, calib)), tuple(map(str, held))


def load_sets(
    model: Model,
    calibration: Paths,
    evaluation: Paths,
    *,
    window: int = WINDOW,
    tokens: int = TOKENS,
    evaluation_tokens: int = EVALUATION_TOKENS,
    correction_tokens: int = CORRECTION_TOKENS,
    seed: int = 0,
    reporter: Reporter,
) -> TokenSets:
    """The three disjoint token sets of a job.

    Args:
        model: whose tokenizer is used.
        calibration: text files for statistics and correction factors.
        evaluation: text files nothing is fitted on.
        window: predicted tokens in a window.
        tokens: most tokens for statistics.
        evaluation_tokens: most tokens for evaluation, over all texts.
        correction_tokens: most tokens for correction factors and other measurements besides.
        seed: order in which calibration windows are drawn.
        reporter: told when embedded texts stand in.
    """
    encode = encoder(model.files)
    window = window_limit(model, window)
    calib, held = as_paths(calibration), as_paths(evaluation)
    if missing := embedded(calib, held):
        reporter.note(f"{missing}, and quality on your text depends on it")
    calib = calib or [demo_directory() / "calib.txt"]
    held = held or [demo_directory() / "val.txt"]
    share = 2 * (tokens + correction_tokens) // len(calib)
    sets = split_sets(
        [load_text(p, encode, window=window, limit=share) for p in calib],
        [load_text(p, encode, window=window, limit=max(1, evaluation_tokens // len(held))) for p in held],
        tokens=tokens, correction_tokens=correction_tokens, seed=seed,
    )  # fmt: skip
    _check_vocabulary(model, sets)
    report_sets(sets, reporter)
    return sets


def with_recovery(
    model: Model,
    sets: TokenSets,
    texts: Paths,
    *,
    window: int = WINDOW,
    seed: int = 0,
    device: str = "cpu",
    reporter: Reporter,
) -> TokenSets:
    """The sets with windows of texts to recover on; what evaluation and correction hold is left out.

    Windows are told apart by how they begin: of a text that was read in part only, the last one may be cut short.

    Args:
        model: whose tokenizer is used.
        sets: the other sets.
        texts: text files; none leaves the sets as they are; the word `self` samples windows from the model.
        window: predicted tokens in a window.
        seed: order of the windows, and of the sampling.
        device: torch device to sample on.
        reporter: told how many tokens there are.

    Raises:
        TextError: nothing is left.
        UsageError: the model cannot be sampled from.
    """
    paths = as_paths(texts)
    if not paths:
        return sets
    length, found = window_limit(model, window), {}
    if paths == [Path(SELF)]:
        found = {w.tokens: w for w in _sampled(model, sets, length, seed, device, reporter)}
    else:
        encode, share = encoder(model.files), 2 * RECOVERY_TOKENS // len(paths)
        found = {w.tokens: w for p in paths for w in load_text(p, encode, window=length, limit=share).windows}
    taken = {w.tokens[:_BEGINNING] for held in (sets.correction, *(t.windows for t in sets.evaluation)) for w in held}
    left = [w for tokens, w in found.items() if tokens[:_BEGINNING] not in taken]
    if not left:
        raise TextError(f"the recovery text {paths[0]} holds nothing that evaluation does not hold as well")
    random.Random(seed).shuffle(left)  # noqa: S311 (sampling, not cryptography)
    recovery = tuple(leading(left, RECOVERY_TOKENS))
    dropped = f" ({len(found) - len(left)} windows of other sets dropped)" if len(left) < len(found) else ""
    reporter.note(f"tokens: {_count(recovery):,} for recovery{dropped}")
    return replace(sets, recovery=recovery)


def _sampled(
    model: Model, sets: TokenSets, window: int, seed: int, device: str, reporter: Reporter
) -> tuple[Window, ...]:
    """Windows that the model makes up, each from a token with which a calibration window begins."""
    if not of_transformers(model.module):
        raise UsageError("--recover-text self samples from a model of transformers; give a text instead")
    with reporter.step("sampling", 1):
        firsts = sorted({w.tokens[0] for w in sets.statistics})
        model.module.to(device)
        tokens = SELF_TOKENS[device]
        return sample(model.module, firsts, tokens, window=window, seed=seed, device=device)


def report_sets(sets: TokenSets, reporter: Reporter) -> None:
    """Say what the sets hold."""
    reporter.note(
        f"tokens: {_count(sets.statistics):,} for statistics, {_count(sets.correction):,} for correction factors, "
        f"{sum(t.tokens for t in sets.evaluation):,} for evaluation; the three sets are disjoint"
        + (f" ({sets.dropped} repeated windows dropped)" if sets.dropped else "")
    )


def _count(windows: Any) -> int:
    return sum(w.predicted for w in windows)


def _check_vocabulary(model: Model, sets: TokenSets) -> None:
    size = model.config().get("vocab_size")
    top = max((max(w.tokens) for w in (*sets.statistics, *sets.correction)), default=0)
    if isinstance(size, int) and top >= size:
        raise TextError(f"the tokenizer gives token {top}, but the model's vocabulary has only {size} entries")
