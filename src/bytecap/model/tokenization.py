"""Read a model's tokenizer from its side files, so that it reads text the same way whatever state it was saved in.

`tokenizer.json` may hold truncation, padding and the dropout of merges, left over from training; a text is scored whole
and once, so they are switched off. Where there is only what a tokenizer is made from (`tokenizer.model`, `vocab.json`
with `merges.txt`), transformers converts it.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytecap.errors import CheckpointError
from bytecap.model.building import quiet
from bytecap.model.fileset import SLOW_TOKENIZER_FILES, TOKENIZER
from bytecap.model.tokenizer import load_tokenizer

_SENTENCEPIECE = "tokenizer.model"
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
    try:
        import transformers
    except ImportError as exc:
        raise CheckpointError("texts need the extra packages: pip install 'bytecap[hf]'") from exc
    quiet()
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (Path(directory) / Path(name).name).write_bytes(content)
        try:
            found: Any = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, use_fast=True
            ).backend_tokenizer
        except Exception as exc:
            names = ", ".join(n for n in SLOW_TOKENIZER_FILES if n in files)
            if _SENTENCEPIECE in files and (missing := [p for p, m in _READERS.items() if not _installed(m)]):
                raise CheckpointError(
                    f"{_SENTENCEPIECE} cannot be read without {' and '.join(missing)}: pip install "
                    f"{' '.join(missing)}, or save {TOKENIZER} with the tokenizer's own library"
                ) from exc
            raise CheckpointError(
                f"transformers cannot convert {names} to a {TOKENIZER} ({str(exc).strip().split(chr(10), 1)[0][:160]}"
                "): save the tokenizer with its own library first"
            ) from exc
    return found
