"""Read a model's tokenizer from its side files, so that it reads text the same way whatever state it was saved in.

`tokenizer.json` may hold truncation, padding and the dropout of merges, left over from training; a text is scored whole
and once, so they are switched off. Where there is only what a tokenizer is made from (`tokenizer.model`, `vocab.json`
with `merges.txt`), transformers converts it, in a process of its own: these files may come from anybody, and the
libraries that read them panic, abort and take what memory there is.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from bytecap.errors import CheckpointError
from bytecap.model.apart import call_apart
from bytecap.model.building import quiet
from bytecap.model.fileset import SLOW_TOKENIZER_FILES, TOKENIZER
from bytecap.model.tokenizer import load_tokenizer

_SENTENCEPIECE = "tokenizer.model"
_MADE = "made.json"  # what a conversion writes
_READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # packages and their modules


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it would be in
        return False


def read_tokenizer(files: Mapping[str, bytes]) -> Any:
    """Return a `tokenizers.Tokenizer`.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if TOKENIZER not in files:
        return settled(_converted(files))
    return settled(load_tokenizer(files[TOKENIZER], TOKENIZER))


def settled(tokenizer: Any) -> Any:
    """Return the tokenizer without truncation, padding and dropout, which change how a text is read."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        model = tokenizer.model
        model.dropout = None
        tokenizer.model = model
    return tokenizer


def is_there(files: Mapping[str, bytes]) -> bool:
    """Return whether side files hold a tokenizer, or the files that one is made from."""
    return TOKENIZER in files or any(n in files for n in SLOW_TOKENIZER_FILES)


def conversion_note(files: Mapping[str, bytes]) -> list[str]:
    """Return the note for a tokenizer that has to be converted."""
    slow = [n for n in SLOW_TOKENIZER_FILES if n in files]
    if TOKENIZER in files or not slow:
        return []
    return [f"there is no {TOKENIZER}: {', '.join(slow)} {'is' if len(slow) == 1 else 'are'} converted by transformers"]


def _converted(files: Mapping[str, bytes]) -> Any:
    if not is_there(files):
        raise CheckpointError(f"the model has no {TOKENIZER}, so texts cannot be turned into tokens")
    if not _installed("transformers"):
        raise CheckpointError("texts need the extra packages: pip install 'bytecap[hf]'")
    return load_tokenizer(_conversion(tuple(sorted(files.items()))), _slow(files))


def _slow(files: Mapping[str, bytes]) -> str:
    """Name the files that a tokenizer is made from."""
    return ", ".join(n for n in SLOW_TOKENIZER_FILES if n in files)


@lru_cache(maxsize=4)
def _conversion(items: tuple[tuple[str, bytes], ...]) -> bytes:
    """Return the `tokenizer.json` that transformers makes of older files, in a process of its own.

    Raises:
        CheckpointError: it cannot, or dies of them.
    """
    files = dict(items)
    with tempfile.TemporaryDirectory() as directory:
        for name, content in items:
            (Path(directory) / Path(name).name).write_bytes(content)
        why = call_apart(convert, Path(directory))
        made = Path(directory) / _MADE
        if not why and made.is_file():
            return made.read_bytes()
    if _SENTENCEPIECE in files and (missing := [p for p, m in _READERS.items() if not _installed(m)]):
        raise CheckpointError(
            f"{_SENTENCEPIECE} cannot be read without {' and '.join(missing)}: pip install {' '.join(missing)}, or "
            f"save {TOKENIZER} with the tokenizer's own library"
        )
    raise CheckpointError(
        f"transformers cannot convert {_slow(files)} to a {TOKENIZER} ({why[:160] or 'nothing was written'}): save the "
        "tokenizer with its own library first"
    )


def convert(directory: str) -> None:
    """Write what transformers makes of a directory's tokenizer into it; run in a process of its own."""
    import transformers

    quiet()
    found: Any = transformers.AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, use_fast=True
    ).backend_tokenizer
    (Path(directory) / _MADE).write_text(found.to_str(), "utf-8")
