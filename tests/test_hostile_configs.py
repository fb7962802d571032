"""Configs and tokenizer files with absurd values: each ends in one line, in bounded time and memory."""

import json
import shutil
import subprocess
import sys
import time
import warnings

import pytest
import torch
import transformers

import bytecap
from bytecap.model.checkpoint import demo_directory
from conftest import _config

VALUES = (
    -1, 0, 1, 10**18, -(10**9), 2**31, float("nan"), float("inf"), 0.5, -0.5, 1e-300, "x", "", "1", None, [], [1], {},
    {"a": 1}, True, "\x1b]0;owned\x07",
)  # fmt: skip
MORE = (  # keys that no family writes by itself
    "rope_scaling", "rope_theta", "sliding_window", "layer_types", "torch_dtype", "quantization_config", "text_config",
    "id2label", "num_labels", "attn_implementation", "transformers_version", "tokenizer_class", "is_decoder",
    "chunk_size_feed_forward", "pruned_heads", "return_dict", "output_hidden_states", "output_attentions",
    "use_return_dict", "problem_type", "max_length", "is_encoder_decoder", "transformers_weights", "auto_map",
)  # fmt: skip
FAMILIES = ("rotary", "transposed", "mixtral")
_SECONDS = 30  # of this process, where the slowest sound config takes a tenth of a second


@pytest.fixture(scope="session")
def sources(once):
    """Function: directory of a tiny model with the embedded tokenizer, by family."""

    def make(family):
        def write(directory):
            torch.manual_seed(0)
            config = (
                transformers.MixtralConfig(
                    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=2048,
                    num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, bos_token_id=0, eos_token_id=0,
                ) if family == "mixtral" else _config(family, vocab_size=2048)
            )  # fmt: skip
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
            shutil.copy(demo_directory() / "tokenizer.json", directory)
            return directory

        return once(f"hostile {family}", write)

    return make


def keys(directory):
    return (*json.loads((directory / "config.json").read_text("utf-8")), *MORE)


@pytest.fixture
def ends_in_a_line(run, tmp_path, texts):
    """Function: score a directory's model with changes of its config; success, or one line of ours."""
    text = tmp_path / "text.txt"
    text.write_text(texts["val"].read_text("utf-8")[:1500], "utf-8")

    def check(source, command=("eval",), **changes):
        directory = tmp_path / "model"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, directory)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
        begun = time.process_time()
        more = ("--text", text, "--tokens", 200) if command[0] == "eval" else command[1:]
        code, out, err = run(command[0], directory, *more, "--json")
        assert time.process_time() - begun < _SECONDS, changes
        assert "\x1b" not in err + out, changes
        if code:
            assert (code, out, err.count("\n")) == (2, "", 1), (changes, err)
            assert err.startswith("error: "), (changes, err)
            assert "unexpected" not in err, (changes, err)
        else:
            assert not err, (changes, err)
        return err

    return check


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_some_values_of_some_keys(sources, ends_in_a_line, family):
    """Every key with one of the values, another one for the next; `nightly` tries them all."""
    for i, key in enumerate(keys(sources(family))):
        ends_in_a_line(sources(family), **{key: VALUES[i * 5 % len(VALUES)]})


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
def test_all_values_of_all_keys(sources, ends_in_a_line, family):
    for key in keys(sources(family)):
        for value in VALUES:
            ends_in_a_line(sources(family), **{key: value})


@pytest.mark.parametrize(("family", "changes", "said"), [
    ("rotary", {"num_labels": 10**18}, "num_labels is 1000000000000000000, more than"),
    ("rotary", {"return_dict": False, "output_hidden_states": "x"}, ""),
    ("mixtral", {"num_experts_per_tok": -1}, "cannot be run as its config.json describes it"),
    ("transposed", {"resid_pdrop": float("nan")}, "cannot be run as its config.json"),
    ("transposed", {"n_head": -1}, "cannot be run as its config.json"),
])  # fmt: skip
def test_what_was_found(sources, ends_in_a_line, family, changes, said):
    assert said in ends_in_a_line(sources(family), **changes)


@pytest.mark.slow
def test_libraries_do_not_quote_files_on_the_terminal(sources, tmp_path):
    """transformers logs configs that it cannot set whole; warnings of any library are one escaped line."""
    directory = tmp_path / "model"
    shutil.copytree(sources("rotary"), directory)
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"use_return_dict": "\x1b[2J", "\x1b]0;owned\x07": 1}
    path.write_text(json.dumps(config), "utf-8")
    code = "import sys\nfrom bytecap.cli import app\nsys.argv[1:] = ['inspect', sys.argv[1], '--json']\napp.main()"
    done = subprocess.run(  # noqa: S603 (our own text)
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: cannot build the model in {directory}: ")


def test_warnings_are_one_escaped_line(run, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    run("--version")
    assert warnings.formatwarning("a\x1b[2Jb\nc", UserWarning, "x.py", 1) == "warning: UserWarning: a\\x1b[2Jb c\n"
    assert warnings.formatwarning("a", bytecap.BytecapWarning, "x.py", 1) == "warning: a\n"
