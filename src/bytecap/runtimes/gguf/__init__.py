"""GGUF files for llama.cpp at an exact size.

`places` says which tensor of a file holds which rows of which unit, `metadata` and `tokenizer` what else a file needs,
`template` takes all of that from the user's own conversion. `menu` measures every type of every tensor, `file`
writes and reads back; `bytecap.pipeline.fit_gguf` chooses under the cap. Names, keys and row orders come from gguf-py
and transformers.
"""

from __future__ import annotations

from bytecap.runtimes.libraries import library

__all__ = ["library"]
