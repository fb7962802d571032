"""`bytecap ledger` shows where every byte of a file went."""

from __future__ import annotations

from bytecap.cli.common import Artifact, Bases, Json, print_json


def ledger(path: Artifact, base: Bases = None, as_json: Json = False) -> None:
    """Show where every byte went, rebuilt from the file alone; a base that is given is checked to be the one."""
    from bytecap.errors import UsageError
    from bytecap.format import container, updates
    from bytecap.format.ledger import total
    from bytecap.report.terminal import print_ledger
    from bytecap.runtimes import hub

    if base and (path.is_dir() or path.suffix == ".gguf"):
        raise UsageError(f"{path} is no .bcap file: it has no base")
    if hub.is_hub(path):
        entries = hub.ledger_of(path)
    elif path.is_dir():
        from bytecap.runtimes.directory.contents import ledger_of

        entries = ledger_of(path)
    elif path.suffix == ".gguf":
        from bytecap.runtimes.gguf.file import ledger as entries_of

        entries = entries_of(path)
    else:
        contents = updates.read(path, base) if base else container.read(path)
        entries = container.ledger(contents, path.stat().st_size)
    if as_json:
        print_json({"file_bytes": total(entries), "entries": [e.as_dict() for e in entries]})
    else:
        print_ledger(entries, str(path))
