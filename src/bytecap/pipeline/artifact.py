"""Define `Artifact`, a finished file in memory with everything that was measured on it, as `fit` returns it."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bytecap.errors import UsageError
from bytecap.format import container
from bytecap.format.container import Contents
from bytecap.format.decoder import decode_units
from bytecap.format.ledger import Entry
from bytecap.model.evaluation import ByWindow
from bytecap.runtimes import hub
from bytecap.system.atomic import replacing, write_atomically
from bytecap.system.directories import replacing_directory
from bytecap.system.scratch import Scratch

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(repr=False)
class Artifact:
    """A finished file.

    Attributes:
        contents: what is in it.
        data: its bytes.
        report: every figure of the job, as `--json` prints it, and under `warnings` every warning.
        windows: scores of every evaluation text by window; none after a dry run.
        before: what would have been written without recovery, where that is something else.
        beside: files beside `model.bcap`, by name, where a directory was asked for (`layout="hub"`).
    """

    contents: Contents
    data: bytes
    report: dict[str, Any] = field(default_factory=dict)
    windows: tuple[ByWindow, ...] = ()
    before: Artifact | None = None
    beside: dict[str, bytes] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Artifact({self._summary()})"

    def _repr_html_(self) -> str:
        """Draw the ledger for notebooks."""
        from bytecap.report.notebook import ledger

        return ledger(self.ledger(), self._summary()) if self.length else f"<p>{self._summary(html=True)}</p>"

    def _summary(self, *, html: bool = False) -> str:
        """Return model, size and quality in one line."""
        from html import escape

        name = "".join(c if c.isprintable() else "?" for c in str(self.report.get("model", "")))
        parts = [name[:60]] if name else []
        if self.length:
            parts.append(f"{self.length:,} bytes")
        if (budget := self.report.get("budget_bytes")) is not None:
            parts.append(f"budget {budget:,}" if self.length else f"dry run under {budget:,} bytes")
        for key, words in (("bpb_artifact", "bits per byte"), ("kl_nats", "nats per token from the original")):
            value = self.report.get(key)
            if isinstance(value, float) and math.isfinite(value):
                parts.append(f"{value:.4f} {words}")
        line = ", ".join(parts)
        return escape(line) if html else line

    @property
    def length(self) -> int:
        """Number of bytes; none after a dry run."""
        return len(self.data)

    def read(self) -> Contents:
        """Read the bytes back, with every check."""
        return container.parse(self.data)

    def save(self, path: Path | str) -> int:
        """Write the file, or the directory if one was asked for, whole or not at all; returns the size in bytes."""
        if not self.beside:
            return write_atomically(self.data, Path(path))
        files = {hub.FILE: self.data, **self.beside}
        with replacing_directory(Path(path)) as made:
            for name, data in files.items():
                (made / name).write_bytes(data)
        return sum(map(len, files.values()))

    def push_to_hub(self, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Send the model to a hub as a directory that transformers loads; returns the address of the commit.

        Args:
            repository: `name` or `organisation/name`, made if there is none.
            private: whether a new repository is seen by its owner alone; by default as the hub does it.
            token: of the hub; by default that of `hf auth login`.

        Raises:
            OutputError: the hub cannot be reached, or refuses. ArtifactError: the file holds no config.
            UsageError: a dry run made no file, or huggingface_hub is missing.
        """
        from bytecap.pipeline.publishing import directory_of, push

        if not self.data:
            raise UsageError("a dry run writes no file: there is nothing to send")
        files = {hub.FILE: self.data, **self.beside} if self.beside else directory_of(self.contents, self.report)
        return push(files, repository, private=private, token=token)

    def ledger(self) -> list[Entry]:
        """Return the owner and the kind of every byte."""
        return hub.ledger(self.contents, self.beside) if self.beside else container.ledger(self.contents)

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """Decode the values, by name and with aliases."""
        return decode_units(self.contents)

    def load_model(
        self, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32", resident: str = "decoded"
    ) -> nn.Module:
        """Return the decoded model as a torch module in evaluation mode, as `bytecap.load_model` reads it from a file.

        Args:
            device: where the values go.
            dtype: of floating-point tensors.
            resident: decoded, or coded: in the memory of the file.

        Raises:
            UsageError: a dry run made no file. ArtifactError: the file holds no config.
        """
        from bytecap.model.from_artifact import module_of

        if not self.length:
            raise UsageError("a dry run writes no file: there is no model to load")
        contents = self.read()
        if contents.base is not None:  # its own bases were read for the job
            contents = replace(contents, base=self.contents.base)
        name = str(self.report.get("model", "the artifact"))
        beside = hub.plain_files(self.beside)
        return module_of(contents, name, device=device, dtype=dtype, resident=resident, beside=beside)


class FiledArtifact(Artifact):
    """A finished file that was never in memory whole.

    Args:
        path: where it is.
        scratch: the work files that it is one of, which are there as long as it is.
    """

    def __init__(self, path: Path, scratch: Scratch) -> None:
        super().__init__(container.open_file(path), b"")
        self._path, self._scratch = path, scratch

    @property
    def data(self) -> bytes:
        """The bytes, read from the file."""
        return self._path.read_bytes()

    @data.setter
    def data(self, value: bytes) -> None:
        """Take nothing: the bytes are the file's."""

    @property
    def length(self) -> int:
        """Number of bytes."""
        return self._path.stat().st_size

    def read(self) -> Contents:
        """Check the file once more; units stay in it."""
        return container.open_file(self._path)

    def save(self, path: Path | str) -> int:
        """Copy atomically; returns the size in bytes."""
        with self._path.open("rb") as source, replacing(Path(path)) as f:
            shutil.copyfileobj(source, f)
        return self.length
