"""Code inside artifacts: packing, accounting, reading back."""

import json
import lzma
import random

import pytest

import bytecap
import golden_code
from bytecap.format import codefiles, container, ledger
from bytecap.format.container import CODE, Contents, FileSection
from bytecap.pipeline import pack_code
from conftest import BUDGET

pytestmark = pytest.mark.coverage

SOURCE = '''"""A program."""
import sys


def main(first: int, *, second: str = "two") -> None:  # a comment
    """Say it."""
    print(first, second, __name__, sys.argv[1:])


if __name__ == "__main__":
    main(1)
'''


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_text(SOURCE, "utf-8")
    return path


class TestPacking:
    def test_python_comes_back_as_the_same_program(self, source, capsys):
        code = pack_code.pack([source])
        assert code.raw == len(SOURCE)
        assert code.packed < 0.6 * len(SOURCE)
        (section,) = code.sections
        text = codefiles.unpack(section.name, section.data).decode()
        assert "comment" not in text
        assert "second:str" in text, "annotations and names stay"
        exec(compile(text, "train_gpt.py", "exec"), {"__name__": "__main__"})  # noqa: S102 (the test's own program)
        assert capsys.readouterr().out.startswith("1 two __main__ ")

    def test_a_docstring_that_is_used_stays(self, tmp_path):
        path = tmp_path / "a.py"
        path.write_text('"""Usage."""\nprint(__doc__)\n', "utf-8")
        assert b"Usage." in codefiles.unpack("a.py", pack_code.pack([path]).sections[0].data)

    def test_other_files_come_back_byte_for_byte(self, tmp_path):
        path = tmp_path / "kernel.cu"
        path.write_bytes(b"int main() { return 0; } // kept\n" * 9)
        assert codefiles.unpack("kernel.cu", pack_code.pack([path]).sections[0].data) == path.read_bytes()

    @pytest.mark.parametrize("size", [0, 1, 5000])
    def test_any_bytes(self, size):
        content = random.Random(size).randbytes(size)  # noqa: S311
        packed = codefiles.squeeze(content)
        assert codefiles.unpack("a", packed) == content
        assert len(packed) <= size + 1

    @pytest.mark.parametrize(
        "data", [b"", b"\3abc", b"\2", b"\2abc", b"\1abc", codefiles.squeeze(b"print(1)" * 99)[:-1]],
    )  # fmt: skip
    def test_damage_is_refused(self, data):
        with pytest.raises(bytecap.CorruptError, match=r"a\.py"):
            codefiles.unpack("a.py", data)

    def test_a_bomb_is_refused(self):
        filters = codefiles._FILTERS
        bomb = b"\2" + lzma.compress(bytes(codefiles._LIMIT + 1), lzma.FORMAT_RAW, filters=filters)
        with pytest.raises(bytecap.CorruptError, match="more than"):
            codefiles.unpack("a.py", bomb)


class TestArtifact:
    def test_files_without_code_do_not_change(self):
        plain = Contents((), b"", (FileSection("config.json", b"\0{}"),), {})
        data = container.serialize(plain)
        assert data[9] == 0
        assert b'"code"' not in data

    def test_code_makes_it_1_2_and_is_owned(self):
        files = (FileSection("a.py", b"\0pass", CODE), FileSection("config.json", b"\0{}"))
        data = container.serialize(Contents((), b"", files, {}))
        assert data[8:10] == b"\1\2"
        contents = container.parse(data)
        assert [(f.name, f.kind) for f in contents.files] == [("config.json", 4), ("a.py", 5)]
        entries = container.ledger(contents)
        assert ledger.by_kind(entries)["code"] == 5
        assert ledger.total(entries) == len(data)
        assert container.serialize(contents) == data

    def test_every_packing_of_the_golden(self):
        data = dict(golden_code.valid())["code"]
        assert set(codefiles.files(container.parse(data)).values()) == {golden_code.SOURCE}


class TestFit:
    @pytest.fixture
    def packed(self, job, source, tmp_path, run):
        """Function: report of a fit with code."""

        def call(*more, budget=BUDGET):
            code, out, err = run(*job(budget=budget, output=tmp_path / "m.bcap"), "--code", source, *more, "--json")
            assert code == 0, err
            return json.loads(out)

        return call

    @pytest.mark.slow
    def test_packed(self, packed, tmp_path, run):
        found = packed()
        data = (tmp_path / "m.bcap").read_bytes()
        assert data[9] == 2
        assert found["code_files"] == ["train_gpt.py"]
        assert found["code_raw_bytes"] == len(SOURCE)
        entries = container.ledger(container.parse(data))
        assert ledger.by_kind(entries)["code"] == found["code_packed_bytes"] < len(SOURCE)
        assert found["budget_bytes"] == BUDGET
        assert len(data) + found["slack_bytes"] == BUDGET
        assert run("unpack", tmp_path / "m.bcap", "-o", tmp_path / "out")[0] == 0
        assert "def main(" in (tmp_path / "out" / "train_gpt.py").read_text("utf-8")
        assert (tmp_path / "out" / "config.json").is_file()

    @pytest.mark.slow
    def test_raw(self, packed, tmp_path):
        found = packed("--code-accounting", "raw")
        size = (tmp_path / "m.bcap").stat().st_size
        counted = size - found["code_packed_bytes"] + found["code_raw_bytes"]
        assert 0 <= BUDGET - counted == found["slack_bytes"]
        assert found["budget_bytes"] == BUDGET

    @pytest.mark.slow
    def test_slack(self, model_directory, texts, source):
        result = bytecap.fit(
            model_directory("rotary"), 24_000, calibration=texts["calib"], evaluation=texts["val"],
            code=pack_code.pack([source], "raw"), tokens=2000, evaluation_tokens=1000, window=128,
        )  # fmt: skip
        assert 0 <= result.report["slack_bytes"] <= 64

    @pytest.mark.nightly
    def test_slack_of_the_embedded_model(self, source):
        result = bytecap.fit("demo", 600_000, code=[source], tokens=4096, evaluation_tokens=1024)
        assert 0 <= 600_000 - len(result.data) <= 64

    @pytest.mark.slow
    def test_both_counts_are_printed(self, job, source, run):
        code, out, err = run(*job(), "--code", source)
        assert code == 0, err
        text = " ".join(out.split())
        assert f"bytes packed, {len(SOURCE):,} raw; the cap is met packed" in text


class TestRefused:
    def line(self, refused, job, path, *more, budget=BUDGET):
        return refused(*job(budget=budget), "--code", path, *more)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"a = 1\ndef f(:\n", ", line 2: does not parse"), (b"a\n\n'\xff'\n", ", line 3: not UTF-8 (byte 0xff)"),
            (b"a\0", ", line 1: does not parse"), (b"(" * 5000 + b")" * 5000, ", line 1"),
        ],
    )  # fmt: skip
    def test_code_that_does_not_parse(self, refused, job, tmp_path, content, said):
        path = tmp_path / "bad.py"
        path.write_bytes(content)
        assert f"{path}{said}" in self.line(refused, job, path)

    def test_missing(self, refused, job, tmp_path):
        assert "cannot read the code file" in self.line(refused, job, tmp_path / "none.py")

    def test_same_name_twice(self, refused, job, source, tmp_path):
        (tmp_path / "b").mkdir()
        other = tmp_path / "b" / source.name
        other.write_text("1", "utf-8")
        assert "train_gpt.py is hidden or given twice" in self.line(refused, job, source, "--code", other)

    def test_accounting(self, refused, job, source):
        assert "unknown code accounting 'both'" in self.line(refused, job, source, "--code-accounting", "both")

    @pytest.mark.parametrize("accounting", codefiles.ACCOUNTING)
    def test_cap_below_code_and_floor_names_both(self, refused, job, tmp_path, accounting):
        path = tmp_path / "noise.dat"
        path.write_bytes(random.Random(1).randbytes(4000) + bytes(500))  # noqa: S311
        line = self.line(refused, job, path, "--code-accounting", accounting, budget=5000)
        code = 4500 if accounting == "raw" else pack_code.pack([path]).packed
        assert f"5,000 bytes is below code ({code:,} bytes, counted {accounting})" in line
        assert "plus the smallest file without it (" in line

    def test_without_the_library_it_says_so(self, refused, job, source, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "python_minifier", None)
        assert "pip install 'bytecap[golf]'" in self.line(refused, job, source)

    def test_unpacking_a_path_is_refused(self, refused, tmp_path):
        path = tmp_path / "bad.bcap"
        path.write_bytes(dict(golden_code.invalid())["code_name_slash"])
        assert "unsafe name 'a/b.py'" in refused("unpack", path, "-o", tmp_path / "out")
        assert not (tmp_path / "out").exists()
