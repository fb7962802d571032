"""The command line as people of this ecosystem type it, phrase by phrase."""

import json

import pytest

import bytecap
from bytecap.sizes import parse_budget


@pytest.mark.coverage
def test_numbers_beyond_all_sizes():
    with pytest.raises(bytecap.UsageError, match="more than any disk holds"):
        bytecap.parse_size("9" * 400)
    with pytest.raises(bytecap.UsageError, match="more bits per parameter than any number has"):
        parse_budget("9" * 400 + ".5bpp", 10)


class TestBudgets:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("budget", "bytes_"), [("3M", 3_000_000), ("3G", 3_000_000_000), ("3MiB", 3 << 20), ("3mb", 3_000_000)]
    )
    def test_units(self, run, job, budget, bytes_):
        code, out, err = run(*job(budget=budget), "--dry-run", "--json")
        assert code == 0, err
        assert json.loads(out)["budget_bytes"] == bytes_

    def test_bits_per_parameter(self, run, job):
        code, out, err = run(*job(budget="6.5bpp"), "--dry-run", "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["budget_bytes"] == int(6.5 * found["parameters"] / 8)

    @pytest.mark.parametrize("budget", ["3.5", "3.5 ", "0.5", "3.5,4.5", "3MB,3.5"])
    def test_a_fraction_without_a_unit(self, refused, job, budget):
        assert "has no unit: write" in refused(*job(budget=budget, output="m-{budget}.bcap"))

    @pytest.mark.parametrize(
        "budget",
        ["9" * 400, "9" * 400 + "GB", "9" * 400 + ".5bpp", "1" * 5000, "10000000TB", "1e9", "3,5MB", "\u0663MB"],
    )
    def test_numbers_that_are_none(self, refused, job, budget):
        assert len(refused(*job(budget=budget))) < 6000

    @pytest.mark.parametrize("command", ["fit", "compare", "export web", "choose"])
    def test_a_fraction_everywhere(self, refused, command, model_directory, texts, tmp_path):
        option = "--budgets" if command == "compare" else "--budget"
        texts = ("--calib", texts["calib"], "--eval", texts["val"])
        said = refused(*command.split(), model_directory("rotary"), option, "3.5", *texts, "-o", tmp_path / "out")
        assert "3.5MB for millions of bytes" in said


class TestWords:
    @pytest.mark.slow
    def test_long_words_of_texts(self, run, job):
        arguments = [{"--calib": "--calibration", "--eval": "--evaluation"}.get(a, a) for a in job()]
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert json.loads(out)["calibration_texts"][0]["name"] == "calib.txt"

    def test_the_same_words_in_python(self, model_directory, texts):
        options = {"calibration": texts["calib"], "evaluation": texts["val"], "tokens": 2000, "evaluation_tokens": 1000}
        found = bytecap.fit(model_directory("rotary"), "21kB", method="uniform", dry_run=True, **options).report
        assert found["budget_bytes"] == 21_000

    @pytest.mark.parametrize("command", ["fit", "compare"])
    def test_names_of_other_quantizers(self, run, command, model_directory, texts, tmp_path):
        options = {
            "fit": ("--budget", "21kB", "--method", "gptq"),
            "compare": ("--budgets", "21kB", "--methods", "gptq"),
        }
        texts = ("--calib", texts["calib"], "--eval", texts["val"])
        code, _, err = run(command, model_directory("rotary"), *options[command], *texts, "-o", tmp_path / "out")
        assert code == 2
        assert "unknown method 'gptq', did you mean golf?" in err

    @pytest.mark.parametrize(
        ("wrong", "right"), [("--budgets", "--budget"), ("--calibrate", "--calib"), ("--out", "-o")]
    )
    def test_words_that_are_nearly_right(self, refused, job, wrong, right):
        assert right in refused(*(wrong if a == right else a for a in job()))
