"""Send a finished model to a hub: the directory that transformers loads, in one commit, through huggingface_hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.errors import OutputError, UsageError
from bytecap.format.container import Contents
from bytecap.format.decoder import side_files
from bytecap.pipeline.cards import source_of
from bytecap.report.card import card
from bytecap.runtimes import hub

_LONGEST = 200  # characters of another program's message


def directory_of(contents: Contents, report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a directory made of an artifact that holds its side files.

    Raises:
        ArtifactError: it holds no config.
    """
    files = hub.layout(contents, side_files(contents))
    source, licence = source_of(str(report.get("model", "")))
    files |= licence
    entries = hub.ledger(hub.split(contents, {})[0], files)
    return files | {hub.CARD: card(entries, report, source, whole=True).encode()}


def push(files: Mapping[str, bytes], repository: str, *, private: bool | None, token: str | None) -> str:
    """Create a repository if there is none, and commit files to it; returns the address of the commit.

    Raises:
        OutputError: the hub cannot be reached, or refuses. UsageError: huggingface_hub is missing.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ModuleNotFoundError as exc:
        raise UsageError("huggingface_hub is missing, which sends files to hubs: pip install 'bytecap[hf]'") from exc
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        done = api.create_commit(repository, operations, commit_message=f"Add {hub.FILE}")
    except Exception as exc:
        raise OutputError(
            f"cannot send {hub.FILE} to {repository!r} ({_first_line(exc)}): check the name and the network, and log "
            "in with `hf auth login`"
        ) from exc
    return str(done.commit_url)


def _first_line(exc: BaseException) -> str:
    """Return the kind of an error and the beginning of its message."""
    lines = [x.strip() for x in str(exc).splitlines() if x.strip()]
    return f"{type(exc).__name__}: {lines[0][:_LONGEST]}" if lines else type(exc).__name__
