"""The one door to tokenizers: `tokenizer.json` from files that anybody may have written.

The library that reads it is written in Rust and trusts the file: padding to 500 million tokens ends the process, and
some contradictions are panics. So what a file says about padding and truncation, which are nobody's business here, is
taken out, and a tokenizer is first tried in a process of its own, with limits on memory and time. Code and templates
are not read here; no tokenizer class is ever taken from a checkpoint.

What it omits: regular expressions that take exponential time on some texts only. The trial ends those that do so on its
own sample.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

from bytecap.errors import CheckpointError
from bytecap.model.building import parse_object

_SECONDS = 120  # of the trial, on a busy machine
_ABSENT = 3  # exit code of a trial that cannot be made
_TRIAL = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):
    pass
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


@lru_cache(maxsize=16)
def _trial(content: bytes) -> str:
    """Say why a tokenizer cannot be used, from a process that tried; an empty text if it can."""
    try:
        done = subprocess.run(  # noqa: S603 (our own text)
            [sys.executable, "-I", "-c", _TRIAL], input=content, capture_output=True, timeout=_SECONDS, check=False,
            env={"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it took more than {_SECONDS} seconds for a few words"
    except OSError:  # no process can be started
        return ""
    if done.returncode in {0, _ABSENT}:
        return ""
    if done.returncode < 0:
        return f"the library that reads it died of it (signal {-done.returncode})"
    return done.stdout.decode("utf-8", "replace") or f"the library that reads it failed (exit code {done.returncode})"
