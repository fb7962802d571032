"""Run what may die, hang or take all memory in a process of its own, with limits.

Libraries that read tokenizers panic and abort on some files, and chat templates are programs. What such a process says
on the terminal is dropped; it answers with its exit code, a line, and files in a directory that it is given.

>>> apart("pass"), apart("import os; os.abort()"), apart("print('no such vocabulary'); sys.exit(4)")
('', 'it died of it (signal 6)', 'no such vocabulary')
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_SECONDS = 120  # of the clock, on a busy machine; 60 of the processor
_MEMORY = 1 << 34
_ABSENT = 3  # exit code where a package is missing
_LIMITS = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):
    pass
"""
_CALL = """
import importlib, json
sys.path[:] = json.loads(sys.argv[1])
sys.modules["torch"] = None
try:
    getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(sys.argv[4])
except MemoryError:
    sys.stdout.write("it takes too much memory")
    sys.exit(4)
except BaseException as exc:
    sys.stdout.write(" ".join(str(exc).split())[:300] or type(exc).__name__)
    sys.exit(4)
"""


def apart(script: str, content: bytes = b"", *arguments: str, memory: int = _MEMORY) -> str:
    """Say why a script failed that a process of its own ran; an empty text if it did not, or no process can be started.

    Args:
        script: our own source; exit code 3 says that it could not try.
        content: its standard input.
        arguments: its command line.
        memory: bytes of addresses that it may have.
    """
    try:
        done = subprocess.run(  # noqa: S603 (our own text)
            [sys.executable, "-I", "-c", _LIMITS.format(memory=memory) + script, *arguments], input=content,
            capture_output=True, timeout=_SECONDS, check=False,
            env={"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it took more than {_SECONDS} seconds for a few words"
    except OSError:
        return ""
    if done.returncode in {0, _ABSENT}:
        return ""
    if done.returncode < 0:
        return f"it died of it (signal {-done.returncode})"
    return done.stdout.decode("utf-8", "replace").strip() or f"it failed (exit code {done.returncode})"


def call_apart(function: Callable[[str], None], directory: Path, *, memory: int = _MEMORY) -> str:
    """Say why a function of ours failed that a process of its own called with a directory; an empty text if it did not.

    The process finds no torch: transformers reads side files without it, and importing it takes longer than the rest.

    Args:
        function: of a module, which that process imports and which imports no torch.
        directory: for what it is given and what it answers.
        memory: bytes of addresses that it may have.
    """
    places = json.dumps([p for p in sys.path if Path(p).is_absolute()])
    return apart(_CALL, b"", places, function.__module__, function.__name__, str(directory), memory=memory)
