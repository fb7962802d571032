"""Side files come back byte for byte, small ones stay small, and damage is reported, never a crash."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
import zlib
from importlib.resources import files
from typing import Any

import brotli
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecap.errors import CorruptError
from bytecap.format.coders import leb
from bytecap.format.sidefiles import bpe_merges, dictionary, packing
from bytecap.format.sidefiles.packing import pack, unpack
from bytecap.pipeline import background

pytestmark = pytest.mark.coverage

DEMO = files("bytecap") / "data" / "demo"
STYLES: list[dict[str, Any]] = [
    {"indent": 2},
    {"indent": 4},
    {"indent": 1},
    {"indent": "\t"},
    {"separators": (",", ":")},
    {},
]


def bpe(merges: list[tuple[str, str]], base: str = "abcd", special: tuple[str, ...] = ("<s>",)) -> dict[str, Any]:
    """A byte-pair tokenizer in the usual order: specials, letters, merged tokens."""
    names = [*special, *base, *dict.fromkeys(a + b for a, b in merges)]
    vocab = {n: i for i, n in enumerate(dict.fromkeys(names))}
    model = {"type": "BPE", "unk_token": None, "vocab": vocab, "merges": [list(m) for m in merges]}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "model": model}


@st.composite
def merge_lists(draw: st.DrawFn) -> list[tuple[str, str]]:
    tokens = list("abcd")
    merges = []
    for _ in range(draw(st.integers(0, 12))):
        merge = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if len("".join(merge)) <= 20 and "".join(merge) not in tokens:
            merges.append(merge)
            tokens.append("".join(merge))
    return merges


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """No usual words and little patience: damage tests unpack thousands of times."""
    monkeypatch.setattr(bpe_merges, "WORDS", ())
    monkeypatch.setattr(bpe_merges, "_SQUARES", 1 << 17)


SMALL = json.dumps(
    bpe([("a", "b"), ("c", "d"), ("ab", "cd"), ("a", "a"), ("d", "ab"), ("abcd", "aa"), ("b", "b"), ("bb", "c")])
).encode()


def structured(content: bytes) -> list[bytes]:
    """Every structured packing on offer, smallest or not."""
    return packing._dismantle(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_demo_files_come_back_and_are_small(name: str) -> None:
    content = (DEMO / name).read_bytes()
    packed = pack(name, content)
    assert unpack(name, packed) == content
    assert len(packed) < 0.7 * len(brotli.compress(content, quality=11))


@pytest.mark.slow
def test_demo_tokenizer_is_spelled() -> None:
    content = (DEMO / "tokenizer.json").read_bytes()
    numbered, spelled = structured(content)
    assert len(spelled) < 0.88 * len(numbered) < 0.3 * len(brotli.compress(content, quality=11))
    assert unpack("t", numbered) == content


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@settings(max_examples=100, deadline=None)
def test_any_bytes_come_back(content: bytes) -> None:
    packed = pack("x", content)
    assert unpack("x", packed) == content
    assert len(packed) <= 1 + min(len(content), len(brotli.compress(content, quality=11)))


@pytest.mark.slow
@given(
    merges=merge_lists(),
    style=st.sampled_from(STYLES),
    escape=st.booleans(),
    end=st.sampled_from(["", "\n", "\r\n"]),
    letters=st.sampled_from(["abcd", "abcdé\u2581", "abcd\u0120\U0001f600"]),
    strings=st.booleans(),
    first=st.booleans(),
    last=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_every_writing_style_comes_back(
    merges: list[tuple[str, str]],
    style: dict[str, Any],
    *,
    escape: bool,
    end: str,
    letters: str,
    strings: bool,
    first: bool,
    last: bool,
) -> None:
    tokenizer = bpe(merges, letters)
    model = tokenizer["model"]
    if last:
        model["vocab"]["<end>"] = len(model["vocab"])
    if strings:
        model["merges"] = [" ".join(m) for m in model["merges"]]
    if first:
        tokenizer["model"] = dict(reversed(model.items()))
    content = (json.dumps(tokenizer, ensure_ascii=escape, **style) + end).encode()
    assert unpack("t", pack("t", content)) == content
    found = structured(content)
    assert found
    assert all(unpack("t", data) == content for data in found)


def shuffled(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {n: i for i, n in enumerate(reversed(vocab))}


def gaps(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["far"] = 1000


def foreign(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].append(["z", "z"])


def repeated(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"] *= 2


def triples(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"] = ["a b c", ["a"], 3, None]


def wordpiece(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["merges"]
    tokenizer["model"] |= {"type": "WordPiece", "continuing_subword_prefix": "##"}


def unigram(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["\u2581a", -2.5e-07]]}


def truths(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"] = {"a": False, "b": True}


def byte_fallback(tokenizer: dict[str, Any]) -> None:
    names = [f"<0x{i:02X}>" for i in range(256)] + list(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = {n: i for i, n in enumerate(names)}


@pytest.mark.parametrize(
    "change", [shuffled, gaps, foreign, repeated, triples, wordpiece, unigram, truths, byte_fallback]
)
def test_other_tokenizers_come_back(change: Any) -> None:
    tokenizer = json.loads(SMALL)
    change(tokenizer)
    for style in STYLES:
        content = json.dumps(tokenizer, ensure_ascii=False, **style).encode()
        assert unpack("t", pack("t", content)) == content


@pytest.mark.parametrize(
    "content",
    [
        b'{"vocab": {"a": 0, "a": 1}, "merges": []}',
        b'{"vocab": {"a" :0}, "merges": ["a a"]}',
        b'{"vocab":{"\\ud800":0},"merges":[]}',
        b'{"vocab": {"": 0}, "merges": [" ", " "]}',
        b'{"vocab": ' + b"[" * 5000,
        b'{"merges": ' + b"[" * 100_000 + b', "vocab": {"a": 0}',
        b'"vocab": {}"merges": []',
        b'{"vocab": {"a": ' + b"9" * 5000 + b"}}",
        b'\xff"vocab": {"a": 0}',
    ],
)
def test_lookalikes_come_back(content: bytes) -> None:
    assert unpack("t", pack("t", content)) == content


@pytest.mark.slow
def test_a_trained_tokenizer_comes_back() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([(DEMO / "val.txt").read_text(encoding="utf8")[:20_000]], 400, show_progress=False)
    for pretty in (False, True):
        content = made.to_str(pretty).encode()
        packed = pack("t", content)
        assert unpack("t", packed) == content
        assert len(packed) < 0.4 * len(brotli.compress(content, quality=11))


def test_merges_that_do_not_follow_from_their_spelling_are_numbered() -> None:
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]  # "abc" encodes as ab|c
    assert bpe_merges.write("abc", merges) == b""
    assert bpe_merges.write((), merges) == b""
    content = json.dumps(bpe(merges)).encode()
    assert len(structured(content)) == 1
    assert unpack("t", structured(content)[0]) == content


@given(merge_lists())
@settings(max_examples=25, deadline=None)
def test_spelling_comes_back_or_declines(merges: list[tuple[str, str]]) -> None:
    data = bpe_merges.write("abcd", merges)
    assert not data or bpe_merges.read(data, "abcd", len(merges)) == merges


@pytest.mark.usefixtures("brief")
def test_truncation_and_excess_are_reported() -> None:
    plain = b"It was a bright cold day in April, and the clocks were striking thirteen. " * 3
    config = (DEMO / "config.json").read_bytes()
    for content in (plain, config):
        assert pack("x", content)[0] in {1, 3}
    for data in (pack("x", plain), pack("x", config), *structured(SMALL)):
        for end in range(len(data)):
            with pytest.raises(CorruptError, match=r"^x: "):
                unpack("x", data[:end])
        with pytest.raises(CorruptError):
            unpack("x", data + b"\0")


@pytest.mark.usefixtures("brief")
def test_flipped_bits_never_crash() -> None:
    plain = pack("x", b"It was a bright cold day in April, and the clocks were striking thirteen. " * 3)
    for data in (plain, pack("x", (DEMO / "config.json").read_bytes()), *structured(SMALL)):
        for at in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[at // 8] ^= 1 << at % 8
            with contextlib.suppress(CorruptError):
                assert len(unpack("x", bytes(damaged), limit=1 << 16)) <= 1 << 16


@given(st.binary(max_size=80), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_noise_never_crashes(noise: bytes, kind: int) -> None:
    with contextlib.suppress(CorruptError):
        unpack("x", bytes([kind]) + noise, limit=1000)


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_bombs_are_bounded(monkeypatch: pytest.MonkeyPatch, *, old: bool) -> None:
    real = brotli.Decompressor

    class Old:
        """Brotli's interface before output could be rationed."""

        def __init__(self) -> None:
            self.real = real()

        def process(self, data: bytes) -> bytes:
            return self.real.process(data)  # type: ignore[no-any-return]

        def is_finished(self) -> bool:
            return self.real.is_finished()  # type: ignore[no-any-return]

    zeros = bytes(1 << 25)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bombs = [b"\1" + brotli.compress(zeros, quality=5), b"\3" + deflate.compress(zeros) + deflate.flush()]
    doubling = b"\0\0" + bytes(range(60)) * 2  # merge i joins token i to itself
    places = leb(0) + leb(0) + leb(2) + leb(60) + leb(len(doubling))
    bombs += [bytes([2, 0, 0]) + bombs[0], bytes([2, 128, 64]) + places + doubling + b'\0["a"]']
    del zeros
    if old:
        monkeypatch.setattr(brotli, "Decompressor", Old)
        assert unpack("x", pack("x", SMALL * 2)) == SMALL * 2
        # only the input is rationed, and those zeros are a handful of bytes: here is something bulkier
        noise = np.random.default_rng(0).bytes(1 << 19)
        bombs = [b"\1" + brotli.compress(noise), bombs[3]]
    tracemalloc.start()
    for bomb in bombs:
        with pytest.raises(CorruptError, match="more than"):
            unpack("x", bomb, limit=1 << 18)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_the_limit_is_exact() -> None:
    for content in (b"abc", b"ab" * 500, SMALL, bytes(100_000), (DEMO / "config.json").read_bytes()):
        data = pack("x", content)
        assert unpack("x", data, limit=len(content)) == content
        with pytest.raises(CorruptError):
            unpack("x", data, limit=len(content) - 1)


def test_the_usual_text_never_changes() -> None:
    """Files already written refer to it."""
    assert zlib.crc32(dictionary.TEMPLATE) == 3578013093
    assert zlib.crc32(" ".join(dictionary.WORDS).encode()) == 836526048


class TestAhead:
    """Packing in a process of its own."""

    LARGE = json.dumps({"model": {"vocab": {f"token {i}": i for i in range(4000)}}}).encode()

    @pytest.mark.slow
    def test_it_gives_the_same_packing(self) -> None:
        background._finished.clear()
        background.start({"tokenizer.json": self.LARGE, "config.json": b"{}"})
        begun = background._begun["tokenizer.json", self.LARGE]
        assert ("config.json", b"{}") not in background._begun  # not worth a process
        assert begun.wait() == packing.pack("tokenizer.json", self.LARGE)
        assert background.packed("tokenizer.json", self.LARGE) == begun.result
        assert not background._begun
        background.start({"tokenizer.json": self.LARGE})
        assert not background._begun  # done before

    def test_few_are_kept(self) -> None:
        for i in range(40):
            background.packed("config.json", b"%d" % i)
        assert len(background._finished) <= 16

    @pytest.mark.parametrize("command", ["/nowhere/python", "/bin/false", ""])
    def test_without_a_process_it_is_packed_here(self, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
        background._finished.clear()
        monkeypatch.setattr(background.sys, "executable", command)
        background.start({"tokenizer.json": self.LARGE})
        assert background.packed("tokenizer.json", self.LARGE) == packing.pack("tokenizer.json", self.LARGE)
