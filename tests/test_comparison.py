"""Comparison: paired errors, envelopes, runs that are made once, and the page that shows them."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bytecap
from bytecap.calibration import statistics
from bytecap.errors import UsageError
from bytecap.format.ledger import KINDS
from bytecap.model.evaluation import paired_stderr, ratio_stderr
from bytecap.progress import Silent
from bytecap.report.comparison import page
from bytecap.report.fit import page as fit_page
from bytecap.report.fit import style
from bytecap.report.svg import Axis, colour, log_ticks
from bytecap.sizes import parse_budget
from bytecap_lab import compare as comparison
from bytecap_lab.compare import runs
from bytecap_lab.compare.envelope import bytes_at, envelope, saved
from bytecap_lab.compare.pairs import Entry, Sums, clusters, difference, estimate, figure, fold
from bytecap_lab.compare.specs import grid, read_external, read_method
from conftest import BUDGET, SMALL
from pages import sound

BUDGETS = (BUDGET, BUDGET + 3000)
METHODS = ("golf", "uniform", "owq:published")


@pytest.fixture(scope="session")
def compared(tmp_path_factory, model_directory, texts):
    """Function: (figures, directory, model directory) of a small comparison, made once for each set of options."""
    made = {}

    def get(directory=None, **changes):
        key = (directory, *sorted(changes.items()))
        if key not in made:
            output = directory or tmp_path_factory.mktemp("compared")
            files = {"calibration": texts["calib"], "evaluation": (texts["calib"], texts["val"])}
            options = {"budgets": BUDGETS, "methods": METHODS, "seeds": 2, **files, **SMALL, **changes}
            made[key] = bytecap.compare(model_directory("rotary"), output, **options), output
        return made[key]

    return get


def one(values, weights, **changes):
    sums = {"kl": {"t": Sums(np.array(values, float), np.array(weights, float))}, "loss": {}}
    return replace(Entry("m", 1, 1.0, tuple(range(len(values))), sums, ()), **changes)


class TestPairs:
    def test_documents_count_once_however_many_windows_they_have(self):
        text = {"documents": [0, 0, 1, 2, 3, 4, 5, 6, 7]}
        of, word = clusters(text)
        assert word == "documents"
        assert fold(np.arange(9.0), of).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        assert fold(np.ones((2, 9)), of).shape == (2, 8)
        assert clusters({"documents": [0, 1, 1]})[1] == "windows"
        assert clusters({"documents": [-1] * 20})[1] == "windows"

    def test_pairing_removes_what_both_share(self):
        rng = np.random.default_rng(0)
        shared, weights = 5 * rng.normal(size=40), np.full(40, 10.0)
        a, b = one([shared], weights), one([shared + 1 + 0.1 * rng.normal(size=40)], weights)
        found = difference(b, a, "kl", ["t"])
        assert found.mean == pytest.approx(0.1, abs=0.01)
        assert found.stderr < figure(a, "kl", ["t"]).stderr / 20
        assert math.isnan(found.seeds)

    def test_the_error_of_a_difference_is_that_of_the_windows_differences(self):
        def parts(*kl):
            one = SimpleNamespace(kl=np.array(kl), nats=np.array(kl) ** 2, tokens=np.full(len(kl), 10.0))
            return [SimpleNamespace(windows=one)] * 2

        rng = np.random.default_rng(0)
        hard, gain = 50 * rng.random(40), rng.random(40)
        expected = ratio_stderr(gain, np.full(40, 10.0)) / math.sqrt(2)  # the mean of two texts
        assert paired_stderr(parts(*hard + gain), parts(*hard), "kl") == pytest.approx(expected)
        assert expected < ratio_stderr(hard, np.full(40, 10.0)) / 10
        assert paired_stderr(parts(*hard), parts(*hard), "nats") == 0
        assert math.isnan(paired_stderr([SimpleNamespace(windows=None)], parts(*hard)[:1], "kl"))

    def test_errors_of_seeds_are_added(self):
        rng = np.random.default_rng(1)
        noise, weights = rng.normal(size=30), np.ones(30)
        same, spread = (np.stack([noise + s * k for k in (-1.0, 0, 1)]) for s in (0.0, 0.3))
        quiet, loud = (estimate([Sums(v, weights)]) for v in (same, spread))
        assert quiet.stderr == pytest.approx(ratio_stderr(noise, weights))
        assert loud.documents == pytest.approx(quiet.documents)
        assert loud.seeds == pytest.approx(0.3 / math.sqrt(3))
        assert loud.stderr == pytest.approx(math.hypot(loud.documents, loud.seeds))

    def test_the_stated_error_is_that_of_repeated_draws(self):
        """Documents drawn again and again: the spread of the mean difference is what one draw says it is."""
        rng = np.random.default_rng(2)
        means, errors = [], []
        for _ in range(400):
            weights = rng.integers(50, 150, 40).astype(float)
            found = estimate([Sums((0.2 * weights + 3 * rng.normal(size=40))[None], weights)])
            means.append(found.mean)
            errors.append(found.stderr)
        assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)

    def test_an_external_stands_beside_every_seed(self):
        a = one([[1.0, 2], [3, 4]], [1, 1])
        b = one([[1.0, 1]], [1, 1], seeds=(None,))
        assert difference(a, b, "kl", ["t"]).mean == pytest.approx(1.5)
        assert difference(a, replace(a, seeds=(1, 5)), "kl", ["t"]).mean == pytest.approx(2.0)


class TestEnvelope:
    def test_beaten_points_go(self):
        assert envelope([(3, 0.5), (1, 0.9), (2, 0.4), (4, 0.4), (5, math.nan)]) == [(1, 0.9), (2, 0.4)]

    def test_some_bytes_less_are_no_advantage(self):
        assert envelope([(100_000, 0.9), (100_020, 0.4), (200_000, 0.1)]) == [(100_020, 0.4), (200_000, 0.1)]

    def test_interpolation_is_logarithmic_and_stays_inside(self):
        kept = [(100, 1.0), (200, 0.01)]
        assert bytes_at(kept, 0.1) == pytest.approx(150)
        assert math.isnan(bytes_at(kept, 2.0))
        assert math.isnan(bytes_at(kept, 0.001))
        assert bytes_at([(100, 1.0), (200, -1.0)], 0.0) == pytest.approx(150)
        assert bytes_at([(7, 0.3)], 0.3) == 7

    def test_saved_bytes(self):
        means = np.array([[0.1, 1.0, 0.01]] * 3)
        found = saved([0], [1, 2], [120, 100, 200], means)
        assert found["mean"] == pytest.approx(1 - 120 / 150)
        assert found["stderr"] == pytest.approx(0)
        assert found["points"] == [{"bytes": 120, "quality": 0.1, "others_bytes": pytest.approx(150)}]
        assert saved([1], [0], [120, 100, 200], means) is None


class TestRunSpecs:
    def test_methods_and_their_options(self):
        assert read_method("golf").options == {}
        assert read_method("bytecap:trellis=false:paths=rows+columns").options == {"trellis": False}
        assert set(read_method("bytecap:paths=rows+columns").paths) == {"rows", "columns"}

    @pytest.mark.parametrize(
        ("text", "said"),
        [("glof", "did you mean golf"), ("golf:published", "no option=value"), ("bytecap:x=1", "no option 'x'")],
    )
    def test_mistakes_are_named(self, text, said):
        with pytest.raises(UsageError, match=said):
            read_method(text)

    def test_budgets(self):
        assert parse_budget("2bpp", 1000) == 250
        with pytest.raises(UsageError, match="cannot read the size"):
            parse_budget("xbpp", 1)
        cells = grid(["a", "b"], ["golf"], ["1bpp", 100], [0, 1], [800, 1600])
        assert [(c.model, c.budget, c.seed) for c in cells] == [
            ("a", 100, 0), ("a", 100, 1), ("b", 100, 0), ("b", 200, 0), ("b", 100, 1), ("b", 200, 1),
        ]  # fmt: skip

    def test_externals(self, tmp_path):
        found = read_external(f"gguf:{tmp_path}:3MB", ["m"])
        assert (found.name, found.directory, found.bytes, found.model) == ("gguf", str(tmp_path), 3_000_000, "m")
        assert read_external(f"gguf:{tmp_path}:3MB:b", ["a", "b"]).model == "b"
        for text, said in ((f"gguf:{tmp_path}:3MB", "NAME:DIR:BYTES:MODEL"), ("gguf:nowhere:3MB:a", "does not exist"),
                           ("gguf:a", "NAME:DIR:BYTES")):  # fmt: skip
            with pytest.raises(UsageError, match=said):
                read_external(text, ["a", "b"])


@pytest.mark.slow
class TestCompare:
    def test_figures_add_up(self, compared, fitted):
        found, directory = compared()
        assert json.loads((directory / "compare.json").read_text()) == found
        (model,) = found["models"]
        assert model["methods"] == list(METHODS)
        assert len(model["cells"]) == 6
        lines = [json.loads(x) for x in (directory / "runs.jsonl").read_text().splitlines()]
        runs = [x for x in lines if x["record"] == "run"]
        assert len(runs) == 12
        assert {r["seed"] for r in runs} == {0, 1}
        assert all(r["file_bytes"] <= r["budget_bytes"] for r in runs)
        cell = next(c for c in model["cells"] if (c["method"], c["budget_bytes"]) == ("golf", BUDGET))
        scores = cell["scores"]
        assert scores["mean"]["kl"]["mean"] == pytest.approx(
            (scores["calib.txt"]["kl"]["mean"] + scores["val.txt"]["kl"]["mean"]) / 2
        )
        mine = [r for r in runs if (r["method"], r["budget_bytes"]) == ("golf", BUDGET)]
        tokens = sum(lines[0]["texts"][1]["tokens"])
        by_hand = np.mean([sum(r["texts"][1]["kl"]) / tokens for r in mine])
        assert scores["val.txt"]["kl"]["mean"] == pytest.approx(by_hand)
        del fitted

    def test_the_same_as_fit_says(self, compared, fitted, model_directory, texts):
        del fitted
        _, directory = compared()
        run = next(
            r for r in map(json.loads, (directory / "runs.jsonl").read_text().splitlines())
            if r["record"] == "run" and (r["method"], r["budget_bytes"], r["seed"]) == ("golf", BUDGET, 0)
        )  # fmt: skip
        result = bytecap.fit(
            model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=(texts["calib"], texts["val"]),
            method="golf", **SMALL,
        )  # fmt: skip
        assert run["file_bytes"] == len(result.data)
        assert sum(run["texts"][1]["kl"]) / result.report["texts"][1]["tokens"] == pytest.approx(
            result.report["texts"][1]["kl_nats"]
        )

    def test_wins_and_ties(self, compared):
        found, _ = compared()
        wins = found["models"][0]["wins"]
        assert len(wins) == 2 * 3 * 2
        for w in wins:
            assert w["difference"]["mean"] >= 0
            tied = w["difference"]["mean"] <= w["difference"]["stderr"]
            assert (w["second"] in w["ties"]) == tied

    def test_statistics_are_computed_once(self, compared, tmp_path, monkeypatch):
        calls = []
        real = statistics.probe
        monkeypatch.setattr(statistics, "probe", lambda *a, **k: calls.append(k["guided"]) or real(*a, **k))
        compared(tmp_path, methods=("golf", "owq", "bytecap"), seeds=1, budgets=BUDGETS[:1])
        assert sorted(calls) == [False, True]

    def test_finished_runs_are_skipped_and_torn_lines_made_again(self, compared, monkeypatch, tmp_path):
        found, directory = compared()
        shutil.copytree(directory, tmp_path / "again")
        path = tmp_path / "again" / "runs.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr("bytecap_lab.compare.runs.fit_sets", None)
            same, _ = compared(tmp_path / "again")
        assert same["models"] == found["models"]
        text = path.read_text()
        path.write_text(text[:-30])
        calls = []
        real = runs.fit_sets
        monkeypatch.setattr(runs, "fit_sets", lambda *a, **k: calls.append(1) or real(*a, **k))
        after, _ = compared(tmp_path / "again", jobs=1)
        assert len(calls) == 1
        assert after["models"][0]["wins"] == found["models"][0]["wins"]
        assert len([x for x in path.read_text().splitlines() if x.startswith("{") and x.endswith("}")]) == 13

    @pytest.mark.nightly
    def test_several_processes_find_the_same(self, compared, tmp_path):
        found, _ = compared()
        both, _ = compared(tmp_path, jobs=2, methods=METHODS[:2], seeds=1, budgets=BUDGETS[:1])
        mine = {c["method"]: c["file_bytes"] for c in both["models"][0]["cells"]}
        assert mine.keys() == {"golf", "uniform"}
        ours = next(c for c in found["models"][0]["cells"] if c["method"] == "uniform")
        assert mine["uniform"] == ours["file_bytes"]

    def test_figures_come_from_the_lines_alone(self, compared, run, tmp_path, monkeypatch):
        found, directory = compared()
        monkeypatch.setattr("bytecap_lab.compare.runs.load_checkpoint", None)
        again = comparison.render(directory / "runs.jsonl", tmp_path)
        assert again == found
        assert (tmp_path / "compare.html").read_text() == (directory / "compare.html").read_text()
        code, out, _ = run("compare", "--from", directory / "runs.jsonl")
        assert code == 0
        assert "who" not in out
        assert "golf saves" in out or "second minus best" in out
        assert "\x1b" not in out
        assert "…" not in out

    def test_budgets_below_the_floor_are_said(self, compared, tmp_path):
        found, _ = compared(tmp_path, budgets=(11_500, BUDGET), methods=("golf", "uniform"), seeds=1)
        model = found["models"][0]
        assert {(r["method"], r["budget_bytes"]) for r in model["refused"]} >= {("golf", 11_500)}
        assert all(r["floor_bytes"] > 11_500 for r in model["refused"])
        assert "cannot get below" in page(found)

    def test_externals_take_part_at_their_size(self, compared, model_directory, tmp_path):
        exact = f"exact:{model_directory('rotary')}:{BUDGET - 5}"
        found, _ = compared(tmp_path, externals=(exact,), seeds=1, methods=("golf", "uniform"))
        model = found["models"][0]
        cell = next(c for c in model["cells"] if c["method"] == "exact")
        assert cell["file_bytes"] == BUDGET - 5
        assert abs(cell["scores"]["mean"]["kl"]["mean"]) < 1e-6
        wins = [w for w in model["wins"] if w["metric"] == "kl"]
        assert {w["best"] for w in wins if w["budget_bytes"] == BUDGET} == {"exact"}
        assert {w["best"] for w in wins if w["budget_bytes"] != BUDGET} == {"golf"}

    def test_a_method_of_the_users_own(self, compared, tmp_path):
        own = tmp_path / "mine.py"
        own.write_text("from bytecap.methods.baselines.runs import run_uniform as uniform\n")
        found, _ = compared(tmp_path / "out", methods=(f"{own}:uniform", "uniform"), seeds=1, budgets=BUDGETS[:1])
        sizes = {c["method"]: c["scores"]["mean"]["kl"]["mean"] for c in found["models"][0]["cells"]}
        assert len(set(sizes.values())) == 1
        assert len(sizes) == 2

    def test_mistakes_on_the_command_line(self, refused, tmp_path):
        assert "give a MODEL" in refused("compare")
        assert "did you mean golf" in refused("compare", "demo", "--methods", "glof", "-o", tmp_path)
        assert "holds no runs" in refused("compare", "--from", tmp_path / "nothing.jsonl")


class TestPages:
    @pytest.mark.slow
    def test_a_comparison_shows_every_figure(self, compared):
        found, directory = compared()
        text = (directory / "compare.html").read_text()
        parser = sound(text)
        for cell in found["models"][0]["cells"]:
            assert f"{cell['scores']['mean']['kl']['mean']:.4f}" in text
            mark = f"{cell['method']}, {cell['file_bytes']:,.0f} bytes: KL to the original"
            assert any(t.startswith(mark) for t in parser.tips)
        assert text.count('data-path="envelope"') == 4  # KL and loss, for broad and for narrow screens
        assert parser.tabs > 5

    @pytest.mark.slow
    def test_missing_figures_do_not_break_it(self, compared):
        found = json.loads(json.dumps(compared()[0]))
        for cell in found["models"][0]["cells"]:
            cell["cpu_seconds"] = cell["scores"]["mean"]["kl"]["stderr"] = None
        sound(page(found))

    @pytest.mark.parametrize("method", ["bytecap", "golf"])
    def test_a_fit_shows_every_byte(self, fitted, method):
        result, _ = fitted("rotary", method)
        text = fit_page(result.report, result.ledger())
        parser = sound(text)
        for e in result.ledger():
            assert any(t.startswith(f"{e.unit}: {e.kind} ") for t in parser.tips)
        assert f"{len(result.data):,}" in text
        assert f"{result.report['kl_nats']:.4f}" in text
        assert ("next 1,000 bytes" in text) == (method == "bytecap")

    def test_every_kind_has_its_own_colour(self):
        assert len({colour(style(k)) for k in KINDS}) == len(KINDS)
        assert style("columns payload") == style("payload")

    @pytest.mark.slow
    def test_the_command_writes_it(self, job, run, tmp_path):
        code, _, _ = run(*job(), "--report", tmp_path / "fit.html", "--json")
        assert code == 0
        sound((tmp_path / "fit.html").read_text())

    @pytest.mark.slow
    def test_names_cannot_inject_markup(self, compared):
        found = json.loads(json.dumps(compared()[0]))
        found["models"][0]["model"] = "<script>alert(1)</script>"
        assert "<script>alert" not in page(found)

    def test_logarithmic_axes_hold_their_points(self):
        axis = Axis(log_ticks(0.013, 0.7), log=True)
        assert 0 <= axis.place(0.013) < axis.place(0.7) <= 1
        assert len(log_ticks(0.3, 0.3)) == 2


@pytest.mark.numeric
def test_margins_balance(fitted):
    """A kilobyte more goes to somebody, and the predicted loss falls about as the slope says."""
    margin = fitted()[0].report["margin"]
    assert 0 < sum(m["bytes"] for m in margin["next"]) <= 1010  # what the plan had left counts too
    gained = -sum(m["nats"] for m in margin["next"])
    assert 0 < gained <= 1.05 * 1000 * margin["slope_nats_per_byte"]
    line = sorted(margin["line"], key=lambda p: p["bytes"])
    assert all(a["nats"] >= b["nats"] for a, b in pairwise(line))


@pytest.mark.nightly
def test_the_demo_model(tmp_path):
    """Two methods on the embedded model: the difference is many times its standard error."""
    found = bytecap.compare(
        "demo", tmp_path, methods=("bytecap", "golf"), budgets=("600kB",), tokens=8192, evaluation_tokens=8192,
        reporter=Silent(),
    )  # fmt: skip
    (win,) = [w for w in found["models"][0]["wins"] if w["metric"] == "kl"]
    assert win["best"] == "bytecap"
    assert win["difference"]["mean"] > 5 * win["difference"]["stderr"]


@pytest.mark.nightly
def test_the_default_comparison_can_be_timed(tmp_path):
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "compare.py"), "--output"]
    command += [str(tmp_path / "speed.jsonl"), "--methods", "uniform,owq", "--budgets", "4bpp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    row = json.loads((tmp_path / "speed.jsonl").read_text())
    assert done.returncode == (row["seconds"] > row["most"]), done.stderr
    assert (row["runs"], row["budgets"], row["statistics"]) == (2, 1, 1)
    assert sum(row["seconds_by_method"].values()) < row["seconds"]
