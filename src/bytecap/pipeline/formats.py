"""What `fit` can write: a format of ours and those of other programs, by name.

A family of other programs' formats is one entry here, and one file or folder in `bytecap.runtimes`.

>>> format_of(None, "model.gguf"), format_of("mlx", "model"), format_of(None, None)
('gguf', 'mlx', 'bcap')
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bytecap.errors import UsageError

OURS = "bcap"


@dataclass(frozen=True)
class Format:
    """A format of other programs.

    Attributes:
        module: where its job is.
        job: function of a model and a budget.
        suffix: of its files; empty if it is a directory.
        options: given to the job.
    """

    module: str
    job: str
    suffix: str = ""
    options: dict[str, str] = field(default_factory=dict)

    def load(self) -> Callable[..., Any]:
        """The job; imports torch."""
        return partial(getattr(importlib.import_module(self.module), self.job), **self.options)


FORMATS = {
    "gguf": Format("bytecap.pipeline.fit_gguf", "fit_gguf", ".gguf"),
    "mlx": Format("bytecap.pipeline.fit_directory", "fit_directory", "", {"format": "mlx"}),
    "compressed-tensors": Format(
        "bytecap.pipeline.fit_directory", "fit_directory", "", {"format": "compressed-tensors"}
    ),
}


def format_of(asked: str | None, output: Path | str | None) -> str:
    """Format by name, or by the suffix of the output.

    Raises:
        UsageError: there is no such format.
    """
    if asked is None:
        suffix = Path(output).suffix if output is not None else ""
        return next((n for n, f in FORMATS.items() if f.suffix and f.suffix == suffix), OURS)
    if asked != OURS and asked not in FORMATS:
        raise UsageError(f"unknown format {asked!r}: there are {', '.join((OURS, *FORMATS))}")
    return asked
