"""`generate`: the cache changes nothing, every end is seen, templates stay in their sandbox, pieces are whole."""

import io
import json
import shutil
import sys

import pytest
import torch
from tokenizers import Tokenizer

import bytecap
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline import generation
from bytecap.pipeline.chat_templates import template_of
from bytecap.pipeline.generation import Sampling, continued, draw, ends_of, generate, pieces
from conftest import BUDGET, KINDS, SMALL, build, save

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
GREEDY = Sampling(temperature=0)


@pytest.fixture
def endless(model_directory, tmp_path):
    """Function: a copy of a tiny model whose config names no end; files are added to it."""

    def copy(kind="rotary", **files):
        path = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(model_directory(kind, dtype=torch.float32), path)
        config = json.loads((path / "config.json").read_text("utf-8")) | {"eos_token_id": None}
        (path / "config.json").write_text(json.dumps(config), "utf-8")
        (path / "generation_config.json").unlink(missing_ok=True)
        for name, value in files.items():
            text = value if isinstance(value, str) else json.dumps(value)
            (path / name.replace("__", ".")).write_text(text, "utf-8")
        return path

    return copy


def plainly(model, ids, count):
    """Likeliest tokens, everything read anew for each."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model.module(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


class TestTokens:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_cache_changes_nothing(self, endless, kind):
        model = load_checkpoint(endless(kind))
        lengths = []
        model.module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        found = list(continued(model, [5, 40, 7], 12, GREEDY, "cpu"))
        assert lengths == [3] + [1] * 11
        assert found == plainly(model, [5, 40, 7], 12)

    def test_a_model_without_a_cache_reads_everything_anew(self, endless):
        model = load_checkpoint(endless())
        wanted, real = list(continued(model, [5, 40, 7], 6, GREEDY, "cpu")), model.module

        class Plain(torch.nn.Module):
            lengths = ()

            def forward(self, ids):
                self.lengths = (*self.lengths, ids.shape[1])
                return real(ids).logits

        model.module = Plain()
        assert list(continued(model, [5, 40, 7], 6, GREEDY, "cpu")) == wanted
        assert model.module.lengths == (3, 4, 5, 6, 7, 8)

    def test_when_positions_are_used_up_the_older_half_is_forgotten(self, endless):
        path = endless("transposed")
        model = load_checkpoint(path)
        limit = model.config()["n_positions"]
        lengths = []
        model.module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        found = list(continued(model, list(range(1, 251)) * 2, 12, GREEDY, "cpu"))
        assert len(found) == 12
        assert lengths == [limit, limit // 2] + [1] * 10

    def test_every_end_stops_it(self, endless):
        path = endless()
        made = list(continued(load_checkpoint(path), [5, 40, 7], 12, GREEDY, "cpu"))
        at = next(i for i in range(2, 12) if made[i] not in made[:i])
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [287, made[at]]}), "utf-8")
        assert list(continued(load_checkpoint(path), [5, 40, 7], 12, GREEDY, "cpu")) == made[:at]

    def test_ends_are_found_in_every_file(self, tokenizer_json):
        end = Tokenizer.from_str(tokenizer_json).token_to_id("<end>")
        files = {
            "config.json": {"eos_token_id": 3, "text_config": {"eos_token_id": [4]}},
            "generation_config.json": {"eos_token_id": [5, 6]},
            "tokenizer_config.json": {"eos_token": {"content": "<end>"}},
        }
        found = {n: json.dumps(f).encode() for n, f in files.items()} | {"tokenizer.json": tokenizer_json.encode()}
        assert ends_of(found) == {3, 4, 5, 6, end}
        assert ends_of({"config.json": b"{}", "generation_config.json": b"[1"}) == frozenset()


class TestSampling:
    LOGITS = torch.log(torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05]))

    def drawn(self, **how):
        generator = torch.Generator().manual_seed(0)
        return {draw(self.LOGITS, Sampling(temperature=1.0, **how), generator) for _ in range(400)}

    def test_who_is_drawn(self):
        assert self.drawn() == {0, 1, 2, 3, 4}
        assert self.drawn(top_k=2) == {0, 2}
        assert self.drawn(top_k=99) == {0, 1, 2, 3, 4}
        assert self.drawn(top_p=0.8) == {0, 2, 3}  # 0.4 + 0.3 are not enough
        assert self.drawn(top_p=0.69) == {0, 2}
        assert self.drawn(top_p=0.01) == {0}
        assert self.drawn(top_p=0.8, top_k=2) == {0, 2}

    def test_temperature_zero_takes_the_likeliest(self):
        assert draw(self.LOGITS, GREEDY, None) == 0

    @pytest.mark.parametrize(
        ("how", "said"),
        [({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0}, "top-p"),
         ({"top_p": 1.5}, "top-p"), ({"top_k": -1}, "top-k")],
    )  # fmt: skip
    def test_numbers_out_of_range(self, how, said):
        with pytest.raises(bytecap.UsageError, match=said):
            Sampling(**how)

    def test_a_seed_gives_the_same_text_and_another_one_another(self, endless):
        model = load_checkpoint(endless())
        one, same, other = (
            list(continued(model, [5, 40, 7], 30, Sampling(seed=s), "cpu")) for s in (1, 1, 2)
        )  # fmt: skip
        assert one == same != other


class TestPieces:
    @pytest.mark.parametrize("text", ["The table", "na\u00efve \u6f22\u5b57 \U0001f642!", " a  b\n"])
    def test_pieces_are_whole_and_make_the_text(self, tokenizer_json, text):
        tokenizer = Tokenizer.from_str(tokenizer_json)
        found = list(pieces(tokenizer, iter(tokenizer.encode(text).ids)))
        assert "".join(found) == text
        assert len(found) > 1
        assert not any("\ufffd" in piece for piece in found)

    def test_a_text_that_ends_inside_a_character_is_shown_as_far_as_it_goes(self, tokenizer_json):
        tokenizer = Tokenizer.from_str(tokenizer_json)
        ids = tokenizer.encode("ab\u6f22").ids[:-1]
        assert "".join(pieces(tokenizer, iter(ids))) == tokenizer.decode(ids)

    def test_words_of_a_tokenizer_that_strips_their_first_space_stay_apart(self):
        from tokenizers import decoders, models, pre_tokenizers

        words = {"\u2581one": 0, "\u2581two": 1, "\u2581three": 2}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="\u2581one"))  # noqa: S106 (no password)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        assert list(pieces(tokenizer, iter([1, 2]), [0])) == [" two", " three"]

    def test_the_first_piece_comes_before_the_second_token_is_made(self, endless):
        model = load_checkpoint(endless())
        passes = []
        model.module.register_forward_pre_hook(lambda *_: passes.append(1))
        made = generate(model, "The table", tokens=20, sampling=Sampling(seed=3))
        next(made)
        assert len(passes) < 20
        list(made)
        assert len(passes) == 20


@pytest.mark.usefixtures("warm")
class TestChat:
    def test_the_template_is_where_the_model_has_it(self):
        config = {"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE}).encode()}
        assert template_of(config) == TEMPLATE
        assert template_of({**config, "chat_template.jinja": b"own"}) == "own"
        several = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]
        assert template_of({"tokenizer_config.json": json.dumps({"chat_template": several}).encode()}) == "y"
        assert template_of({}) is None

    @pytest.mark.slow
    def test_a_question_is_put_into_the_template(self, endless, monkeypatch):
        path = endless(chat_template__jinja=TEMPLATE)
        seen = []
        real = generation.continued
        monkeypatch.setattr(generation, "continued", lambda m, ids, *a: seen.append(ids) or real(m, ids, *a))
        list(generate(path, "Why?", chat=True, system="Be brief.", tokens=2))
        tokenizer = Tokenizer.from_str((path / "tokenizer.json").read_text("utf-8"))
        assert tokenizer.decode(seen[0]) == "<system>Be brief.<user>Why?<assistant>"
        list(generate(path, "Why?", tokens=2))
        assert tokenizer.decode(seen[1]) == "Why?"  # behind the token that begins every document, which is not shown

    @pytest.mark.slow
    def test_a_template_survives_the_file(self, endless, texts, tmp_path):
        path = endless(chat_template__jinja=TEMPLATE, tokenizer_config__json={"eos_token": "<end>"})
        out = tmp_path / "chat.bcap"
        bytecap.fit(
            path, BUDGET, method="uniform", calibration=texts["calib"], evaluation=texts["val"], output=out, **SMALL
        )
        assert isinstance("".join(generate(out, "Why?", chat=True, tokens=3, sampling=GREEDY)), str)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "template",
        ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}",
         "{% for m in messages %}", "{{ 1 / 0 }}"],
    )  # fmt: skip
    def test_a_template_cannot_leave_its_sandbox_and_its_errors_are_ours(self, endless, template):
        with pytest.raises(bytecap.ArtifactError, match=r"the chat template of .* cannot be rendered"):
            generate(endless(chat_template__jinja=template), "Why?", chat=True)

    @pytest.mark.slow
    def test_no_class_that_a_config_names_is_looked_up(self, endless):
        path = endless(
            chat_template__jinja=TEMPLATE,
            tokenizer_config__json={"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
            evil__py="raise SystemExit('foreign code ran')",
        )
        list(generate(path, "Why?", chat=True, tokens=1))

    def test_mistakes(self, endless):
        path = endless()
        with pytest.raises(bytecap.ArtifactError, match="no chat template: leave --chat out"):
            generate(path, "Why?", chat=True)
        with pytest.raises(bytecap.UsageError, match="--chat"):
            generate(path, "Why?", system="Be brief.")
        (path / "tokenizer.json").unlink()
        with pytest.raises(bytecap.ArtifactError, match="no tokenizer"):
            generate(path, "Why?")


class TestCommand:
    @pytest.mark.slow
    def test_the_prompt_in_every_way(self, run, endless, monkeypatch):
        path = endless()
        common = ("-n", 4, "--temperature", 0)
        code, out, _ = run("generate", path, "The table", *common)
        assert code == 0
        assert out.startswith("The table")
        assert out.endswith("\n")
        for arguments in (("-p", "The table"), ("--prompt", "The table")):
            assert run("generate", path, *arguments, *common)[1] == out
        monkeypatch.setattr(sys, "stdin", io.StringIO("The table"))
        assert run("generate", path, "-", *common)[1] == out
        assert json.loads(run("generate", path, "The table", *common, "--json")[1])["text"] == out[9:-1]

    def test_mistakes_are_one_line(self, refused, endless):
        path = endless()
        assert "once" in refused("generate", path)
        assert "once" in refused("generate", path, "a", "-p", "b")
        assert "top-p" in refused("generate", path, "a", "--top-p", 2)
        assert "unknown device" in refused("generate", path, "a", "--device", "tpu")

    def test_control_sequences_are_shown_and_not_sent(self, run, endless):
        _, out, _ = run("generate", endless(), "\x1b[31mred\tb", "-n", 0)
        assert out == "\\x1b[31mred\tb\n"


@pytest.mark.slow
def test_a_tied_model_keeps_a_cache_for_every_layer(made):
    model = load_checkpoint(made[0])
    found = list(continued(model, [5, 40, 7], 8, GREEDY, "cpu"))
    assert found == plainly(model, [5, 40, 7], 8)[: len(found)]


def test_a_tokenizer_that_makes_no_token_of_the_prompt_is_said(endless, edited_config):
    path = endless()
    edited_config(path, bos_token_id=None)
    with pytest.raises(bytecap.UsageError, match="no token"):
        generate(path, "")


def test_models_of_any_dtype(tmp_path, tokenizer_json):
    path = save(build("rotary", dtype=torch.float16), tmp_path, tokenizer_json)
    assert isinstance("".join(generate(path, "The", tokens=2)), str)
