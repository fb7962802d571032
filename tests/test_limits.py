"""Disks that are full or read-only and memory that does not suffice: one line, exit code 2, nothing left behind."""

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from bytecap.cli import app
from bytecap.errors import OutputError
from bytecap.format.decoder import load
from bytecap.pipeline import fit_directory
from bytecap.report.lines import append, read_lines
from bytecap.runtimes.gguf import file as gguf_file
from bytecap.system import allocator
from conftest import BUDGET, FAST
from forks import child
from synthetic import comparison_lines
from test_thesis import lines as thesis_lines

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
LIBC = ctypes.CDLL(None, use_errno=True)


def mount(source, target, kind, flags, options=None):
    """Mount in a namespace of the calling process alone."""
    spelled = [None if x is None else str(x).encode() for x in (source, target, kind, options)]
    if LIBC.mount(spelled[0], spelled[1], spelled[2], ctypes.c_ulong(flags), spelled[3]):
        raise OSError(ctypes.get_errno(), "mount")


def own_mounts():
    """Leave the mounts of everybody else alone."""
    if LIBC.unshare(CLONE_NEWNS | (CLONE_NEWUSER if os.geteuid() else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    mount(None, "/", None, MS_REC | MS_PRIVATE)


@pytest.fixture(scope="module")
def mounts(tmp_path_factory):
    """Skips where nobody may mount."""
    directory = tmp_path_factory.mktemp("mount")

    def work():
        own_mounts()
        mount("none", directory, "tmpfs", 0, "size=64k")

    if not sys.platform.startswith("linux") or child(work, directory / "log"):
        pytest.skip("no mount namespaces here")


@pytest.fixture
def limited(tmp_path_factory):
    """Function: (exit code, what was printed) of a command line run behind `limit()` in a fork of its own."""

    def call(limit, arguments):
        def work():
            limit()
            sys.argv = ["bytecap", *map(str, arguments), "--json"]
            app.main()

        printed = tmp_path_factory.mktemp("printed") / "text"
        return child(work, printed), printed.read_text("utf-8")

    return call


@pytest.fixture
def stopped(limited):
    """Function: the one line such a command line stops with."""

    def call(limit, arguments):
        code, text = limited(limit, arguments)
        assert code == 2, text
        assert text.startswith("error: "), text
        assert text.count("\n") == 1
        return text

    return call


@pytest.fixture
def slow(job, tmp_path):
    """Arguments of a fit by the default method with a store."""
    arguments = job()
    at = arguments.index(FAST[0])
    return [*arguments[:at], *arguments[at + 2 :], "--store", tmp_path / "store"]


def file_size(most):
    """Function: nothing larger than `most` bytes can be written."""

    def limit():
        sys.dont_write_bytecode = True  # Python would keep the first `most` bytes of it, for everyone
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return limit


@pytest.fixture(scope="module")
def compiled(fitted):
    """Compiled loops are kept before disks are full: a fit, of whatever worker, has left them, and a file read here."""
    load(fitted("rotary")[1])


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
class TestDisk:
    @pytest.mark.slow
    def test_the_store_does_not_fit(self, stopped, slow, tmp_path):
        assert str(tmp_path / "store") in stopped(file_size(8192), slow)
        assert [p.name for p in tmp_path.rglob("*")] == ["store"]

    @pytest.mark.slow
    def test_later_entries_do_not_fit(self, stopped, slow, tmp_path):
        """Statistics are there, so the next run goes on from them."""
        assert str(tmp_path / "out.bcap") in stopped(file_size(BUDGET // 2), [*slow[:-2]])
        assert not list(tmp_path.iterdir())

    def test_a_small_disk_is_full(self, stopped, slow, tmp_path, mounts):  # noqa: ARG002
        def limit():
            own_mounts()
            (tmp_path / "store").mkdir()
            mount("none", tmp_path / "store", "tmpfs", 0, "size=64k")

        text = stopped(limit, slow)
        assert "No space left" in text
        assert str(tmp_path / "store") in text
        assert [p.name for p in tmp_path.rglob("*")] == ["store"]

    def test_a_small_disk_is_full_before_the_file_is_written(self, stopped, job, tmp_path, mounts):  # noqa: ARG002
        disk = tmp_path / "disk"
        disk.mkdir()

        def limit():
            own_mounts()
            mount("none", disk, "tmpfs", 0, "size=8k")

        assert "No space left" in stopped(limit, job(output=disk / "out.bcap"))

    @pytest.mark.parametrize("what", ["output", "store"])
    def test_a_read_only_directory(self, stopped, slow, tmp_path, mounts, what):  # noqa: ARG002
        closed = tmp_path / "closed"
        closed.mkdir()

        def limit():
            own_mounts()
            mount(closed, closed, None, MS_BIND)
            mount(None, closed, None, MS_REMOUNT | MS_BIND | MS_RDONLY)

        at = slow.index("-o" if what == "output" else "--store") + 1
        arguments = [*slow[:at], closed / "out.bcap" if what == "output" else closed, *slow[at + 1 :]]
        assert "not writable" in stopped(limit, arguments)
        assert not list(closed.iterdir())

    def test_a_store_that_is_a_file(self, refused, slow, tmp_path):
        (tmp_path / "store").write_bytes(b"mine")
        assert str(tmp_path / "store") in refused(*slow)
        assert (tmp_path / "store").read_bytes() == b"mine"

    def test_a_store_for_code_of_the_users(self, refused, tmp_path):
        (tmp_path / "m.py").write_text("def make(): raise SystemExit", "utf-8")
        arguments = ("fit", "--factory", f"{tmp_path / 'm.py'}:make", "--budget", "1MB", "-o", tmp_path / "out.bcap")
        assert "--store" in refused(*arguments, "--store", tmp_path / "store")


def late(module, name, most):
    """Function: nothing larger than `most` bytes can be written once a function of a module is called."""
    real = getattr(module, name)

    def limited_then(*args, **options):
        file_size(most)()
        return real(*args, **options)

    return lambda: setattr(module, name, limited_then)


def left(directory):
    """Contents of all files in a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
class TestWriters:
    """Whatever is written, a full disk is one line that names it, and leaves what was there and nothing else."""

    @pytest.fixture
    def full(self, limited, tmp_path):
        """Function: checks a command whose output, at `place`, meets a full disk after so many bytes."""

        def call(most, place, *arguments, kept=()):
            before = left(tmp_path)
            code, text = limited(file_size(most) if isinstance(most, int) else most, arguments)
            lines = [line for line in text.splitlines() if line.startswith("error: ")]
            assert code == 2, text
            assert len(lines) == 1, text
            assert str(place) in lines[0]
            assert "File too large" in lines[0]
            after = left(tmp_path)
            assert {n: v for n, v in after.items() if n not in kept} == before
            return lines[0]

        return call

    @pytest.mark.parametrize("old", [False, True])
    def test_unpack(self, full, fitted, tmp_path, old):
        if old:
            (tmp_path / "out").mkdir()
            for name in ("model.safetensors", "config.json", "mine"):
                (tmp_path / "out" / name).write_bytes(b"old")
        line = full(4096, tmp_path / "out", "unpack", fitted("rotary")[1], "-o", tmp_path / "out")
        assert "model.safetensors" in line
        assert (tmp_path / "out").exists() == old

    def test_a_page(self, full, job, tmp_path):
        kept = {"out.bcap"}
        full(2 * BUDGET, tmp_path / "r.html", *job(), "--report", tmp_path / "r.html", kept=kept)

    @pytest.mark.usefixtures("block_code")
    @pytest.mark.parametrize(("form", "more"), [("mlx", ()), ("compressed-tensors", ()), ("mlx", ("--memory", "1MB"))])
    def test_directories(self, full, other, tmp_path, form, more):
        out = tmp_path / "out"
        full(late(fit_directory, "write_directory", 1 << 14), out, *other, "-o", out, "--format", form, *more)

    def test_gguf(self, full, other, tmp_path):
        pytest.importorskip("gguf")
        full(late(gguf_file, "write", 1 << 15), "out.gguf", *other, "-o", tmp_path / "out.gguf")

    @pytest.fixture
    def other(self, model_directory, texts):
        """Arguments of a fit for another program."""
        given = ("--calib", texts["calib"], "--eval", texts["val"], "--tokens", 512, "--eval-tokens", 256)
        return ("fit", model_directory("rotary"), "--budget", "14bpp", *given)

    def test_an_importance_matrix(self, full, model_directory, texts, tmp_path):
        pytest.importorskip("gguf")
        words = ("imatrix", model_directory("rotary"), "-o", tmp_path / "i.gguf", "--calib", texts["calib"])
        full(1024, ".gguf", *words, "--tokens", 256)

    def test_a_submission(self, full, fitted, tmp_path):
        script = tmp_path / "in.py"
        script.write_text("from bytecap import load\nprint(load('model.bcap'))\n", "utf-8")
        full(4096, tmp_path / "out", "golf", "export", fitted("rotary")[1], "--script", script, "-o", tmp_path / "out")

    @pytest.mark.parametrize("kind", ["thesis", "compare"])
    def test_figures(self, full, tmp_path, kind):
        lines = tmp_path / "lines.jsonl"
        if kind == "compare":
            comparison_lines(lines)
        else:
            lines.write_text("".join(json.dumps(r) + "\n" for r in thesis_lines()), "utf-8")
        full(1024, tmp_path / "out", kind, "--from", lines, "-o", tmp_path / "out")

    def test_lines_that_are_appended(self, tmp_path):
        """Old entries are whole, and torn ones count as absent."""
        path = tmp_path / "lines.jsonl"
        append(path, [{"record": "a", "x": "y" * 1000}])
        whole = path.read_bytes()

        def work():
            file_size(len(whole) + 40)()
            try:
                append(path, [{"record": "b", "x": "y" * 100}])
            except OutputError as exc:
                sys.stdout.write(str(exc))
                raise SystemExit(3) from exc

        assert child(work, tmp_path / "printed") == 3
        assert f"cannot write {path}: File too large" in (tmp_path / "printed").read_text("utf-8")
        assert [r["record"] for r in read_lines(path)] == ["a"]
        append(path, [{"record": "c"}])
        assert [r["record"] for r in read_lines(path)] == ["a", "c"]


def data(megabytes):
    """Function: a process may have so much memory of its own (mapped libraries do not count)."""

    def limit():
        most = int(megabytes * 1e6)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    return limit


_FRESH = """
import resource, sys
kind, most, more, *sys.argv = sys.argv[1:]
if more == "more":  # than what the process has with everything imported
    import torch, transformers.models.llama
    import bytecap.pipeline.fit, bytecap.format.entropy.kernels, bytecap.methods.bytecap
    with open("/proc/self/status", encoding="ascii") as f:
        name = {"RLIMIT_DATA": "VmData", "RLIMIT_AS": "VmSize"}[kind]
        most = int(most) + next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024
resource.setrlimit(getattr(resource, kind), (int(most), int(most)))
import bytecap.cli.app
bytecap.cli.app.main()
"""


def fresh(arguments, kind, most, more="less"):
    """(exit code, what was printed) of a command line in a limited process that inherits nobody's memory."""
    words = [sys.executable, "-c", _FRESH, kind, str(most), more, "bytecap", *map(str, arguments), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
class TestMemory:
    @pytest.mark.nightly
    def test_within_the_stated_bound(self, limited, slow, tmp_path):
        parameters = sum(v.size for v in _fitted(limited, slow, tmp_path).values())
        code, text = fresh(slow, "RLIMIT_DATA", allocator.bound(parameters))
        assert code == 0, text

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
    def test_one_line_says_how_much_is_needed(self, slow, tmp_path, kind):
        code, text = fresh(slow[:-2], kind, 20_000_000, "more")
        if "700 MB" not in text:  # rarely a library that meets the limit first says it in words of its own
            code, text = fresh(slow[:-2], kind, 40_000_000, "more")
        assert code == 2, text
        assert text.startswith("error: "), text
        assert text.count("\n") == 1
        assert "700 MB" in text
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("exc", "is_one"),
        [
            (MemoryError(), True), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
            (RuntimeError("CUDA out of memory. Tried to allocate"), True), (RuntimeError("size mismatch"), False),
            (OSError("libx.so: failed to map segment: Cannot allocate memory"), True),
            (ValueError("out of memory"), False),
            (RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx`"), True),
            (RuntimeError("CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnSpotrf`"), False),
        ],
    )  # fmt: skip
    def test_what_counts_as_lack_of_memory(self, exc, is_one):
        assert allocator.is_shortage(exc) == is_one


def _fitted(limited, arguments, directory):
    code, text = limited(lambda: None, arguments)
    assert code == 0, text
    values = load(directory / "out.bcap")
    (directory / "out.bcap").unlink()
    shutil.rmtree(directory / "store")
    return values
