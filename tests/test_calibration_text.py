"""Calibration text by words: samples of the model, the embedded general text, files, and their weights."""

import math
import re
from dataclasses import fields

import pytest

import bytecap
from bytecap.errors import TextError, UsageError
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.model import sources
from bytecap.model.calibration_text import GENERAL, SELF, Source, general, general_documents, parse
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.defaults import SAMPLED_TOKENS, TOKENS
from bytecap.model.evaluation import Comparison, evaluate
from bytecap.model.sources import default_sources, default_tokens, load_sets
from bytecap.model.texts import Text, TokenSets, Window, split_sets
from bytecap.pipeline.quality import quality, say_narrow
from bytecap.progress import Silent
from bytecap.report.fit import page
from bytecap.report.fit.predicted import distance
from bytecap.report.plain import finite
from conftest import BUDGET, SMALL

TINY = {"tokens": 2_000, "evaluation_tokens": 500, "window": 64}


def windows(first, count, length=10):
    return tuple(Window((first + i, *range(length)), 0) for i in range(count))


class TestNames:
    def test_words_files_and_weights(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("a.txt", "b:2"):
            (tmp_path / name).write_text("text")
        assert parse(["self", "general:0.5", "a.txt:3", "b:2"]) == (
            Source(SELF), Source(GENERAL, 0.5), Source("a.txt", 3), Source("b:2"),
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["self:0", "self:-1", "general:x", "self:nan", "self:inf"])
    def test_weights_that_are_none(self, name):
        with pytest.raises(UsageError, match=re.escape(f"the weight in {name} is no positive number")):
            parse([name])

    def test_twice(self):
        with pytest.raises(UsageError, match="named twice; to draw it more often write self:2"):
            parse(["self", "self:3"])


class TestGeneralText:
    def test_what_is_held_is_never_calibrated_on(self):
        held, rest = set(general(held=True)), set(general(held=False))
        assert not held & rest
        assert held | rest == set(general_documents())
        assert len(held) > len(rest) / 6

    def test_many_kinds(self):
        text = "\n".join(general_documents())
        for piece in ("def ", "Alice", "Droits", "#include", "人"):
            assert piece.lower() in text.lower(), piece


class TestWeights:
    @pytest.mark.parametrize("weights", [(), (1.0, 1.0), (3.0, 1.0), (0.25, 0.75)])
    def test_tokens_follow_weights(self, weights):
        pools = [Text("a", windows(1000, 400)), Text("b", windows(2000, 400))]
        sets = split_sets(
            pools, [Text("c", windows(9000, 5))], tokens=2000, correction_tokens=200, seed=0, weights=weights
        )
        drawn = dict(sets.drawn)
        share = (weights or (1.0, 1.0))[0] / sum(weights or (1.0, 1.0))
        assert drawn["a"] + drawn["b"] == sum(w.predicted for w in (*sets.statistics, *sets.correction))
        assert drawn["a"] / (drawn["a"] + drawn["b"]) == pytest.approx(share, abs=0.02)

    def test_an_empty_pool_leaves_the_rest_to_others(self):
        pools = [Text("a", windows(1000, 3)), Text("b", windows(2000, 400))]
        sets = split_sets(pools, [], tokens=1000, correction_tokens=100, seed=0, weights=[5.0, 1.0])
        assert dict(sets.drawn)["a"] == 30
        assert sum(w.predicted for w in sets.statistics) >= 1000


class TestHeldOut:
    def test_correction_windows_know_their_text(self):
        pools = [Text("a", windows(1000, 90)), Text("b", windows(2000, 30))]
        sets = split_sets(pools, [], tokens=800, correction_tokens=90, seed=0, weights=[2.0, 1.0])
        found = {t.name: t.windows for t in sets.correction_texts()}
        assert found.keys() == {"a", "b"}
        assert all(w in pools[0].windows for w in found["a"])
        assert all(w in pools[1].windows for w in found["b"])
        assert sorted(w.tokens for ws in found.values() for w in ws) == sorted(w.tokens for w in sets.correction)

    def test_where_nobody_kept_them_they_are_one_text(self):
        sets = TokenSets(windows(0, 3), windows(10, 2), (), 0)
        assert [(t.name, t.windows) for t in sets.correction_texts()] == [("calibration", windows(10, 2))]


def comparison(name, tokens, nats, kl):
    rest = dict.fromkeys((f.name for f in fields(Comparison)), 0.0)
    return Comparison(**rest | {"name": name, "tokens": tokens, "nats_original": nats, "kl_nats": kl, "windows": None})


class TestDistance:
    def test_calibration_weighs_by_tokens_and_evaluation_by_text(self):
        parts = [comparison("x", 10, 3.0, 0.2), comparison("y", 1000, 4.0, 0.3)]
        held = [comparison(SELF, 300, 2.0, 0.1), comparison(GENERAL, 100, 6.0, 0.5)]
        found = quality(parts, held)
        assert found["text_distance"] == pytest.approx(
            {"calibration_nats": 3.0, "evaluation_nats": 3.5, "calibration_kl": 0.2, "evaluation_kl": 0.25}
        )
        assert [t["name"] for t in found["calibration_held_out"]] == [SELF, GENERAL]
        assert distance(found) == (
            "calibration 3.00 nats, evaluation 3.50; KL 0.2 on calibration's held-out windows, 0.25 on evaluation"
        )

    def test_without_held_windows_nothing_is_said(self):
        assert distance(quality([comparison("x", 10, 3.0, 0.2)])) == ""

    def test_without_predictions_only_the_loss_is_said(self):
        found = quality([comparison("x", 10, 3.0, math.nan)], [comparison("c", 10, 2.0, math.nan)])
        assert distance(finite(found)) == "calibration 2.00 nats, evaluation 3.00"


class TestNarrowText:
    @pytest.mark.parametrize(
        ("calibration", "sources", "kl", "said"),
        [
            (["a.txt"], ("a.txt",), 0.13, True),
            ("a.txt", ("a.txt",), 0.13, True),
            (["a.txt"], ("a.txt",), 0.12, False),
            (["a.txt", "self"], ("a.txt", SELF), 0.13, False),
            (None, (GENERAL,), 0.13, False),
            ([{"ids": 1}], ("calibration",), 0.13, False),
            (["a.txt"], ("a.txt",), math.nan, False),
        ],
    )
    def test_it_is_said_where_samples_may_help(self, calibration, sources, kl, said):
        reporter = Silent()
        sets = TokenSets(windows(0, 10, 500), windows(0, len(sources)), (), 0, sources=sources)
        job = Job(None, sets, 0, lambda *_: 0, "cpu", reporter, FitConfig(0, calibration=calibration))
        say_narrow(job, {"text_distance": {"calibration_kl": 0.1, "evaluation_kl": kl}})
        assert [("--calib self" in n) for n in reporter.notes] == [True] * said

    def test_little_text_is_said_first(self):
        reporter = Silent()
        sets = TokenSets(windows(0, 8, 500), windows(0, 1), (), 0, sources=("a.txt",))
        job = Job(None, sets, 0, lambda *_: 0, "cpu", reporter, FitConfig(0, calibration=["a.txt"]))
        say_narrow(job, {"text_distance": {"calibration_kl": 0.1, "evaluation_kl": 0.1}})
        [note] = reporter.notes
        assert note.startswith("a calibration text of 4,000 tokens is fitted too closely")

    def test_without_figures_nothing_is_said(self):
        reporter = Silent()
        say_narrow(Job(None, TokenSets((), (), (), 0), 0, lambda *_: 0, "cpu", reporter, FitConfig(0)), {})
        assert not reporter.notes


class TestSets:
    def test_default(self, model_directory):
        model = load_checkpoint(model_directory("rotary"))
        assert [s.name for s in default_sources(model, 100_000, "cpu")] == [SELF, GENERAL]
        asked = []

        def sampler(tokens):
            asked.append(tokens)
            return windows(10, -(-tokens // 64), 64)

        sets = load_sets(model, None, None, sampler=sampler, correction_tokens=500, reporter=Silent(), **TINY)
        names = dict(sets.drawn)
        assert set(names) == {SELF, GENERAL}
        assert asked == [1250]
        assert names[SELF] > 0.3 * sum(names.values())
        assert [t.name for t in sets.evaluation] == [GENERAL]

    def test_more_samples_where_they_are_cheap(self, model_directory, texts, monkeypatch):
        model = load_checkpoint(model_directory("rotary"))
        assert default_tokens(model, [], "cuda") == SAMPLED_TOKENS
        assert default_tokens(model, [], "cpu") == TOKENS
        assert default_tokens(model, [texts["calib"]], "cuda") == TOKENS
        monkeypatch.setattr(sources, "SAMPLED_WORK", 200_000.5 * model.parameters)
        assert default_tokens(model, [], "cuda") == 200_000
        monkeypatch.setattr(sources, "SAMPLED_WORK", 1000 * model.parameters)
        assert default_tokens(model, [], "cuda") == TOKENS

    @pytest.mark.slow
    def test_samples_repeat_by_seed(self, model_directory):
        model = load_checkpoint(model_directory("rotary"))
        options = {"correction_tokens": 500, "reporter": Silent(), **TINY}
        one, two, other = (load_sets(model, ["self"], None, seed=s, **options).statistics for s in (0, 0, 1))
        assert one == two != other

    def test_what_nothing_is_measured_on_is_not_read(self, model_directory, texts):
        model, reporter = load_checkpoint(model_directory("rotary")), Silent()
        sets = load_sets(
            model, texts["calib"], None, reporter=reporter, **TINY | {"evaluation_tokens": 0, "correction_tokens": 0}
        )
        assert sets.statistics
        assert not sets.evaluation
        assert not sets.correction
        (said,) = reporter.notes
        assert "for statistics" in said
        assert not any(word in said for word in ("evaluation", "correction", "disjoint"))
        with pytest.raises(TextError, match="at least one window is needed"):
            split_sets([], [], tokens=100, correction_tokens=0, seed=0)

    def test_the_embedded_model_has_texts_of_its_own(self):
        sets = load_sets(load_checkpoint("demo"), None, None, correction_tokens=500, reporter=Silent(), **TINY)
        assert [n for n, _ in sets.drawn] == ["calib.txt"]
        assert [t.name for t in sets.evaluation] == ["val.txt"]

    def test_self_needs_a_model_that_can_be_sampled(self, model_directory, texts, monkeypatch):
        model = load_checkpoint(model_directory("rotary"))
        monkeypatch.setattr("bytecap.model.sources.of_transformers", lambda _: False)
        assert [s.name for s in default_sources(model, 100_000, "cpu")] == [GENERAL]
        with pytest.raises(UsageError, match="give a text instead"):
            load_sets(model, ["self"], texts["val"], reporter=Silent(), **TINY)


@pytest.mark.slow
def test_a_fit_without_texts(model_directory, tmp_path):
    directory = model_directory("rotary")
    small = {**SMALL, "method": "uniform"}
    with pytest.warns(bytecap.BytecapWarning, match="no --calib given: samples of the model itself"):
        found = bytecap.fit(directory, BUDGET, store=tmp_path, **small)
    drawn = {t["name"]: t["tokens"] for t in found.report["calibration_texts"]}
    assert set(drawn) == {SELF, GENERAL}
    with pytest.warns(bytecap.BytecapWarning):
        again = bytecap.fit(directory, BUDGET, store=tmp_path, **small)
    assert again.data == found.data
    assert [t["name"] for t in found.report["calibration_held_out"]] == [SELF, GENERAL]
    assert sum(t["tokens"] for t in found.report["calibration_held_out"]) == found.report["correction_tokens"]
    model, shown = load_checkpoint(directory), found.report["calibration_held_out"][1]
    sets = load_sets(model, None, None, sampler=None, reporter=Silent(), **TINY | SMALL)
    text = next(t for t in sets.correction_texts() if t.name == GENERAL)
    assert shown["nats_original"] == pytest.approx(evaluate(model.module, text).nats, rel=1e-4)
    assert distance(found.report) in page(found.report, found.ledger()).replace("&#x27;", "'")
