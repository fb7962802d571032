"""Say what went wrong in one line."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from contextvars import ContextVar

import typer

from bytecap.errors import BytecapError, BytecapWarning
from bytecap.escape import shown
from bytecap.system.allocator import BOUND, is_shortage

DEBUG: ContextVar[bool] = ContextVar("debug", default=False)  # whether tracebacks are wanted
_LONGEST = 4000  # characters of an error


def complain(exc: BaseException, where: str = "") -> int:
    """Print one line for an error, with the rank that met it where there are several; returns the exit code."""
    if where and DEBUG.get():
        traceback.print_exception(exc)
    if isinstance(exc, typer.Abort):
        return 130
    if isinstance(exc, typer.Exit):
        return int(exc.exit_code)
    if hasattr(exc, "format_message"):  # usage errors: typer carries its own copy of click, or click itself
        message = str(exc.format_message())
        if not message:  # no command was given: the help has been printed
            return 2
    elif isinstance(exc, BytecapError):
        message = str(exc)
    elif is_shortage(exc):
        message = f"out of memory ({str(exc) or type(exc).__name__}): {BOUND}"
    elif isinstance(exc, BrokenPipeError):  # nobody reads on, as behind `| head`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 (nothing is flushed into it at exit)
        return 1
    elif type(exc).__name__ == "PanicException":
        message = (
            f"the library that reads tokenizer.json failed on it: {exc}; write it anew with the library that made it"
        )
    elif isinstance(exc, OSError) and exc.errno in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}:
        message = (
            f"{exc.strerror}: {exc.filename or 'compiled code cannot be kept'}; free some space (NUMBA_CACHE_DIR says "
            "where compiled code is kept)"
        )
    elif isinstance(exc, ModuleNotFoundError):
        message = f"the package {exc.name} is missing: pip install 'bytecap[hf]'"
    else:
        message = f"unexpected {type(exc).__name__}: {exc} (run with --debug for the traceback)"
    sys.stderr.write("error: " + where + shown(" ".join(message.split()), most=_LONGEST) + "\n")
    return 2


def warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as one line: its text may quote a file, and where in the source it was made helps nobody."""
    del filename, lineno, line
    kind = "" if issubclass(category, BytecapWarning) else f"{category.__name__}: "
    return f"warning: {kind}{shown(' '.join(str(message).split()), most=_LONGEST)}\n"
