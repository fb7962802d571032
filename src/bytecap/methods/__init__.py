"""List the methods, which turn a model into sections that fit a cap and share container, ledger and evaluation.

A method is a function from a `Job` to an `Outcome` (`bytecap.job`). `bytecap` is the default; the others are what it is
measured against, and `METHODS` lists them in the order of help and comparisons.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bytecap.errors import UsageError
from bytecap.job import Method
from bytecap.types import Unit


@dataclass(frozen=True)
class Entry:
    """A method in the list.

    Attributes:
        load: imports the method's module, which needs torch, and returns the method.
        windows_only: it walks token windows itself, so it needs a module whose forward gives logits.
    """

    load: Callable[[], Method]
    windows_only: bool = False


def _bytecap() -> Method:
    from bytecap.methods.bytecap import run

    return run


def _golf() -> Method:
    from bytecap.methods.baselines.runs import run_golf

    return run_golf


def _uniform() -> Method:
    from bytecap.methods.baselines.runs import run_uniform

    return run_uniform


def _owq() -> Method:
    from bytecap.methods.baselines.owq import run

    return run


def _radio() -> Method:
    from bytecap.methods.baselines.radio import run

    return run


def _cluscomp() -> Method:
    from bytecap.methods.baselines.cluscomp import run

    return run


def _reallm() -> Method:
    from bytecap.methods.baselines.reallm import run

    return run


# Loaders are imports and not names in strings: the type checker and the contracts between rooms follow them, so a wrong
# name cannot pass `make lint`.
METHODS = {
    "bytecap": Entry(_bytecap),
    "golf": Entry(_golf),
    "uniform": Entry(_uniform),
    "owq": Entry(_owq),
    "radio": Entry(_radio, windows_only=True),
    "cluscomp": Entry(_cluscomp, windows_only=True),
    "reallm": Entry(_reallm, windows_only=True),
}

RELATED = {  # beginnings of other programs' names: the method that does the same or comes nearest, and why
    ("gptq", "autogptq"): ("golf", "It is GPTQ with entropy coded integers."),
    ("rtn", "int", "absmax", "minmax", "hqq", "gguf", *(f"q{n}" for n in range(2, 9)), "iq", "nf4", "fp4", "bnb",
     "bitsandbytes"): ("uniform", "It rounds to nearest without calibration."),
    ("awq", "autoawq", "smoothquant", "imatrix", "exl"): (
        "bytecap", "It weighs every weight by what calibration says about it; awq itself is not here."),
    ("spqr", "squeezellm", "llm.int8", "llmint8"): ("owq", "It keeps the weights that suffer most in 16 bit."),
    ("aqlm", "vptq", "quip", "kmeans", "vq"): ("cluscomp", "It codes vectors of weights by codebooks."),
}  # fmt: skip


def find(name: str) -> Method:
    """Return the method of a name.

    Args:
        name: one of `METHODS`, or `FILE.py:CALLABLE`, a `Method` in a file of the user's. That file is run.

    Raises:
        UsageError: unknown; the message suggests the nearest one.
    """
    if name.partition(":")[0].endswith(".py"):
        from bytecap.model.factory import load_callable

        own: Method = load_callable(name)[0]
        return own
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}, {_suggestion(name)} (there are {', '.join(METHODS)})")
    return METHODS[name].load()


def _suggestion(name: str) -> str:
    """Suggest a method for the name of another quantizer, or for a misspelling."""
    plain = name.lower().replace("_", "").replace("-", "")
    for words, (method, reason) in RELATED.items():
        if any(plain.startswith(word) for word in words):
            return f"did you mean {method}? {reason}"
    return f"did you mean {difflib.get_close_matches(name, METHODS, 1, 0.0)[0]}?"


def menu_of(names: Sequence[str] | None, method: str) -> tuple[str, ...]:
    """Return the overlays that a method may choose from.

    Raises:
        UsageError: an unknown overlay, or a method that chooses none.
    """
    from bytecap.allocation import overlay_menu

    if names and method != "bytecap":
        raise UsageError(f"method {method} chooses no overlays: --paths is for --method bytecap")
    return overlay_menu.known(names) if method == "bytecap" else ()


def smallest_section(unit: Unit) -> tuple[int, bytes]:
    """Return (tag, bytes) of the smallest section of a unit, with every value at its centre."""
    import numpy as np

    from bytecap.format.coders import Shared
    from bytecap.format.coders.exact import CODER as EXACT
    from bytecap.format.coders.vector import CODER as VECTOR

    if not unit.dtype.startswith(("F", "BF")):
        return EXACT.tag, EXACT.encode(np.zeros(unit.matrix_shape), unit.dtype)
    return VECTOR.tag, VECTOR.encode(np.zeros(min(1, unit.parameters), np.float32), 1.0, Shared()).data  # any number
