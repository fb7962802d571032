"""One list of options: what is asked in Python, of modules and on the command line is one frozen `FitConfig`."""

import ast
import inspect
import io
import re
import sys
import warnings
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch

import bytecap
from bytecap.calibration import statistics
from bytecap.cli.options import OPTIONS
from bytecap.job.config import FitConfig, documentation
from bytecap.pipeline import stages
from bytecap.progress import Bars, Silent, TextBars, reporter_for
from bytecap.quantization.options import Options
from conftest import BUDGET, SMALL

SOURCE = Path(bytecap.__file__).parent
NAMES = [f.name for f in fields(FitConfig)]
STUDIES = {"plan", "choose", "score"}  # settings of their own: many fits, as `compare` in the lab, or none


class TestOneList:
    def test_it_is_frozen(self):
        with pytest.raises(FrozenInstanceError):
            FitConfig(1000).seed = 3

    def test_every_option_is_documented_once(self):
        assert list(documentation()) == NAMES
        assert all(documentation().values())

    @pytest.mark.parametrize("function", [bytecap.fit, bytecap.fit_budgets, bytecap.train.export])
    def test_signatures_are_made_from_it(self, function):
        found = list(inspect.signature(function).parameters.values())
        first = found.index(next(p for p in found if p.name == "budget"))
        assert [p.name for p in found[first:]] == NAMES
        assert all(p.annotation is not p.empty for p in found)
        assert all(p.kind is p.KEYWORD_ONLY for p in found[first + 1 :])
        assert "most calibration tokens" in function.__doc__
        assert "config: " not in function.__doc__.partition("Options:")[0]

    def test_no_function_of_a_fit_writes_the_list_out_again(self):
        for path in [*(SOURCE / "pipeline").glob("*.py"), SOURCE / "cli" / "fit.py", SOURCE / "__init__.py"]:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    names = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
                    assert len(names & set(NAMES)) <= 6 or node.name in STUDIES, (path.name, node.name)

    def test_the_face_has_no_options_of_any_name(self):
        for name in ("fit", "fit_budgets", "compare", "byte_returns", "tie", "load_model", "load_into"):
            kinds = [p.kind for p in inspect.signature(getattr(bytecap, name)).parameters.values()]
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name

    def test_the_command_line_s_options_are_fields(self):
        assert set(OPTIONS) <= set(NAMES)
        words = [w for o in OPTIONS.values() for w in o.words]
        assert len(set(words)) == len(words)

    def test_unknown_options_are_named(self):
        with pytest.raises(TypeError, match=r"fit\(\) got an unexpected keyword argument 'calib'"):
            bytecap.fit("demo", BUDGET, calib="x")

    @pytest.mark.nightly
    def test_a_type_checker_knows_the_options(self, tmp_path, monkeypatch):
        from mypy import api

        monkeypatch.setenv("MYPYPATH", str(SOURCE.parent))

        path = tmp_path / "user.py"
        path.write_text(
            "import bytecap\n"
            "bytecap.fit('demo', '3MB', seed=1, calibration='a.txt').save('x.bcap')\n"
            "bytecap.fit('demo', '3MB', seed='1')\nbytecap.fit('demo', '3MB', sede=1)\nbytecap.fti\n"
        )
        out, _, _ = api.run(["--strict", "--ignore-missing-imports", f"--cache-dir={tmp_path / 'cache'}", str(path)])
        lines = [line.partition("user.py:")[2] for line in out.splitlines() if "user.py" in line]
        assert [line.partition(":")[0] for line in lines if " error: " in line] == ["3", "4", "5"], out


class TestOrder:
    """Cheap checks come first: options, then the model, then the floor, then texts."""

    def test_options_before_the_model(self):
        for options, said in (
            ({"method": "glof"}, "did you mean golf"),
            ({"device": "tpu"}, "unknown device"),
            ({"recover": "soon"}, "soon"),
            ({"recover_text": "a.txt"}, "recover_text"),
            ({"loss": print}, "for torch modules"),
        ):
            with pytest.raises(bytecap.UsageError, match=said):
                bytecap.fit("no such model", BUDGET, **options)
        with pytest.raises(bytecap.UsageError, match=r"3\.5bpp for bits per parameter"):
            bytecap.fit("no such model", "3.5")

    def test_the_model_before_texts_and_the_floor_between(self, model_directory, tmp_path):
        texts = {"calibration": tmp_path / "none.txt", "evaluation": tmp_path / "none.txt"}
        with pytest.raises(bytecap.CheckpointError, match="no model at"):
            bytecap.fit("no such model", BUDGET, **texts)
        with pytest.raises(bytecap.BudgetError, match="below the floor"):
            bytecap.fit(model_directory("rotary"), 100, **texts)
        with pytest.raises(bytecap.TextError, match=r"none\.txt"):
            bytecap.fit(model_directory("rotary"), BUDGET, **texts)

    def test_options_that_do_not_fit_the_model_are_refused(self, model_directory):
        module = torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64))
        with pytest.raises(bytecap.UsageError, match="store is for checkpoints"):
            bytecap.fit(module, 3000, calibration=[], store="x")
        with pytest.raises(bytecap.UsageError, match="calibration=batches"):
            bytecap.fit(module, 3000)
        with pytest.raises(bytecap.UsageError, match="calibration=batches"):
            bytecap.fit(module, 3000, calibration="a.txt")
        with pytest.raises(bytecap.UsageError, match="Tensor is no name"):
            bytecap.fit(model_directory("rotary"), BUDGET, calibration=[torch.zeros(2, 3)])

    @pytest.mark.parametrize(
        ("name", "method"),
        [("gptq", "golf"), ("GPTQ", "golf"), ("rtn", "uniform"), ("nf4", "uniform"), ("int4", "uniform"),
         ("q4_k_m", "uniform"), ("awq", "bytecap"), ("spqr", "owq"), ("aqlm", "cluscomp"), ("radios", "radio")],
    )  # fmt: skip
    def test_names_of_other_quantizers_lead_to_a_method(self, name, method):
        with pytest.raises(bytecap.UsageError, match=f"unknown method '{name}', did you mean {method}\\?"):
            bytecap.fit("no such model", BUDGET, method=name)


@pytest.mark.slow
class TestWarnings:
    def test_python_hears_them_and_the_report_keeps_them(self, model_directory):
        with pytest.warns(bytecap.BytecapWarning, match="no --calib given") as heard:
            found = bytecap.fit(model_directory("rotary"), BUDGET, method="uniform", **SMALL)
        assert [w.filename for w in heard if w.category is bytecap.BytecapWarning] == [__file__]
        (said,) = found.report["warnings"]
        assert said.startswith(
            "no --calib given: samples of the model itself and the embedded general text stand in; no --eval"
        )

    def test_a_fit_without_any_has_an_empty_list(self, fitted):
        assert fitted("rotary", "uniform")[0].report["warnings"] == []

    def test_a_reporter_that_takes_warnings_gets_them(self, model_directory):
        class Own(Silent):
            said = ()

            def warn(self, text):
                self.said = (*self.said, text)

        own = Own()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = bytecap.fit(model_directory("rotary"), BUDGET, method="uniform", reporter=own, **SMALL)
        assert list(own.said) == found.report["warnings"]
        assert len(own.said) == 1

    def test_json_holds_them_and_the_terminal_is_silent(self, run, model_directory, tmp_path):
        import json

        code, out, err = run(
            "fit", model_directory("rotary"), "--budget", BUDGET, "-o", tmp_path / "out.bcap", "--method", "uniform",
            "--tokens", "2000", "--eval-tokens", "1000", "--json",
        )  # fmt: skip
        assert (code, err) == (0, "")
        assert len(json.loads(out)["warnings"]) == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgress:
    def test_bars_appear_where_somebody_looks_on(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert isinstance(reporter_for(), Silent)
        assert isinstance(reporter_for(progress=True), Bars)
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert isinstance(reporter_for(), Bars)
        assert isinstance(reporter_for(progress=False), Silent)
        own = Silent()
        assert reporter_for(own, progress=True) is own
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
        assert isinstance(reporter_for(), TextBars)
        monkeypatch.setattr(sys, "stderr", None)
        monkeypatch.delitem(sys.modules, "ipykernel")
        assert isinstance(reporter_for(), Silent)

    @pytest.mark.slow
    def test_fit_takes_it(self, model_directory, texts, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
        given = {"calibration": texts["calib"], "evaluation": texts["val"], "method": "uniform", **SMALL}
        bytecap.fit(model_directory("rotary"), BUDGET, **given)
        said = capsys.readouterr().err
        assert "evaluation" in said
        assert "100%" in said
        bytecap.fit(model_directory("rotary"), BUDGET, progress=False, **given)
        assert capsys.readouterr().err == ""

    def test_a_text_bar_ends_full_and_on_a_line_of_its_own(self):
        stream = io.StringIO()
        bars = TextBars(stream)
        with bars.step("statistics", 4) as advance:
            advance(1)
        bars.note("done")
        last = stream.getvalue().rpartition("\r")[2]
        assert last.splitlines()[0].startswith("statistics ")
        assert "#" * 30 in last
        assert "100%" in last
        assert last.endswith("\ndone\n")


@pytest.mark.slow
class TestArtifact:
    def test_repr_is_one_short_line(self, fitted):
        said = repr(fitted("rotary")[0])
        assert said.startswith("Artifact(")
        assert len(said) < 300
        assert "\n" not in said
        assert f"{len(fitted('rotary')[0].data):,} bytes" in said

    def test_the_notebook_gets_the_ledger(self, fitted):
        from dataclasses import replace

        made = fitted("rotary")[0]
        found = replace(made, report={**made.report, "model": "<script>alert(1)</script>\n"})
        page = found._repr_html_()
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        assert "model.embed_tokens.weight" in page
        widths = [float(x) for x in re.findall(r"[\";]width:([0-9.]+)%", page)]
        assert sum(widths) == pytest.approx(100, abs=0.1)
        assert "\n" not in repr(found)

    def test_it_loads_as_a_module(self, fitted):
        made, path = fitted("rotary")
        here, there = made.load_model().state_dict(), bytecap.load_model(path).state_dict()
        assert here.keys() == there.keys()
        assert all(torch.equal(here[n], there[n]) for n in here)

    def test_a_dry_run_has_no_file(self, model_directory, texts):
        found = bytecap.fit(
            model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"], dry_run=True,
            method="bytecap", **SMALL,
        )  # fmt: skip
        assert "dry run" in repr(found)
        assert "dry run" in found._repr_html_()
        with pytest.raises(bytecap.UsageError, match="dry run"):
            found.load_model()


class TestBudgets:
    @pytest.mark.slow
    def test_several_from_one_set_of_statistics(self, model_directory, texts, fitted, tmp_path, monkeypatch):
        calls = []
        real = statistics.probe
        monkeypatch.setattr(statistics, "probe", lambda *a, **k: calls.append(1) or real(*a, **k))
        found = bytecap.fit_budgets(
            model_directory("rotary"), "21kB,24,000", calibration=texts["calib"], evaluation=texts["val"],
            output=tmp_path / "m-{budget}.bcap", **SMALL,
        )  # fmt: skip
        assert len(calls) == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m-21kB.bcap", "m-24,000.bcap"]
        assert [a.report["budget_bytes"] for a in found] == [21_000, 24_000]
        assert found[0].data == fitted("rotary")[0].data == (tmp_path / "m-21kB.bcap").read_bytes()
        assert found[1].data == fitted("rotary", budget=24_000)[0].data
        assert len(found[0].data) < len(found[1].data)

    @pytest.mark.slow
    def test_bits_per_parameter(self, model_directory, texts):
        found = bytecap.fit(
            model_directory("rotary"), "6bpp", calibration=texts["calib"], evaluation=texts["val"], method="uniform",
            **SMALL,
        )  # fmt: skip
        assert found.report["budget_bytes"] == int(6 * found.report["parameters"] / 8)
        assert found.report["bits_per_parameter"] <= 6

    @pytest.mark.parametrize(
        ("budget", "output", "said"),
        [
            ("3MB,3MB", None, "every budget once"),
            (",", None, "every budget once"),
            ("3MB,4MB", "m.bcap", "write {budget} into"),
            ("3MB,4XB", "m-{budget}.bcap", "cannot read the size '4XB'"),
        ],
    )
    def test_mistakes_are_found_before_the_model(self, budget, output, said):
        with pytest.raises(bytecap.UsageError, match=said):
            bytecap.fit_budgets("no such model", budget, output=output)

    def test_one_fit_takes_one_budget(self):
        with pytest.raises(bytecap.UsageError, match="cannot read the size"):
            bytecap.fit("no such model", "3MB,4MB")

    def test_a_budget_below_the_floor_stops_all_of_them_before_texts_are_read(self, model_directory, tmp_path):
        with pytest.raises(bytecap.BudgetError, match="below the floor"):
            bytecap.fit_budgets(
                model_directory("rotary"), "21kB,100", output=tmp_path / "{budget}", calibration=tmp_path / "none"
            )
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_lab_fits_take_the_same_config(model_directory, texts, fitted):
    from bytecap.model.checkpoint import load_checkpoint
    from bytecap.model.sources import load_sets

    model = load_checkpoint(model_directory("rotary"))
    sets = load_sets(model, texts["calib"], texts["val"], reporter=Silent(), **SMALL)
    found = stages.fit_sets(model, sets, FitConfig(BUDGET, method="uniform"))
    assert found.data == fitted("rotary", "uniform")[0].data


class TestOptionsOfTheMethod:
    def test_a_withdrawn_one_is_named_and_has_no_effect(self):
        told = []
        assert Options.of({"groups": 2, "drift": 0.0}, told.append) == Options(drift=0.0)
        assert len(told) == 1
        assert "the option groups of method bytecap does nothing any more: row groups" in told[0]

    @pytest.mark.slow
    def test_the_warning_reaches_the_user(self, model_directory, texts):
        with pytest.warns(bytecap.BytecapWarning, match="groups of method bytecap does nothing any more"):
            bytecap.fit(
                model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"], dry_run=True,
                options={"groups": 2}, **SMALL,
            )  # fmt: skip

    def test_an_unknown_one_is_refused(self):
        with pytest.raises(bytecap.UsageError, match="no option 'grops'"):
            Options.of({"grops": 2})
