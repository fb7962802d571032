"""The one door to tokenizers: `tokenizer.json` from files that anybody may have written.

The library that reads it is written in Rust and trusts the file: padding to 500 million tokens ends the process, and
some contradictions are panics. So what a file says about padding and truncation, which are nobody's business here, is
taken out, and a tokenizer is first tried in a process of its own, with limits on memory and time. Code and templates
are not read here; no tokenizer class is ever taken from a checkpoint.

A regular expression may take exponential time on some texts only (the library ends a single match, with a panic, but
not many that are nearly as long). So all texts are read and written through `encode`
and `decode`, which give up when the processor's time for a text is spent.

What it omits: ending what was given up. A library of compiled code cannot be interrupted within its process, so it
works on until the process ends; the command line ends with the error.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from bytecap.errors import CheckpointError
from bytecap.model.apart import apart
from bytecap.model.building import parse_object

T = TypeVar("T")

_SPARE, _PER_CHARACTER = 60.0, 1e-4  # seconds of the processor for a text; common tokenizers need a hundredth of it
_POLL = 0.2
_TRIAL = """
try:
    from tokenizers import Tokenizer
except ImportError:
    sys.exit(3)
try:
    tokenizer = Tokenizer.from_str(sys.stdin.buffer.read().decode("utf-8"))
    sample = "The quick brown fox, 0123456789!\\n\\tdef f(x): return x  # caf\\u00e9 \\u4e2d\\u6587 \\U0001f600\\n" * 8
    for found in tokenizer.encode_batch([sample, "", " ", "a" * 300, "(" * 300], add_special_tokens=False):
        tokenizer.decode(found.ids)
except BaseException as exc:
    sys.stdout.write(" ".join(str(exc).split())[:300])
    sys.exit(4)
"""


def load_tokenizer(content: bytes, name: str = "tokenizer.json") -> Any:
    """A `tokenizers.Tokenizer` without padding and truncation.

    Args:
        content: of `tokenizer.json`.
        name: for messages.

    Raises:
        CheckpointError: it cannot be read, or the library dies of it.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        raise CheckpointError("texts need the extra packages: pip install 'bytecap[hf]'") from exc
    value = parse_object(content, name)
    if value.get("padding") is not None or value.get("truncation") is not None:
        value |= {"padding": None, "truncation": None}
        content = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if why := _trial(content):
        raise CheckpointError(f"{name} cannot be read: {why}; write it anew with the library that made it")
    try:
        return Tokenizer.from_str(content.decode("utf-8"))
    except BaseException as exc:
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{name} cannot be read: {exc}") from exc


def encode(tokenizer: Any, documents: Sequence[str]) -> list[Any]:
    """Return the encodings of documents, without special tokens.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        documents: texts.

    Raises:
        CheckpointError: it takes far longer than any tokenizer needs.
    """
    found: list[Any] = _in_time(
        lambda: tokenizer.encode_batch(list(documents), add_special_tokens=False), sum(map(len, documents))
    )
    return found


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens, without special ones.

    Raises:
        CheckpointError: it takes far longer than any tokenizer needs.
    """
    found: str = _in_time(lambda: tokenizer.decode_batch([list(ids)])[0], len(ids))
    return found


def _in_time(work: Callable[[], T], size: int) -> T:
    """Do work of compiled code that may never end; what is given up works on in its thread until the process ends."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as exc:  # noqa: BLE001 (a panic of the library is no Exception)
            failed.append(exc)

    worker = threading.Thread(target=run, daemon=True)
    until = time.process_time() + _SPARE + _PER_CHARACTER * size
    worker.start()
    worker.join(_POLL)
    while worker.is_alive():
        if time.process_time() > until:
            raise CheckpointError(
                f"tokenizer.json: {size:,} characters or tokens were not done in {_SPARE + _PER_CHARACTER * size:.0f} "
                "seconds; an expression in its pre_tokenizer, normalizer or decoder takes exponential time on this text"
            )
        worker.join(_POLL)
    if failed and type(failed[0]).__name__ == "PanicException":
        raise CheckpointError(f"tokenizer.json: the library that reads it failed on a text: {failed[0]}")
    if failed and type(failed[0]) is Exception:  # the library's own
        raise CheckpointError(f"tokenizer.json: the library that reads it failed on a text: {failed[0]}") from failed[0]
    if failed:
        raise failed[0]
    return done[0]


@lru_cache(maxsize=16)
def _trial(content: bytes) -> str:
    """Say why a tokenizer cannot be used, from a process that tried; an empty text if it can."""
    return apart(_TRIAL, content)
