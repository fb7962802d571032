"""The decode-only install: what it imports, what it is licensed under, and that the lock names what is pinned."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bytecap
import licences

ROOT = Path(__file__).parents[1]
SOURCE = Path(bytecap.__file__).parent
PERMISSIVE = ("BSD", "MIT", "Apache", "PSF", "0BSD", "ISC", "Zlib", "CC0")
BLOCKER = """
import sys
ALLOWED = {allowed!r} | set(sys.stdlib_module_names)
ALLOWED |= {{"bytecap"}} | {{m.lstrip("_") for m in sys.stdlib_module_names}}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top.lstrip("_") not in ALLOWED and not top.startswith("_sysconfigdata"):
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
sys.argv = ["bytecap", *{arguments!r}]
from bytecap.cli.app import main
main()
"""
MODULES = {"markdown-it-py": "markdown_it"}


def decode_only(*arguments):
    """A command in a process that can import the standard library and the core's packages only."""
    allowed = {MODULES.get(name, name).replace("-", "_") for name in licences.core()}
    script = BLOCKER.format(allowed=allowed, arguments=[str(a) for a in arguments])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    return subprocess.run(  # noqa: S603 (our own script)
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "files", "exact", "trellis", "code", "shared_latent"])
def test_unpacking_needs_the_core_only(name, tmp_path):
    done = decode_only("unpack", ROOT / "tests" / "goldens" / f"{name}.bcap", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", [("check",), ("ledger",), ("ledger", "--json")])
def test_reading_needs_the_core_only(command):
    done = decode_only(*command, ROOT / "tests" / "goldens" / "files.bcap")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_blocker_blocks():
    done = decode_only("eval", ROOT / "tests" / "goldens" / "files.bcap", "--text", ROOT / "README.md")
    assert done.returncode == 2
    assert "pip install" in done.stderr or "blocked" in done.stderr


def test_the_core_is_small_and_permissive():
    direct = licences.needed("bytecap")
    assert direct == {"numpy", "msgspec", "brotli", "typer", "rich"}
    for name in licences.core():
        assert any(word in licences.licence(name) for word in PERMISSIVE), (name, licences.licence(name))


def test_the_table_of_licences():
    """Names as installed; a licence may be worded otherwise by another version."""
    page = (ROOT / "docs" / "licences.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| ([a-z0-9-]+) \| (.+) \|", page, re.MULTILINE))
    del listed["package"]
    core = licences.core()
    assert list(listed) == core + sorted(set(licences.pinned()) - set(core))
    known = (*PERMISSIVE, "MPL", "Mozilla", "Python Software")
    assert [n for n, said in listed.items() if not any(word in said for word in known)] == []


def test_the_lock_pins_the_same_versions_with_hashes():
    """`make lock` writes it from constraints.txt; torch is left out on purpose, as the lock's head says."""
    lock = (ROOT / "requirements-dev.txt").read_text("utf-8")
    wanted = {n: v for n, v in licences.pinned().items() if n != "torch"}
    assert licences.pinned(ROOT / "requirements-dev.txt") == wanted
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert len(entries) == len(wanted)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)
    assert len(set(re.findall(r"sha256:[0-9a-f]{64}\b", lock))) == lock.count("--hash=")


LISTING = """
import sys
from pathlib import Path
from bytecap import reference
from bytecap.format import codefiles, decoder
from bytecap.format.container import ledger, read
from bytecap.model import from_artifact
from bytecap.pipeline import export
for path in sorted(Path(sys.argv[1]).glob("*.bcap")):
    if not path.name.startswith("bad_"):
        contents = read(path)
        export.directory_files(contents)
        ledger(contents)
        reference.decode_file(path.read_bytes())
print(*sorted(Path(m.__file__).as_posix() for n, m in sys.modules.items() if n.startswith("bytecap")), sep="\\n")
"""
WRITING = {
    "__init__.py",
    "_moved.py",
    "model/__init__.py",
    "pipeline/__init__.py",
    "system/__init__.py",
    "system/atomic.py",
    "system/directories.py",
    "system/collisions.py",
}  # names, and files written: no part of decoding


@pytest.mark.slow
def test_coverage_is_asked_of_all_that_decodes():
    """The modules that reading every golden imports are those that `make coverage` looks at."""
    done = subprocess.run(  # noqa: S603 (our own script)
        [sys.executable, "-c", LISTING, ROOT / "tests" / "goldens"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    used = {Path(p).relative_to(SOURCE).as_posix() for p in done.stdout.split()}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["coverage"]["report"]
    assert settings["fail_under"] == 100
    patterns = [p.removeprefix("src/bytecap/") for p in settings["include"]]

    def found(pattern):
        return (SOURCE / pattern.removesuffix("/*")).rglob("*") if pattern.endswith("/*") else SOURCE.glob(pattern)

    asked = {p.relative_to(SOURCE).as_posix() for pattern in patterns for p in found(pattern) if p.suffix == ".py"}
    assert used - asked == WRITING
    compiled = {f"format/entropy/{name}.py" for name in ("encode_kernels", "kernels", "simd")}  # where numba is
    assert asked - used == compiled
