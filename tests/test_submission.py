"""`bytecap golf`: packed scripts, the vendored decoder, recounts from outside."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch

import bytecap
import golden_parts
import make_goldens
from bytecap.format import container
from bytecap.pipeline.minify import parse
from bytecap.reference.overlays import OVERLAYS
from bytecap.reference.stack import CODERS
from bytecap_lab.submission import check, export, pack, vendor

DIRECTORY = golden_parts.DIRECTORY
EXPECTED = json.loads((DIRECTORY / "expected.json").read_text())
ALL = frozenset(CODERS) | frozenset(OVERLAYS) | {vendor.OBJECTS}

SCRIPT = '''"""Evaluates a model."""
import hashlib
import inspect
import sys

import numpy as np
from bytecap import load
from helper_mod import scale


class Model:
    def loss(self, values):
        """A figure."""
        return sum(float(np.abs(v).sum()) for v in values.values()) * scale(1)


DIGEST


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for path in sys.argv[1:]:
            try:
                print(digest(load(path)))
            except Exception:
                print("refused")
    else:
        assert "def loss" in inspect.getsource(Model.loss)
        assert "return 2*x" in inspect.getsource(scale)
        print(f"val_loss:1.0 val_bpb:{Model().loss(load('model.bcap')):.6f}")
'''.replace("DIGEST", inspect.getsource(make_goldens.digest))


def model(seed=1):
    """A small file of the coders that the default method uses."""
    rng = np.random.default_rng(seed)
    return golden_parts.pack(
        golden_parts.unit("blocks.0.weight", (40, 33), 9, golden_parts.trellis((40, 33), seed=seed), linear=True),
        golden_parts.unit("norm", (33,), 2, golden_parts.vector(rng.standard_normal(33)), aliases=("tied",)),
    )


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mine" / "train_gpt.py"
    path.parent.mkdir()
    path.write_text(SCRIPT, "utf-8")
    (path.parent / "helper_mod.py").write_text(
        'def scale(x: int) -> int:\n    """Twice."""\n    return 2 * x\n', "utf-8"
    )
    return path


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.bcap"
    path.write_bytes(model())
    return path


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Function: a module path with nothing on it but some libraries."""

    def only(*modules):
        directory = tmp_path_factory.mktemp("libraries")
        for module in modules:
            place = Path(module.__file__)
            site = place.parent.parent if place.name == "__init__.py" else place.parent
            for found in site.glob(f"*{module.__name__}*"):
                (directory / found.name).symlink_to(found)
        return directory

    return only


def isolated(directory, path, *arguments):
    """Output of a directory's script without site-packages, user settings or the caller's module path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-S", "-s", "-W", "error", "train_gpt.py", *map(str, arguments)], cwd=directory,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


class TestDecoder:
    @pytest.mark.slow
    def test_size(self):
        """At most 6 KB packed, as text inside the script, for what the default method makes."""
        sources = {"a.py": b"from bytecap import load"}
        packed = pack.pack(sources, vendored=True, used=vendor.DEFAULT)
        fewer = pack.pack(sources, vendored=True)
        assert fewer.decoder <= 6000
        assert fewer.decoder < packed.decoder < pack.pack(sources, vendored=True, used=ALL).decoder

    def test_it_is_made_of_the_reference_alone(self):
        text = vendor.decoder(ALL)
        assert set(pack.imports(parse(text.encode(), "decoder")[1])) - set(sys.stdlib_module_names) == {
            "numpy",
            "brotli",
        }
        assert "brotli" not in vendor.decoder(vendor.DEFAULT)
        assert "bytecap" not in text

    def test_coders_of_stacks_are_seen(self):
        def used(name):
            return vendor.tags(container.read(DIRECTORY / f"{name}.bcap"))

        assert used("trellis") == {9}
        assert used("long_trellis") == {9, 15}
        assert used("long_trellis_stack") == {5, 15, 34}
        assert used("tied") == {1, 2}
        assert used("layer_lowrank") >= {5, 35}

    @pytest.mark.slow
    @pytest.mark.parametrize("used", [vendor.DEFAULT, ALL], ids=["default", "all"])
    def test_goldens_alone_with_numpy(self, script, tmp_path, libraries, used):
        sources = pack.gather(script)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "train_gpt.py").write_bytes(pack.pack(sources, vendored=True, used=used).data)
        path = libraries(np, brotli) if used == ALL else libraries(np)
        known = {n: vendor.tags(container.read(DIRECTORY / n)) <= used for n in EXPECTED["valid"]}
        assert all(known.values()) == (used == ALL)
        assert sum(known.values()) > 12
        said = isolated(tmp_path / "out", path, *(DIRECTORY / n for n in known))
        assert said == [EXPECTED["valid"][n] if known[n] else "refused" for n in known]
        bad = isolated(tmp_path / "out", path, *(DIRECTORY / n for n in EXPECTED["invalid"]))
        assert bad == ["refused"] * len(EXPECTED["invalid"])


class TestExport:
    @pytest.mark.slow
    def test_vendored_alone_with_numpy(self, file, script, tmp_path, libraries):
        found = export.export(file, tmp_path / "out", script)
        sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
        assert sizes == found["files"]
        assert sum(sizes.values()) == found["total_bytes"] == found["cap_bytes"] - found["slack_bytes"]
        assert found["modules"] == ["train_gpt", "helper_mod"]
        (said,) = [s for s in isolated(tmp_path / "out", libraries(np)) if "bpb" in s]
        expected = 2 * sum(float(np.abs(v).sum()) for v in bytecap.load(file).values())
        assert said == f"val_bpb:{expected:.6f}"
        digests = isolated(tmp_path / "out", libraries(np), file)
        assert digests == [make_goldens.digest(bytecap.load(file))]

    @pytest.mark.slow
    def test_library(self, file, script, tmp_path):
        found = export.export(file, tmp_path / "out", script, vendored=False)
        assert found["decoder_bytes"] == 0
        text = (tmp_path / "out" / "train_gpt.py").read_text("ascii")
        assert "from bytecap import load" in pack.unpacked(text)["__main__"]
        ran = check.evaluate(tmp_path / "out", "python train_gpt.py")
        assert ran["bpb"] == pytest.approx(2 * sum(np.abs(v).sum() for v in bytecap.load(file).values()), rel=1e-5)

    def test_the_packed_sources_can_be_read_back(self, script):
        for vendored in (True, False):
            found = pack.unpacked(pack.pack(pack.gather(script), vendored=vendored).data.decode("ascii"))
            assert list(found) == ["__main__", "helper_mod", *([pack.DECODER] if vendored else [])]
            source = pack.DECODER if vendored else "bytecap"
            assert f"from {source} import load" in found["__main__"]
        assert pack.unpacked(SCRIPT) == {}

    def test_the_budget_leaves_nothing(self, file, script, tmp_path, run):
        size = file.stat().st_size
        code, out, _ = run("golf", "budget", "--script", script, "--cap", "20000", "--like", file)
        assert code == 0
        cap = 20_000 - int(out) + size
        arguments = ("golf", "export", file, "--script", script, "-o", tmp_path / "out", "--json")
        assert json.loads(run(*arguments, "--cap", cap)[1])["slack_bytes"] == 0
        code, out, err = run(*arguments, "--cap", cap - 1)
        assert code == 2
        assert f"fit again with --budget {size - 1}" in err

    @pytest.mark.slow
    def test_the_like_of_an_artifact(self, script, file):
        tied = export.budget(script, like=DIRECTORY / "layer_lowrank.bcap")
        assert tied < export.budget(script) < export.budget(script, like=file) < export.budget(script, vendored=False)

    @pytest.mark.slow
    def test_the_budget_is_enough_for_a_model_with_buffers(self, script, tmp_path):
        module = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64))
        module.register_buffer("steps", torch.arange(5))
        ids = torch.randint(64, (16, 33), generator=torch.Generator().manual_seed(0))
        path, cap = tmp_path / "buffered.bcap", 9_000
        calibration = [ids[i : i + 4] for i in (0, 4, 8)]
        bytecap.fit(module, export.budget(script, cap=cap), calibration=calibration, output=path)
        assert export.export(path, tmp_path / "out", script, cap=cap)["total_bytes"] <= cap

    def test_code_of_the_artifact(self, script, tmp_path):
        from bytecap.pipeline import pack_code

        contents = container.parse(model())
        code = pack_code.pack([script.parent / "helper_mod.py", script])
        path = tmp_path / "with.bcap"
        container.write(container.Contents(contents.units, contents.tables, code.sections, {}), path)
        found = export.export(path, tmp_path / "out")
        assert found["modules"] == ["train_gpt", "helper_mod"]
        assert container.read(tmp_path / "out" / "model.bcap").files == ()
        assert check.evaluate(tmp_path / "out", "python train_gpt.py")["bpb"] > 0

    def test_the_table_adds_up(self, file, script, tmp_path, run):
        code, out, _ = run("golf", "export", file, "--script", script, "-o", tmp_path / "out")
        assert code == 0
        numbers = [int(line.split()[0].replace(",", "")) for line in out.splitlines()]
        assert numbers[0] + numbers[1] == numbers[2]
        assert numbers[2] + numbers[3] == export.CAP


class TestExportRefuses:
    def line(self, refused, file, path, tmp_path, *more):
        line = refused("golf", "export", file, "--script", path, "-o", tmp_path / "out", *more)
        assert not (tmp_path / "out" / "train_gpt.py").exists()
        return line

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("print(1)\n", "train_gpt.py never says `from bytecap import load`"),
            ("import bytecap\nbytecap.load(1)\n", "line 2: bytecap.load cannot be packed"),
            ("from bytecap import load\ndef\n", "line 2: does not parse"),
            ("import inner\nfrom bytecap import load", "line 1: imports the package inner beside it"),
        ],
    )
    def test_scripts(self, refused, file, script, tmp_path, source, said):
        (script.parent / "inner").mkdir()
        (script.parent / "inner" / "__init__.py").write_text("", "utf-8")
        script.write_text(source, "utf-8")
        assert said in self.line(refused, file, script, tmp_path)

    def test_no_script(self, refused, file, tmp_path):
        assert "holds the code (none)" in refused("golf", "export", file, "-o", tmp_path / "out")
        assert "cannot read the code file" in self.line(refused, file, tmp_path / "no.py", tmp_path)

    def test_other_files_in_the_directory(self, refused, file, script, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("x", "utf-8")
        assert "holds other files, which would count: notes.txt" in self.line(refused, file, script, tmp_path)

    def test_script_alone_over_the_cap(self, refused, script):
        assert "train_gpt.py alone has" in refused("golf", "budget", "--script", script, "--cap", "1000")


class TestCheck:
    @pytest.fixture
    def submission(self, file, script, tmp_path):
        export.export(file, tmp_path / "out", script)
        return tmp_path / "out"

    @pytest.fixture
    def plain(self, submission):
        """A submission whose script is not packed."""

        def write(source):
            (submission / "train_gpt.py").write_text(source, "utf-8")
            return submission

        return write

    @pytest.mark.slow
    def test_sound(self, submission, run):
        code, out, err = run("golf", "check", submission, "--eval", "python train_gpt.py")
        assert code == 0, err
        assert "left" in out
        assert "evaluation: " in out
        before = sorted(p.name for p in submission.rglob("*"))
        assert before == ["model.bcap", "train_gpt.py"], "nothing is written into it"

    @pytest.mark.slow
    def test_public_data_does_not_count(self, submission, run):
        (submission / "data").mkdir()
        (submission / "data" / "val.bin").write_bytes(bytes(1000))
        total = json.loads(run("golf", "check", submission, "--json")[1])["total_bytes"]
        command = "python -c \"print('bpb', len(open('data/val.bin','rb').read()))\""
        code, out, _ = run("golf", "check", submission, "--data", "data/val.bin", "--eval", command, "--json")
        assert code == 0
        found = json.loads(out)
        assert found["total_bytes"] == total - 1000
        assert found["bpb"] == 1000

    @pytest.mark.slow
    def test_modules_beside_it_count(self, plain):
        root = plain("import extra\ntry:\n    import no_such_thing\nexcept ImportError:\n    pass\n")
        (root / "extra.py").write_text("x = 1\n", "utf-8")
        assert check.check(root)["files"]["extra.py"] == 6

    @pytest.mark.slow
    def test_over_the_cap(self, submission, refused):
        total = check.check(submission)["total_bytes"]
        line = refused("golf", "check", submission, "--cap", total - 1)
        assert f"has {total:,} bytes, 1 over the cap of {total - 1:,}" in line

    @pytest.mark.slow
    def test_units_of_the_cap_are_told_apart(self, submission, run):
        assert json.loads(run("golf", "check", submission, "--cap", "16MiB", "--json")[1])["cap_bytes"] == 16 * 2**20

    @pytest.mark.parametrize("name", ["train_gpt.py", "model.bcap"])
    def test_files_that_must_be_there(self, submission, refused, name):
        (submission / name).unlink()
        assert f"has no {'train_gpt.py' if 'py' in name else '.bcap file'}" in refused("golf", "check", submission)

    def test_no_directory(self, refused, tmp_path):
        assert "is no directory" in refused("golf", "check", tmp_path / "none")

    def test_a_damaged_model(self, submission, refused):
        data = bytearray((submission / "model.bcap").read_bytes())
        data[-9] ^= 1
        (submission / "model.bcap").write_bytes(data)
        assert "model.bcap is damaged: the checksum of section" in refused("golf", "check", submission)

    @pytest.mark.slow
    def test_an_absent_helper(self, plain, refused):
        root = plain("x = 1\n\ndef f():\n    import helper_here\n")
        line = refused("golf", "check", root)
        assert f"{root}/train_gpt.py, line 4: imports helper_here, which is neither in {root} nor installed" in line
        assert check.check(root, libraries=["helper_here"])

    @pytest.mark.slow
    def test_an_absent_helper_of_a_packed_script(self, submission, script, refused):
        packed = pack.pack({"train_gpt.py": script.read_bytes()}, vendored=True)
        (submission / "train_gpt.py").write_bytes(packed.data)
        assert "(__main__), line" in (line := refused("golf", "check", submission))
        assert "imports helper_mod" in line

    @pytest.mark.slow
    def test_a_helper_outside(self, plain, refused, tmp_path):
        root = plain("import helper_there\n")
        (tmp_path / "helper_there.py").write_text("", "utf-8")
        assert f"imports {tmp_path}/helper_there.py, which is outside and not counted" in refused("golf", "check", root)

    def test_a_link(self, submission, refused, tmp_path):
        (submission / "big.bin").symlink_to(tmp_path / "some.bcap")
        assert "big.bin is a link" in refused("golf", "check", submission)

    def test_code_is_no_public_data(self, submission, refused):
        (submission / "helper.py").write_text("", "utf-8")
        assert "helper.py is no public data" in refused("golf", "check", submission, "--data", "helper.py")
        assert "has no file x.bin" in refused("golf", "check", submission, "--data", "x.bin")

    @pytest.mark.slow
    def test_a_script_that_does_not_parse(self, plain, refused):
        assert "train_gpt.py, line 1: does not parse" in refused("golf", "check", plain("def"))

    @pytest.mark.slow
    @pytest.mark.parametrize("cut", [400, 1001])
    def test_a_damaged_script(self, submission, refused, cut):
        text = (submission / "train_gpt.py").read_text("ascii")
        (submission / "train_gpt.py").write_text(text[:cut] + text[cut + 50 :], "ascii")
        assert "the packed script is damaged" in refused("golf", "check", submission)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ("python -c 'import sys; sys.exit(\"no data here\")'", "failed with exit code 1: no data here"),
            ("python -c 'print(3)'", "printed no figure"), ("no-such-program", "cannot run no-such-program"),
            ("python -c 'unclosed", "cannot read the command"), ("''", "cannot run"), ("", "is empty"),
            ("python -c 'import time; time.sleep(60)'", "was ended after 0.5 seconds"),
        ],
    )  # fmt: skip
    def test_evaluations(self, submission, refused, command, said):
        seconds = "0.5" if "sleep" in command else "60"
        assert said in refused("golf", "check", submission, "--eval", command, "--seconds", seconds)

    @pytest.mark.slow
    def test_the_evaluation_sees_no_other_modules(self, submission, tmp_path, monkeypatch, refused):
        (tmp_path / "leaked.py").write_text("", "utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        line = refused("golf", "check", submission, "--eval", "python -c 'import leaked'")
        assert "No module named 'leaked'" in line
