"""Turn texts into token windows, and these into three disjoint sets.

A text file holds documents separated by form feed. Each document is tokenized by itself, a leading
end-of-text token is put in front where the model has one, and it is cut into windows of `window` predicted
tokens whose first input repeats the last token of the window before: every token is predicted exactly once,
and bits per byte count every byte of the text exactly once.

Omitted on purpose: overlapping (strided) windows, which score better but cost several times the work.

>>> [w.tokens for w in cut_windows([7, 1, 2, 3, 4], [0, 1, 1, 1, 1], 2)]
[(7, 1, 2), (2, 3, 4)]
"""

from __future__ import annotations

import itertools
import random
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bytecap.errors import TextError
from bytecap.model import tokenizer as door

Encoder = Callable[[Iterable[str]], Iterator[tuple[list[int], list[int]]]]
_TOGETHER = 64  # documents turned into tokens side by side


@dataclass(frozen=True)
class Window:
    """Tokens of one window: the first is context only, the others are predicted.

    Attributes:
        tokens: of the window.
        bytes: UTF-8 bytes that the predicted ones stand for.
        document: number of its document in the text, -1 where nobody counted.
    """

    tokens: tuple[int, ...]
    bytes: int
    document: int = field(default=-1, kw_only=True)

    @property
    def predicted(self) -> int:
        """Number of predicted tokens."""
        return len(self.tokens) - 1


def leading(windows: Sequence[Window], tokens: int) -> list[Window]:
    """Return the first windows with at least so many predicted tokens together, or all."""
    taken: list[Window] = []
    count = 0
    for w in windows:
        if count >= tokens:
            break
        taken.append(w)
        count += w.predicted
    return taken


def iteration_windows(windows: Sequence[Window], tokens: int, seed: int) -> Iterator[list[Window]]:
    """Yield windows of about so many tokens at a time, endlessly, shuffled anew when all have been seen."""
    pool = list(windows)
    rng = random.Random(seed)  # noqa: S311 (sampling, not cryptography)
    chosen: list[Window] = []
    while True:
        rng.shuffle(pool)
        for w in pool:
            chosen.append(w)
            if sum(x.predicted for x in chosen) >= tokens:
                yield chosen
                chosen = []


@dataclass(frozen=True)
class Text:
    """A tokenized text."""

    name: str
    windows: tuple[Window, ...]

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(w.predicted for w in self.windows)


def read_documents(path: Path | str) -> list[str]:
    """Read the documents of a UTF-8 text file, separated by form feeds.

    Raises:
        TextError: missing, empty, or not UTF-8.
    """
    path = Path(path)
    try:
        if stat.S_ISCHR(mode := path.stat().st_mode) or stat.S_ISBLK(mode):
            raise TextError(f"cannot read the text {path}: it is a device, which has no end")
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise TextError(f"{path} is not UTF-8 text: byte {exc.start} cannot be decoded") from exc
    except OSError as exc:
        raise TextError(f"cannot read the text {path}: {exc.strerror}") from exc
    documents = [d for d in content.split("\f") if d.strip()]
    if not documents:
        raise TextError(f"the text {path} is empty")
    return documents


def tokenizer_encoder(tokenizer: Any, first: int | None) -> Encoder:
    """Return an encoder of documents, which gives token ids and the UTF-8 bytes of each token.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        first: token put in front of every document (worth 0 bytes), or None.
    """

    def encode(documents: Iterable[str]) -> Iterator[tuple[list[int], list[int]]]:
        left = iter(documents)
        while batch := list(itertools.islice(left, _TOGETHER)):
            for document, found in zip(batch, door.encode(tokenizer, batch), strict=True):
                ids, sizes = found.ids, _sizes(document, [end for _, end in found.offsets])
                yield (ids, sizes) if first is None else ([first, *ids], [0, *sizes])

    return encode


def _sizes(document: str, ends: list[int]) -> list[int]:
    """Return the bytes of every token from its end in characters; a split character counts for its last token."""
    if not ends:
        return []
    raw = np.frombuffer(document.encode(), np.uint8)
    upto = np.append(np.flatnonzero((raw & 0xC0) != 0x80), len(raw))  # bytes before every character, and in all
    stops = upto[np.maximum.accumulate(ends)]
    stops[-1] = upto[-1]  # what no token claims
    sizes: list[int] = np.diff(stops, prepend=0).tolist()
    return sizes


def cut_windows(ids: Sequence[int], sizes: Sequence[int], window: int, document: int = -1) -> list[Window]:
    """Cut tokens into windows of at most `window` predicted tokens; every token but the first is predicted once."""
    return [
        Window(tuple(ids[i : i + window + 1]), sum(sizes[i + 1 : i + window + 1]), document=document)
        for i in range(0, len(ids) - 1, window)
    ]


def check_known(ids: Sequence[int], vocabulary: int | None, name: Path | str) -> None:
    """Refuse tokens that a model does not know.

    Raises:
        TextError: the token and the text are named.
    """
    low, top = min(ids, default=0), max(ids, default=0)
    if low < 0 or (vocabulary is not None and top >= vocabulary):
        raise TextError(
            f"{name}: the tokenizer gives token {low if low < 0 else top}, but the model's vocabulary has only "
            f"{vocabulary} entries; use the tokenizer that the model was trained with"
        )


def load_text(
    path: Path | str, encode: Encoder, *, window: int, limit: int | None = None, vocabulary: int | None = None
) -> Text:
    """Tokenize a text file into windows, stopping after about `limit` tokens spread over its documents.

    Args:
        path: of the text.
        encode: see `tokenizer_encoder`.
        window: predicted tokens in a window.
        limit: most tokens, about.
        vocabulary: number of tokens that the model knows, if that is known.

    Raises:
        TextError: it cannot be read, holds too few tokens for one prediction, or a token that the model does not know.
    """
    found = load_documents(str(path), read_documents(path), encode, window=window, limit=limit, vocabulary=vocabulary)
    return Text(Path(path).name, found.windows)


def load_documents(
    name: str,
    documents: list[str],
    encode: Encoder,
    *,
    window: int,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> Text:
    """Tokenize documents into windows as `load_text` does; `name` stands in messages."""
    windows: list[Window] = []
    for number, (ids, sizes) in enumerate(encode(_take_documents(documents, limit))):
        check_known(ids, vocabulary, name)
        windows.extend(cut_windows(ids, sizes, window, number))
    if not windows:
        raise TextError(f"the text {name} is too short: it holds no token to predict")
    if limit is not None and sum(w.predicted for w in windows) > limit:
        windows = _spread(windows, limit)
    return Text(name, tuple(windows))


def _take_documents(documents: list[str], limit: int | None) -> Iterable[str]:
    """Return all documents, or an even spread of pieces that surely holds `limit` tokens and costs little."""
    if limit is None or sum(map(len, documents)) <= 16 * limit:
        return documents
    share = 16 * limit / sum(map(len, documents))
    return [d[: max(1, int(len(d) * share))] for d in documents]


def _spread(windows: list[Window], limit: int) -> list[Window]:
    """Return windows evenly spaced over the text, with about `limit` tokens."""
    mean = sum(w.predicted for w in windows) / len(windows)
    count = max(1, min(len(windows), int(limit / mean)))
    return [windows[i * len(windows) // count] for i in range(count)]


@dataclass(frozen=True)
class TokenSets:
    """The three disjoint sets: statistics, correction factors, evaluation.

    Attributes:
        dropped: windows taken out of the first two because the evaluation holds them too.
        recovery: a fourth set, for recovery; empty where the first serves.
        drawn: name of every calibration text, and its predicted tokens in the first two sets.
        sources: name of the calibration text of every window for correction factors; empty where nobody kept it.
    """

    statistics: tuple[Window, ...]
    correction: tuple[Window, ...]
    evaluation: tuple[Text, ...]
    dropped: int
    recovery: tuple[Window, ...] = ()
    drawn: tuple[tuple[str, int], ...] = ()
    sources: tuple[str, ...] = ()

    def correction_texts(self) -> tuple[Text, ...]:
        """Return the windows for correction factors by calibration text, as texts that can be evaluated.

        No statistic has seen them, so they say what calibration itself is like.
        """
        names = self.sources or ("calibration",) * len(self.correction)
        found: dict[str, list[Window]] = {}
        for name, window in zip(names, self.correction, strict=True):
            found.setdefault(name, []).append(window)
        return tuple(Text(name, tuple(windows)) for name, windows in found.items())


def split_sets(
    calibration: Sequence[Text],
    evaluation: Sequence[Text],
    *,
    tokens: int,
    correction_tokens: int,
    seed: int,
    weights: Sequence[float] = (),
) -> TokenSets:
    """Split windows into three disjoint sets, in which every calibration text weighs the same or what it is given.

    Args:
        calibration: texts for statistics and correction factors.
        evaluation: texts nothing is fitted on.
        tokens: most tokens for statistics.
        correction_tokens: most tokens for correction factors (at most an eighth of what there is); 0 for none.
        seed: order in which windows are drawn.
        weights: how often windows of every calibration text are drawn, relative to the others; all 1 by default.

    Raises:
        TextError: too little text is left for both sets.
    """
    held_out = {w.tokens for text in evaluation for w in text.windows}
    rng = random.Random(seed)  # noqa: S311 (sampling, not cryptography)
    pools, dropped = [], 0
    seen: set[tuple[int, ...]] = set()
    for text in calibration:
        pool = []
        for w in text.windows:
            if w.tokens in held_out or w.tokens in seen:
                dropped += 1
            else:
                seen.add(w.tokens)
                pool.append(w)
        rng.shuffle(pool)
        pools.append(pool)
    total = sum(w.predicted for pool in pools for w in pool)
    queue = list(_in_turn(pools, weights or [1.0] * len(pools)))
    correction = _draw(queue, min(correction_tokens, total // 8)) if correction_tokens else []
    statistics = _draw(queue, tokens)
    if not statistics or (correction_tokens and not correction):
        raise TextError(
            f"the calibration text is too short: {total} tokens are left after taking out what the evaluation "
            f"holds ({dropped} windows); at least {'two windows are' if correction_tokens else 'one window is'} needed"
        )
    used = {id(w) for w in (*statistics, *correction)}
    names = {id(w): text.name for text, pool in zip(calibration, pools, strict=True) for w in pool}
    counts = tuple(
        (text.name, sum(w.predicted for w in pool if id(w) in used))
        for text, pool in zip(calibration, pools, strict=True)
    )
    return TokenSets(
        tuple(statistics), tuple(correction), tuple(evaluation), dropped, drawn=counts,
        sources=tuple(names[id(w)] for w in correction),
    )  # fmt: skip


def _in_turn(pools: Sequence[Sequence[Window]], weights: Sequence[float]) -> Iterator[Window]:
    """Windows of all pools in turn; where weights differ, the next from the pool that lies furthest behind its own."""
    even = len(set(weights)) <= 1
    taken, weighed = [0] * len(pools), [0.0] * len(pools)
    while left := [i for i, pool in enumerate(pools) if taken[i] < len(pool)]:
        i = min(left, key=lambda i: (weighed[i], i))
        window = pools[i][taken[i]]
        yield window
        taken[i] += 1
        weighed[i] += 1 if even else window.predicted / weights[i]


def _draw(queue: list[Window], tokens: int) -> list[Window]:
    """Take windows off the front of `queue` until `tokens` are reached; at least one."""
    taken: list[Window] = []
    count = 0
    while queue and (not taken or count < tokens):
        count += queue[0].predicted
        taken.append(queue.pop(0))
    return taken
