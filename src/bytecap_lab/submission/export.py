"""Export a whole Parameter Golf submission, `train_gpt.py` and `model.bcap`, counted as a judge would count them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bytecap.errors import BudgetError, CodeError, OutputError
from bytecap.format import codefiles, container
from bytecap.format.container import FILE
from bytecap.system.atomic import write_atomically
from bytecap_lab.submission import pack, vendor

CAP = 16_000_000
SCRIPT, MODEL = "train_gpt.py", "model.bcap"


def budget(script: Path | str, *, cap: int = CAP, vendored: bool = True, like: Path | str | None = None) -> int:
    """Return the bytes that a cap leaves for `model.bcap` beside a packed script.

    Args:
        script: the user's script.
        cap: for both files together, in bytes.
        vendored: whether the script carries a decoder.
        like: an artifact whose coders the decoder has; None for those of the default method.

    Raises:
        BudgetError: the script alone exceeds the cap.
    """
    used = pack.TYPICAL if like is None else vendor.tags(container.read(like))
    packed = pack.pack(pack.gather(Path(script)), vendored=vendored, used=used)
    if len(packed.data) >= cap:
        raise BudgetError(f"{SCRIPT} alone has {len(packed.data):,} bytes of a cap of {cap:,}", len(packed.data))
    return cap - len(packed.data)


def export(
    path: Path | str, directory: Path | str, script: Path | str | None = None, *, vendored: bool = True, cap: int = CAP
) -> dict[str, Any]:
    """Write a submission into a directory of its own.

    Args:
        path: `.bcap` file; its code files move into the script's file.
        directory: made if missing; may hold nothing but an earlier submission.
        script: the user's script, evaluation included; None takes the code files of the artifact.
        vendored: carry a decoder that needs numpy alone; else the script imports bytecap.
        cap: for both files together, in bytes.

    Returns:
        The recount: `files`, `total_bytes`, `slack_bytes` and what the script's file is made of.

    Raises:
        BudgetError: both files together exceed the cap; nothing is written then.
        CodeError: the script cannot be packed. OutputError: the directory cannot be written or holds other files.
    """
    contents = container.read(path)
    sources = pack.gather(Path(script)) if script is not None else _inside(codefiles.files(contents), str(path))
    packed = pack.pack(sources, vendored=vendored, used=vendor.tags(contents))
    model = container.serialize(replace(contents, files=tuple(f for f in contents.files if f.kind == FILE)))
    total = len(packed.data) + len(model)
    if total > cap:
        raise BudgetError(
            f"{SCRIPT} ({len(packed.data):,} bytes) and {MODEL} ({len(model):,}) are {total - cap:,} over the cap of "
            f"{cap:,}: fit again with --budget {cap - len(packed.data)}", total,
        )  # fmt: skip
    target = _directory(Path(directory))
    write_atomically(packed.data, target / SCRIPT)
    write_atomically(model, target / MODEL)
    return {
        "directory": str(directory), "variant": "vendored" if vendored else "library", "cap_bytes": cap,
        "total_bytes": total, "slack_bytes": cap - total, "files": {SCRIPT: len(packed.data), MODEL: len(model)},
        "script_raw_bytes": packed.raw, "decoder_bytes": packed.decoder, "modules": list(packed.modules),
    }  # fmt: skip


def _inside(files: dict[str, bytes], path: str) -> dict[str, bytes]:
    """Return the code files of an artifact, the script first."""
    scripts = {name: content for name, content in files.items() if name.endswith(".py")}
    first = SCRIPT if SCRIPT in scripts else next(iter(scripts), None)
    if first is None or (first != SCRIPT and len(scripts) > 1) or len(scripts) < len(files):
        raise CodeError(f"{path} holds the code {', '.join(files) or '(none)'}: name the script to pack with --script")
    return {first: scripts[first]} | scripts


def _directory(path: Path) -> Path:
    """Make the directory if it is missing, and refuse one that holds anything that would count."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = sorted(p.name for p in path.iterdir() if p.name not in {SCRIPT, MODEL})
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror}") from exc
    if others:
        raise OutputError(f"{path} holds other files, which would count: {', '.join(others[:3])}")
    return path
