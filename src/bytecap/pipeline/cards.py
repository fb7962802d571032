"""Make the card of a file from the file, the figures of its fit, and what the source says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytecap.errors import CheckpointError
from bytecap.format import container
from bytecap.model.checkpoint import resolve
from bytecap.report.card import Source, card, licence_of
from bytecap.runtimes import hub

_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING")


def source_of(name: str) -> tuple[Source, dict[str, bytes]]:
    """Return what is known of a model by its name, and the text of its licence by file name."""
    try:
        directory = resolve(name)
    except CheckpointError:
        return Source(short(name)), {}
    return read_source(directory, short(name))


def read_source(directory: Path, name: str) -> tuple[Source, dict[str, bytes]]:
    """Return the licence that a directory's card names, and the text of its licence by file name."""
    readme = directory / hub.CARD
    licence = licence_of(readme.read_text("utf-8", "replace")) if readme.is_file() else {}
    texts = [n for n in _LICENCES if (directory / n).is_file()][:1]
    return Source(name, licence, texts[0] if texts else ""), {n: (directory / n).read_bytes() for n in texts}


def card_of(path: Path, report: Mapping[str, Any], source: str | None) -> str:
    """Return the card of a file, or of a directory in the hub's layout.

    The card of an update states the bytes of the update alone and names the base that it is read with.

    Args:
        path: `.bcap` file or directory.
        report: figures of its fit; empty if they are not known.
        source: directory or hub id of the model that it was made of.

    Raises:
        ArtifactError: the file cannot be trusted. CheckpointError: there is no such source.
    """
    whole = hub.is_hub(path)
    contents = container.read(path / hub.FILE if whole else path)
    entries = [
        e
        for e in (hub.ledger_of(path) if whole else container.ledger(contents, path.stat().st_size))
        if e.unit != hub.CARD
    ]
    name = short(str(report.get("model", "")))
    if source is not None:
        origin = read_source(resolve(source), short(source))[0]
    else:
        origin = read_source(path, name)[0] if whole else Source(name)
    budget = contents.about.get("budget")
    known = {"budget_bytes": budget} if isinstance(budget, int) and not whole else {}
    base = contents.base.sha256 if contents.base else ""
    return card(entries, {**known, **report}, origin, whole=whole, base=base)


def short(name: str) -> str:
    """Return a model's name: a hub id whole, of a directory the last part."""
    return Path(name).resolve().name if name and Path(name).exists() else name
