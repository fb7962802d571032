"""Read token shards of the Parameter Golf challenge, and the bytes of text that every token stands for.

A shard is 256 little-endian int32 (`20240520`, `1`, number of tokens, zeros) and that many little-endian uint16.

A token's bytes depend on the token before it: a leading-space marker counts one byte unless the previous token is a
control. Tables come from a SentencePiece model, or from a file: `.npy` or text, one row a token, of one to three
integers: bytes, whether a leading space comes on top (0 or 1), whether the token is a control (0 or 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import TextError, UsageError
from bytecap.model.sources import CORRECTION_TOKENS
from bytecap.model.texts import Text, TokenSets, Window, split_sets
from bytecap.system.atomic import read_regular

MAGIC, VERSION, HEADER = 20240520, 1, 256
_MARK = "\u2581"  # SentencePiece's leading space
Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class ByteCounts:
    """Bytes of every token; see the module.

    Attributes:
        size: (vocabulary,) bytes without the leading space.
        space: (vocabulary,) whether a leading space comes on top.
        control: (vocabulary,) whether the token is a control.

    >>> counts = ByteCounts(np.array([0, 3, 2]), np.array([False, True, True]), np.array([True, False, False]))
    >>> counts.of(np.array([0, 1, 2, 1])).tolist()
    [3, 3, 4]
    """

    size: npt.NDArray[np.int64]
    space: npt.NDArray[np.bool_]
    control: npt.NDArray[np.bool_]

    def of(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return the bytes of every token but the first, which is context."""
        before, after = tokens[:-1], tokens[1:]
        found: npt.NDArray[np.int64] = self.size[after] + (self.space[after] & ~self.control[before])
        return found


def read_shard(path: Path) -> Tokens:
    """Map the tokens of a shard from its file.

    Raises:
        TextError: unreadable, or header and length do not agree.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", HEADER)
    except OSError as exc:
        raise TextError(f"cannot read the shard {path}: {exc.strerror}") from exc
    if len(header) < HEADER:
        raise TextError(f"the shard {path} is truncated: {size} bytes, its header alone has {4 * HEADER}")
    magic, version, count = (int(x) for x in header[:3])
    if magic != MAGIC:
        raise TextError(f"{path} is not a token shard: it begins with {magic}, not with {MAGIC}")
    if version != VERSION:
        raise TextError(f"the shard {path} has version {version}, only {VERSION} is known")
    if count < 0 or size != 4 * HEADER + 2 * count:
        raise TextError(f"the shard {path} declares {count} tokens, {4 * HEADER + 2 * count} bytes, but has {size}")
    if count < 2:
        raise TextError(f"the shard {path} is too short: it holds no token to predict")
    return np.memmap(path, "<u2", "r", 4 * HEADER, (count,))


def expand(paths: Sequence[Path | str]) -> list[Path]:
    """Return paths, with patterns such as `train_*.bin` expanded in order.

    Raises:
        TextError: a pattern matches nothing.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        matches = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else [path]
        if not matches:
            raise TextError(f"no shard matches {path}")
        found += matches
    return found


def byte_counts(path: Path) -> ByteCounts:
    """Read counts from a SentencePiece model (`.model`), a `.npy` or a text table.

    Raises:
        TextError: the file cannot be read or is no such table.
    """
    if not path.is_file():
        raise TextError(f"cannot read the table {path}: there is no such file")
    if path.suffix == ".model":
        return _from_pieces(path)
    try:
        table = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, np.int64, ndmin=2)
    except (ValueError, OSError, EOFError) as exc:
        raise TextError(f"{path} is no table of bytes per token: {exc}") from exc
    table = table.reshape(len(table), -1) if table.ndim == 1 else table
    if table.ndim != 2 or not 1 <= table.shape[1] <= 3 or table.dtype.kind not in "iub" or not len(table):
        raise TextError(f"{path} is no table of bytes per token: it holds {table.dtype} of shape {table.shape}")
    if table.min() < 0 or table[:, 1:].max(initial=0) > 1:
        raise TextError(f"{path} is no table of bytes per token: counts are at least 0, marks 0 or 1")
    wide = np.zeros((len(table), 3), np.int64)
    wide[:, : table.shape[1]] = table
    return ByteCounts(wide[:, 0], wide[:, 1] > 0, wide[:, 2] > 0)


def _from_pieces(path: Path) -> ByteCounts:
    try:
        import sentencepiece
    except ImportError as exc:
        raise UsageError("SentencePiece models need the extra package: pip install 'bytecap[golf]'") from exc
    try:
        model: Any = sentencepiece.SentencePieceProcessor(model_proto=read_regular(path))
    except (OSError, RuntimeError) as exc:
        raise TextError(f"{path} is no SentencePiece model: {exc}") from exc
    size, space, control = np.zeros(len(model), np.int64), np.zeros(len(model), bool), np.zeros(len(model), bool)
    for i in range(len(model)):
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            control[i] = True
        elif model.is_byte(i):
            size[i] = 1
        else:
            piece: str = model.id_to_piece(i)
            space[i] = piece.startswith(_MARK)
            size[i] = len(piece.removeprefix(_MARK).encode())
    return ByteCounts(size, space, control)


def windows(tokens: Tokens, window: int, limit: int | None, counts: ByteCounts | None) -> list[Window]:
    """Return windows of `window` predicted tokens, evenly spread until `limit` tokens are reached; all by default."""
    starts = range(0, len(tokens) - 1, window)
    if limit is not None and len(tokens) - 1 > limit:
        most = max(1, limit // window)
        full = (len(tokens) - 1) // window
        starts = range(0, full * window, max(1, full // most) * window)[:most] if full else starts
    found = []
    for at in starts:
        ids = np.asarray(tokens[at : at + window + 1])
        found.append(Window(tuple(ids.tolist()), int(counts.of(ids).sum()) if counts is not None else 0))
    return found


def check_ids(path: Path, tokens: Tokens, size: int | None) -> None:
    """Refuse tokens beyond a vocabulary.

    Raises:
        TextError: naming shard, position and token.
    """
    if size is not None and int(tokens.max()) >= size:
        at = int(np.argmax(tokens >= size))
        raise TextError(
            f"the shard {path} holds the token {int(tokens[at])} at {at}, the vocabulary has {size} entries"
        )


def shard_sets(
    calibration: Sequence[Path],
    evaluation: Sequence[Path],
    *,
    window: int,
    tokens: int,
    evaluation_tokens: int,
    seed: int,
    vocabulary: int | None,
    counts: ByteCounts | None,
) -> TokenSets:
    """Return three disjoint sets; without evaluation shards the tail of the last one (at most a quarter) is held out.

    Args:
        calibration: shards for statistics and correction factors.
        evaluation: shards nothing is fitted on.
        window: predicted tokens in a window.
        tokens: most tokens for statistics.
        evaluation_tokens: most tokens for evaluation.
        seed: order in which windows are drawn.
        vocabulary: number of tokens the module knows, if that is known.
        counts: bytes of every token; without them there are no bits per byte.

    Raises:
        TextError: a shard is damaged, too short, or holds a token beyond the vocabulary.
        UsageError: one shard is given for both.
    """
    both = {p.resolve() for p in calibration} & {p.resolve() for p in evaluation}
    if both:
        raise UsageError(f"the shard {min(both)} is given for calibration and for evaluation")
    read = {p: read_shard(p) for p in (*calibration, *evaluation)}
    for path, found in read.items():
        check_ids(path, found, min(x for x in (vocabulary, len(counts.size) if counts else None, 1 << 16) if x))
    held = [(p.name, read[p]) for p in evaluation]
    if not held:
        last = calibration[-1]
        cut = len(read[last]) - max(2, min(evaluation_tokens + 1, len(read[last]) // 4))
        held, read[last] = [(f"tail of {last.name}", read[last][cut:])], read[last][:cut]
    share = 2 * (tokens + CORRECTION_TOKENS) // len(calibration)
    most = max(1, evaluation_tokens // len(held))
    return split_sets(
        [Text(p.name, tuple(windows(read[p], window, share, counts))) for p in calibration],
        [Text(name, tuple(windows(found, window, most, counts))) for name, found in held],
        tokens=tokens, correction_tokens=CORRECTION_TOKENS, seed=seed,
    )  # fmt: skip
