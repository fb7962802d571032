"""The public face: names, imports without torch, errors, and a source tree that names no architecture."""

import ast
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bytecap
from bytecap import errors

SOURCE = Path(bytecap.__file__).parent
LAB = SOURCE.with_name("bytecap_lab")

BLOCKED = """
import sys

class Block:
    names = {"torch", "transformers", "tokenizers", "safetensors", "scipy", "constriction", "matplotlib"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""


def run_blocked(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(  # noqa: S603 (our own interpreter and code)
        [sys.executable, "-W", "error", "-c", BLOCKED + code, *map(str, arguments)], capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip


_ROOMS = ("quantization", "runtimes.blocks")
_PROGRAMS = (
    "model.decode_programs",
    "quantization.triton_search",
    *(f"{room}.{n}" for room in _ROOMS for n in ("cuda", "triton_programs")),
)
NEEDING_TRITON = () if importlib.util.find_spec("triton") else _PROGRAMS
NEEDING_LM_EVAL = () if importlib.util.find_spec("lm_eval") else ("runtimes.lm_eval",)


class TestNames:
    def test_all_is_sorted_and_complete(self):
        assert bytecap.__all__ == sorted(bytecap.__all__)
        assert len(set(bytecap.__all__)) == len(bytecap.__all__)

    @pytest.mark.parametrize("name", bytecap.__all__)
    def test_every_public_name_can_be_imported_and_is_documented(self, name):
        value = getattr(bytecap, name)
        assert value.__doc__

    def test_every_error_is_public_and_derives_from_one(self):
        found = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
        assert found <= set(bytecap.__all__)
        found.remove("BytecapWarning")
        assert all(issubclass(getattr(bytecap, n), bytecap.BytecapError) for n in found)
        assert issubclass(bytecap.BytecapWarning, UserWarning)

    def test_unknown_names_are_attribute_errors(self):
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = bytecap.no_such_name

    def test_artifact_is_what_fit_gives(self, fitted):
        assert isinstance(fitted("rotary", "uniform")[0], bytecap.Artifact)

    def test_every_module_has_a_docstring_and_every_one_imports(self):
        for info in pkgutil.walk_packages([str(SOURCE.parent)]):
            if not info.name.startswith("bytecap"):
                continue
            if not info.name.endswith(("__main__", *NEEDING_TRITON, *NEEDING_LM_EVAL)):
                assert __import__(info.name, fromlist=["x"]).__doc__, info.name


class TestWithoutTorch:
    @pytest.mark.slow
    def test_import_and_load(self, fitted):
        _, path = fitted("rotary")
        done = run_blocked(
            "import bytecap\nvalues = bytecap.load(sys.argv[1])\nprint(len(values), bytecap.parse_size('3MB'))", path
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["21", "3000000"]

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["bytecap", "golf", "uniform"])
    @pytest.mark.parametrize("command", ["check", "ledger"])
    def test_commands(self, fitted, command, method):
        _, path = fitted("rotary", method)
        done = run_blocked("sys.argv[0] = 'bytecap'\nfrom bytecap.cli.app import main\nmain()", command, path, "--json")
        assert done.returncode == 0, done.stderr
        assert '"file_bytes"' in done.stdout

    @pytest.mark.slow
    def test_unpack_needs_no_torch_either(self, fitted, tmp_path):
        _, path = fitted("rotary")
        done = run_blocked(
            "sys.argv[0] = 'bytecap'\nfrom bytecap.cli.app import main\nmain()", "unpack", path, "-o", tmp_path / "out"
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / "model.safetensors").is_file()

    @pytest.mark.slow
    def test_finished_thesis_lines_are_judged(self, tmp_path):
        from test_thesis import lines

        path = tmp_path / "thesis.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines()), "utf-8")
        done = run_blocked(
            "sys.argv[0] = 'bytecap'\nfrom bytecap.cli.app import main\nmain()", "thesis", "--from", path, "-o",
            tmp_path / "out", "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["experiments"]) == 8
        assert (tmp_path / "out" / "thesis.html").is_file()

    @pytest.mark.slow
    @pytest.mark.parametrize("command", [["fit", "demo", "--budget", "600kB", "-o", "x.bcap"], ["eval", "demo"]])
    def test_what_needs_torch_says_so_in_one_line(self, command, tmp_path):
        done = run_blocked(
            f"import os\nos.chdir({str(tmp_path)!r})\nsys.argv[0] = 'bytecap'\n"
            "from bytecap.cli.app import main\nmain()",
            *command,
        )
        assert done.returncode == 2
        assert done.stderr.count("error: ") == 1
        assert "pip install 'bytecap[hf]'" in done.stderr
        assert "Traceback" not in done.stderr


RUNS_A_FILE = {"exec_module", "spec_from_file_location"}


def files():
    every = [*SOURCE.rglob("*.py"), *LAB.rglob("*.py")]
    return [p for p in sorted(every) if "data" not in p.relative_to(SOURCE.parent).parts]


NAMES_OF_GGUF = {  # what GGUF calls kinds of tokenizer, and the architecture that it has for another one's tensors
    "tokenizer.py": {"llama", "gpt2", "qwen2"},
    "places.py": {"llama", "mistral", "gemma"},
}


class TestSource:
    def test_no_architecture_is_named(self):
        programs = r"llama(?:[._-](?:cpp|quant|quantize|model|bpe)\b|_model_quantize)"  # named after one
        forbidden = {"llama", "qwen", "qwen2", "gpt2", "opt", "mistral", "gemma", "phi", "bloom", "pythia"}
        # dictionary.py holds the format's own dictionary of text: data, though spelled in Python
        for path in (p for p in files() if p.name != "dictionary.py"):
            text = re.sub(programs, "", path.read_text("utf-8").lower())
            words = set(re.findall(r"[a-z0-9]+", text)) - NAMES_OF_GGUF.get(path.name, set())
            assert not words & forbidden, path

    @pytest.mark.slow
    def test_nothing_from_a_file_is_ever_executed(self):
        for path in files():
            self.check_calls(path, ast.parse(path.read_text("utf-8")))

    def check_calls(self, path, tree):
        nodes = list(ast.walk(tree))
        imported = {n.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for n in node.names}
        imported |= {(node.module or "").partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        pickles = imported & {"pickle", "marshal", "shelve", "dill", "joblib"}
        assert pickles <= ({"pickle"} if path.name == "factory.py" else set()), path
        if pickles:  # the class of an error that torch raises, and nothing else
            assert set(re.findall(r"\bpickle\.(\w+)", ast.unparse(tree))) == {"UnpicklingError"}, path
        calls = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not calls & {"eval", "exec", "compile"}, path
        methods = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        running = {"exec_module", "load_module", "run_path", "run_module", "spec_from_file_location"}
        # factory.py alone runs a file, the one that the user named with --factory or --loss
        assert methods & running == (RUNS_A_FILE if path.name == "factory.py" else set()), path

    def test_the_one_file_that_is_run_is_the_user_s(self):
        """`factory.py` executes the path it is given and nothing else, and only the command line gives it one."""
        tree = ast.parse((SOURCE / "model" / "factory.py").read_text("utf-8"))
        runs = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and "exec_module" in ast.unparse(f)]
        assert [f.name for f in runs] == ["load_callable"]
        (located,) = re.findall(r"spec_from_file_location\((.*)\)", ast.unparse(runs[0]))
        assert located.endswith(", path")
        assert "path = Path(file)" in ast.unparse(runs[0])
        assert "file, _, rest = spec.rpartition(':')" in ast.unparse(runs[0])
        callers = {
            p.relative_to(SOURCE.parent).as_posix().removeprefix("bytecap/")
            for p in files()
            if "load_callable(" in p.read_text("utf-8")
        }
        assert callers == {
            "model/factory.py",
            "pipeline/fit_shards.py",
            "methods/__init__.py",
        }  # --factory, --loss, --method FILE.py:NAME

    def test_the_version_is_the_package_s(self):
        pyproject = SOURCE.parents[1] / "pyproject.toml"
        if pyproject.is_file():
            assert f'version = "{bytecap.__version__}"' in pyproject.read_text("utf-8")


@pytest.mark.coverage
def test_a_loaded_model_holds_the_decoded_values(fitted):
    artifact_, path = fitted("rotary", "uniform")
    module = bytecap.load_model(path)
    live = module.state_dict()
    assert all(np.array_equal(live[n].numpy(), v) for n, v in artifact_.tensors().items())
    assert not module.training
