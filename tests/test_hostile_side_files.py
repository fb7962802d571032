"""Hostile files beside the weights: older tokenizers, chat templates, generation configs, shared layers."""

import contextlib
import json
import os
import random

import pytest

import bytecap
from bytecap.errors import ArtifactError, BytecapError, CheckpointError
from bytecap.format import container, decoder
from bytecap.format.container import FileSection
from bytecap.format.sidefiles import packing
from bytecap.model import apart, tying
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.inputs import facts
from bytecap.model.tokenization import read_tokenizer
from bytecap.model.tokenizer import encode
from bytecap.pipeline import chat_templates, generation

POSIX = pytest.mark.skipif(os.name != "posix", reason="limits of processes")
GPT2 = {"config.json": b'{"model_type": "gpt2"}', "vocab.json": b'{"a": 0, "b": 1, "ab": 2}',
        "merges.txt": b"#version: 0.2\na b\n"}  # fmt: skip
LLAMA = {"config.json": b'{"model_type": "llama"}'}
RUBBISH = random.Random(0).randbytes(10_000)  # noqa: S311

# ------------------------------------------------------------------------------------------ what tokenizers are made of

TOKENIZERS = {
    "merges in a circle": GPT2 | {"merges.txt": b"#version: 0.2\na b\nab ab\nb a\nab a\n"},  # a panic of the library
    "a token of 10 MB": GPT2 | {"vocab.json": json.dumps({"a" * 10**7: 0, "b": 1}).encode(),
                                "merges.txt": b"#version: 0.2\n" + b"a" * 10**7 + b" b\n"},
    "negative ids": GPT2 | {"vocab.json": b'{"a": -1, "b": 1, "ab": 99999999999999}'},
    "ids that are none": GPT2 | {"vocab.json": b'{"a": "x"}'}, "a list": GPT2 | {"vocab.json": b"[1, 2]"},
    "nested": GPT2 | {"vocab.json": b"[" * 10**6}, "merges of three": GPT2 | {"merges.txt": b"#v\na b c\n\n\na\n"},
    "rubbish": LLAMA | {"tokenizer.model": RUBBISH}, "nothing": LLAMA | {"tokenizer.model": b""},
    "a piece of 2 GB": LLAMA | {"tokenizer.model": b"\x0a\xff\xff\xff\xff\x7f" + b"x" * 100},
    "a trainer of 4 GB": LLAMA | {"tokenizer.model": b"\x12\xff\xff\xff\xff\x0f"},
    "no numbers": GPT2 | {"added_tokens.json": b'{"x": "y", "z": -5, "q": 1e18}'},
    "a list of tokens": GPT2 | {"added_tokens.json": b"[1]"},
    "special": GPT2 | {"special_tokens_map.json": b'{"eos_token": [1, 2], "bos_token": {"content": 5}}'},
    "nested map": GPT2 | {"special_tokens_map.json": b"[" * 10**6},
    "a path": GPT2 | {"tokenizer_config.json": b'{"tokenizer_class": "../../x"}'},
    "a class": GPT2 | {"tokenizer_config.json": b'{"tokenizer_class": 5, "added_tokens_decoder": {"x": 1}}'},
    "no unknown token": {"config.json": b'{"model_type": "bert"}', "vocab.txt": b"a\n" * 1000},
    "no text": {"config.json": b'{"model_type": "bert"}', "vocab.txt": b"\x00\xff\xfe\n[UNK]\n"},
}  # fmt: skip


def some(cases, *often):
    """Cases of which a few are tried often, each in a process that imports a large library, and the rest nightly."""
    return [pytest.param(c, marks=pytest.mark.slow if c in often else pytest.mark.nightly) for c in cases]


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("kind", some(TOKENIZERS, "merges in a circle", "rubbish", "special", "no unknown token"))
def test_older_tokenizers_end_in_a_line(kind, capfd):
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(TOKENIZERS[kind])
    assert len(str(caught.value)) < 600
    assert capfd.readouterr().err == ""  # a panic writes its stack


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_files_that_a_config_names_are_not_read():
    config = b'{"tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd", "name_or_path": "/etc"}'
    assert read_tokenizer(GPT2 | {"tokenizer_config.json": config}).get_vocab_size() <= 8


@POSIX
def test_a_conversion_that_dies_is_a_line(monkeypatch):
    monkeypatch.setattr(apart, "_CALL", "import os; os.abort()")
    with pytest.raises(CheckpointError, match=r"cannot convert vocab\.json, merges\.txt .* died of it .signal 6"):
        read_tokenizer(GPT2 | {"tokenizer_config.json": b'{"a": 1}'})


def test_what_a_tokenizer_raises_on_a_text_is_a_line():
    class Tokenizer:
        def encode_batch(self, *_, **__):
            raise Exception("WordPiece error: Missing [UNK] token from the vocabulary")  # noqa: TRY002 (as it does)

    with pytest.raises(CheckpointError, match="failed on a text: WordPiece error"):
        encode(Tokenizer(), ["a"])


# ------------------------------------------------------------------------------------------------------ chat templates

TEMPLATES = {
    "without end": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "died|took"),
    "memory": ("{{ 'a' * 10 ** 10 }}", "memory|cannot be rendered"),
    "doubling": ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
                 "memory|cannot be rendered"),
    "a long text": ("{% for i in range(99999) %}{{ 'a' * 200 }}{% endfor %}", r"writes 19,999,8\d\d bytes"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined|attribute"),
    "formats": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe|attribute|cannot be rendered"),
    "changes": ("{{ messages.append(1) }}", "unsafe"), "syntax": ("{% for %}", "cannot be rendered"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion|died"),
    "files": ("{% include '/etc/passwd' %}", "cannot be rendered"),
}  # fmt: skip


@POSIX
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("kind", some(TEMPLATES, "memory", "a long text", "classes"))
def test_templates_end_in_a_line(monkeypatch, kind, capfd):
    template, said = TEMPLATES[kind]
    monkeypatch.setattr(apart, "_LIMITS", apart._LIMITS.replace("(60, 60)", "(20, 20)"))
    with pytest.raises(ArtifactError, match=f"the chat template of a.bcap .*(?:{said})"):
        chat_templates.conversation(
            {"chat_template.jinja": template.encode()}, "a.bcap", [{"role": "user", "content": "x"}]
        )
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_sound_template():
    template = b"{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}|"
    files = {"chat_template.jinja": template, "special_tokens_map.json": b'{"bos_token": {"content": "<s>"}}'}
    said = [{"role": "system", "content": "caf\u00e9\r\n"}, {"role": "user", "content": "x{{ 1 }}"}]
    assert chat_templates.conversation(files, "a.bcap", said) == "<s><system>caf\u00e9\r\n<user>x{{ 1 }}|"


# ------------------------------------------------------------------------------------------ ends of texts, first tokens

ENDS = [
    [], {}, "x", -1, 10**30, True, None, float("nan"), 1.5, [1, "x", None, [2], True, 1e9], list(range(200_000)),
    [10**9], {"a": 1},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ends", ENDS, ids=lambda e: repr(e)[:20])
def test_ends_of_texts(ends, fitted, tmp_path, run):
    contents = container.read(fitted("rotary")[1])
    files = decoder.side_files(contents)
    files["generation_config.json"] = json.dumps({"eos_token_id": ends, "max_new_tokens": ends}).encode()
    path = tmp_path / "a.bcap"
    sections = tuple(FileSection(n, packing.pack(n, c)) for n, c in files.items())
    container.write(contents.__class__(**{**vars(contents), "files": sections}), path)
    assert all(type(i) is int for i in generation.ends_of(files))
    code, _, err = run("generate", path, "one", "--tokens", 3)
    assert (code, err) == (0, "") or (code == 2 and err.startswith("error: ") and "unexpected" not in err), err
    with contextlib.suppress(BytecapError):
        bytecap.load_model(path)


@pytest.mark.parametrize("first", ["x", 0.5, True, [1], {}, -1])
def test_first_tokens_that_are_none(first):
    with pytest.raises(CheckpointError, match=r"bos_token_id .* which is no token"):
        facts({"config.json": json.dumps({"model_type": "mpt", "bos_token_id": first}).encode()})


# ------------------------------------------------------------------------------------------------------- shared layers

TYINGS = [
    b"", b"[]", b"{}", b"[" * 10**6, b'{"blocks": 1, "sources": [], "ranks": {}}',
    b'{"blocks": "model.layers", "sources": [0, 0], "ranks": {"mlp.up_proj": 1e18}}',
    b'{"blocks": "model.layers", "sources": [0, 0], "ranks": {"mlp.up_proj": 1000000000000000000}}',
    b'{"blocks": "model.layers", "sources": [0, 0], "ranks": {"mlp.up_proj": NaN}}',
    b'{"blocks": "model.layers", "sources": [0, 0], "ranks": {"../x": 1}}',
    b'{"blocks": "model.layers", "sources": [0, 1.0], "ranks": {}}',
    b'{"blocks": "model.layers", "sources": [0, -1], "ranks": {}}',
    b'{"blocks": "model.layers", "sources": [0, true], "ranks": {}}',
    b'{"blocks": "model.layers", "sources": [0, 1], "ranks": {"mlp.up_proj": -5}}',
    b'{"blocks": "model.embed_tokens", "sources": [0, 0], "ranks": {}}',
    b'{"blocks": "__class__", "sources": [0, 0], "ranks": {}}',
    json.dumps({"blocks": "model.layers", "sources": [0] * 10**6, "ranks": {}}).encode(),
    json.dumps({"blocks": "model.layers", "sources": [0, 0], "ranks": {f"x{i}": 1 for i in range(10**5)}}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("content", TYINGS, ids=lambda c: c[:60].decode())
def test_descriptions_of_shared_layers(content, copied, fitted, tmp_path):
    (copied / tying.FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tying\.json"):
        load_checkpoint(copied)
    contents = container.read(fitted("rotary")[1])
    path = tmp_path / "a.bcap"
    more = FileSection(tying.FILE, packing.pack(tying.FILE, content))
    container.write(contents.__class__(**{**vars(contents), "files": (*contents.files, more)}), path)
    with pytest.raises((CheckpointError, ArtifactError)):
        bytecap.load_model(path)
