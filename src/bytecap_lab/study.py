"""Check the inputs and places of a study of several models, before anything is read or written.

`compare` and `thesis` begin with it: the same models, texts, directory, store and page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bytecap.errors import UsageError
from bytecap.model.sources import Paths, named
from bytecap.progress import Reporter
from bytecap.system.atomic import make_directory
from bytecap.system.collisions import refuse_pages

SHOWS_ONLY = "module"


@dataclass(frozen=True)
class Study:
    """The inputs and places of a study.

    Attributes:
        models: directories, hub ids or `demo`.
        calibration, evaluation: names of text files; none for the embedded text.
        output: directory to write, or None.
        kept: directory of statistics, where it is not inside `output`.
    """

    models: tuple[str, ...]
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    output: Path | None
    kept: Path | None

    @staticmethod
    def of(
        name: str,
        models: Sequence[Path | str] | Path | str,
        output: Path | str | None,
        *,
        report: Path | str | None,
        store: Path | str | None,
        calibration: Paths,
        evaluation: Paths,
        reporter: Reporter,
    ) -> Study:
        """Check what is read and written.

        Args:
            name: of the files that the study writes, such as `compare`.
            models: one or several.
            output: directory to write.
            report: page to write.
            store: directory of statistics.
            calibration: text files.
            evaluation: text files.
            reporter: told where embedded texts stand in.

        Raises:
            OutputError: an output is an input. UsageError: there is no model.
        """
        names = tuple(str(m) for m in ([models] if isinstance(models, str | Path) else models))
        refuse_pages(
            output, name, report, store,
            {"a model": names, "a calibration text": calibration, "an evaluation text": evaluation},
        )  # fmt: skip
        if not names:
            raise UsageError("there is nothing to run: give at least one model (demo is the embedded one)")
        texts = named(calibration, evaluation, reporter, names)
        return Study(names, *texts, None if output is None else Path(output), None if store is None else Path(store))

    def directory(self) -> Path | None:
        """Make the directory to write and return it; None if nothing is written."""
        return None if self.output is None else make_directory(self.output)

    @property
    def store(self) -> Path | None:
        """Directory of statistics: the one that was asked for, or `store` in the output."""
        if self.kept is not None or self.output is None:
            return self.kept
        return self.output / "store"
