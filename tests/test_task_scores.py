"""Scores on tasks beside KL, without the harness: what is paired, printed and refused (test_lm_eval.py runs it)."""

import sys

import pytest

import bytecap
from bytecap.errors import UsageError
from bytecap.report.compared import print_comparison
from bytecap_lab.compare.figures import summarize
from bytecap_lab.compare.task_scores import figures, names_of
from synthetic import comparison_lines


def test_without_the_harness_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'bytecap\[lm-eval\]'"):
        bytecap.compare("demo", None, tasks=[tmp_path / "a.yaml"])


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"output_type: x\n", b" task: nested\n"])
def test_files_that_define_no_task(monkeypatch, tmp_path, content):
    monkeypatch.setitem(sys.modules, "lm_eval", sys)  # any module: only its presence is asked for
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.yaml"):
        names_of([str(path)])
    path.write_text("# a task\ntask: 'the_name'  # its name\n")
    assert names_of([str(path)]) == ["the_name"]


def test_differences_are_paired():
    original = [0.0, 1.0, 1.0, 0.0, 1.0]
    found = figures({"tasks": {"t acc": original}, "tasks_original": {"t acc": original}})["t acc"]
    assert found["stderr"] > 0.2
    assert found["difference"] == {"mean": 0.0, "stderr": 0.0}
    other = figures({"tasks": {"t acc": original}, "tasks_original": {"t acc": original[:2]}})["t acc"]
    assert "difference" not in other
    assert figures({}) == {}


def test_they_are_printed_beside_kl(tmp_path, capsys):
    from bytecap.report.lines import read_lines

    records = read_lines(comparison_lines(tmp_path / "runs.jsonl", models=("m",), seeds=1))
    for r in records:
        if r["record"] == "run" and "refused" not in r:
            r |= {"tasks": {"cloze acc": [1.0, 0.0, 1.0, 1.0]}, "tasks_original": {"cloze acc": [1.0] * 4}}
    found = summarize(records)
    assert all("tasks" in c for c in found["models"][0]["cells"])
    print_comparison(found)
    out = capsys.readouterr().out
    assert "minus original" in out
    assert "cloze acc" in out
    assert "1.0000" in out
