"""Models and tokenizers from hostile files: compared before they are built, tried before they are used."""

import contextlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time

import pytest

import bytecap
from bytecap.errors import ArtifactError, CheckpointError
from bytecap.format import container
from bytecap.model import apart, bounds, building, gguf_file, tokenizer
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.fileset import check_safetensors, weight_files
from test_safety import artifact

POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes and links")

# ------------------------------------------------------------------------------------------------ models of artifacts

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 64,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), [
    ({}, "does not hold the model of its config.json: its config.json has no tensor w"),
    ({"vocab_size": 2**42}, "has no tensor w"), ({"vocab_size": 2**70}, "vocab_size is 118"),
    ({"hidden_size": 2**31, "vocab_size": 2**31}, "cannot build a model from"),
    ({"max_position_embeddings": 2**40}, "has no tensor w"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ({"num_hidden_layers": 60_000}, "asks for more tensors than belong to 1 stored tensors"),
    ({"model_type": "qwen2", "num_hidden_layers": 60_000}, "asks for more tensors than"),
    ({"model_type": "gpt2", "num_hidden_layers": 60_000}, "asks for more tensors than"),
    ({"model_type": "mixtral", "num_local_experts": 60_000}, "has no tensor w|asks for more"),
])  # fmt: skip
def test_a_config_is_compared_before_it_is_built(tmp_path, changes, said, monkeypatch):
    path = artifact(tmp_path / "a.bcap", files=[("config.json", json.dumps(LLAMA | changes).encode())])
    built, from_config = [], building.causal_lm

    def watched(config):
        module = from_config(config)
        built.append({p.device.type for p in module.parameters()})
        return module

    monkeypatch.setattr(building, "causal_lm", watched)
    monkeypatch.setattr("bytecap.model.checkpoint.causal_lm", watched)
    with pytest.raises((ArtifactError, CheckpointError), match=said) as caught:
        bytecap.load_model(path)
    assert str(path) in str(caught.value)
    assert built in ([], [{"meta"}])


def test_shapes_and_names_of_both_sides(fitted, tmp_path):
    from dataclasses import replace

    contents = container.read(fitted("rotary")[1])
    first, second, *rest = contents.units
    renamed = replace(rest[0].unit, name="x[1]")
    other = replace(first.unit, shape=first.unit.shape[::-1])
    for units, said in (
        ((replace(first, unit=other), second, *rest), f"tensor {first.unit.name} is "),
        ((first, *rest), f"it lacks tensor {second.unit.name}"),
        ((first, second, replace(rest[0], unit=renamed), *rest[1:]), "no tensor x.1. .1 more"),
    ):
        container.write(replace(contents, units=tuple(units)), tmp_path / "a.bcap")
        with pytest.raises(ArtifactError, match=f"does not hold the model of its config.json: .*{said}"):
            bytecap.load_model(tmp_path / "a.bcap")


@pytest.mark.parametrize("kind", ["rotary", "biased", "transposed", "offset"])
def test_sound_artifacts_load(fitted, kind):
    import torch

    path = fitted(kind)[1]
    module, values = bytecap.load_model(path), bytecap.load(path)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, torch.from_numpy(values[name]))


def test_buffers_that_no_file_stores():
    import torch
    import transformers

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(2**15, 2**15), persistent=False)

    building_of = building.causal_lm
    try:
        building.causal_lm = lambda _: Hidden()
        with pytest.raises(ArtifactError, match=r"a.bcap: its config.json asks for 1,073,741,824 values besides"):
            building.check_fits(transformers.LlamaConfig(), {}, "a.bcap")
    finally:
        building.causal_lm = building_of


@pytest.mark.slow
def test_modules_that_register_nothing_but_modules():
    import torch

    with pytest.raises(ArtifactError, match="more modules than belong to 1 stored"), building.bounded(1, "a.bcap"):
        torch.nn.Sequential(*[torch.nn.Identity() for _ in range(5000)])
    assert len(torch.nn.Sequential(*[torch.nn.Identity() for _ in range(5000)])) == 5000  # no longer watched


@pytest.mark.parametrize(("changes", "said"), [
    ({"vocab_size": 2**36}, r"asks for [\d,]+ values, and [\d,]+ are stored"),
    ({"intermediate_size": 2**36}, "values, and"), ({"hidden_size": 2**30}, "values, and|cannot build"),
    ({"num_hidden_layers": 60_000}, "asks for more tensors than belong to"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
    ({"num_codebooks": 2**40}, "num_codebooks is 1099511627776"), ({"n_iters": [3, 2**40]}, "n_iters is 1099511627776"),
    ({"max_position_embeddings": 2**46}, ""),  # tables of positions are computed from it, if they are
])  # fmt: skip
@pytest.mark.parametrize("end", ["", "tying.json"])
def test_a_directory_is_compared_before_it_is_built(model_directory, tmp_path, changes, said, end, monkeypatch):
    """A config that asks for gigabytes beside tiny weights; what is built for it holds no values."""
    source, directory = model_directory("rotary"), tmp_path / "model"
    shutil.copytree(source, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    if end:
        (directory / end).write_text("{}", "utf-8")

    class Built(BaseException):
        pass

    def watched(*_, **__):
        raise Built

    monkeypatch.setattr("bytecap.model.checkpoint.pretrained", watched)
    monkeypatch.setattr("bytecap.model.checkpoint.module_from_config", watched)
    if said:
        with pytest.raises(CheckpointError, match=said) as caught:
            load_checkpoint(directory)
        assert str(directory) in str(caught.value)
    else:
        with pytest.raises(Built):
            load_checkpoint(directory)


def test_numbers_that_are_no_counts():
    """Sizes, lengths, ids and statistics of a training may be large."""
    large = dict.fromkeys(("n_positions", "n_words", "num_trained_tokens", "head_dim", "block_size", "n_params"), 2**40)
    building.check_config(large | {"eos_token_id": [128_001, 128_009], "num_hidden_layers": 61}, "config.json")


@pytest.mark.slow
def test_one_stored_tensor_under_many_names():
    """A unit of zeros, 100 bytes, that a thousand layers are said to share would be built a thousand times."""
    import transformers

    width, layers = 512, 40
    config = LLAMA | {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "head_dim": width}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    square = [n for n, s in shapes.items() if s == (width, width)]
    assert len(square) == 7 * layers
    with pytest.raises(ArtifactError, match=r"asks for 73,\d{3},\d{3} values, and 262,144 are stored"):
        building.check_fits(model.config, shapes, "a.bcap", held=width * width)
    building.check_fits(model.config, shapes, "a.bcap")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of a thread's own")
def test_a_constructor_that_loops_is_ended(monkeypatch):
    monkeypatch.setattr(bounds, "_SECONDS", 0.3)

    def construct():
        while True:
            with contextlib.suppress(Exception):  # a constructor may catch what it likes
                math.sqrt(2)

    said = r"a.bcap: a model is not built from its config.json within 0.3 seconds"
    with pytest.raises(ArtifactError, match=said), bounds.bounded(1, "a.bcap"):
        construct()
    with bounds.bounded(1, "a.bcap"):  # what is done in time is not ended
        pass


def test_what_is_done_in_time_is_not_interrupted(monkeypatch):
    """One that is only cleared leaves the interpreter looking for it: loops are slower, and traced ones never end."""
    asked = []
    monkeypatch.setattr(bounds.ctypes.pythonapi, "PyThreadState_SetAsyncExc", lambda *found: asked.append(found))
    with bounds.hurried(ArtifactError("too long")):
        pass
    assert asked == []


# ------------------------------------------------------------------------------------------------------- tokenizers


def changed(tokenizer_json, **changes):
    return json.dumps(json.loads(tokenizer_json) | changes).encode()


PADDING = {"strategy": {"Fixed": 500_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "x"}  # fmt: skip


def test_padding_and_truncation_are_nobodys_business(tokenizer_json):
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    plain = tokenizer.load_tokenizer(tokenizer_json.encode())
    for more in ({"padding": PADDING}, {"truncation": truncation}, {"padding": PADDING, "truncation": truncation}):
        found = tokenizer.load_tokenizer(changed(tokenizer_json, **more))
        assert found.encode("hello world").ids == plain.encode("hello world").ids


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"{}", b"[" * 200_000, b'{"model":' * 200_000, b"\xff", b"null", b'{"model": {"type": "None"}}',
    b'{"version":"1.0","model":{"type":"Unigram","unk_id":99,"vocab":[["a",0.0]]},"added_tokens":[]}',
    b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]},"added_tokens":[]}',
    (b'{"version":"1.0","pre_tokenizer":{"type":"Split","pattern":{"Regex":"("},"behavior":"Isolated","invert":false},'
     b'"model":{"type":"BPE","vocab":{"a":0},"merges":[]},"added_tokens":[]}'),
])  # fmt: skip
def test_tokenizers_that_are_none(content):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        tokenizer.load_tokenizer(content)


HANGS = """
import sys
from bytecap.model import tokenizer
tokenizer._SPARE, tokenizer._PER_CHARACTER = 1.0, 0.0
found = tokenizer.load_tokenizer(open(sys.argv[1], "rb").read())
try:
    tokenizer.encode(found, ["hello", sys.argv[2]])
except Exception as exc:
    sys.exit(f"{type(exc).__name__}: {exc}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("text", "said"), [
    ("x" * 60, "the library that reads it failed on a text: "),
    (("x" * 21 + " ") * 5000, "characters or tokens were not done in 1 seconds; an expression in its pre_tokenizer"),
])  # fmt: skip
@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer"])
def test_expressions_that_take_exponential_time(tokenizer_json, tmp_path, place, text, said):
    """They are given up, and the process ends; the trial's sample has nothing that they take long for."""
    content, regex = json.loads(tokenizer_json), {"Regex": "(x+x+)+y"}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    content[place] = split if place == "pre_tokenizer" else {"type": "Replace", "pattern": regex, "content": "z"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), "utf-8")
    done = subprocess.run(  # noqa: S603 (our own text)
        [sys.executable, "-c", HANGS, str(path), text], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("CheckpointError: tokenizer.json: ")
    assert said in done.stderr


def test_tokens_are_the_same_through_the_door(tokenizer_json):
    found = tokenizer.load_tokenizer(tokenizer_json.encode())
    texts = ["hello world", "", "caf\u00e9 \u4e2d"]
    assert [e.ids for e in tokenizer.encode(found, texts)] == [found.encode(t).ids for t in texts]
    ids = found.encode(texts[0]).ids
    assert tokenizer.decode(found, ids) == found.decode(ids)
    with pytest.raises(OverflowError):
        tokenizer.decode(found, [-1])


@POSIX
@pytest.mark.parametrize(("end", "said"), [
    ("import os; os.abort()", "died of it .signal 6"), ("import sys; sys.exit(9)", "exit code 9"),
    ("import sys; print('a\\nwhy'); sys.exit(4)", "a"), ("import sys; sys.exit(3)", None),
    ("import time; time.sleep(60)", "more than 1 seconds"),
])  # fmt: skip
def test_a_library_that_dies_is_a_line(monkeypatch, tokenizer_json, end, said):
    """Panics and aborts end the trial's process, not ours; where no trial can be made there is none."""
    tokenizer._trial.cache_clear()
    monkeypatch.setattr(tokenizer, "_TRIAL", end)
    monkeypatch.setattr(apart, "_SECONDS", 1 if "sleep" in end else 100)
    if said is None:
        assert tokenizer.load_tokenizer(tokenizer_json.encode())
    else:
        with pytest.raises(CheckpointError, match=f"tokenizer.json cannot be read: .*{said}"):
            tokenizer.load_tokenizer(tokenizer_json.encode())
    tokenizer._trial.cache_clear()


def test_a_panic_in_the_middle_is_a_line(run, fitted, monkeypatch):
    from bytecap.pipeline import generation

    class PanicException(BaseException):
        pass

    def fail(*_, **__):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(generation, "generate", fail)
    code, out, err = run("generate", fitted("rotary")[1], "--prompt", "a")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "tokenizer.json failed on it: index out of bounds" in err


# --------------------------------------------------------------------------------------------- files of a directory


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000])
def test_nested_json_of_a_model_directory(refused, job, copied, content):
    (copied / "config.json").write_bytes(content)
    assert "config.json is nested too deep" in refused(*job(copied))


def test_nested_json_elsewhere(copied):
    next(copied.glob("*.safetensors")).unlink()
    (copied / "model.safetensors.index.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match="not a valid shard index"):
        weight_files(copied)
    (copied / "model.safetensors.index.json").unlink()
    header = b"[" * 100_000
    (copied / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="corrupt safetensors header"):
        check_safetensors(copied / "x.safetensors")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "c:x", "..\\x"])
def test_an_index_that_redirects(copied, shard):
    next(copied.glob("*.safetensors")).unlink()
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}), "utf-8")
    (copied.parent / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"not a valid shard index|missing"):
        weight_files(copied)


# ---------------------------------------------------------------------------------------------------------- GGUF files


def text(value):
    return struct.pack("<Q", len(value)) + value


def gguf_head(tensors, keys):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


LLAMA_KEY = key(b"general.architecture", 8, text(b"llama"))
GGUFS = {
    "nothing": b"", "magic alone": b"GGUF", "keys": gguf_head(0, 1 << 60), "tensors": gguf_head(1 << 60, 0),
    "name": gguf_head(0, 1) + struct.pack("<Q", 1 << 62), "negative": gguf_head(0, 1) + struct.pack("<Q", 2**64 - 8),
    "array": gguf_head(0, 1) + key(b"a", 9, struct.pack("<IQ", 4, 1 << 40)),
    "strings": gguf_head(0, 1) + key(b"a", 9, struct.pack("<IQ", 8, 1 << 40)),
    "arrays": gguf_head(0, 1) + key(b"a", 9, struct.pack("<IQ", 9, 1 << 40)),
    "nested": gguf_head(0, 1) + key(b"a", 9, struct.pack("<IQ", 9, 1) * 50_000),
    "type": gguf_head(0, 1) + key(b"a", 99, b""),
    "dimensions": gguf_head(1, 1) + LLAMA_KEY + text(b"t") + struct.pack("<I", 1 << 30),
    "size": gguf_head(1, 1) + LLAMA_KEY + text(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0),
    "other order": b"GGUF" + struct.pack(">IQQ", 3, 1 << 60, 0),
    "layers": gguf_head(0, 2) + LLAMA_KEY + key(b"llama.block_count", 4, struct.pack("<I", 2**32 - 1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", GGUFS)
def test_gguf_files_that_claim_what_they_do_not_hold(tmp_path, kind):
    """gguf-py goes through 2^40 members that a file of 60 bytes claims."""
    path = tmp_path / "a.gguf"
    path.write_bytes(GGUFS[kind])
    if kind not in {"layers", "nothing"}:
        with pytest.raises(CheckpointError, match=r"a\.gguf is no sound GGUF file"):
            gguf_file.check_header(path)
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        load_checkpoint(path)
