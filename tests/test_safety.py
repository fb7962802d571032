"""Hostile files at the command line: what they say is shown as text, and what a user names as input stays as it is."""

import os
import re
import subprocess
import sys

import pytest

import bytecap
from bytecap import escape
from bytecap.errors import OutputError
from bytecap.format import container
from bytecap.system.collisions import refuse_collisions
from test_hostile import VECTOR, index, made, unit

POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes and links")


def artifact(path, name="w", files=(), **more):
    listed = index([unit(name, **more)], [n for n, _ in files])
    path.write_bytes(made((1, listed), (3, VECTOR), *[(4, b"\0" + c) for _, c in files]))
    return path


# ---------------------------------------------------------------------------------------------- what files say is shown

SPOKEN = [
    "[/red]", "a[/]", "[link=file:///etc/passwd]model.embed[/link]", "[bold red]x", ":smile:.x",
    "[@click=app.quit]x[/]", "run[v2]", "\\[x]", "a\\",
]  # fmt: skip
CONTROLS = {
    "a\x1b[2J": "a\\x1b[2J", "a\x1b]0;title\x07": "a\\x1b]0;title\\x07", "a\rb": "a\\rb", "a\nb": "a\\nb",
    "a\x9b1mb": "a\\x9b1mb",
    "\u202egpj": "\\u202egpj", "a\u2066b": "a\\u2066b", "a\U000e0041b": "a\\U000e0041b",
}  # fmt: skip


def shows(run, path, said):
    for command in ("ledger", "inspect"):
        code, out, err = run(command, path)
        assert code == 0, err
        assert said in out
        assert not set(out) & set("\x1b\x07\x9b\r\u202e\u2066")


@pytest.mark.parametrize("name", SPOKEN)
def test_markup_in_names_is_text(run, tmp_path, name):
    shows(run, artifact(tmp_path / "a.bcap", name), name)


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_in_names_are_escaped(run, tmp_path, name):
    shows(run, artifact(tmp_path / "a.bcap", name, dtype="F32"), CONTROLS[name])


def test_a_file_is_shown_under_its_name(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    path = artifact(tmp_path / "run[v2].bcap")
    for command in ("check", "ledger", "inspect"):
        assert "run[v2].bcap" in run(command, path)[1]


@POSIX
def test_errors_are_one_line_whatever_they_name(refused, tmp_path):
    name = "a\x1b]0;x\x07\nerror: fine[bold].bcap"
    line = refused("check", tmp_path / name)
    assert "a\\x1b]0;x\\x07 error: fine[bold].bcap" in line
    assert len(refused("check", tmp_path / ("x" * 100_000))) < 5000


def test_notes_and_bars_are_text():
    import io

    from bytecap.progress import Bars

    bars = Bars()
    bars.console = escape.console(file=(out := io.StringIO()), width=200)
    bars.note("[bold]wrote[/] a\x1b[2J :smile:")
    with bars.step("[red]val\x1b[2J.txt[/red]", 1) as advance:
        advance(1)
    assert "[bold]wrote[/] a\\x1b[2J :smile:" in out.getvalue()
    assert "[red]val\\x1b[2J.txt[/red]" in out.getvalue()


@pytest.mark.slow
def test_a_terminal_that_lacks_the_letters(tmp_path):
    path = artifact(tmp_path / "é中.bcap", "é中😀")
    done = subprocess.run(  # noqa: S603 (our own command)
        [sys.executable, "-m", "bytecap", "ledger", str(path)], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\xe9\\u4e2d\\U0001f600" in done.stdout


def test_what_a_model_writes_is_shown(run, fitted, monkeypatch):
    from bytecap.pipeline import generation

    monkeypatch.setattr(generation, "generate", lambda *_, **__: iter(["x\x1b[2J", "\ny\tz\x07"]))
    assert run("generate", fitted("rotary")[1], "--prompt", "a")[1] == "ax\\x1b[2J\ny\tz\\x07\n"


# ----------------------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize("name", ["." * 50_000, "a." * 50_000 + "b", ".".join("ab" * 30), "x" * 300_000])
def test_names_of_many_dots_and_letters(run, tmp_path, name):
    """A branch for every dot took a minute and then the stack."""
    path = artifact(tmp_path / "a.bcap", name)
    for command in ("inspect", "ledger", "check"):
        code, out, err = run(command, path)
        assert code == 0, err
        assert len(out) < 20_000


@pytest.mark.slow
def test_work_of_a_tree_grows_with_its_names_alone(tmp_path, monkeypatch):
    from bytecap.report import tree
    from bytecap.report.summary import of_artifact

    units = [unit(f"{i}." + "a." * 40 + "b") for i in range(500)]
    (tmp_path / "a.bcap").write_bytes(made((1, index(units)), *[(3, VECTOR)] * 500))
    added = []
    monkeypatch.setattr(tree._Sum, "add", lambda _, line: added.append(line))
    tree.print_survey(of_artifact(tmp_path / "a.bcap"), "a")
    assert len(added) <= 500 * (tree._DEEPEST + 1)


# ----------------------------------------------------------------------------------------------------- pipes, devices


@POSIX
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("command", ["check", "ledger", "unpack", "inspect"])
def test_what_is_no_file(refused, tmp_path, command, kind):
    path = tmp_path / "a.bcap"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as s:
            os.chdir(tmp_path)  # names of sockets are short
            s.bind("a.bcap")
    more = ["-o", tmp_path / "out"] if command == "unpack" else []
    line = refused(command, path, *more)
    assert str(path) in line
    assert "a device, a pipe or a socket" in line or kind == "socket"


@POSIX
def test_texts_and_code_that_have_no_end(refused, job, fitted, tmp_path):
    (tmp_path / "t").symlink_to("/dev/zero")
    line = refused("eval", fitted("rotary")[1], "--text", tmp_path / "t")
    assert f"the text {tmp_path / 't'}: it is a device" in line
    os.mkfifo(tmp_path / "code.py")
    assert "a device, a pipe or a socket" in refused(*job(), "--code", tmp_path / "code.py")


# --------------------------------------------------------------------------------------------------------- data loss


def inputs_of(texts, tmp_path):
    own = {n: tmp_path / f"own-{n}.txt" for n in ("calib", "val")}
    for n, path in own.items():
        path.write_bytes(texts[n].read_bytes())
    return own


@pytest.mark.parametrize("option", ["-o", "--report", "--store"])
@pytest.mark.parametrize("what", ["weights", "config", "tokenizer", "calib", "eval", "code"])
def test_an_output_that_is_an_input(run, copied, texts, tmp_path, option, what):
    own = inputs_of(texts, tmp_path)
    script = tmp_path / "train.py"
    script.write_text("x = 1\n", "utf-8")
    named = {"weights": next(copied.glob("*.safetensors")), "config": copied / "config.json", "code": script,
             "tokenizer": copied / "tokenizer.json", "calib": own["calib"], "eval": own["val"]}[what]  # fmt: skip
    before = named.read_bytes()
    outputs = {"-o": tmp_path / "out.bcap"} | {option: named}
    words = [w for pair in outputs.items() for w in pair]
    code, out, err = run("fit", copied, "--budget", 21_000, "--calib", own["calib"], "--eval", own["val"],
                         "--code", script, *words, "--json")  # fmt: skip
    assert (code, out) == (2, "")
    assert f"{option} names {named}, which is" in err
    assert "it would be replaced" in err
    assert named.read_bytes() == before
    assert not (tmp_path / "out.bcap").exists()


@pytest.mark.parametrize(("option", "template", "said"), [
    ("--report", "r-{budget}.html", "--report .30kB. names"), ("-o", "o-{budget}.bcap", "-o .30kB. names"),
    ("--report", "{budget}/../r.html", "--report .25kB. and --report .30kB. both name"),
    ("-o", "{budget}/../o.bcap", "-o .25kB. and -o .30kB. both name"),
    ("--emit", "t-{budget}.txt", "--emit .30kB. names"), ("--emit", "t.txt", "2 budgets need names of their own"),
    ("--report", "r.html", "2 budgets need names of their own"),
])  # fmt: skip
def test_outputs_of_several_budgets(refused, copied, texts, tmp_path, option, template, said):
    """Those of the second budget count as those of the first do."""
    for budget in ("25kB", "30kB"):
        (tmp_path / budget).mkdir()
    victim = tmp_path / template.replace("{budget}", "30kB")
    victim.write_bytes(texts["calib"].read_bytes())
    words = {"-o": tmp_path / "out-{budget}.gguf", option: tmp_path / template}
    line = refused(
        "fit", copied, "--budget", "25kB,30kB", "--calib", victim, "--eval", texts["val"],
        *[w for pair in words.items() for w in pair],
    )  # fmt: skip
    assert re.search(said, line)
    assert victim.read_bytes() == texts["calib"].read_bytes()


@POSIX
@pytest.mark.parametrize("way", ["link", "hard link", "dots", "same"])
def test_files_under_other_names(tmp_path, way):
    (tmp_path / "in").write_bytes(b"x")
    other = tmp_path / "other"
    if way == "link":
        other.symlink_to(tmp_path / "in")
    elif way == "hard link":
        other.hardlink_to(tmp_path / "in")
    else:
        other = tmp_path / "none" / ".." / "in" if way == "dots" else tmp_path / "in"
    with pytest.raises(OutputError, match=r"-o names .* which is the text: it would be replaced"):
        refuse_collisions({"-o": other}, {"the text": [tmp_path / "in"]})
    with pytest.raises(OutputError, match="-o and --report both name"):
        refuse_collisions({"-o": tmp_path / "in", "--report": other}, {})


@pytest.mark.parametrize("pair", [("-o", "--report"), ("-o", "--store"), ("--report", "--store")])
def test_outputs_that_are_one_another(run, job, tmp_path, pair):
    outputs = {"-o": tmp_path / "o.bcap", "--report": tmp_path / "r.html", "--store": tmp_path / "s"}
    outputs[pair[1]] = outputs[pair[0]]
    words = job(output=outputs["-o"])
    code, _, err = run(*words, "--report", outputs["--report"], "--store", outputs["--store"])
    assert code == 2
    assert f"{pair[0]} and {pair[1]} both name {outputs[pair[0]]}" in err
    assert not list(tmp_path.glob("[ors]*"))


def test_python_refuses_them_too(copied, texts):
    with pytest.raises(OutputError, match="-o names"):
        bytecap.fit(copied, 21_000, calibration=texts["calib"], evaluation=texts["val"], output=copied / "config.json")
    with pytest.raises(OutputError, match="-o names"):
        bytecap.tie(copied, 1, copied)
    with pytest.raises(OutputError, match="-o names"):
        bytecap.fit(copied, 21_000, recover="1", recover_text=texts["val"], output=texts["val"])


@pytest.mark.slow
def test_other_commands(refused, copied, texts, tmp_path, fitted):
    text = tmp_path / "t.txt"
    text.write_bytes(texts["val"].read_bytes())
    where = tmp_path / "d"
    for command in ("compare", "curves", "thesis"):
        more = ["--budget", "21000"] if command != "compare" else []
        assert "--report names" in refused(command, copied, "-o", where, "--report", text, "--calib", text, *more)
    lines = tmp_path / "compare.json"
    lines.write_text("{}", "utf-8")
    assert "compare.json of -o names" in refused("compare", "--from", lines, "-o", tmp_path)
    assert "thesis.html of -o names" in refused("thesis", "--from", tmp_path / "thesis.html", "-o", tmp_path)
    assert lines.read_text("utf-8") == "{}"
    path = tmp_path / "out" / "config.json"  # an artifact under the name of a file that is inside it
    path.parent.mkdir()
    path.write_bytes(fitted("rotary")[1].read_bytes())
    assert "config.json names" in refused("unpack", path, "-o", tmp_path / "out")
    assert container.read(path)
    script = tmp_path / "out" / "train_gpt.py"
    script.write_text("from bytecap import load\n", "utf-8")
    assert "train_gpt.py names" in refused("golf", "export", path, "--script", script, "-o", tmp_path / "out")
    assert script.read_text("utf-8") == "from bytecap import load\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "recode", "choose", "web"])
def test_the_file_of_a_method_is_an_input(refused, copied, texts, tmp_path, command):
    script, gguf = tmp_path / "method.py", tmp_path / "model.gguf"
    script.write_text("raise SystemExit(3)\n", "utf-8")
    gguf.write_bytes(b"GGUF")
    first, said = {
        "fit": (("fit", copied), f"-o names {script}, which is --method: it would be replaced"),
        "choose": (("choose", copied, copied), f"-o names {script}, which is --method: it would be replaced"),
        "recode": (("recode", gguf), "the option method is not for the format gguf"),
        "web": (("export", "web", copied), "the option method is not for the format gguf"),
    }[command]
    output = tmp_path / "site" if command == "web" else script
    line = refused(*first, "--budget", "25kB", "--eval", texts["val"], "-o", output, "--method", f"{script}:run")
    assert said in line
    assert script.read_text("utf-8").startswith("raise")


def test_a_card_does_not_replace_the_one_of_its_source(run, copied, fitted):
    (copied / "README.md").write_text("# Of the source\n", "utf-8")
    path = fitted("rotary")[1]
    code, _, err = run("card", path, "--source", copied, "-o", copied / "README.md")
    assert code == 2
    assert f"-o names {copied / 'README.md'}, which is --source: it would be replaced" in " ".join(err.split())
    assert (copied / "README.md").read_text("utf-8") == "# Of the source\n"
