"""Find the formats that `fit` can write by name: our own and those of other programs.

A family of other programs' formats is one entry here, a job in `bytecap.pipeline.fit`, and one file or folder in
`bytecap.runtimes`.

>>> format_of(FitConfig("3MB", output="a.gguf")), format_of(FitConfig("3MB", format="mlx")), format_of(FitConfig("3MB"))
('gguf', 'mlx', 'bcap')
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bytecap.errors import UsageError
from bytecap.job.config import FitConfig

OURS = "bcap"
FILE, HUB = "file", "hub"  # layouts of ours
_ONLY = ("types", "pure", "template", "emit")  # options of other programs' formats
_NOT = ("paths", "code", "loss", "evaluate", "predictions", "given", "allow_unused")  # options of ours


@dataclass(frozen=True)
class Format:
    """A format of other programs.

    Attributes:
        suffix: of its files; empty if it is a directory.
        lacks: options that it does not have.
    """

    suffix: str = ""
    lacks: tuple[str, ...] = ()


_DIRECTORY = Format(lacks=("template", "emit"))
FORMATS = {"gguf": Format(".gguf"), "mlx": _DIRECTORY, "compressed-tensors": _DIRECTORY}
_SUFFIXES = {".bcap": OURS} | {f.suffix: n for n, f in FORMATS.items() if f.suffix}


def is_directory(config: FitConfig) -> bool:
    """Return whether a config asks for a directory, not for a file."""
    kind = format_of(config)
    return config.layout == HUB or (kind in FORMATS and not FORMATS[kind].suffix)


def format_of(config: FitConfig) -> str:
    """Format that a config asks for, by name or by the suffix of its output.

    Raises:
        UsageError: there is no such format, the output has the suffix of another one, or options are given that are not
            for it.
    """
    suffix = Path(config.output).suffix if config.output is not None else ""
    named = _SUFFIXES.get(suffix)
    kind = config.format or named or OURS
    if kind != OURS and kind not in FORMATS:
        raise UsageError(f"unknown format {kind!r}: there are {', '.join((OURS, *FORMATS))}")
    if named not in {None, kind}:
        own = next((s for s, n in _SUFFIXES.items() if n == kind), None)
        raise UsageError(
            f"the output {config.output} is named like the format {named}, but the format is {kind}: "
            + (f"name a file that ends in {own}" if own else "name a directory")
        )
    if config.layout not in {FILE, HUB}:
        raise UsageError(f"unknown layout {config.layout!r}: there are {FILE} and {HUB}")
    if config.layout != FILE and kind != OURS:
        raise UsageError(f"the option layout is not for the format {kind}")
    given = {n: getattr(config, n) for n in (_ONLY if kind == OURS else (*_NOT, *FORMATS[kind].lacks))}
    wrong = [n for n, value in given.items() if getattr(value, "sections", value)]  # code, packed, may be none
    if kind in FORMATS:
        wrong += [n for n in ("tokenizer", "config") if not getattr(config, n)]
        wrong += ["method"] if config.method != "bytecap" else []
    if wrong:
        raise UsageError(f"the option {wrong[0]} is not for the format {kind}")
    return kind
