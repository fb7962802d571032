"""Claims of the pages against the committed lines (`benchmarks/claims.py`), and its arithmetic on made-up ones."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "claims.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("claims", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = found  # dataclasses look there
    spec.loader.exec_module(found)
    return found


def pair(kl, error, **more):
    row = {"benchmark": "targets", "model": "m", "bits": 2.5, "measured_delta_nats": kl, "measured_delta_stderr": error}
    return {**row, "kl_nats": kl, "kl_stderr": error, **more}


def test_two_figures(script):
    kl, loss = script.targets([pair(0.5, 0.03, method="bytecap"), pair(1.0, 0.04, method="golf")])
    assert (kl.difference, kl.error, kl.paired) == (0.5, pytest.approx(0.05), False)
    assert kl.ratio == pytest.approx(10)
    assert kl.holds
    assert loss.figures == ("| 2.5 | 0.500 | 0.500 |",)


def test_five_errors_are_asked_of_differences_and_refused_to_ties(script):
    for difference, there in ((0.49, False), (0.51, True), (-0.51, True)):
        assert script.Claim("x", difference, 0.1, True).holds == there
        assert script.Claim("x", difference, 0.1, True, tie=True).holds != there
    for tie in (False, True):
        assert not script.Claim("x", 1.0, float("nan"), True, tie=tie).holds
        assert not script.Claim("x", 1.0, 0.0, True, tie=tie).holds


def test_files_for_other_programs_are_compared_recipe_by_recipe_and_menu_by_menu(script):
    def row(method, kl, recipe="Q4_K_M"):
        return {**pair(kl, 0.001, benchmark="formats"), "recipe": recipe, "method": method}

    rows = [row("stock", 0.03), row("bytecap", 0.006), row("bytecap scalar", 0.007), row("bytecap", 0.1, "alone")]
    one, other = script.formats([*rows, row("bytecap", 0.005)])
    assert one.figures == ("0.0300 | 0.0050",)
    assert one.ratio == pytest.approx(0.025 / 0.001 / 2**0.5)
    assert other.figures == ("0.0070",)


def test_paired_errors_go_first_where_lines_hold_them(script):
    plain = {k: v for k, v in pair(1.0, 0.04).items() if k not in {"benchmark", "model", "bits"}}
    row = pair(0.9, 0.03, benchmark="recover", without_recovery=plain)
    assert [c.paired for c in script.recovery([row])] == [False, False]
    plain |= {"kl_difference_stderr": 0.01, "delta_difference_stderr": 0.05}
    kl, loss = script.recovery([row])
    assert (kl.ratio, loss.ratio) == (pytest.approx(10), pytest.approx(2))
    assert kl.paired
    assert kl.holds
    assert not loss.holds


def test_later_lines_replace_earlier_ones(script):
    rows = [pair(0.5, 0.03, method="bytecap"), pair(1.0, 0.04, method="golf"), pair(0.7, 0.03, method="bytecap")]
    assert next(script.targets(rows)).difference == pytest.approx(0.3)


def ran(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *words], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603


@pytest.fixture
def pages(tmp_path):
    """A copy of the pages, to be falsified."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/results.md", "docs/recovery.md", "docs/sharing.md"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    return tmp_path


def falsify(page, old, new):
    text = page.read_text("utf-8")
    assert old in text
    page.write_text(text.replace(old, new), "utf-8")


def test_pages_say_what_was_measured():
    found = ran()
    assert found.returncode == 0, found.stdout


def test_a_claim_that_is_too_small_fails(tmp_path):
    for path in (ROOT / "results").glob("*.jsonl"):
        lines = [json.loads(x) for x in path.read_text("utf-8").splitlines()]
        for row in lines:
            if path.name == "targets.jsonl" and (row.get("model"), row.get("bits")) == ("small-s0", 3.5):
                row["measured_delta_stderr"] = 0.01
        (tmp_path / path.name).write_text("".join(json.dumps(r) + "\n" for r in lines), "utf-8")
    found = ran("--results", str(tmp_path))
    assert found.returncode == 1
    assert found.stdout.count("NOT SO") == 1


@pytest.mark.parametrize(
    ("page", "old", "new", "said"),
    [
        ("results", "| 3.5 | 0.452 |", "| 3.5 | 0.352 |", "docs/results.md lacks | 3.5 | 0.452 | 0.381 |"),
        ("recovery", "0.0582 ± 0.0007", "0.0482 ± 0.0007", "docs/recovery.md lacks 0.0582"),
        ("sharing", "0.143 / +0.123", "0.043 / +0.123", "docs/sharing.md lacks 0.143 / +0.123"),
    ],
)
def test_a_misquoted_figure_fails(pages, page, old, new, said):
    falsify(pages / "docs" / f"{page}.md", old, new)
    found = ran("--pages", str(pages))
    assert found.returncode == 1
    assert said in found.stdout


def test_the_table_of_the_readme_is_part_of_the_page(pages):
    falsify(pages / "README.md", "| 3.5 | 0.452 |", "| 3.5 | 0.352 |")
    found = ran("--pages", str(pages))
    assert found.returncode == 1
    assert found.stdout.count("README.md says what docs/results.md does not: | small-s0 (7M) | 3.5 | 0.352 |") == 1
