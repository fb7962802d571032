"""bytecap: a trained language model in ONE file under a hard byte cap, every byte spent where it recovers most.

`load` needs numpy alone, `fit` of a torch module and `load_into` the `torch` extra; `fit` of a checkpoint and
`load_model` need `hf`.

>>> import bytecap
>>> bytecap.parse_size("3MB")
3000000
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecap._version import __version__
from bytecap.errors import (
    ArtifactError,
    BudgetError,
    BytecapError,
    CheckpointError,
    CodeError,
    CorruptError,
    NotAnArtifact,
    OutputError,
    ShortageError,
    TextError,
    UsageError,
    VersionError,
)
from bytecap.format.decoder import load
from bytecap.sizes import format_size, parse_size

if TYPE_CHECKING:
    from bytecap.pipeline.fit import Artifact
    from bytecap.pipeline.fit_directory import DirectoryFit
    from bytecap.pipeline.fit_gguf import GgufFile

__all__ = [
    "Artifact",
    "ArtifactError",
    "BudgetError",
    "BytecapError",
    "CheckpointError",
    "CodeError",
    "CorruptError",
    "NotAnArtifact",
    "OutputError",
    "ShortageError",
    "TextError",
    "UsageError",
    "VersionError",
    "__version__",
    "byte_returns",
    "compare",
    "fit",
    "format_size",
    "load",
    "load_into",
    "load_model",
    "parse_size",
    "tie",
]


def fit(model: Any, budget: int | str, **options: Any) -> Artifact | GgufFile | DirectoryFit:
    """Put a model into one file of at most `budget` bytes.

    See `bytecap.pipeline.fit.fit` for every option, and `bytecap.pipeline.fit_module.fit_module` where `model` is a
    torch module; with `format="gguf"`, `bytecap.pipeline.fit_gguf.fit_gguf`;
    with `format="mlx"` or `"compressed-tensors"`, `bytecap.pipeline.fit_directory.fit_directory`.
    """
    from bytecap.pipeline.formats import FORMATS, format_of

    kind = format_of(options.pop("format", None), options.get("output"))
    if kind in FORMATS:
        found: Artifact | GgufFile | DirectoryFit = FORMATS[kind].load()(model, budget, **options)
        return found
    if hasattr(model, "named_modules"):
        from bytecap.pipeline.fit_module import fit_module

        return fit_module(model, budget, **options)
    from bytecap.pipeline.fit import fit as run

    return run(model, budget, **options)


def byte_returns(model: Any, budget: int | str, output: Path | str | None = None, **options: Any) -> dict[str, Any]:
    """What a byte buys on every exception path; see `bytecap_lab.rd_curves.byte_returns` for every option."""
    from bytecap_lab.rd_curves import byte_returns as run

    return run(model, budget, output, **options)


def tie(model: Any, blocks: int, output: Path | str, **options: Any) -> dict[str, Any]:
    """A trained model with fewer stored blocks, as a directory; see `bytecap_lab.layer_tying.tie` for every option."""
    from bytecap_lab.layer_tying import tie as run

    return run(model, blocks, output, **options)


def compare(models: Any, output: Path | str | None = None, **options: Any) -> dict[str, Any]:
    """Methods at equal bytes on equal tokens; see `bytecap_lab.compare.compare` for every option."""
    from bytecap_lab.compare import compare as run

    return run(models, output, **options)


def load_model(path: Path | str) -> Any:
    """The decoded model of an artifact as a torch module in evaluation mode; see `bytecap.model.from_artifact`."""
    from bytecap.model.from_artifact import load_model as run

    return run(path)


def load_into(path: Path | str, module: Any) -> None:
    """Put an artifact's decoded values into a torch module, in place; see `bytecap.model.from_artifact`."""
    from bytecap.model.from_artifact import load_into as run

    run(path, module)


def __getattr__(name: str) -> Any:
    if name == "Artifact":
        from bytecap.pipeline.fit import Artifact

        return Artifact
    if name == "train":
        from bytecap_lab import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
