"""Share types of options, progress, output and checks among the commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.errors import OutputError, UsageError
from bytecap.job.config import FitConfig
from bytecap.model.defaults import EVALUATION_TOKENS, TOKENS
from bytecap.progress import Bars, Reporter, Silent
from bytecap.report.plain import finite
from bytecap.system.atomic import check_kind
from bytecap.system.collisions import Paths, refuse_collisions

EMBEDDED = "embedded text (--calib: and samples of the model), with a warning"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Resident = Annotated[
    str, typer.Option(help="decoded, or coded: in the memory of the file, each block decoded just before it runs.")
]
Model = Annotated[str, typer.Argument(help="Hugging Face directory, hub id, or `demo`.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Artifact = Annotated[Path, typer.Argument(help="A .bcap file.", metavar="ARTIFACT")]
Bases = Annotated[
    list[Path] | None,
    typer.Option(
        "--base", help="The file that ARTIFACT is an update of (repeatable, for bases of bases).", show_default="none"
    ),
]  # fmt: skip
Calibration = Annotated[
    list[Path] | None,
    typer.Option("--calibration", "--calib", help="Calibration text (repeatable).", show_default=EMBEDDED),
]
Evaluation = Annotated[
    list[Path] | None,
    typer.Option("--evaluation", "--eval", help="Evaluation text, one a workload (repeatable).", show_default=EMBEDDED),
]
EvaluationTokens = Annotated[
    int, typer.Option("--evaluation-tokens", "--eval-tokens", help="Most evaluation tokens, over all texts.", min=1)
]
MostTokens = Annotated[int | None, typer.Option("--tokens", help="Most calibration tokens.", show_default=str(TOKENS))]
MostEvaluationTokens = Annotated[
    int | None,
    typer.Option(
        "--evaluation-tokens", "--eval-tokens", help="Most evaluation tokens.", show_default=str(EVALUATION_TOKENS)
    ),
]
Tokens = Annotated[int, typer.Option(help="Most calibration tokens.", min=1)]
Factory = Annotated[
    str | None,
    typer.Option(
        "--factory", help="FILE.py:CALLABLE that returns the module, instead of MODEL. The file is run.",
        show_default="none",
    ),
]  # fmt: skip
State = Annotated[
    Path | None,
    typer.Option(
        "--state", help="The factory module's state dict: safetensors, or torch.save.",
        show_default="as the factory made it",
    ),
]  # fmt: skip
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss", help="FILE.py:CALLABLE(module, ids) -> mean nats. The file is run.", show_default="the next token"
    ),
]
BytesPerToken = Annotated[
    Path | None,
    typer.Option(
        "--bytes-per-token", help="Table (.npy, text) or SentencePiece model (.model).",
        show_default="none: no bits per byte",
    ),
]  # fmt: skip


class _Terminal(Bars):
    """Bars that print warnings as lines like all others."""

    def warn(self, text: str) -> None:
        """Print the warning."""
        self.note(f"warning: {text}")


class _Quiet(Silent):
    """Silence beside `--json`, whose object holds the warnings."""

    def warn(self, text: str) -> None:
        """Keep the warning."""
        self.note(f"warning: {text}")


def progress(quiet: bool) -> Reporter:
    """Return bars, or silence beside `--json`."""
    return _Quiet() if quiet else _Terminal()


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output; NaN and infinity become null."""
    sys.stdout.write(json.dumps(finite(value), allow_nan=False) + "\n")


def show(found: dict[str, Any], as_json: bool, printed: Callable[[dict[str, Any]], None]) -> None:
    """Show figures: as JSON, or by a printer for the terminal."""
    (print_json if as_json else printed)(found)


def check_study(models: list[str] | None, lines: Any, what: str) -> None:
    """Refuse a study of no models, and one of both models and finished lines.

    Args:
        models: the MODEL arguments.
        lines: files of finished lines, from --from.
        what: the study's purpose and file, for the message.
    """
    if bool(models) == bool(lines):
        raise UsageError(f"give a MODEL (demo is the embedded one) to {what}")


def names(paths: list[str] | None) -> list[str] | None:
    """Return names of paths, given by comma or repeated; None if there are none."""
    return [n.strip() for group in paths or () for n in group.split(",") if n.strip()] or None


def needed(model: str | None) -> str:
    """Return the MODEL of a command that may have a factory in its place."""
    if model is None:
        raise typer.BadParameter("say which MODEL, or give --factory FILE.py:CALLABLE")
    return model


def source_of(factory: str, model: str | None, state: Path | None, loss: str | None, table: Path | None) -> Any:
    """Return the factory's source; MODEL may be its artifact, in place of --state."""
    from bytecap.pipeline.fit_shards import Source

    if model is not None and (state is not None or not model.endswith(".bcap")):
        raise UsageError(f"give --factory or the model {model}, not both (an artifact may stand for --state)")
    return Source(factory, Path(model) if model is not None else state, loss, table)


def completed(
    config: FitConfig, tokens: int | None, evaluation_tokens: int | None, as_json: bool, kind: str = "FILE"
) -> FitConfig:
    """Return the config of a command whose tokens are numbers, and that writes or only says what it would write."""
    if config.output is None and not config.dry_run:
        raise typer.BadParameter(f"say where to write with -o {kind}, or use --dry-run")
    return replace(
        config, tokens=tokens or TOKENS, evaluation_tokens=evaluation_tokens or EVALUATION_TOKENS,
        reporter=progress(as_json),
    )  # fmt: skip


def check_output(path: Path | None, made: Path | None = None) -> None:
    """Fail before hours of work, not after; the directory `made` need not be there yet."""
    if path is None or path.parent == made:
        return
    check_kind(path)
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: the directory {path.parent} is not writable")


def check_inputs(outputs: Mapping[str, Path | str | None], inputs: Mapping[str, Paths]) -> None:
    """Refuse outputs that would take the place of an input or of one another; see `bytecap.system.collisions`."""
    refuse_collisions(outputs, inputs)


def source_file(spec: str | None) -> str | None:
    """The file of FILE.py:CALLABLE, if it is one."""
    return spec.rpartition(":")[0] if spec is not None and ":" in spec else None
