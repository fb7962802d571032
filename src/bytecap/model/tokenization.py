"""A model's tokenizer from its side files, reading text the same way whatever state it was saved in.

`tokenizer.json` may hold truncation, padding and the dropout of merges, left over from training; a text is scored whole
and once, so they are switched off. Where there is only what a tokenizer is made from (`tokenizer.model`, `vocab.json`
with `merges.txt`), transformers converts it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytecap.errors import CheckpointError
from bytecap.model.fileset import SLOW_TOKENIZER_FILES, TOKENIZER


def read_tokenizer(files: Mapping[str, bytes]) -> Any:
    """A `tokenizers.Tokenizer`.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        raise CheckpointError("texts need the extra packages: pip install 'bytecap[hf]'") from exc
    if TOKENIZER not in files:
        return settled(_converted(files))
    try:
        return settled(Tokenizer.from_str(files[TOKENIZER].decode("utf-8")))
    except Exception as exc:
        raise CheckpointError(f"{TOKENIZER} cannot be read: {exc}") from exc


def settled(tokenizer: Any) -> Any:
    """The tokenizer without what changes how a text is read: truncation, padding, dropout."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        model = tokenizer.model
        model.dropout = None
        tokenizer.model = model
    return tokenizer


def is_there(files: Mapping[str, bytes]) -> bool:
    """Whether side files hold a tokenizer, or what one is made from."""
    return TOKENIZER in files or any(n in files for n in SLOW_TOKENIZER_FILES)


def conversion_note(files: Mapping[str, bytes]) -> list[str]:
    """What to say where a tokenizer has to be converted."""
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
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (Path(directory) / Path(name).name).write_bytes(content)
        try:
            found: Any = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, use_fast=True
            ).backend_tokenizer
        except Exception as exc:
            names = ", ".join(n for n in SLOW_TOKENIZER_FILES if n in files)
            raise CheckpointError(
                f"transformers cannot convert {names} to a {TOKENIZER} ({str(exc).strip().split(chr(10), 1)[0][:160]}"
                "): save the tokenizer with its own library first"
            ) from exc
    return found
