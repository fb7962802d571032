"""What README.md claims against the committed lines (`benchmarks/claims.py`), and the arithmetic on made-up ones."""

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


def test_readme_says_what_was_measured():
    found = ran()
    assert found.returncode == 0, found.stdout


def test_a_claim_that_is_too_small_or_misquoted_fails(tmp_path):
    for path in (ROOT / "results").glob("*.jsonl"):
        lines = [json.loads(x) for x in path.read_text("utf-8").splitlines()]
        for row in lines:
            if path.name == "targets.jsonl" and (row.get("model"), row.get("bits")) == ("small-s0", 3.5):
                row["measured_delta_stderr"] = 0.01
        (tmp_path / path.name).write_text("".join(json.dumps(r) + "\n" for r in lines), "utf-8")
    found = ran("--results", str(tmp_path))
    assert found.returncode == 1
    assert found.stdout.count("NOT SO") == 1
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text("utf-8").replace("| 0.534 |", "| 0.434 |"), "utf-8")
    found = ran("--readme", str(readme))
    assert found.returncode == 1
    assert found.stdout.count("README.md lacks | 3.5 | 0.534 | 0.488 |") == 2
