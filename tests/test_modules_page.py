"""Run what docs/modules.md shows."""

import doctest
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.slow
def test_the_documented_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testfile(str(DOCS / "modules.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 5
    assert found.failed == 0


@pytest.mark.slow
def test_the_documented_commands_run(tmp_path, monkeypatch, run):
    text = (DOCS / "modules.md").read_text("utf-8")
    blocks = [b.split("\n", 1) for b in text.split("```")[1::2]]
    monkeypatch.chdir(tmp_path)
    (script,) = [body for kind, body in blocks if kind == "python"]
    (tmp_path / "model.py").write_text(script, "utf-8")
    exec(compile(script + "\nmake_files()", "model.py", "exec"), {"__name__": "model"})  # noqa: S102 (our own page)
    (commands,) = [body for kind, body in blocks if kind == "sh"]
    for line in commands.replace("\\\n", " ").splitlines():
        if line.startswith("bytecap "):
            code, out, err = run(*line.split("#")[0].replace("'", "").split()[1:], "--json")
            assert code == 0, err
            assert json.loads(out)
    assert (tmp_path / "model.bcap").stat().st_size <= 12_000
