"""Submissions made to cheat or to hurt who checks them: bytes in names, bombs of source, evaluations without end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import golden_parts
from bytecap.errors import BudgetError, CodeError
from bytecap_lab.submission import check
from bytecap_lab.submission import run as running

MODEL = golden_parts.DIRECTORY / "tiny.bcap"
POSIX = pytest.mark.skipif(os.name != "posix", reason="sessions and signals")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux alone")


@pytest.fixture
def submission(tmp_path):
    """Function: a directory with a model, a script of some source, and other files by name."""

    def make(source="print('bpb 1.25')\n", **others):
        root = tmp_path / "submission"
        root.mkdir(exist_ok=True)
        (root / "model.bcap").write_bytes(MODEL.read_bytes())
        (root / "train_gpt.py").write_text(source, "utf-8")
        for name, content in others.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root

    return make


def total(root):
    return check.check(root)["total_bytes"]


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.slow
def test_names_of_files_and_directories_count(submission):
    root = submission()
    plain = total(root)
    assert plain == len(MODEL.read_bytes()) + (root / "train_gpt.py").stat().st_size
    (root / ("d" * 200)).mkdir()
    (root / ("d" * 200) / ("e" * 100)).touch()
    (root / "é").mkdir()
    found = check.check(root)
    assert found["name_bytes"] == 200 + 100 + 2
    assert found["total_bytes"] == plain + 302
    assert found["slack_bytes"] == found["cap_bytes"] - found["total_bytes"]
    with pytest.raises(BudgetError, match="names 302"):
        check.check(root, cap=plain + 301)


@pytest.mark.slow
def test_names_are_shown(submission, run):
    root = submission()
    (root / "\x1b[2J[bold]").touch()
    code, out, _ = run("golf", "check", root)
    assert code == 0
    assert "\x1b" not in out
    assert "\\x1b[2J[bold]" in out
    assert "(names)" in out


@POSIX
def test_what_is_neither_file_nor_directory(submission):
    root = submission()
    os.mkfifo(root / "pipe")
    with pytest.raises(CodeError, match="pipe is neither a file nor a directory"):
        check.check(root)
    with pytest.raises(CodeError, match="pipe is neither"):
        running.evaluate(root, "python train_gpt.py")


def test_times_and_rights_carry_nothing(submission):
    """A byte in the time of a file, or in whether others may read it, would not be counted."""
    root = submission("import os\ns = os.stat('x')\nprint('bpb', int(s.st_mtime), oct(s.st_mode)[-3:])\n", x=b"")
    os.utime(root / "x", (123456789, 123456789))
    (root / "x").chmod(0o600)
    assert running.evaluate(root, "python train_gpt.py")["line"] == "bpb 0 755"


# ------------------------------------------------------------------------------------------------------------- source

DEEP = {
    "unary": "x = " + "-" * 100_000 + "1\n",
    "attributes": "x = a" + ".b" * 100_000 + "\n",
    "calls": "x = " + "f(" * 100_000 + ")" * 100_000 + "\n",
    "blocks": "".join(" " * i + "if x:\n" for i in range(2000)),
    "nul": "x = 1\0\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEEP)
def test_source_that_nests(submission, kind):
    with pytest.raises(CodeError, match=r"nested too deeply|does not parse|too much memory|ends the parser"):
        check.check(submission(DEEP[kind]))


def test_the_limit_on_memory_is_said(submission, monkeypatch, capsys):
    monkeypatch.setattr(check, "read_sources", lambda *_: (_ for _ in ()).throw(MemoryError))
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    check.answer(str(submission()), ["train_gpt.py"])
    assert "takes more than 4096 MiB to be parsed" in json.loads(capsys.readouterr().out)["error"]


# --------------------------------------------------------------------------------------------------------- evaluation


def test_output_without_end_is_read_and_not_kept(submission):
    source = "import sys\nfor _ in range(400):\n    sys.stdout.write('y' * 99_999 + '\\n')\nprint('bpb 1.5')\n"
    root = submission(source)
    assert running.evaluate(root, "python train_gpt.py")["bpb"] == 1.5
    end, into = os.pipe()
    with os.fdopen(end, "rb", buffering=0) as pipe:
        tail = running._Tail(pipe)
        tail.start()
        for _ in range(5 * running._KEPT >> 16):
            os.write(into, b"z" * (1 << 16))
        os.close(into)
        assert tail.text() == "z" * running._KEPT
    assert len(tail._kept) <= 2 * running._KEPT


def test_the_callers_secrets_stay_outside(submission, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    source = "import os\nprint('bpb 1', [k for k, v in os.environ.items() if 'secret' in v], os.environ['HOME'])\n"
    line = running.evaluate(submission(source), "python train_gpt.py")["line"]
    assert line.startswith("bpb 1 []")
    assert os.environ.get("HOME", "?") not in line.split()
    assert running.environment(MODEL)["LC_ALL"] == "C.UTF-8"


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"


ORPHAN = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open({path!r}, "w").write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
while not os.path.exists({path!r}) or not open({path!r}).read():
    time.sleep(0.01)
{then}
"""


@LINUX
@pytest.mark.parametrize(("then", "said"), [
    pytest.param("time.sleep(600)", "ended after 3 seconds", marks=pytest.mark.slow),
    ("print('bpb 2')", "2.0"), ("sys.exit(7)", "exit code 7"),
])  # fmt: skip
def test_grandchildren_end_with_the_evaluation(submission, tmp_path, then, said):
    """The orphan has a session of its own and holds the pipes: neither it nor the wait for it outlasts the run."""
    path = tmp_path / "orphan"
    root = submission(ORPHAN.format(path=str(path), then=then))
    try:
        found = running.evaluate(root, "python train_gpt.py", seconds=3 if "600" in then else 60)
    except CodeError as exc:
        found = {"bpb": str(exc)}
    assert said in str(found["bpb"])
    assert not alive(int(path.read_text("utf-8")))


@LINUX
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_evaluation_ends_with_who_asked_for_it(tmp_path, how):
    path, supervisor = tmp_path / "child", Path(running.__file__).with_name("supervisor.py")
    source = f"import os,time;open({str(path)!r},'w').write(str(os.getpid()));time.sleep(600)"
    bounds = ["600", str(tmp_path / "status"), str(1 << 34), str(1 << 34), "4096", str(tmp_path)]
    words = [sys.executable, "-I", str(supervisor), *bounds, sys.executable, "-c", source]
    between = [sys.executable, "-c", f"import subprocess;subprocess.run({words!r})"]
    start = words if how == signal.SIGTERM else between
    parent = subprocess.Popen(start)  # noqa: S603 (our own text)
    while not path.exists() or not path.read_text("utf-8"):
        time.sleep(0.02)
    parent.send_signal(how)
    parent.wait()
    while not (tmp_path / "status").exists():
        time.sleep(0.02)
    assert not alive(int(path.read_text("utf-8")))


@pytest.mark.parametrize(("command", "said"), [
    ("no-such-program", "cannot run no-such-program: No such file"), ("'", "cannot read the command"), ("", "is empty"),
    ("python -c \"import sys; sys.stderr.write('\\n\\n'); sys.exit(3)\"", "exit code 3: .no message."),
    ("python -c \"print('bpb none')\"", "no figure"),
    ("python -c \"import os; os.kill(os.getpid(), 9)\"", "exit code -9"),
])  # fmt: skip
@POSIX
def test_commands_that_fail(submission, command, said):
    with pytest.raises(CodeError, match=said):
        running.evaluate(submission(), command)


WAIT = "\nimport time; time.sleep(600)\n"
GREEDY = {
    "one process": ("memory", 200_000_000, "held = bytearray(1) * 400_000_000"),
    "many processes": (
        "memory", 200_000_000,
        "import os\nfor i in range(8):\n    if os.fork() == 0:\n        held = b'x' * 60_000_000\n        break",
    ),
    "one file": ("disk", 1_000_000, "open('f', 'wb').write(b'x' * 3_000_000)"),
    "many files": (
        "disk", 10_000_000,
        "import os\nfor i in range(40):\n    open(f'{os.environ[\"TMPDIR\"]}/{i}', 'wb').write(b'x' * 900_000)",
    ),
    "processes": ("processes", 24, "import os\nfor i in range(40):\n    if os.fork() == 0:\n        break"),
    "threads": (
        "processes", 24,
        "import threading, time\nfor i in range(40):\n    threading.Thread(target=time.sleep, args=(600,)).start()",
    ),
}  # fmt: skip


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("kind", GREEDY)
def test_what_an_evaluation_may_take(submission, kind):
    """It is ended by the watch over all it has started, or fails by the system's limit on one process."""
    bound, most, source = GREEDY[kind]
    root = submission(source + WAIT)
    with pytest.raises(CodeError) as caught:
        running.evaluate(root, "python train_gpt.py", seconds=120, **{bound: most})
    said = str(caught.value)
    ended = f"it took more than {most:,} " in said and f"(--{bound})" in said
    assert (
        ended or "MemoryError" in said or "File too large" in said or "start new thread" in said or "Errno 11" in said
    )
    assert ended or kind not in {"many processes", "many files"}
    root = submission(source.replace("600", "0") + "\nprint('bpb 1')\n")
    if not kind.startswith(("many p", "proc")):  # within the bounds nothing happens
        assert running.evaluate(root, "python train_gpt.py", seconds=120, **{bound: 50 * most})["bpb"] == 1


@POSIX
def test_the_systems_limits_are_set(submission):
    source = (
        "import resource as r\n"
        "found = [r.getrlimit(k)[0] for k in (r.RLIMIT_CORE, r.RLIMIT_FSIZE, r.RLIMIT_DATA)]\n"
        "print('bpb 1', found, r.getrlimit(r.RLIMIT_CPU))"
    )
    line = running.evaluate(submission(source), "python train_gpt.py", seconds=50, memory=1 << 32, disk=1 << 30)["line"]
    assert line.startswith(f"bpb 1 [0, {1 << 30}, {1 << 32}]")
    most = 50 * (os.cpu_count() or 1) + 60
    assert line.endswith(f"({most}, {most})")


@pytest.mark.slow
def test_bounds_are_options(submission, run):
    code, out, err = run("golf", "check", submission(), "--eval", "python train_gpt.py", "--memory", "3.5")
    assert code == 2
    assert "cannot read the size '3.5'" in err + out
    assert run(
        "golf", "check", submission(), "--eval", "python train_gpt.py", "--memory", "2GB", "--disk", "1GB",
        "--processes", "64",
    )[0] == 0  # fmt: skip
