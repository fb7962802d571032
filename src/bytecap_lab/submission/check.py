"""Recount a submission and run it from outside, trusting nothing that made it.

Every file in the directory counts unless it is named as public data, and so do names. Code is read, not run, to see
what it imports; only the evaluation, if asked for, is run (`bytecap_lab.submission.run`).

What it omits: modules imported under computed names, and files opened by absolute path, are not seen.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bytecap.errors import BudgetError, CodeError
from bytecap.format import container
from bytecap.format.decoder import decode_each
from bytecap.pipeline.minify import parse
from bytecap_lab.submission.export import CAP, MODEL, SCRIPT
from bytecap_lab.submission.pack import imports, unpacked
from bytecap_lab.submission.run import evaluate

__all__ = ["check", "evaluate"]

_PARSING, _MEMORY = 120, 1 << 32  # seconds and bytes that parsing sources may take
_CODE = {".py", ".pyc", ".so", ".pyd", ".sh", ".cu", ".bcap", ".zip"}


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
        `files`, `name_bytes` (of the names of all files and directories but the script's and the model's: they can hold
        data as well), `total_bytes`, `slack_bytes`, `public` and `parameters`.

    Raises:
        BudgetError: more bytes than the cap. ArtifactError: a `.bcap` file cannot be trusted.
        CodeError: a file is not counted, code does not parse, or a module is not there.
    """
    root = Path(directory)
    counted, public, names = _count(root, set(data))
    total = sum(counted.values()) + names
    if total > cap:
        largest = ", ".join(f"{n} {counted[n]:,}" for n in sorted(counted, key=lambda n: -counted[n])[:3])
        largest += f", names {names:,}" if names else ""
        raise BudgetError(f"{root} has {total:,} bytes, {total - cap:,} over the cap of {cap:,}: {largest}", total)
    if SCRIPT not in counted:
        raise CodeError(f"{root} has no {SCRIPT}")
    models = [n for n in counted if n.endswith(".bcap")]
    if not models:
        raise CodeError(f"{root} has no .bcap file")
    parameters = sum(v.size for n in models for _, v in decode_each(container.read(root / n)))
    _check_imports(root, [n for n in counted if n.endswith(".py")], set(libraries))
    return {
        "directory": str(root), "cap_bytes": cap, "total_bytes": total, "slack_bytes": cap - total, "files": counted,
        "name_bytes": names, "public": public, "parameters": parameters,
    }  # fmt: skip


def _count(root: Path, data: set[str]) -> tuple[dict[str, int], dict[str, int], int]:
    """Sizes of counted files and of public data, by name, and the bytes of names."""
    if not root.is_dir():
        raise CodeError(f"{root} is no directory")
    counted, public, names = dict[str, int](), dict[str, int](), 0
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name not in data and path.is_symlink():
            raise CodeError(f"{root}/{name} is a link: what it leads to would not be counted")
        if not path.is_file() and not path.is_dir():
            raise CodeError(f"{root}/{name} is neither a file nor a directory, so it cannot be counted")
        if path.is_file():
            if name in data and path.suffix in _CODE:
                raise CodeError(f"{root}/{name} is no public data: it has to be counted")
            (public if name in data else counted)[name] = path.stat().st_size
        names += len(os.fsencode(path.name)) if name not in {SCRIPT, MODEL} else 0
    if missing := sorted(data - set(public)):
        raise CodeError(f"{root} has no file {missing[0]}, which is named as public data")
    return counted, public, names


def _check_imports(root: Path, files: Sequence[str], libraries: set[str]) -> None:
    """Check that every imported module is packed, beside the importing file, or a public library."""
    public = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | libraries | {"bytecap"}
    found = _read_apart(root, files)
    for file in files:
        known = public | set(found[file]["packed"]) | _beside((root / file).parent) | _beside(root)
        for name, needed in found[file]["needed"].items():
            _refuse_unknown(root, name, needed, known)


def _read_apart(root: Path, files: Sequence[str]) -> dict[str, Any]:
    """`read_sources` in a process of its own: a source of a few bytes may take all memory or time to be parsed."""
    request = json.dumps({"path": sys.path, "root": str(root), "files": list(files)})
    start = (
        "import json,sys;r=json.load(sys.stdin);sys.path[:0]=r['path'];"
        "from bytecap_lab.submission.check import answer;answer(r['root'],r['files'])"
    )
    try:
        done = subprocess.run(  # noqa: S603 (our own text)
            [sys.executable, "-I", "-c", start], input=request.encode(), capture_output=True, check=False,
            timeout=_PARSING,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise CodeError(f"the source in {root} takes more than {_PARSING} seconds to be parsed") from None
    except ValueError:
        raise CodeError(f"the source in {root} takes too much memory to be parsed, or ends the parser") from None
    if "error" in found:
        raise CodeError(str(found["error"]))
    return dict(found["sources"])


def answer(root: str, files: Sequence[str]) -> None:
    """Print what `read_sources` finds as JSON, within limits on memory and time."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        found: dict[str, Any] = {"sources": read_sources(Path(root), files)}
    except CodeError as exc:
        found = {"error": str(exc)}
    except MemoryError:
        found = {"error": f"the source in {root} takes more than {_MEMORY >> 20} MiB to be parsed"}
    sys.stdout.write(json.dumps(found))


def read_sources(root: Path, files: Sequence[str]) -> dict[str, Any]:
    """Names of packed modules, and what each source needs with the line that says so, by file."""
    sources = {}
    for file in files:
        try:
            content = (root / file).read_bytes()
        except OSError as exc:
            raise CodeError(f"cannot read {root}/{file}: {exc.strerror}") from exc
        text, tree = parse(content, f"{root}/{file}")
        packed = unpacked(text)
        needed = {file: _needed(tree)}
        for name, source in packed.items():
            needed[f"{file} ({name})"] = _needed(parse(source.encode(), f"{root}/{file} ({name})")[1])
        sources[file] = {"packed": list(packed), "needed": needed}
    return sources


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
