"""Code that a model or an artifact brings, names or asks for is never run, imported or fetched.

Two nets: the source is searched for every call that could, and all that reads foreign files is run in a process in
which an import of foreign code, a connection, a new program or a question on standard input is a failure.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bytecap.errors import CheckpointError
from bytecap.format import container
from bytecap.format.container import FileSection
from bytecap.format.decoder import side_files
from bytecap.format.sidefiles import packing
from bytecap.model import building

SOURCE = Path(__file__).parents[1] / "src"
DOORS = {
    "bytecap/model/building.py": {"from_pretrained", "from_config"}, "bytecap/model/tokenizer.py": {"from_str"},
    "bytecap/model/tokenization.py": {"from_pretrained"}, "bytecap/model/gguf_file.py": {"from_pretrained"},
}  # fmt: skip


def calls():
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield path.relative_to(SOURCE).as_posix(), node, name


def keywords(node):
    return {k.arg: getattr(k.value, "value", None) for k in node.keywords}


@pytest.mark.slow
def test_one_door_to_what_may_run_code():
    seen = set()
    for file, node, name in calls():
        if name in {"from_pretrained", "from_config"} or (name in {"from_str", "from_file"} and "okenizer" in file):
            assert name in DOORS.get(file, ()), f"{file}:{node.lineno} calls {name}: go through bytecap.model.building"
            seen.add((file, name))
            if name != "from_str":
                assert keywords(node)["trust_remote_code"] is False, f"{file}:{node.lineno}"
        assert keywords(node).get("trust_remote_code") in {None, False}, f"{file}:{node.lineno}"
        bare = isinstance(node.func, ast.Name)
        assert not (bare and name in {"eval", "exec", "compile", "__import__"}), f"{file}:{node.lineno}"
        assert name != "get_class_from_dynamic_module", f"{file}:{node.lineno}"
        if name == "load" and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "torch":
            assert keywords(node)["weights_only"] is True, f"{file}:{node.lineno}"
        if name in {"load", "loads", "Unpickler"} and isinstance(node.func, ast.Attribute):
            assert getattr(node.func.value, "id", "") not in {"pickle", "dill", "joblib", "marshal", "yaml"}, file
        if name in {"Environment", "Template"}:  # templates only in jinja's sandbox
            raise AssertionError(f"{file}:{node.lineno}: use jinja2.sandbox.ImmutableSandboxedEnvironment")
    assert seen == {(f, n) for f, names in DOORS.items() for n in names}


def options():
    """(command, option, help) of the whole command line."""
    import typer

    from bytecap.cli.app import app

    left = [("", typer.main.get_command(app))]
    for name, command in left:
        left += [(f"{name} {n}".strip(), c) for n, c in getattr(command, "commands", {}).items()]
        for parameter in () if hasattr(command, "commands") else command.params:
            yield name, max(parameter.opts, key=len), getattr(parameter, "help", None) or ""


def test_the_documents_say_which_options_run_code():
    """Every option whose help says so stands in SECURITY.md with its command; there are no more than these."""
    text = (SOURCE.parent / "SECURITY.md").read_text("utf-8").split("## What runs code")[1].split("No other command")[0]
    run = {(c, o) for c, o, said in options() if re.search(r"(is|are) run\b", said) and "nothing is run" not in said}
    assert {o for _, o in run} == {"--factory", "--loss", "--method", "--methods", "--eval", "--tasks", "models"}
    rows = [row for row in text.splitlines() if row.startswith("| `")]
    gguf = {
        ("recode", "--method"),
        ("export web", "--method"),
    }  # formats that have no methods: refused before it is read
    for command, option in run - gguf:
        word = "MODELS" if option == "models" else option
        assert any(word in r and f"`{command}" in r for r in rows), f"SECURITY.md: {command} {option} runs code"


def test_mlx_is_not_asked_about_a_model_that_names_code(tmp_path, monkeypatch):
    from bytecap.runtimes.directory.mlx import FAMILY

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} is asked"))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "model_file": "../evil.py"}', "utf-8")
    assert "names a file of code" in FAMILY.check(tmp_path)


# --------------------------------------------------------------------------------------------------- in a process

WATCH = """
import sys, os
FOREIGN = ("kernels", "flash_attn", "transformers_modules", "modeling_evil", "configuration_evil", "tokenization_evil")
class Net:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in FOREIGN and {strict}:
            os.write(2, ("FOREIGN import " + name).encode()); os._exit(99)
sys.meta_path.insert(0, Net())
import torch, transformers, tokenizers, numpy
import transformers.models.llama.modeling_llama, transformers.models.auto.modeling_auto
from bytecap.pipeline import score, export
from bytecap.model import checkpoint, from_artifact, sources, tokenizer
watching = False
def hook(event, args):
    if not watching:
        return
    if event in {"socket.connect", "socket.getaddrinfo", "urllib.Request"} or event == "os.system":
        os.write(2, ("FOREIGN " + event + repr(args)).encode()); os._exit(99)
    if event == "subprocess.Popen" and args[1][1:3] != ["-I", "-c"]:
        os.write(2, ("FOREIGN " + repr(args)).encode()); os._exit(99)
    reads = event == "open" and isinstance(args[0], str) and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if reads and args[0].endswith(("evil.py", "evil.pyc", "custom_generate/generate.py")):
        os.write(2, ("FOREIGN open " + args[0]).encode()); os._exit(99)
sys.addaudithook(hook)
class Asked:
    def readline(self, *_):
        os.write(2, b"FOREIGN question"); os._exit(99)
    read = readline
sys.stdin = Asked()
import builtins
builtins.input = Asked().read
watching = True
from bytecap.errors import BytecapError
for call in {calls}:
    try:
        print("done", type(eval(call)).__name__)
    except BytecapError as exc:
        print("refused", exc)
"""
EVIL = "import os\nos.write(2, b'FOREIGN code ran')\nos._exit(99)\n"


def attempt(calls):
    """Outcomes of some calls, one after the other in one process."""
    script = WATCH.replace("{calls}", repr(calls)).replace("{strict}", "globals().get('watching')")
    done = subprocess.run(  # noqa: S603 (our own text)
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=900, check=False
    )
    assert "FOREIGN" not in done.stderr, done.stderr[-500:]
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


def spoil(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "sitecustomize.py"):
        (directory / name).write_text(EVIL, "utf-8")
    (directory / "custom_generate").mkdir(exist_ok=True)
    (directory / "custom_generate" / "generate.py").write_text(EVIL, "utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil",
                    "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}), "utf-8")  # fmt: skip
    return directory


OWN = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}


DIRECTORIES = [
    ({"auto_map": OWN}, "done Model"),  # a type that transformers knows: its own class
    ({"auto_map": OWN, "model_type": "evil"}, "auto_map"),
    ({"attn_implementation": "owner/repo"}, "attn_implementation asks for code"),
    ({"_attn_implementation": "owner/repo@v1:flash"}, "_attn_implementation asks for code"),
    ({"text_config": {"attn_implementation": {"": "kernels-community/vllm-flash-attn3"}}}, "attn_implementation asks"),
    ({"experts_implementation": "owner/repo"}, "experts_implementation asks for code"),
    ({"attn_implementation": "flash_attention_2"}, "done Model"),  # what the library has stands in
    ({"use_kernels": True}, "use_kernels asks"),
    ({"use_pretrained_backbone": True, "backbone": "owner/repo"}, "use_pretrained_backbone asks"),
]
ARTIFACTS = [
    ({"auto_map": OWN}, "done Llama"), ({"auto_map": OWN, "model_type": "evil"}, "auto_map"),
    ({"attn_implementation": "owner/repo"}, "attn_implementation asks for code"),
]  # fmt: skip


def artifact(path, source, changes):
    """An artifact whose config is changed and whose side files hold code."""
    contents = container.read(source)
    files = side_files(contents)
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | changes).encode()
    files["modeling_evil.py"] = files["configuration_evil.py"] = EVIL.encode()
    sections = tuple(FileSection(n, packing.pack(n, c)) for n, c in files.items())
    container.write(replace(contents, files=sections), path)
    return path


@pytest.mark.slow
def test_nothing_foreign_runs(model_directory, fitted, texts, tmp_path):
    calls, wanted = [], []
    for i, (changes, said) in enumerate(DIRECTORIES):
        directory = spoil(shutil.copytree(model_directory("rotary"), tmp_path / f"model{i}"), **changes)
        calls.append(f"checkpoint.load_checkpoint({str(directory)!r})")
        wanted.append(said)
    calls.append(f"score.score({str(tmp_path / 'model0')!r}, {str(texts['val'])!r}, tokens=200)")
    wanted.append("done list")
    for i, (changes, said) in enumerate(ARTIFACTS):
        path = artifact(tmp_path / f"{i}.bcap", fitted("rotary")[1], changes)
        calls += [
            f"from_artifact.load_model({str(path)!r})",
            f"export.unpack({str(path)!r}, {str(tmp_path / f'out{i}')!r})",
        ]
        wanted += [said, "done str"]
    for call, found, said in zip(calls, attempt(calls), wanted, strict=True):
        assert said in found, call


# --------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(("config", "said"), [
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"), ({"a": [{"n_layer": -(2**40)}]}, "n_layer is -"),
    ({"num_local_experts": 2**17}, "num_local_experts"), ({"vocab_size": 2**70}, "vocab_size is 11805"),
])  # fmt: skip
def test_counts_that_no_model_has(config, said):
    with pytest.raises(CheckpointError, match=said):
        building.check_config(config, "config.json")


def test_configs_of_models_that_people_have():
    building.check_config(
        {"vocab_size": 262_144, "max_position_embeddings": 10_485_760, "num_hidden_layers": 126, "eos_token_id": [1, 2],
         "head_dim": 512, "num_experts": 512, "expert_hidden_size": 131_072, "layer_norm_eps": 1e-5, "rope_theta": 5e8,
         "attn_implementation": "eager", "quantization_config": {"block_size": 131_072}}, "config.json",
    )  # fmt: skip


@pytest.mark.parametrize(("content", "said"), [
    (b"[" * 100_000, "nested too deep"), (b'{"a":' * 100_000, "nested too deep"), (b"{", "not valid JSON"),
    (b"[]", "no JSON object"), (b"\xff\xfe", "not valid JSON"), (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
])  # fmt: skip
def test_json_that_is_none(content, said):
    with pytest.raises(CheckpointError, match=said):
        building.parse_object(content, "config.json")
