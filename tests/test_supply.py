"""The decode-only install: what it imports, what it is licensed under, and that the lock names what is pinned."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import licences

ROOT = Path(__file__).parents[1]
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
from bytecap.cli import main
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


@pytest.mark.parametrize("name", ["tiny", "files", "exact", "trellis", "code", "shared_latent"])
def test_decoding_needs_the_core_only(name, tmp_path):
    path = ROOT / "tests" / "goldens" / f"{name}.bcap"
    for arguments in (["check", path], ["ledger", path], ["ledger", path, "--json"], ["unpack", path, "-o", tmp_path]):
        done = decode_only(*arguments)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").is_file()


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
    listed = re.findall(r"^\| ([a-z0-9-]+) \|", (ROOT / "docs" / "licences.md").read_text("utf-8"), re.MULTILINE)
    assert [n for n in listed if n != "package"] == licences.core()
