"""GGUF files for llama.cpp at an exact size.

`places` says which tensor of a file holds which rows of which unit, `metadata` and `tokenizer` what else a file needs,
`template` takes all of that from the user's own conversion. `menu` measures every type of every tensor, `file`
writes and reads back; `bytecap.pipeline.fit_gguf` chooses under the cap. Names, keys and row orders come from gguf-py
and transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

from bytecap.errors import UsageError


def library(name: str = "gguf") -> Any:
    """The package gguf, or a module of it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise UsageError("GGUF files need one more package: pip install 'bytecap[gguf]'") from exc
