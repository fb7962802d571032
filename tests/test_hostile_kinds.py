"""Files and directories of other kinds than `.bcap`, damaged, and names that are no files: one line each."""

import json
import os
import random
import shutil
import struct

import pytest

import bytecap
from bytecap.runtimes.gguf.file import ledger
from conftest import SMALL

pytestmark = pytest.mark.slow
POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes and links")


@pytest.fixture(scope="module")
def outputs(model_directory, texts, tmp_path_factory):
    """Function: path of a tiny model in a format, made once."""
    made, place = {}, tmp_path_factory.mktemp("outputs")

    def make(kind):
        if kind not in made:
            made[kind] = place / (f"{kind}.gguf" if kind == "gguf" else kind)
            how = {"layout": "hub", "method": "uniform"} if kind == "hub" else {"format": kind}
            if kind == "gguf":
                pytest.importorskip("gguf")
            options = {"calibration": texts["calib"], "evaluation": texts["val"], "output": made[kind], **SMALL}
            bytecap.fit(model_directory("rotary"), 60_000, **how, **options)
        return made[kind]

    return make


def damaged(data, count, seed=0):
    """Truncated and lengthened files, and files with other bytes and numbers in their head."""
    rnd = random.Random(seed)  # noqa: S311
    for size in (0, 3, 4, 24, 100, 1000, len(data) // 2, len(data) - 1):
        yield data[:size]
    yield data + bytes(100)
    for i in range(count):
        changed, at = bytearray(data), rnd.randrange(min(len(data) - 8, 20_000))
        number = rnd.choice((0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1))
        changed[at : at + 8 if i % 2 else at + 1] = struct.pack("<Q", number) if i % 2 else bytes([rnd.randrange(256)])
        yield bytes(changed)


class TestDamaged:
    def test_ledger_of_gguf_files(self, outputs, run, tmp_path):
        path, source = tmp_path / "x.gguf", outputs("gguf").read_bytes()
        assert sum(e.bytes for e in ledger(outputs("gguf"))) == len(source)
        for content in damaged(source, 60):
            path.write_bytes(content)
            code, _, err = run("ledger", path, "--json")
            assert code in {0, 2}, err
            assert (err.count("\n"), "unexpected" in err) == ((1, False) if code else (0, False)), err

    @pytest.mark.parametrize("command", ["recode", "fit", "eval"])
    def test_gguf_files_that_are_cut_off(self, outputs, refused, texts, tmp_path, command):
        pytest.importorskip("accelerate")
        path, source = tmp_path / "x.gguf", outputs("gguf").read_bytes()
        more = {
            "eval": ["--text", texts["val"], "--tokens", 200],
            "fit": ["--budget", "30kB", "-o", tmp_path / "a.bcap", "--calib", texts["calib"], "--eval", texts["val"]],
            "recode": ["--budget", "50kB", "-o", tmp_path / "y.gguf", "--allow-quantized", "--calib", texts["calib"],
                       "--eval", texts["val"]],
        }[command]  # fmt: skip
        for size in (0, 100, len(source) // 2, len(source) - 40):
            path.write_bytes(source[:size])
            assert str(path) in refused(command, path, *more)

    @pytest.mark.parametrize("kind", ["mlx", "compressed-tensors", "hub"])
    def test_directories(self, outputs, run, tmp_path, kind):
        source = outputs(kind)
        for path in sorted(p for p in source.iterdir() if p.is_file()):
            content = path.read_bytes()
            other = (b"", b"{}", b"[]", b"[" * 100_000, b"\xff", content[: len(content) // 2], content + b"x")
            more = list(damaged(content, 6, len(content)))[-6:] if len(content) > 100 else []
            for data in (*other, *more):
                shutil.rmtree(tmp_path / "w", ignore_errors=True)
                shutil.copytree(source, tmp_path / "w")
                (tmp_path / "w" / path.name).write_bytes(data)
                code, _, err = run("ledger", tmp_path / "w", "--json")
                assert code in {0, 2}, (path.name, data[:60], err)
                assert (err.count("\n"), "unexpected" in err) == ((1, False) if code else (0, False)), (path.name, err)

    @pytest.mark.parametrize(("kind", "key"), [("mlx", "quantization"), ("compressed-tensors", "quantization_config")])
    def test_what_directories_say_of_their_schemes(self, outputs, run, tmp_path, kind, key):
        shutil.copytree(outputs(kind), tmp_path / "w")
        path = tmp_path / "w" / "config.json"
        config = json.loads(path.read_text("utf-8"))
        for inner in (None, *config[key]):
            for value in (None, -1, 0, 10**18, "x", [], [1], {}, {"a": 1}, float("nan"), True):
                changed = {**config, key: value if inner is None else {**config[key], inner: value}}
                path.write_text(json.dumps(changed), "utf-8")
                code, _, err = run("ledger", tmp_path / "w", "--json")
                assert code in {0, 2}, (inner, value, err)
                assert (err.count("\n"), "unexpected" in err) == ((1, False) if code else (0, False)), (inner, err)


@POSIX
class TestNoFiles:
    @pytest.mark.parametrize("kind", ["pipe", "device"])
    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "model.bcap"])
    @pytest.mark.parametrize("layout", ["plain", "hub"])
    def test_in_directories(self, run, model_directory, outputs, tmp_path, texts, layout, name, kind):
        source = outputs("hub") if layout == "hub" else model_directory("rotary")
        if not (source / name).is_file():
            return
        place = shutil.copytree(source, tmp_path / "w")
        (place / name).unlink()
        if kind == "pipe":
            os.mkfifo(place / name)
        else:
            (place / name).symlink_to("/dev/zero")
        code, out, err = run("eval", place, "--text", texts["val"], "--tokens", 200, "--json")
        assert (code, out, err.count("\n"), "unexpected" in err) == (2, "", 1, False), err

    @pytest.mark.parametrize("kind", ["pipe", "device"])
    @pytest.mark.parametrize("command", [
        ("compare", "--from", "AT", "-o", "OUT"), ("thesis", "--from", "AT", "-o", "OUT"), ("recode", "AT.gguf",
        "--budget", "3kB", "-o", "OUT"), ("ledger", "AT.gguf"), ("eval", "AT.gguf"), ("inspect", "AT.gguf"),
        ("card", "AT"), ("card", "ARTIFACT", "--report", "AT"), ("eval", "ARTIFACT", "--base", "AT"),
    ])  # fmt: skip
    def test_on_the_command_line(self, run, fitted, tmp_path, command, kind):
        words = {"ARTIFACT": fitted("rotary")[1], "OUT": tmp_path / "out"}
        for name in ("odd", "odd.gguf"):
            if kind == "pipe":
                os.mkfifo(tmp_path / name)
            else:
                (tmp_path / name).symlink_to("/dev/zero")
        found = [words.get(c, str(tmp_path / c.replace("AT", "odd")) if c.startswith("AT") else c) for c in command]
        code, _, err = run(*found)
        assert (code, err.count("\n"), "unexpected" in err) == (2, 1, False), err
        assert "odd" in err
