"""Open a model directory before any weight of it is read: side files, headers, and what has to be dequantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bytecap.model.fileset import Header, read_headers, read_side_files
from bytecap.model.inputs import refuse_encoder_decoder
from bytecap.model.quantized_checkpoint import Dequantized, dense, refuse_finished
from bytecap.model.tokenization import conversion_note


@dataclass(frozen=True)
class Opened:
    """A directory before any weight of it is in the model.

    Attributes:
        files: side files.
        headers: of the weight files, quantized weights as the dense ones they stand for.
        notes: for the user.
        dense: reads those weights; None where nothing is quantized.
    """

    files: dict[str, bytes]
    headers: dict[Path, Header]
    notes: list[str]
    dense: Dequantized | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors."""
        return {n: tuple(e["shape"]) for header in self.headers.values() for n, e in header.items()}


def opened(
    directory: Path,
    name: str,
    begin: Callable[[dict[str, bytes]], None] | None,
    allow_unused: Sequence[str],
    *,
    keep: int = 0,
) -> Opened:
    """Read what a directory says of its model before any weight is read, and refuse kinds that are no language model.

    Args:
        directory: of the model.
        name: for messages.
        begin: see `bytecap.model.checkpoint.load_checkpoint`.
        allow_unused: likewise.
        keep: most bytes of dequantized weights that are kept until they are read.
    """
    files = read_side_files(directory)
    refuse_encoder_decoder(files, name)
    refuse_finished(files["config.json"], directory)
    headers, notes = read_headers(directory, allow_unused)
    quantized = dense(files["config.json"], headers, directory, keep)
    if quantized is not None:
        files, headers = files | {"config.json": quantized.config}, quantized.headers
        notes = [*notes, *quantized.notes]
    if begin is not None:
        begin(files)
    return Opened(files, headers, notes + conversion_note(files), quantized)
