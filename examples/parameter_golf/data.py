"""Text in, tokenizer and shards out: the data of the Parameter Golf example.

    python data.py -o DIR TEXT...

trains a 1,024-piece byte-pair SentencePiece model on the given texts and writes, into DIR,

    tokenizer.model      the SentencePiece model
    train_000000.bin     token shards, at most `--shard-tokens` each
    val_000000.bin       documents that nothing was trained on, tokenizer included

A text is UTF-8, plain or xz-compressed; documents are separated by NUL or form feed. Whether a document is held out
is decided by a hash of its text, so the same document never lands on both sides, in whatever order the files come.

A shard is the challenge's: a header of 256 little-endian int32 `[20240520, 1, n_tokens, 0...]`, then n_tokens
little-endian uint16. Every document starts with the control token `<s>`.

Pieces are trained without any normalisation, so bytes counted from tokens are the text's own UTF-8 bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

MAGIC, VERSION, HEADER = 20240520, 1, 256
PIECES = 1024
_SPACE = "\u2581"  # SentencePiece's mark of a space in front of a piece
_LONGEST = 4192  # bytes of one training sentence, SentencePiece's own default

Tokens = npt.NDArray[np.uint16]


def documents(paths: Iterable[Path]) -> Iterator[str]:
    """Documents of text files (`.xz` or plain), separated by NUL or form feed, empty ones left out."""
    for path in paths:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        yield from (d for d in re.split("[\0\f]", raw.decode("utf-8")) if d.strip())


def held_out(document: str, one_in: int) -> bool:
    """Whether a document is for validation, as one in `one_in` is, by its hash."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % one_in == 0


def train_tokenizer(texts: Iterable[str], prefix: Path, pieces: int = PIECES) -> sentencepiece.SentencePieceProcessor:
    """Train a byte-pair model with byte fallback and write `prefix.model`.

    Args:
        texts: documents; they are cut into lines.
        prefix: path without suffix.
        pieces: size of the vocabulary, with 3 controls and 256 bytes.
    """
    lines = (line[:_LONGEST] for text in texts for line in text.split("\n") if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(prefix), model_type="bpe", vocab_size=pieces, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        character_coverage=0.999, minloglevel=2,
    )  # fmt: skip
    prefix.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(prefix.with_suffix(".model")))


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write one shard."""
    header = np.zeros(HEADER, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def read_shard(path: Path) -> Tokens:
    """Tokens of a shard.

    Raises:
        ValueError: magic, version or length is not a shard's.
    """
    raw = path.read_bytes()
    header = np.frombuffer(raw[: 4 * HEADER], "<i4")
    if len(header) < HEADER or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path}: not a token shard of version {VERSION}")
    if len(raw) != 4 * HEADER + 2 * int(header[2]):
        raise ValueError(f"{path}: {header[2]:,} tokens announced, {len(raw) - 4 * HEADER:,} bytes of tokens found")
    return np.frombuffer(raw, "<u2", offset=4 * HEADER)


def read_shards(directory: Path, kind: str) -> Tokens:
    """All tokens of `kind` ("train" or "val") in a directory, in the order of names.

    Raises:
        ValueError: there is none, or one is malformed.
    """
    paths = sorted(directory.glob(f"{kind}_*.bin"))
    if not paths:
        raise ValueError(f"{directory}: no {kind}_*.bin")
    return np.concatenate([read_shard(p) for p in paths])


def encode(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str]) -> Tokens:
    """Tokens of documents one after the other, each behind the control token `<s>`."""
    parts = [np.array([tokenizer.bos_id(), *tokenizer.encode(text)], np.uint16) for text in texts]
    return np.concatenate(parts)


def byte_table(tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[npt.NDArray[np.int64], ...]:
    """The bytes that a token counts, by the challenge's rule.

    Returns:
        Three arrays (vocabulary,): bytes of the piece without its space mark (bytes tokens 1, controls 0); 1 where
        it has that mark, worth one byte more unless the token before is a control; 1 where it is a control.
    """
    ids = range(tokenizer.vocab_size())
    control = [tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids]
    pieces = ["" if control[i] else tokenizer.id_to_piece(i) for i in ids]
    size = [
        1 if tokenizer.is_byte(i) else len(p.removeprefix(_SPACE).encode()) for i, p in zip(ids, pieces, strict=True)
    ]
    space = [not tokenizer.is_byte(i) and p.startswith(_SPACE) for i, p in zip(ids, pieces, strict=True)]
    return np.array(size, np.int64), np.array(space, np.int64), np.array(control, np.int64)


def count_bytes(tokens: Tokens, table: tuple[npt.NDArray[np.int64], ...]) -> int:
    """Bytes of text that all tokens but the first stand for (the first is only ever read, never predicted)."""
    size, space, control = table
    return int(size[tokens[1:]].sum() + (space[tokens[1:]] & ~control[tokens[:-1]] & 1).sum())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a tokenizer and write token shards.")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--pieces", type=int, default=PIECES)
    parser.add_argument("--held-out", type=int, default=80, help="one document in so many is for validation")
    parser.add_argument("--tokenizer-text", type=int, default=8_000_000, help="characters the tokenizer is trained on")
    parser.add_argument("--shard-tokens", type=int, default=20_000_000)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    parts: dict[bool, list[str]] = {True: [], False: []}
    for text in documents(args.texts):
        parts[held_out(text, args.held_out)].append(text)
    if not parts[True] or not parts[False]:
        parser.error(f"{len(parts[False])} documents for training, {len(parts[True])} held out: choose --held-out anew")
    stride = max(1, sum(map(len, parts[False])) // args.tokenizer_text)
    tokenizer = train_tokenizer(parts[False][::stride], args.output / "tokenizer", args.pieces)
    for kind, texts in (("train", parts[False]), ("val", parts[True])):
        tokens = encode(tokenizer, texts)
        for n, start in enumerate(range(0, len(tokens), args.shard_tokens)):
            write_shard(args.output / f"{kind}_{n:06}.bin", tokens[start : start + args.shard_tokens])
        size = sum(len(t.encode()) for t in texts)
        print(f"{kind}: {len(texts):,} documents, {size:,} bytes, {len(tokens):,} tokens")


if __name__ == "__main__":
    main()
