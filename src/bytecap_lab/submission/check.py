"""Recount a submission and run it from outside, trusting nothing that made it.

Every file in the directory counts unless it is named as public data. Code is read, not run, to see what it imports;
only the evaluation, if asked for, is run: in a copy of the directory, without the caller's module path.

What it omits: modules imported under computed names, and files opened by absolute path, are not seen.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bytecap.errors import BudgetError, CodeError
from bytecap.format import container
from bytecap.format.decoder import decode_units
from bytecap.pipeline.minify import parse
from bytecap_lab.submission.export import CAP, SCRIPT
from bytecap_lab.submission.pack import imports, unpacked

SECONDS = 600.0  # what the challenge allows an evaluation
_CODE = {".py", ".pyc", ".so", ".pyd", ".sh", ".cu", ".bcap", ".zip"}
_FIGURE = re.compile(r"(?:bpb|bits[ _]per[ _]byte)\W{0,4}([0-9]+\.?[0-9]*(?:e[-+]?[0-9]+)?)", re.IGNORECASE)


def check(
    directory: Path | str, *, cap: int = CAP, data: Collection[str] = (), libraries: Collection[str] = ()
) -> dict[str, Any]:
    """Recount a submission.

    Args:
        directory: of the submission.
        cap: for all files together, in bytes.
        data: names of public data files in it, which do not count.
        libraries: public libraries that are not installed here.

    Returns:
        `files`, `total_bytes`, `slack_bytes`, `public` and `parameters`.

    Raises:
        BudgetError: more bytes than the cap. ArtifactError: a `.bcap` file cannot be trusted.
        CodeError: a file is not counted, code does not parse, or a module is not there.
    """
    root = Path(directory)
    counted, public = _count(root, set(data))
    total = sum(counted.values())
    if total > cap:
        largest = ", ".join(f"{n} {counted[n]:,}" for n in sorted(counted, key=lambda n: -counted[n])[:3])
        raise BudgetError(f"{root} has {total:,} bytes, {total - cap:,} over the cap of {cap:,}: {largest}", total)
    if SCRIPT not in counted:
        raise CodeError(f"{root} has no {SCRIPT}")
    models = [n for n in counted if n.endswith(".bcap")]
    if not models:
        raise CodeError(f"{root} has no .bcap file")
    values = [v for n in models for v in decode_units(container.read(root / n), aliases=False).values()]
    _check_imports(root, [n for n in counted if n.endswith(".py")], set(libraries))
    return {
        "directory": str(root), "cap_bytes": cap, "total_bytes": total, "slack_bytes": cap - total, "files": counted,
        "public": public, "parameters": sum(v.size for v in values),
    }  # fmt: skip


def evaluate(
    directory: Path | str, command: str, *, data: Collection[str] = (), seconds: float = SECONDS
) -> dict[str, Any]:
    """Run a submission's evaluation in a copy of its directory, and read the figure it prints.

    Args:
        directory: of the submission.
        command: as on a command line; `python` is the interpreter of this process.
        data: public data files, linked instead of copied.
        seconds: after which it is ended.

    Returns:
        `bpb`, the last figure behind "bpb" or "bits per byte" in its output, and `line`, where it stands.

    Raises:
        CodeError: it fails, takes too long, or prints no figure.
    """
    words = _words(command)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "submission"
        shutil.copytree(directory, copy, ignore=shutil.ignore_patterns(*data))
        for name in data:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).unlink(missing_ok=True)
            (copy / name).symlink_to((Path(directory) / name).resolve())
        try:
            done = subprocess.run(  # noqa: S603 (the user's own command)
                words, cwd=copy, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds,
                check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CodeError(f"the evaluation was ended after {seconds:g} seconds: {command}") from None
        except OSError as exc:
            raise CodeError(f"cannot run {words[0]}: {exc.strerror}") from exc
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["(no message)"])[-1]
        raise CodeError(f"the evaluation failed with exit code {done.returncode}: {last}")
    for line in reversed(done.stdout.splitlines()):
        if found := _FIGURE.findall(line):
            return {"bpb": float(found[-1]), "line": line.strip()}
    raise CodeError('the evaluation printed no figure behind "bpb" or "bits per byte"')


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise CodeError(f"cannot read the command {command!r}: {exc}") from exc
    if not words:
        raise CodeError("the command of the evaluation is empty")
    return [sys.executable if words[0] in {"python", "python3"} else words[0], *words[1:]]


def _count(root: Path, data: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of counted files and of public data, by name."""
    if not root.is_dir():
        raise CodeError(f"{root} is no directory")
    counted, public = dict[str, int](), dict[str, int]()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name not in data and path.is_symlink():
            raise CodeError(f"{root}/{name} is a link: what it leads to would not be counted")
        if path.is_file():
            if name in data and path.suffix in _CODE:
                raise CodeError(f"{root}/{name} is no public data: it has to be counted")
            (public if name in data else counted)[name] = path.stat().st_size
    if missing := sorted(data - set(public)):
        raise CodeError(f"{root} has no file {missing[0]}, which is named as public data")
    return counted, public


def _check_imports(root: Path, files: Sequence[str], libraries: set[str]) -> None:
    """Check that every imported module is packed, beside the importing file, or a public library."""
    public = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | libraries | {"bytecap"}
    for file in files:
        content = (root / file).read_bytes()
        text, tree = parse(content, f"{root}/{file}")
        packed = unpacked(text)
        trees = {f"{file} ({name})": parse(s.encode(), f"{root}/{file} ({name})")[1] for name, s in packed.items()}
        known = public | set(packed) | _beside((root / file).parent) | _beside(root)
        for name, one in ({file: tree} | trees).items():
            _refuse_unknown(root, name, _needed(one), known)


def _refuse_unknown(root: Path, file: str, needed: Mapping[str, int], known: set[str]) -> None:
    for name, line in needed.items():
        if name in known:
            continue
        for place in (Path.cwd(), root.resolve().parent):
            for path in (place / f"{name}.py", place / name / "__init__.py"):
                if path.is_file():
                    raise CodeError(f"{root}/{file}, line {line}: imports {path}, which is outside and not counted")
        raise CodeError(f"{root}/{file}, line {line}: imports {name}, which is neither in {root} nor installed")


def _beside(directory: Path) -> set[str]:
    """Return the modules and packages in a directory."""
    return {p.stem for p in directory.glob("*.py")} | {p.parent.name for p in directory.glob("*/__init__.py")}


def _needed(tree: ast.Module) -> dict[str, int]:
    """Return the imported modules, without those whose absence the program expects."""
    optional: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(_catches_imports(h) for h in node.handlers):
            optional.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if hasattr(node, "body") and isinstance(node.body, list):
            node.body = [n for n in node.body if n not in optional or not isinstance(n, ast.Import | ast.ImportFrom)]
    return imports(tree)


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    names = {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} if handler.type else {"Exception"}
    return bool(names & {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})
