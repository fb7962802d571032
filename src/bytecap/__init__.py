"""Put a trained language model into one file under a hard byte cap, every byte spent where it recovers most.

`load` needs numpy alone, `fit` of a torch module and `load_into` the `torch` extra; `fit` of a checkpoint and
`load_model` need `hf`.

>>> import bytecap
>>> bytecap.parse_size("3MB")
3000000
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bytecap import _moved
from bytecap._version import __version__
from bytecap.errors import (
    ArtifactError,
    BaseError,
    BudgetError,
    BytecapError,
    BytecapWarning,
    CheckpointError,
    CodeError,
    CorruptError,
    NotAnArtifact,
    OutputError,
    RankError,
    ShortageError,
    TextError,
    UsageError,
    VersionError,
)
from bytecap.format.decoder import load
from bytecap.sizes import format_size, parse_size

if TYPE_CHECKING:
    from bytecap.job.config import FitConfig
    from bytecap.model.from_artifact import load_into, load_model
    from bytecap.pipeline.artifact import Artifact
    from bytecap.pipeline.choose import Choice, choose
    from bytecap.pipeline.fit import fit, fit_budgets
    from bytecap_lab.compare import compare
    from bytecap_lab.layer_tying import tie
    from bytecap_lab.rd_curves import byte_returns

__all__ = [
    "Artifact",
    "ArtifactError",
    "BaseError",
    "BudgetError",
    "BytecapError",
    "BytecapWarning",
    "CheckpointError",
    "Choice",
    "CodeError",
    "CorruptError",
    "FitConfig",
    "NotAnArtifact",
    "OutputError",
    "RankError",
    "ShortageError",
    "TextError",
    "UsageError",
    "VersionError",
    "__version__",
    "byte_returns",
    "choose",
    "compare",
    "fit",
    "fit_budgets",
    "format_size",
    "load",
    "load_into",
    "load_model",
    "parse_size",
    "tie",
]


_LAZY = {  # what needs more than numpy, and the module that has it
    "Artifact": "bytecap.pipeline.artifact",
    "Choice": "bytecap.pipeline.choose",
    "FitConfig": "bytecap.job.config",
    "byte_returns": "bytecap_lab.rd_curves",
    "choose": "bytecap.pipeline.choose",
    "compare": "bytecap_lab.compare",
    "fit": "bytecap.pipeline.fit",
    "fit_budgets": "bytecap.pipeline.fit",
    "load_into": "bytecap.model.from_artifact",
    "load_model": "bytecap.model.from_artifact",
    "tie": "bytecap_lab.layer_tying",
}

_moved.install()

if not TYPE_CHECKING:  # a type checker sees the imports above

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(import_module(_LAZY[name]), name)
        if name == "train":
            return import_module("bytecap_lab.train")
        if f"bytecap.{name}" in _moved.MOVED:
            return import_module(f"bytecap.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
