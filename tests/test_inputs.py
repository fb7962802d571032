"""How text reaches a model: tokenizers in any state, first tokens, lengths, ids, and models that look ahead."""

import json
import shutil

import pytest
import torch

from bytecap import CheckpointError, TextError
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.inputs import check_causal, facts, refuse_encoder_decoder, vocabulary_of
from bytecap.model.sources import check_model, encoder, first_token, window_limit
from bytecap.model.texts import check_known, load_text
from bytecap.model.tokenization import read_tokenizer
from bytecap.pipeline.score import score
from conftest import build, save


def files(**config):
    return {"config.json": json.dumps(config).encode()}


def tokens_of(found):
    return next(encoder(found)(["a text of some words, and then some more of them"]))


@pytest.mark.usefixtures("warm")
class TestTokenizerState:
    @pytest.mark.parametrize("spoil", ["truncation", "padding", "both", "dropout"])
    def test_what_was_left_switched_on_changes_nothing(self, tokenizer_json, spoil):
        from tokenizers import Tokenizer

        plain = {"tokenizer.json": tokenizer_json.encode()}
        changed = Tokenizer.from_str(tokenizer_json)
        if spoil in {"truncation", "both"}:
            changed.enable_truncation(4)
        if spoil in {"padding", "both"}:
            changed.enable_padding(length=64, pad_id=0, pad_token="<end>")  # noqa: S106 (no password)
        text = changed.to_str()
        if spoil == "dropout":
            text = text.replace('"dropout":null', '"dropout":0.9')
            assert '"dropout":0.9' in text
        assert tokens_of({"tokenizer.json": text.encode()}) == tokens_of(plain)

    @pytest.mark.slow
    def test_only_a_vocabulary_and_merges(self, tmp_path, tokenizer_json):
        """transformers converts them; the files are kept byte for byte, and it is said."""
        parsed = json.loads(tokenizer_json)["model"]
        source = tmp_path / "source"
        build("transposed").save_pretrained(source)
        (source / "vocab.json").write_text(json.dumps(parsed["vocab"]), "utf-8")
        merges = [" ".join(m) if isinstance(m, list) else m for m in parsed["merges"]]
        (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
        model = load_checkpoint(source)
        assert model.files["merges.txt"] == (source / "merges.txt").read_bytes()
        assert any("vocab.json, merges.txt are converted by transformers" in n for n in model.notes)
        found = {"config.json": model.files["config.json"], "tokenizer.json": tokenizer_json.encode()}
        assert tokens_of(model.files) == tokens_of(found)

    @pytest.mark.slow
    def test_files_that_cannot_be_converted(self, monkeypatch):
        monkeypatch.setattr("bytecap.model.tokenization._installed", lambda _: True)
        with pytest.raises(CheckpointError, match=r"cannot convert tokenizer\.model"):
            read_tokenizer({**files(model_type="llama"), "tokenizer.model": b"rubbish"})

    @pytest.mark.slow
    def test_packages_that_read_a_lone_tokenizer_model_are_named(self, monkeypatch):
        monkeypatch.setattr("bytecap.model.tokenization._installed", lambda m: m != "google.protobuf")
        with pytest.raises(
            CheckpointError, match=r"^tokenizer\.model cannot be read without protobuf: pip install proto"
        ):
            read_tokenizer({**files(model_type="llama"), "tokenizer.model": b"rubbish"})

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["bpe", "unigram"])
    def test_a_lone_tokenizer_model_is_read_as_transformers_reads_it(self, tmp_path, kind):
        sentencepiece = pytest.importorskip("sentencepiece")
        pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
        from transformers import AutoTokenizer

        text = ["the quick brown fox jumps over the lazy dog", "a naïve façade: déjà vu", "the dog and the fox"] * 30
        (tmp_path / "text.txt").write_text("\n".join(text), "utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, minloglevel=2,
            byte_fallback=True, model_type=kind, hard_vocab_limit=False, character_coverage=0.98,
        )  # fmt: skip
        (tmp_path / "text.txt").unlink()
        (tmp_path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
        found = {n: (tmp_path / n).read_bytes() for n in ("config.json", "tokenizer.model")}
        ours, theirs = read_tokenizer(found), AutoTokenizer.from_pretrained(tmp_path)
        for line in ("the dog and a fox", "déjà  vu", "xyz \u65e5\u672c"):
            ids = ours.encode(line, add_special_tokens=False).ids
            assert ids == theirs(line, add_special_tokens=False)["input_ids"]
            assert ours.decode(ids).split() == line.split()

    def test_a_tokenizer_json_makes_the_rest_needless(self, model_directory, tmp_path):
        source = shutil.copytree(model_directory("rotary"), tmp_path / "source")
        (source / "vocab.json").write_text("{}", "utf-8")
        (source / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
        found = load_checkpoint(source).files
        assert "vocab.json" not in found
        assert found["chat_template.jinja"] == b"{{ messages }}"


class TestFacts:
    @pytest.mark.parametrize(
        ("config", "first", "positions"),
        [
            ({"model_type": "llama", "bos_token_id": 7, "max_position_embeddings": 64}, 7, 64),
            ({"model_type": "llama", "bos_token_id": None, "max_position_embeddings": 64}, None, 64),
            ({"model_type": "gpt2", "bos_token_id": 5, "n_positions": 32}, 5, 32),
            ({"model_type": "mpt", "max_seq_len": 48}, None, 48),
            ({"model_type": "rwkv", "context_length": 96, "bos_token_id": 0}, 0, 96),
            ({"model_type": "mamba", "bos_token_id": 3}, 3, None),
            ({"model_type": "gemma3", "text_config": {"bos_token_id": 9, "max_position_embeddings": 80}}, 9, 80),
            ({"model_type": "no such kind", "bos_token_id": 4, "n_ctx": 16}, 4, 16),
            ({"model_type": "no such kind", "text_config": {"bos_token_id": 4, "n_ctx": 16}}, 4, 16),
            ({}, None, None),
        ],
    )
    def test_first_token_and_length_under_any_name(self, config, first, positions):
        found = facts(files(**config))
        assert (found.first, found.positions) == (first, positions)
        assert first_token(files(**config)) == first

    def test_a_first_token_below_zero(self):
        with pytest.raises(CheckpointError, match="bos_token_id '-1', which is no token"):
            facts(files(model_type="llama", bos_token_id=-1))

    def test_the_window_follows(self, model_directory, tmp_path, edited_config):
        source = shutil.copytree(model_directory("rotary"), tmp_path / "source")
        edited_config(source, max_position_embeddings=48)
        assert window_limit(load_checkpoint(source), 512) == 48


class TestIds:
    def test_rows_of_the_embedding_count_and_not_the_config(self, model_directory):
        model = load_checkpoint(model_directory("rotary"))
        model.module.config.vocab_size = 10**6
        assert vocabulary_of(model.module) == 288
        assert vocabulary_of(torch.nn.Linear(2, 2)) is None

    def test_a_token_that_only_the_evaluation_text_holds(self, model_directory, texts, tmp_path):
        from tokenizers import AddedToken, Tokenizer

        source = shutil.copytree(model_directory("rotary"), tmp_path / "source")
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken("<|call|>")])
        tokenizer.save(str(source / "tokenizer.json"))
        text = tmp_path / "text.txt"
        content = texts["val"].read_text("utf-8")
        text.write_text(f"{content[:3000]}<|call|>{content[3000:]}", "utf-8")
        with pytest.raises(TextError, match=r"text\.txt: the tokenizer gives token 288, but the model's vocabulary"):
            score(source, text, tokens=256)
        assert score(source, texts["val"], tokens=256)

    def test_a_first_token_beyond_the_vocabulary(self, model_directory, texts, tmp_path, edited_config):
        source = shutil.copytree(model_directory("rotary"), tmp_path / "source")
        edited_config(source, bos_token_id=288)
        with pytest.raises(TextError, match="token 288"):
            score(source, texts["val"], tokens=256)

    @pytest.mark.parametrize("ids", [[3, -1], [3, 4]])
    def test_range(self, ids):
        with pytest.raises(TextError, match="only 4 entries"):
            check_known(ids, 4, "x")
        check_known([], 4, "x")
        check_known([3], None, "x")

    def test_texts_are_checked_whole_within_what_is_read(self, tmp_path):
        path = tmp_path / "t.txt"
        path.write_text("a" * 50, "utf-8")

        def encode(documents):
            return (([0] * 49 + [9], [1] * 50) for _ in documents)

        with pytest.raises(TextError, match="token 9"):
            load_text(path, encode, window=4, limit=8, vocabulary=9)


BOTH_WAYS = {
    "BertConfig": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "XLNetConfig": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
}


class TestCausality:
    @pytest.mark.parametrize("name", BOTH_WAYS)
    def test_models_that_see_both_ways_are_refused(self, name, tmp_path, tokenizer_json, texts):
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, name)(vocab_size=288, **BOTH_WAYS[name])
        source = save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "m", tokenizer_json)
        with pytest.raises(CheckpointError, match=r"LMHeadModel\) is no causal language model"):
            score(source, texts["val"], tokens=256)

    @pytest.mark.parametrize("kind", ["rotary", "biased", "transposed", "offset"])
    def test_causal_ones_are_not(self, model_directory, kind):
        check_model(load_checkpoint(model_directory(kind)))

    def test_a_leak_to_one_token_behind(self):
        class Peeking(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(16, 16)

            def forward(self, ids):
                x = self.table(ids)
                return x + 0.01 * torch.roll(x, -1, 1)

        torch.manual_seed(0)
        with pytest.raises(CheckpointError, match="no causal"):
            check_causal(Peeking(), "peeking", 16)
        check_causal(torch.nn.Embedding(16, 16), "table", 16)

    @pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
    def test_encoder_decoders_are_named(self, kind):
        with pytest.raises(CheckpointError, match=f"is an encoder-decoder \\({kind}\\)"):
            refuse_encoder_decoder(files(model_type=kind), "m")

    def test_logits_that_are_not_finite(self):
        table = torch.nn.Embedding(16, 16)
        with torch.no_grad():
            table.weight[3] = float("nan")
        with pytest.raises(Exception, match="logits that are not finite"):
            check_causal(table, "broken", 16)
