"""Texts, windows, and the three disjoint token sets."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bytecap import CheckpointError, TextError
from bytecap.model.sources import encoder, first_token
from bytecap.model.texts import Text, Window, cut_windows, load_text, read_documents, split_sets, tokenizer_encoder

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\f"), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def encode(tokenizer_json):
    return tokenizer_encoder(Tokenizer.from_str(tokenizer_json), 0)


def text_of(name, *runs):
    return Text(name, tuple(Window(tuple(r), len(r)) for r in runs))


class TestWindows:
    @given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 20))
    def test_every_token_but_the_first_is_predicted_once(self, ids, window):
        sizes = [1 + i % 3 for i in range(len(ids))]
        windows = cut_windows(ids, sizes, window)
        assert [t for w in windows for t in w.tokens[1:]] == ids[1:]
        assert sum(w.bytes for w in windows) == sum(sizes[1:])
        assert all(2 <= len(w.tokens) <= window + 1 for w in windows)
        for before, after in itertools.pairwise(windows):
            assert before.tokens[-1] == after.tokens[0]

    @pytest.mark.slow
    @given(WORDS)
    def test_every_byte_is_counted_once(self, encode, document):
        ((ids, sizes),) = encode([document])
        assert len(ids) == len(sizes)
        assert ids[0] == 0
        assert sizes[0] == 0
        assert min(sizes) >= 0
        assert sum(sizes) == len(document.encode())

    @pytest.mark.parametrize("first", [None, 5])
    def test_an_empty_document(self, tokenizer_json, first):
        ((ids, sizes),) = tokenizer_encoder(Tokenizer.from_str(tokenizer_json), first)([""])
        assert ids == ([] if first is None else [first])
        assert sum(sizes) == 0

    def test_without_a_first_token_nothing_is_put_in_front(self, tokenizer_json, encode):
        bare = tokenizer_encoder(Tokenizer.from_str(tokenizer_json), None)
        assert next(bare(["some words"]))[0] == next(encode(["some words"]))[0][1:]

    @given(st.lists(WORDS, max_size=5))
    def test_documents_do_not_change_one_another(self, encode, documents):
        assert list(encode(documents)) == [next(encode([d])) for d in documents]


class TestFiles:
    def test_documents_are_separated_by_form_feed(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("one\ftwo\n\f \f three", "utf-8")
        assert read_documents(path) == ["one", "two\n", " three"]

    def test_limits_are_spread_over_the_documents(self, tmp_path, encode):
        path = tmp_path / "a.txt"
        path.write_text("\f".join(f"document {i} " + "word " * 400 for i in range(20)), "utf-8")
        whole = load_text(path, encode, window=32)
        part = load_text(path, encode, window=32, limit=600)
        assert whole.tokens > 5000
        assert 400 <= part.tokens <= 800
        whole_tokens = {w.tokens for w in whole.windows}
        assert sum(w.tokens in whole_tokens for w in part.windows) > 0.7 * len(part.windows)

    def test_a_text_without_anything_to_predict(self, tmp_path, tokenizer_json):
        path = tmp_path / "a.txt"
        path.write_text("a", "utf-8")
        with pytest.raises(TextError, match="too short"):
            load_text(path, tokenizer_encoder(Tokenizer.from_str(tokenizer_json), None), window=8)

    @pytest.mark.parametrize(
        ("content", "said"), [(b"", "empty"), (b"\f\f \n", "empty"), (b"ab\xff", "not UTF-8 text: byte 2")]
    )
    def test_bad_files_are_named(self, tmp_path, content, said):
        path = tmp_path / "bad.txt"
        path.write_bytes(content)
        with pytest.raises(TextError, match=said) as caught:
            read_documents(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("name", ["missing.txt", "."])
    def test_files_that_cannot_be_read(self, tmp_path, name):
        with pytest.raises(TextError, match="cannot read the text"):
            read_documents(tmp_path / name)


RUNS = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=6), min_size=1, max_size=30)


class TestSets:
    @given(st.lists(RUNS, min_size=1, max_size=3), RUNS, st.integers(1, 60), st.integers(0, 5))
    def test_always_disjoint(self, calibration, held, tokens, seed):
        calib = [text_of(f"c{i}", *runs) for i, runs in enumerate(calibration)]
        try:
            sets = split_sets(calib, [text_of("e", *held)], tokens=tokens, correction_tokens=20, seed=seed)
        except TextError as exc:
            assert "too short" in str(exc)  # noqa: PT017 (either outcome is fine)
            return
        groups = [
            [w.tokens for w in sets.statistics], [w.tokens for w in sets.correction],
            [w.tokens for t in sets.evaluation for w in t.windows],
        ]  # fmt: skip
        assert len(set(groups[0])) == len(groups[0])
        assert not set(groups[0]) & set(groups[1])
        assert not set(groups[2]) & {*groups[0], *groups[1]}
        assert groups[0]
        assert groups[1]

    def test_the_seed_decides_the_order(self):
        calib = [text_of("c", *([i, i + 1, i + 2] for i in range(100)))]
        held = [text_of("e", [1000, 1001])]
        one, two, three = (
            split_sets(calib, held, tokens=40, correction_tokens=20, seed=s).statistics for s in (0, 0, 1)
        )
        assert one == two
        assert one != three

    def test_every_text_weighs_the_same(self):
        calib = [
            text_of("long", *([i, 7000 + i] for i in range(3000))),
            text_of("short", *([i, 50_000 + i] for i in range(50))),
        ]
        sets = split_sets(calib, [text_of("e", [1, 2])], tokens=60, correction_tokens=10, seed=0)
        short = sum(w.tokens[1] >= 50_000 for w in (*sets.statistics, *sets.correction)) / 70
        assert 0.4 < short < 0.6

    def test_correction_takes_at_most_an_eighth(self):
        calib = [text_of("c", *([i, i + 1] for i in range(80)))]
        sets = split_sets(calib, [text_of("e", [900, 901])], tokens=10**6, correction_tokens=10**6, seed=0)
        assert len(sets.correction) == 10
        assert len(sets.statistics) == 70


class TestTokenizer:
    def test_missing(self):
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
            encoder({})

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": null}'])
    def test_damaged(self, content):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json (cannot be read|is not valid|holds no)"):
            encoder({"tokenizer.json": content})

    @pytest.mark.parametrize(
        ("config", "token"), [(b"{}", None), (b'{"bos_token_id": 3}', 3), (b'{"bos_token_id": null}', None)]
    )
    def test_first_token(self, config, token):
        assert first_token({"config.json": config}) == token

    @pytest.mark.slow
    def test_the_embedded_model_is_as_good_as_its_notes_say(self):
        """About 1.22 bits per byte on its own evaluation text: units of the whole evaluation are right."""
        from bytecap.pipeline.score import score

        (found,) = score("demo", tokens=4096)
        assert found.bpb == pytest.approx(1.224, abs=0.08)
        assert found.bpb == pytest.approx(found.nats * found.tokens / math.log(2) / found.bytes)
        assert found.bpb_stderr < 0.08
