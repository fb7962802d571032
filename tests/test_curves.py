"""Byte-return curves: bytes that add up, measured points that are reused, and a page that shows them all."""

import json
import xml.etree.ElementTree as ET
from functools import partial

import numpy as np
import pytest

from bytecap.errors import UsageError
from bytecap.model.evaluation import ByWindow
from bytecap.progress import Silent
from bytecap.report.curves import page
from bytecap.report.svg import ticks
from bytecap.system.cache import Store, digest
from bytecap_lab.rd_curves import byte_returns, points, trial
from bytecap_lab.rd_curves.choose import hull, most, spend
from bytecap_lab.rd_curves.operating_point import build
from bytecap_lab.rd_curves.points import MeasuredPick
from bytecap_lab.rd_curves.ranks import ceiling, spearman
from bytecap_lab.rd_curves.report import ninety, verdict
from bytecap_lab.rd_curves.trial import OverlayCandidate
from conftest import BUDGET, SMALL

PATHS = ("columns", "lowrank")
POINT = {
    "bytes", "side_bytes", "list_bytes", "units_share", "weights_share", "predicted_nats", "kl_recovered", "kl_stderr",
    "loss_recovered", "loss_stderr", "nats_per_byte", "bpb_recovered", "bpb_per_kb", "units",
    "lead_nats", "lead_stderr",
}  # fmt: skip


@pytest.fixture(scope="session")
def curved(tmp_path_factory, model_directory, texts):
    """Function: (result, directory) of the curves of a tiny model, made once for each set of options."""
    made = {}

    def get(kind="rotary", directory=None, **changes):
        changes.setdefault("base", "grid")
        key = (kind, directory, *sorted(changes.items()))
        if key not in made:
            output = directory or tmp_path_factory.mktemp("curves")
            options = {"paths": PATHS, "points": 8, "point_tokens": 500, **SMALL, **changes}
            files = {"calibration": texts["calib"], "evaluation": texts["val"]}
            made[key] = byte_returns(model_directory(kind), BUDGET, output, **files, **options), output
        return made[key]

    return get


def candidate(size, gain, unit="u"):
    return OverlayCandidate("p", unit, 0, "", size, gain, 0.0, gain, 0, 1.0)


class TestStore:
    def test_keeps_json_and_arrays(self, tmp_path):
        store = Store(tmp_path / "deep" / "store")
        store.put("a", {"x": [1.5]})
        store.put_arrays("b", {"one two": np.arange(3.0)})
        assert store.get("a") == {"x": [1.5]}
        assert store.arrays("b")["one two"].tolist() == [0, 1, 2]
        assert not [p for p in (tmp_path / "deep" / "store").iterdir() if p.suffix == ".tmp"]

    def test_damage_counts_as_absence(self, tmp_path):
        store = Store(tmp_path)
        store.put("a", {"x": 1})
        path = tmp_path / "a.json"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        assert store.get("a") is None
        path.write_bytes(b"")
        assert store.get("a") is None

    def test_without_a_directory_nothing_is_kept(self):
        store = Store(None)
        store.put("a", 1)
        assert store.get("a") is None

    def test_digest_tells_shapes_and_order_apart(self):
        a = np.arange(6.0)
        found = {digest(a), digest(a.reshape(2, 3)), digest(a.astype(np.float32)), digest("a", "b"), digest("ab"),
                 digest(b"a", b"b")}  # fmt: skip
        assert len(found) == 6
        assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


class TestChoice:
    def test_hull_is_concave_and_starts_with_what_is_free(self):
        kept = hull(
            [
                candidate(-5, 1.0),
                candidate(-2, 2.0),
                candidate(10, 3.0),
                candidate(20, 8.0),
                candidate(30, 8.0),
                candidate(5, -1),
            ]
        )
        assert [(o.bytes, o.gain) for o in kept] == [(-2, 2.0), (20, 8.0)]

    def test_best_slopes_first_within_the_room(self):
        candidates = {
            "a": [candidate(10, 5.0, "a"), candidate(30, 6.0, "a")],
            "b": [candidate(10, 4.0, "b")],
            "c": [candidate(5, -1, "c")],
        }
        assert most(candidates) == 40
        assert {n: o.bytes for n, o in spend(candidates, 20).items()} == {"a": 10, "b": 10}
        assert {n: o.bytes for n, o in spend(candidates, 40).items()} == {"a": 30, "b": 10}
        assert spend(candidates, 4) == {}

    def test_ninety_percent_is_interpolated(self):
        points = [{"bytes": 10, "kl_recovered": 0.5}, {"bytes": 20, "kl_recovered": 1.0}]
        assert ninety(points) == pytest.approx(18)
        assert ninety([{"bytes": 5, "kl_recovered": -0.1}]) is None


class TestRanks:
    def test_ties_share_their_rank(self):
        assert spearman(np.array([1.0, 1, 2]), np.array([3.0, 3, 9])) == pytest.approx(1)
        assert np.isnan(spearman(np.ones(4), np.arange(4.0)))

    def test_ceiling_falls_with_noise(self):
        rng = np.random.default_rng(0)
        signal = np.linspace(0, 1, 30)[:, None] + np.zeros((30, 16))
        tokens = np.ones(16)
        clean, noisy = (ceiling(signal + s * rng.normal(size=signal.shape), tokens, 0) for s in (0.01, 3.0))
        assert clean > 0.99 > noisy


class TestVerdict:
    def measured(self, spent, kl):
        return MeasuredPick({"u": spent}, 0, 1.0, np.array(kl, float), np.zeros(4))

    def judge(self, *path):
        tokens = np.full(4, 10.0)
        base = ByWindow(np.array([4.0, 5, 6, 5]), np.zeros(4), np.zeros(4), tokens, tokens)
        steps = [self.measured(100, base.kl - [1.0, 1.1, 0.9, 1.0])]
        return verdict("p", [self.measured(n, base.kl - gain) for n, gain in path], steps, base)

    def test_a_lead_at_one_amount_is_enough(self):
        found = self.judge((50, [0.5, 0.4, 0.6, 0.4]), (100, [2.0, 2.2, 1.9, 2.0]))
        assert found["verdict"] == "earns"
        assert found["advantage_bytes"] == 100
        assert found["advantage_nats"] == pytest.approx((8.1 - 4.0) / 40)

    def test_a_lag_without_a_lead_is_a_refusal(self):
        assert self.judge((50, [0.6, 0.4, 0.5, 0.5]), (100, [0.1, 0.2, 0.0, 0.1]))["verdict"] == "does not earn"

    def test_noise_is_no_difference(self):
        assert self.judge((100, [3.0, -1.0, 2.0, 0.0]))["verdict"] == "no difference"
        assert self.judge()["verdict"] == "not applicable"


class TestPaths:
    def test_step_comes_first_and_names_are_checked(self):
        assert trial.known(["lowrank", "step", "lowrank"]) == ["step", "lowrank"]
        assert trial.known(None)[0] == "step"
        with pytest.raises(UsageError, match="did you mean columns"):
            trial.known(["colums"])

    def test_unknown_names_on_the_command_line(self, refused, tmp_path):
        assert "did you mean step" in refused("curves", "demo", "--budget", "600kB", "--paths", "stepp", "-o", tmp_path)
        assert "unknown base" in refused("curves", "demo", "--budget", "600kB", "--base", "x", "-o", tmp_path)

    @pytest.mark.slow
    def test_lossless_budgets_are_refused(self, model_directory):
        with pytest.raises(UsageError, match="losslessly"):
            byte_returns(model_directory("rotary"), "9MB", **SMALL)


@pytest.mark.slow
class TestCurves:
    @pytest.mark.parametrize("base", ["grid", "golf"])
    def test_members_and_sums(self, curved, base):
        found, directory = curved(base=base)
        assert json.loads((directory / "curves.json").read_text()) == found
        assert found["schema"] == 1
        assert list(found["paths"]) == ["step", *PATHS]
        assert found["base"]["bytes"] < BUDGET
        assert found["base"]["kl_nats"] > 0
        for path in found["paths"].values():
            assert path["whole"]
            for p in path["whole"]:
                assert set(p) == POINT
                assert p["bytes"] == sum(p["units"].values()) + p["list_bytes"]
                assert 0 <= p["weights_share"] <= 1
                assert p["side_bytes"] >= 0
            assert len(path["units"]) + path["skipped_units"] == 14 + 1
        assert found["agreement"]["points"] == sum(len(p["sample"]) for p in found["paths"].values()) >= 8

    def test_steps_recover_what_they_cost(self, curved):
        found, _ = curved()
        steps = found["paths"]["step"]
        assert steps["verdict"] == "yardstick"
        assert steps["whole"][-1]["bytes"] > steps["whole"][0]["bytes"] > 0
        assert steps["whole"][-1]["kl_recovered"] > 0
        assert found["lambda"]["nats_per_byte"] > 0
        assert all(p["side_bytes"] == 0 for p in steps["whole"])
        verdicts = {found["paths"][n]["verdict"] for n in PATHS}
        assert verdicts <= {"earns", "does not earn", "no difference"}

    def test_every_path_has_a_curve_on_the_page(self, curved):
        found, directory = curved()
        text = (directory / "curves.html").read_text()
        assert len(text) < 2_000_000
        assert "http" not in text.replace("http-equiv", "")
        charts = [ET.fromstring("<svg " + c.partition("</svg>")[0] + "</svg>") for c in text.split("<svg ")[1:]]  # noqa: S314
        names = {g.get("data-path") for c in charts for g in c.iter("g")}
        assert {"step", *PATHS, "lambda"} <= names
        for name in found["paths"]:
            assert f'<p class="verdict">{name}: ' in text
        whole = next(c for c in charts if "KL recovered" in c.get("aria-label", ""))
        assert sum(p.get("class") == "band" for p in whole.iter("polygon")) == len(names & {"step", *PATHS})
        tips = [g.get("data-tip") for g in whole.iter("g") if g.get("data-tip")]
        saturated = [n for n, p in found["paths"].items() if p["ninety_percent_bytes"] is not None]
        assert [t.partition(":")[0] for t in tips if "90% of its gain" in t] == saturated
        assert sum("bytes: " in t and "matrices" in t for t in tips) == sum(
            len(p["whole"]) for p in found["paths"].values()
        )

    def test_every_unit_has_a_small_curve_that_can_be_found(self, curved):
        found, directory = curved()
        text = (directory / "curves.html").read_text()
        table = text.partition('<table class="sorts" id="units">')[2].partition("</table>")[0]
        rows = table.partition("<tbody>")[2].split("<tr>")[1:]
        assert len(rows) == sum(len(p["units"]) for p in found["paths"].values())
        assert all(r.count('<svg class="spark"') == 1 for r in rows)
        assert 'data-filters="units"' in text
        step = found["paths"]["step"]["units"][0]
        best = max(p["predicted_nats"] for p in step["points"] if p["on_hull"])
        assert f'<td data-value="{best:.6e}">' in rows[0]

    def test_the_page_goes_where_it_is_wanted(self, curved, model_directory, texts, tmp_path):
        _, directory = curved()
        files = {"calibration": texts["calib"], "evaluation": texts["val"]}
        found = byte_returns(
            model_directory("rotary"), BUDGET, **files, paths=PATHS, points=8, point_tokens=500,
            store=directory / "store", report=tmp_path / "a.html", **SMALL,
        )  # fmt: skip
        assert (tmp_path / "a.html").read_text() == (directory / "curves.html").read_text()
        assert found["paths"].keys() == {"step", *PATHS}
        assert [p.name for p in tmp_path.iterdir()] == ["a.html"]

    def test_a_second_run_measures_nothing_and_finds_the_same(self, curved, monkeypatch):
        _, directory = curved()
        before = (directory / "curves.json").read_bytes()
        monkeypatch.setattr("bytecap_lab.rd_curves.points.by_window", None)
        monkeypatch.setattr("bytecap.calibration.statistics.probe", None)
        curved(directory=directory)
        assert (directory / "curves.json").read_bytes() == before

    def test_an_interrupted_run_goes_on(self, curved, tmp_path, monkeypatch):
        _, complete = curved()
        measured = []
        real = points.by_window

        def stops(*arguments, **options):
            measured.append(1)
            if len(measured) == 4:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr("bytecap_lab.rd_curves.points.by_window", stops)
            with pytest.raises(KeyboardInterrupt):
                curved(directory=tmp_path)
        assert not (tmp_path / "curves.json").exists()
        entries = sorted((tmp_path / "store").iterdir())
        assert entries
        entries[0].write_bytes(b"nonsense")
        entries[-1].write_bytes(entries[-1].read_bytes()[:-3])
        curved(directory=tmp_path)
        assert (tmp_path / "curves.json").read_bytes() == (complete / "curves.json").read_bytes()

    def test_another_seed_or_library_asks_anew(self, curved, monkeypatch):
        _, directory = curved()
        calls = []
        real = points.by_window
        monkeypatch.setattr("bytecap.calibration.statistics.library", lambda: "another")
        monkeypatch.setattr("bytecap_lab.rd_curves.points.by_window", lambda *a, **k: calls.append(1) or real(*a, **k))
        before = len(list((directory / "store").iterdir()))
        curved(directory=directory, paths=("step",), points=1)
        assert calls
        assert len(list((directory / "store").iterdir())) > before

    def test_a_second_budget_reuses_statistics(self, model_directory, texts, curved, monkeypatch):
        _, directory = curved()
        monkeypatch.setattr("bytecap.calibration.statistics.probe", None)
        found = byte_returns(
            model_directory("rotary"), BUDGET + 500, None, store=directory / "store", calibration=texts["calib"],
            evaluation=texts["val"], paths=["step"], points=1, point_tokens=500, **SMALL,
        )  # fmt: skip
        assert found["budget_bytes"] == BUDGET + 500

    def test_units_a_path_cannot_serve_are_counted_once(self, curved, model_directory, texts, monkeypatch, tmp_path):
        del curved
        monkeypatch.setattr("bytecap.quantization.overlays.columns.Columns.settings", lambda *_: [])
        reporter = Silent()
        found = byte_returns(
            model_directory("rotary"), BUDGET, tmp_path, calibration=texts["calib"], evaluation=texts["val"],
            paths=["columns"], points=2, point_tokens=300, reporter=reporter, **SMALL,
        )  # fmt: skip
        assert found["paths"]["columns"]["skipped_units"] == 15
        assert found["paths"]["columns"]["verdict"] == "not applicable"
        assert sum("cannot apply to 15" in n for n in reporter.notes) == 1


@pytest.mark.nightly
def test_decoded_values_are_what_the_paths_say(model_directory, texts, monkeypatch):
    """The section through the reader's coders gives exactly the values the path was predicted with."""
    seen = []
    real = trial.realise

    def look(operating_point, wanted):
        found = real(operating_point, wanted)
        for (path, name, index), r in found.items():
            setting = trial.ladder(path, operating_point.base, name, operating_point.most_settings)[index]
            tried = trial.attempt(operating_point, path, {name: (index, setting)})[name]
            seen.append(np.array_equal(r.values, tried.values.numpy()))
        return found

    monkeypatch.setattr("bytecap_lab.rd_curves.points.realise", look)
    monkeypatch.setattr("bytecap_lab.rd_curves.build", partial(build, most_settings=2))
    byte_returns(
        model_directory("transposed"), BUDGET + 4000, calibration=texts["calib"], evaluation=texts["val"], points=4,
        point_tokens=300, **SMALL,
    )  # fmt: skip
    assert seen
    assert all(seen)


@pytest.mark.slow
def test_the_command_prints_one_object(run, model_directory, texts, tmp_path):
    arguments = ("curves", model_directory("rotary"), "--budget", BUDGET, "--paths", "step,rows", "-o", tmp_path / "a")
    arguments += ("--calib", texts["calib"], "--eval", texts["val"], "--tokens", 2000, "--eval-tokens", 1000)
    arguments += ("--points", 4, "--point-tokens", 500)
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "a" / "curves.json").read_text())
    code, out, _ = run(*arguments)
    assert code == 0
    assert "rank correlation" in out
    assert "rows" in out


@pytest.mark.slow
def test_a_page_survives_missing_figures(curved):
    found, _ = curved()
    found = json.loads(json.dumps(found))
    found["lambda"]["nats_per_byte"] = None
    found["agreement"] |= {"spearman": None, "ceiling": None}
    for p in found["paths"]["columns"]["whole"]:
        p |= {"kl_stderr": None, "nats_per_byte": None, "bpb_per_kb": None}
    assert "too few" in page(found)


def test_ticks_cover_the_range():
    assert ticks(-0.4, 1.2)[0] <= -0.4
    assert ticks(-0.4, 1.2)[-1] >= 1.2
