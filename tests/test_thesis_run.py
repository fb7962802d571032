"""The thesis end to end on a tiny model: measured once, resumed, judged again from lines, refused with a reason."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bytecap.errors import BytecapError, CheckpointError, UsageError
from bytecap.format.overlays.channels import BOTH, COLUMNS, ROWS
from bytecap.progress import Silent
from bytecap.quantization.overlays.protect import Amount
from bytecap.report.lines import read_lines
from bytecap.system.cache import Store
from bytecap_lab import thesis
from bytecap_lab.rd_curves.points import Pick
from bytecap_lab.thesis import models, runner
from bytecap_lab.thesis.amounts import GLOBAL
from bytecap_lab.thesis.bench import Bench, BenchSetting
from bytecap_lab.thesis.experiments.execution import ratio
from bytecap_lab.thesis.measures.singles import chosen, problems
from bytecap_lab.thesis.measures.timing import SIDE, seconds
from bytecap_lab.thesis.statistics import Interval
from conftest import BUDGET, SMALL
from pages import sound

ROOT = Path(__file__).parents[1]
OPTIONS = {**SMALL, "budget": str(BUDGET), "rungs": 2, "seeds": 2}


@pytest.fixture(scope="module")
def tested(tmp_path_factory, model_directory, texts):
    """(verdicts, directory, model, options) of a tiny run of three experiments."""
    output = tmp_path_factory.mktemp("thesis")
    model = str(model_directory("rotary"))
    options = {**OPTIONS, "calibration": (texts["calib"], texts["val"]), "evaluation": texts["val"],
               "only": ["saturation", "instability", "8"]}  # fmt: skip
    return thesis.thesis(model, output, **options), output, model, options


@pytest.fixture(scope="module")
def bench(tested):
    """The bench of the same run, from its store."""
    _, output, model, options = tested
    files = [
        tuple(map(str, p if isinstance(p, tuple) else (p,))) for p in (options["calibration"], options["evaluation"])
    ]
    setting = BenchSetting(
        *files, str(BUDGET), SMALL["tokens"], SMALL["evaluation_tokens"], SMALL["window"], 2, 2, "cpu"
    )
    return Bench(models.load(model), "grid", setting, Store(output / "store"), Silent())


@pytest.mark.slow
class TestRun:
    def test_verdicts_on_both_bases(self, tested):
        found, output, model, _ = tested
        assert [e["name"] for e in found["experiments"]] == ["saturation", "instability", "execution"]
        assert {(m["model"], m["base"]) for m in found["models"]} == {(model, "grid"), (model, "golf")}
        assert all(not m["counts"] and m["kl"]["effect"] > 0 for m in found["models"])
        assert all(len(e["cells"]) == 2 for e in found["experiments"])
        unstable = found["experiments"][1]["cells"]
        wanted = {"regret, calibration seeds", "regret, workloads"}  # no figure where a random model gains nothing
        assert all(wanted <= set(c["effects"]) or "not surely above 0" in c["reason"] for c in unstable)
        assert all(e["verdict"] == "undecided" for e in found["experiments"])
        assert json.loads((output / "thesis.json").read_text("utf-8")) == found
        sound((output / "thesis.html").read_text("utf-8"))

    def test_every_figure_is_there_where_something_is_gained(self, tested, monkeypatch):
        """A random model may gain nothing surely, so figures are asked for whatever their resamples say."""
        plain = classmethod(lambda cls, values: cls(*(float(np.nan_to_num(values).mean()) for _ in range(4))))
        monkeypatch.setattr(Interval, "of", plain)
        found = thesis.render(tested[1] / "thesis.jsonl", only=["instability"])
        wanted = {"regret, calibration seeds", "regret, workloads"}
        assert [wanted <= set(c["effects"]) for c in found["experiments"][0]["cells"]] == [True, True]

    def test_a_second_run_measures_nothing(self, tested, monkeypatch):
        found, output, model, options = tested
        before = (output / "thesis.jsonl").read_bytes()
        monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("measured again"))
        assert thesis.thesis(model, output, **options) == found
        assert (output / "thesis.jsonl").read_bytes() == before

    def test_a_lost_line_is_measured_again_and_says_the_same(self, tested, tmp_path):
        _, output, model, options = tested
        lines = (output / "thesis.jsonl").read_text("utf-8").splitlines(keepends=True)
        at = next(i for i, text in enumerate(lines) if '"what": "arm exceptions"' in text)
        (tmp_path / "thesis.jsonl").write_text("".join(lines[:at] + lines[at + 1 :]) + lines[at][:50], "utf-8")
        again = thesis.thesis(model, tmp_path, **options, store=output / "store")
        (old,), (new,) = (
            [
                r["points"]
                for r in read_lines(p / "thesis.jsonl")
                if r.get("what") == "arm exceptions" and r["base"] == b
            ][-1:]
            for p, b in ((output, json.loads(lines[at])["base"]), (tmp_path, json.loads(lines[at])["base"]))
        )
        assert old == new
        assert [e["name"] for e in again["experiments"]] == ["saturation", "instability", "execution"]

    def test_lines_alone_make_everything_again(self, tested, tmp_path):
        found, output, _, options = tested
        again = thesis.render(output / "thesis.jsonl", tmp_path, only=options["only"])
        assert again == found
        assert (tmp_path / "thesis.html").read_bytes() == (output / "thesis.html").read_bytes()
        assert not (tmp_path / "store").exists()
        every = thesis.render([output / "thesis.jsonl"])
        assert len(every["experiments"]) == 8
        assert every["experiments"][0]["cells"][0]["reason"] == "arm ranked was not measured"


@pytest.mark.slow
class TestBench:
    def test_finer_steps_everywhere_touch_every_matrix(self, bench):
        (found,) = bench.measure([bench.everywhere(GLOBAL[2])], "global")
        assert set(found.growth) == set(bench.operating_point.base.problems)
        assert found.bytes > 0
        assert sum(bench.recovered(found)) > 0

    def test_a_pick_of_several_paths_adds_up(self, bench):
        names = list(bench.operating_point.base.problems)[:2]
        both = Pick({names[0]: ("step", 2), names[1]: ("rows", 0)})
        alone = [Pick({n: both.chosen[n]}) for n in names]
        joint, *parts = bench.measure([both, *alone], "parts")
        assert joint.growth == {**parts[0].growth, **parts[1].growth}
        assert joint.layers == parts[1].layers > 0
        assert (parts[0].layers, parts[0].heads) == (0, 0)

    def test_sums_over_documents_are_those_over_windows(self, bench):
        assert sum(bench.fold(bench.at_base.kl)) == pytest.approx(bench.at_base.kl.sum(), rel=1e-5)

    def test_singles_lie_near_two_percent(self, bench):
        for name, candidate in chosen(bench).items():
            assert 0.005 <= candidate.bytes / len(bench.operating_point.sections[name].data) <= 0.08
            assert candidate.path != "step"

    def test_problems_of_the_own_tokens_are_the_own_ones(self, bench):
        for name, other in problems(bench, bench.sets(), 0).items():
            own = bench.operating_point.base.problems[name]
            values = bench.operating_point.base.units[name].values
            assert other.distortion(values) == pytest.approx(own.distortion(values), rel=0.1)  # damping is left out


class TestModels:
    @pytest.fixture
    def looped(self, tmp_path, model_directory):
        """A trained-looking looped directory of two stored blocks passed twice, written by the benchmark's own code."""
        spec = importlib.util.spec_from_file_location("thesis_models", ROOT / "benchmarks" / "thesis_models.py")
        maker = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(maker)
        source = Path(shutil.copytree(model_directory("rotary"), tmp_path / "source"))
        (source / "tokenizer_config.json").write_text("{}", "utf-8")
        config = json.loads((source / "config.json").read_text("utf-8")) | {"stored_layers": 2, "num_hidden_layers": 4}
        torch.manual_seed(0)
        module = maker.build(config)
        line = {"recipe": "looped", "seed": 3, "registration": maker.registration()}
        maker.write(module, config, source, line, tmp_path / "looped-3")
        return f"{ROOT / 'benchmarks' / 'thesis_models.py'}:looped:{tmp_path / 'looped-3'}", module

    def test_a_looped_model_is_read_through_its_file(self, looped):
        spec, module = looped
        found = models.load(spec)
        plain = {u.name for u in found.units}
        assert not [n for n in plain if n.startswith(("model.layers.2", "model.layers.3"))]
        ids = torch.arange(12)[None]
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(p.bfloat16())
            assert torch.allclose(found.module(ids).logits, module(ids).logits, atol=1e-4)
        assert "tokenizer.json" in found.files
        assert models.origin(spec) == models.Origin("looped", 3, models.origin(spec).registration)
        assert models.origin("demo") == models.Origin()

    def test_as_an_ordinary_directory_it_is_refused(self, looped):
        with pytest.raises(CheckpointError, match="lacks tensor"):
            models.load(looped[0].rpartition(":")[2])

    def test_a_broken_training_file_is_named(self, tmp_path):
        (tmp_path / "training.json").write_text('{"recipe": "mini"}', "utf-8")
        with pytest.raises(CheckpointError, match=r"training\.json does not say recipe, seed and registration"):
            models.origin(str(tmp_path))

    def test_a_missing_directory_is_named(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"write FILE\.py:CALLABLE:DIRECTORY"):
            models.load(f"x.py:f:{tmp_path / 'none'}")


class TestProducts:
    @pytest.mark.parametrize("mode", [COLUMNS, ROWS, BOTH])
    def test_channels_of_either_side_multiply_as_the_values_do(self, mode):
        rng = np.random.default_rng(0)
        base, change = rng.standard_normal((3, 8)), np.zeros((3, 8))
        index = np.array([5, 7]) if mode == COLUMNS else np.array([0, 2])  # columns beyond the last row
        if mode & COLUMNS:
            change[:, index] = rng.standard_normal((3, 2))
        if mode & ROWS:
            change[index] = rng.standard_normal((2, 8))
        x = rng.standard_normal(8)
        found = SIDE["channels"](base, change, Amount(2, 8, mode, index))(x)
        assert np.allclose(found, (base + change) @ x, atol=1e-5)


def test_a_clock_that_stands_still_gives_times_that_can_be_compared(monkeypatch):
    monkeypatch.setattr("time.process_time", lambda: 1.0)
    assert np.isfinite(ratio([seconds(abs, 1)], [seconds(abs, 2)])).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"only": ["nine"]}, "unknown experiment 'nine'"), ({"bases": ["lattice"]}, "unknown base 'lattice'"),
            ({"bases": []}, "there is nothing to test"), ({"budget": "wide"}, "wide"),
        ],
    )  # fmt: skip
    def test_unknown_names(self, model_directory, texts, options, message):
        files = {"calibration": texts["calib"], "evaluation": texts["val"]}
        with pytest.raises(BytecapError, match=message):
            thesis.thesis(str(model_directory("rotary")), **{**OPTIONS, **files, **options})

    def test_lines_without_measurements(self, tmp_path):
        (tmp_path / "empty.jsonl").write_text('{"record": "run"}\n', "utf-8")
        with pytest.raises(UsageError, match="holds no measurement of the thesis"):
            thesis.render(tmp_path / "empty.jsonl")

    @pytest.mark.slow
    def test_on_the_command_line(self, tested, run, tmp_path):
        _, output, _, _ = tested
        assert run("thesis")[0] == 2
        code, out, err = run(
            "thesis", "--from", output / "thesis.jsonl", "-o", tmp_path, "--json", "--only", "2,8"
        )  # fmt: skip
        assert code == 0, err
        assert [e["name"] for e in json.loads(out)["experiments"]] == ["saturation", "execution"]
        assert (tmp_path / "thesis.html").exists()
