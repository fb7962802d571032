"""The command line: JSON fields, exit codes, and one clear line for every kind of bad input."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

import forks
from bytecap.cli import app
from bytecap.methods.rate_control import allowed_slack
from conftest import BUDGET, FAST, SMALL

SCORED = ("--tokens", SMALL["evaluation_tokens"], "--window", SMALL["window"])  # as `fitted` is

FIT_FIELDS = {
    "budget_bytes", "file_bytes", "slack_bytes", "ideal_bytes", "parameters", "bits_per_parameter", "bpb_original",
    "bpb_artifact", "bpb_stderr", "nats_original", "nats_artifact", "kl_nats", "kl_stderr", "same_top1",
    "predicted_delta_nats", "measured_delta_nats", "slope_nats_per_byte", "duality_gap_nats", "seconds",
}  # fmt: skip


class TestJson:
    @pytest.mark.slow
    def test_fit(self, run, job, tmp_path):
        arguments = [a for a in job() if a not in FAST[:2]]
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, "")
        report = json.loads(out)
        assert out.count("\n") == 1
        assert set(report) >= FIT_FIELDS
        assert all(isinstance(report[k], int | float) for k in FIT_FIELDS)
        assert report["file_bytes"] == (tmp_path / "out.bcap").stat().st_size
        assert report["slack_bytes"] <= allowed_slack(BUDGET)
        for text in report["texts"]:
            assert set(text) >= {"name", "bpb_original", "bpb_artifact", "kl_nats", "kl_stderr", "same_top1"}

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["golf", "uniform"])
    def test_fit_with_a_baseline_has_null_where_nothing_is_predicted(self, run, job, method):
        code, out, _ = run(*job(), "--method", method, "--json")
        assert code == 0
        report = json.loads(out)
        assert set(report) >= FIT_FIELDS
        assert report["predicted_delta_nats"] is None
        assert report["method"] == method

    @pytest.mark.slow
    def test_dry_run(self, run, model_directory, texts):
        code, out, err = run(
            "fit", model_directory("rotary"), "--budget", "21kB", "--dry-run", "--calib", texts["calib"], "--eval",
            texts["val"], *FAST[2:], "--json",
        )  # fmt: skip
        assert (code, err) == (0, "")
        report = json.loads(out)
        assert 0 < report["floor_bytes"] < 21_000
        assert report["predicted_delta_nats"] > 0

    @pytest.mark.parametrize("source", ["artifact", "directory"])
    def test_eval(self, run, fitted, model_directory, texts, source):
        model = fitted("rotary")[1] if source == "artifact" else model_directory("rotary")
        code, out, err = run("eval", model, "--text", texts["val"], *SCORED, "--json")
        assert (code, err) == (0, "")
        score = json.loads(out)
        assert out.count("\n") == 1
        assert {"bpb", "bpb_stderr", "nats_per_token", "tokens", "bytes"} <= set(score)
        key = "artifact" if source == "artifact" else "original"
        report = fitted("rotary")[0].report
        assert score["nats_per_token"] == pytest.approx(report[f"nats_{key}"], rel=1e-5)
        assert score["bpb"] == pytest.approx(report[f"bpb_{key}"], rel=1e-5)
        assert score["tokens"] == report["evaluation_tokens"]

    def test_eval_means_over_texts_are_unweighted(self, run, fitted, texts):
        _, out, _ = run(
            "eval", fitted("rotary")[1], "--text", texts["val"], "--text", texts["calib"], "--tokens", 700, "--window",
            128, "--json",
        )  # fmt: skip
        score = json.loads(out)
        assert [t["name"] for t in score["texts"]] == ["val.txt", "calib.txt"]
        assert score["bpb"] == pytest.approx(sum(t["bpb"] for t in score["texts"]) / 2)
        assert score["bytes"] == sum(t["bytes"] for t in score["texts"])

    def test_ledger(self, run, fitted):
        _, path = fitted("rotary")
        code, out, err = run("ledger", path, "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found["file_bytes"] == path.stat().st_size == sum(e["bytes"] for e in found["entries"])
        assert all(set(e) == {"unit", "kind", "bytes", "parameters"} for e in found["entries"])

    def test_check(self, run, fitted):
        _, path = fitted("rotary")
        code, out, _ = run("check", path, "--json")
        assert code == 0
        assert json.loads(out)["file_bytes"] == path.stat().st_size

    @pytest.mark.slow
    def test_unpack_and_generate(self, run, fitted, tmp_path):
        _, path = fitted("rotary")
        code, out, _ = run("unpack", path, "-o", tmp_path / "out", "--json")
        assert code == 0
        assert json.loads(out)["dtype"] == "bfloat16"
        assert json.loads(out)["rounded"] > 0
        code, out, _ = run("unpack", path, "-o", tmp_path / "exact", "--dtype", "float32")
        assert out.strip().endswith("exact: written as float32")
        code, out, _ = run("generate", path, "--prompt", "The table", "--tokens", 5, "--temperature", 0, "--json")
        assert code == 0
        assert json.loads(out)["prompt"] == "The table"
        assert run("generate", path, "--prompt", "The table", "--tokens", 5, "--temperature", 0, "--json")[1] == out

    @pytest.mark.slow
    def test_fit_under_several_budgets(self, run, job, tmp_path):
        arguments = job(budget="21kB,6bpp")
        arguments[arguments.index("-o") + 1] = tmp_path / "m-{budget}.bcap"
        code, out, err = run(*arguments, "--budget", "23000", "--report", tmp_path / "{budget}.html", "--json")
        assert (code, err) == (0, "")
        reports = json.loads(out)["fits"]
        names = ["21kB", "6bpp", "23000"]
        assert [(tmp_path / f"m-{n}.bcap").stat().st_size for n in names] == [r["file_bytes"] for r in reports]
        assert all(r["file_bytes"] <= r["budget_bytes"] for r in reports)
        assert {p.name for p in tmp_path.iterdir()} == {
            f(n) for n in names for f in ("m-{}.bcap".format, "{}.html".format)
        }


class TestFullDisk:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
    def test_what_a_library_could_not_write_is_one_line(self, run, job, monkeypatch, number):
        def full(*_):
            raise OSError(number, "no room", "kernels.nbi")

        monkeypatch.setattr("bytecap.cli.fit.check_output", full)
        code, _, err = run(*job())
        assert code == 2
        assert (
            err == "error: no room: kernels.nbi; free some space (NUMBA_CACHE_DIR says where compiled code is kept)\n"
        )


class TestHelp:
    COMMANDS = (
        ["fit"], ["eval"], ["ledger"], ["check"], ["unpack"], ["generate"], ["demo"], ["compare"], ["curves"],
        ["inspect"], ["thesis"], ["tie"], ["golf", "budget"], ["golf", "export"], ["golf", "check"],
        ["recode"], ["imatrix"], ["card"], ["choose"], ["export", "web"],
    )  # fmt: skip

    def options(self):
        """(command, option) of all there are."""
        from typer.main import get_command

        from bytecap.cli.app import app

        everything = get_command(app)
        for words in self.COMMANDS:
            command = everything
            for word in words:
                command = command.commands[word]
            yield from ((" ".join(words), p) for p in command.params if p.param_type_name == "option")

    def test_every_command_is_here(self):
        from typer.main import get_command

        from bytecap.cli.app import app

        known = get_command(app).commands
        assert {*known} == {words[0] for words in self.COMMANDS}
        for group in ("golf", "export"):
            assert {*known[group].commands} == {words[1] for words in self.COMMANDS if words[0] == group}

    @pytest.mark.slow
    def test_every_default_is_shown(self):
        for command, option in self.options():
            if not (option.is_flag or option.required or option.name in {"help", "as_json"}):
                shown = option.show_default if isinstance(option.show_default, str) else option.default
                assert shown not in {None, ""}, (command, option.name)

    @pytest.mark.slow
    def test_defaults_are_those_of_python(self):
        import inspect

        import bytecap
        from bytecap_lab.thesis import thesis

        functions = {
            "compare": bytecap.compare, "curves": bytecap.byte_returns, "thesis": thesis, "tie": bytecap.tie,
            "fit": bytecap.fit,
        }  # fmt: skip
        same = {"eval_tokens": "evaluation_tokens", "lora_rank": "rank"}
        for command, option in self.options():
            if command in functions:
                found = inspect.signature(functions[command]).parameters.get(same.get(option.name, option.name))
                if found is not None and option.default is not None and not option.is_flag and not option.required:
                    python = found.default
                    python = (
                        ",".join(python) if isinstance(python, tuple) and isinstance(option.default, str) else python
                    )
                    assert option.default == python, (command, option.name)

    @pytest.mark.slow
    def test_long_and_short_words(self):
        words = {command: set() for command, _ in self.options()}
        for command, option in self.options():
            words[command] |= set(option.opts)
        for command in ("fit", "compare", "curves", "thesis"):
            assert {"--calibration", "--calib", "--evaluation", "--eval"} <= words[command], command
        assert {"--calibration", "--calib"} <= words["inspect"]


class TestTalk:
    @pytest.mark.slow
    def test_fit_says_what_it_did(self, run, job):
        code, out, err = run(*job())
        assert code == 0
        said = " ".join((out + err).split())
        assert "21,000 bytes (21.0 kB, 20.5 KiB)" in said  # both units, once
        for words in ("bits per parameter", "KL to the original", "same top-1", "predicted", "disjoint"):
            assert words in said

    @pytest.mark.slow
    def test_the_embedded_texts_are_announced(self, run, model_directory, tmp_path):
        code, _, err = run(
            "fit", model_directory("rotary"), "--budget", BUDGET, "-o", tmp_path / "out.bcap", *FAST
        )  # fmt: skip
        assert code == 0
        assert "warning: no --calib given: samples of the model itself" in " ".join(err.split())

    @pytest.mark.slow
    def test_lossless_is_announced_and_exits_with_0(self, run, job, tmp_path):
        code, out, err = run(*job(budget="1MB"))
        assert code == 0
        assert "without any loss" in " ".join((out + err).split())
        assert (tmp_path / "out.bcap").stat().st_size < 1_000_000

    @pytest.mark.slow
    def test_ledger_check_eval_and_version(self, run, fitted, texts):
        _, path = fitted("rotary")
        code, out, _ = run("ledger", path)
        assert code == 0
        assert "model.embed_tokens.weight" in out
        code, out, _ = run("check", path)
        assert code == 0
        assert "sound" in out
        code, out, _ = run("eval", path, "--text", texts["val"], "--tokens", 500)
        assert code == 0
        assert "val.txt" in out
        code, out, _ = run("--version")
        assert code == 0
        assert re.match(r"bytecap \d+\.\d+\.\d+", out)

    @pytest.mark.parametrize("command", ["fit", "eval", "ledger", "check", "unpack", "generate", "demo"])
    def test_every_command_has_help(self, run, command):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "Usage" in out

    def test_debug_shows_the_traceback(self, run, tmp_path):
        from bytecap import NotAnArtifact

        with pytest.raises(NotAnArtifact):
            run("--debug", "check", tmp_path / "none.bcap")


def spawn(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(  # noqa: S603 (our own interpreter)
        [sys.executable, "-m", "bytecap", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, **options,
        # a background job of a shell starts with Ctrl-C ignored, and its children inherit that; nothing else runs here
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],  # noqa: PLW1509
    )  # fmt: skip


@pytest.fixture
def endless(tmp_path, model_directory, texts):
    """Words of a fit of a small model, and far more work than there is time for."""
    return [
        "fit", model_directory(), "--budget", BUDGET, "-o", tmp_path / "out.bcap", "--calib", texts["calib"], "--eval",
        texts["val"], "--recover", 100_000,
    ]  # fmt: skip


class TestInterruption:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("number", "code"),
        [(signal.SIGINT, 130), *(pytest.param(n, 128 + n, marks=pytest.mark.nightly) for n in (15, 1))],
    )
    def test_signals_to_a_real_process(self, tmp_path, endless, number, code):
        process = spawn(*endless)
        try:
            seen = ""
            killer = threading.Timer(900, process.kill)  # only what hangs
            killer.start()
            while "disjoint" not in seen and process.poll() is None:  # past start-up, at work
                seen += process.stderr.readline()
            time.sleep(0.3)
            process.send_signal(number)
            out, err = process.communicate()
            killer.cancel()
        finally:
            process.kill()
        assert process.returncode == code, seen + err
        assert "Traceback" not in err
        assert ("interrupted; no partial file is left behind" in err) == (number == signal.SIGINT)
        assert out == ""
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_a_fork_is_terminated(self, tmp_path, endless):
        """As above, without four seconds of imports."""
        printed = tmp_path / "printed"

        def work():
            for n in (signal.SIGINT, signal.SIGTERM):
                signal.signal(n, signal.SIG_DFL)
            sys.stderr.reconfigure(line_buffering=True)
            sys.argv = ["bytecap", *map(str, endless)]
            app.main()

        pid = forks.start(work, printed)
        while not (printed.exists() and "disjoint" in printed.read_text("utf-8")):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), printed.read_text("utf-8")
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(pid, signal.SIGTERM)
        assert forks.wait(pid) == 143
        assert "Traceback" not in printed.read_text("utf-8")
        assert list(tmp_path.iterdir()) == [printed]

    @pytest.mark.parametrize("where", ["bytecap.pipeline.stages._measure", "bytecap.system.atomic.os.fsync"])
    def test_ctrl_c_at_awkward_moments(self, run, job, tmp_path, monkeypatch, where):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(where, interrupt)
        code, out, err = run(*job(), "--json")
        assert code == 130
        assert out == ""
        assert "Traceback" not in err
        assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
        if where.endswith("fsync"):
            assert list(tmp_path.iterdir()) == []
        elif (tmp_path / "out.bcap").exists():  # then it was finished before, and must be whole
            assert run("check", tmp_path / "out.bcap")[0] == 0

    @pytest.mark.slow
    def test_the_module_can_be_run(self, tmp_path):
        process = spawn("check", tmp_path / "none.bcap")
        out, err = process.communicate()
        assert process.returncode == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
