"""Scores on tasks beside KL, without the harness: what is paired, printed and refused (test_lm_eval.py runs it)."""

import sys

import pytest

import bytecap
from bytecap.errors import UsageError
from bytecap.report.compared import print_comparison
from bytecap.report.comparison import page
from bytecap.report.lines import read_lines
from bytecap.report.plain import finite
from bytecap_lab.compare.figures import summarize
from bytecap_lab.compare.task_scores import figures, names_of
from pages import sound
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


@pytest.fixture
def found(tmp_path):
    """Figures of a comparison with two tasks."""
    return summarize(read_lines(comparison_lines(tmp_path / "runs.jsonl", models=("m",), seeds=1)))


def test_they_are_printed_beside_kl(found, capsys):
    assert all("tasks" in c for c in found["models"][0]["cells"])
    print_comparison(found)
    out = capsys.readouterr().out
    assert "minus original" in out
    assert "cloze acc" in out
    assert "1.0000" in out


def test_they_stand_on_the_page(found):
    """A chart for every task whose differences are paired, and a row for every task of every file."""
    cells = found["models"][0]["cells"]
    text = page(found)
    tips = [t for t in sound(text).tips if "against the original" in t]
    assert len(tips) == 2 * 2 * len(cells)  # tasks, widths of screens
    assert sum("cloze acc -" in t for t in tips) > len(cells)
    assert text.count("cloze perplexity</td>") == len(cells)
    for c in cells:
        del c["tasks"]["cloze acc"]["difference"], c["tasks"]["cloze acc"]["original"]
    text = page(found)
    assert len([t for t in sound(text).tips if "against the original" in t]) == 2 * len(cells)
    for c in cells:
        del c["tasks"]
    assert ": tasks</h2>" not in page(found)


def test_one_question_has_no_error(found):
    for c in found["models"][0]["cells"]:
        c["tasks"] = figures({"tasks": {"t acc": [0.0]}, "tasks_original": {"t acc": [1.0]}})
    text = page(finite(found))
    sound(text)
    assert "nan" not in text
    assert "-1.0000 against the original" in text
