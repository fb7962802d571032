"""The best model for so many bytes: who is left out and why, the same bytes for all, and the file that is kept."""

import json
import math
import shutil
from pathlib import Path

import pytest

import bytecap
from bytecap.errors import BudgetError, UsageError
from bytecap.format.container import parse
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline import choose as module
from bytecap.pipeline import contenders
from bytecap.pipeline.choose import choose
from bytecap.progress import Silent
from bytecap.report.choice import page
from bytecap.report.chosen import print_choice
from pages import sound

SMALL = {"method": "uniform", "tokens": 2000, "short_tokens": 1000, "evaluation_bytes": 3000, "window": 128}
FAST = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]


@pytest.fixture(scope="module")
def two(model_directory):
    """A small model and a larger one with another vocabulary's file, both of random weights."""
    return model_directory("rotary"), model_directory("biased", num_hidden_layers=3)


@pytest.fixture(scope="module")
def choice(two, texts, tmp_path_factory):
    target = tmp_path_factory.mktemp("choice") / "best.bcap"
    said = Silent()
    found = choose(two, 40_000, evaluation=texts["val"], calibration=texts["calib"], output=target,
                   budgets=["25kB", "800"], reporter=said, **SMALL)  # fmt: skip
    return found, target, said


def row(found, model, budget):
    return next(r for r in found.report["rows"] if r["model"] == model.name and r["budget_bytes"] == budget)


@pytest.mark.slow
class TestChoice:
    def test_the_file_is_the_best_at_the_cap(self, choice, two):
        found, target, _ = choice
        assert target.read_bytes() == found.best.data
        assert parse(found.best.data).units
        whole = {m.name: row(found, m, 40_000)["whole"]["bpb"] for m in two if "whole" in row(found, m, 40_000)}
        assert min(whole.values()) == found.report["bpb"] == whole[found.report["best"]]
        assert len(target.read_bytes()) == found.report["file_bytes"] <= 40_000

    def test_a_floor_above_a_cap_is_out_without_a_fit(self, choice, two):
        found, _, said = choice
        for model in two:
            out = row(found, model, 800)
            assert out["floor_bytes"] > 800
            assert "short" not in out
            assert "smallest file" in out["out"]
            assert any(model.name in n and "800 bytes" in n for n in said.notes)

    def test_every_model_is_scored_on_the_same_bytes(self, choice):
        found = choice[0]
        sizes = {r[k]["evaluation_bytes"] for r in found.report["rows"] for k in ("short", "whole") if k in r}
        assert sizes == {found.report["evaluation_bytes"]}
        assert 0 < sizes.pop() <= 3000

    def test_the_envelope_is_the_lowest_whole_fit_of_each_cap(self, choice):
        report = choice[0].report
        assert [e["budget_bytes"] for e in report["envelope"]] == [25_000, 40_000]
        for e in report["envelope"]:
            whole = [
                r["whole"]["bpb"] for r in report["rows"] if "whole" in r and r["budget_bytes"] == e["budget_bytes"]
            ]
            assert e["bpb"] == min(whole)


class TestBytes:
    def test_a_model_without_a_leading_token_pays_for_the_first_of_every_piece(self, two, texts, tmp_path):
        path = contenders.pieces([texts["val"]], 2000, tmp_path, Silent())[0]
        documents = path.read_text("utf-8").split("\f")
        model = load_checkpoint(two[0])
        led = contenders.toll_of(model, path)
        assert (led.bytes, led.unscored, led.bits) == (sum(len(d.encode()) for d in documents), 0, 0.0)
        model.files = {**model.files, "config.json": json.dumps({"model_type": "llama", "bos_token_id": None}).encode()}
        bare = contenders.toll_of(model, path)
        assert bare.bytes == led.bytes
        assert bare.unscored >= len(documents)
        assert bare.bits == pytest.approx(len(documents) * math.log2(288))

    def test_pieces_are_cut_by_bytes_and_keep_whole_characters(self, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text("äöü" * 100 + "\f" + "x" * 100, "utf-8")
        path = contenders.pieces([text], 350, tmp_path, Silent())[0]
        one, other = path.read_text("utf-8").split("\f")
        assert set(one) <= set("äöü")
        assert len(one.encode()) + len(other) in range(345, 351)

    def test_figures_on_other_bytes_are_refused(self):
        text = {
            "name": "a.txt",
            "bytes": 90,
            "tokens": 30,
            "nats_artifact": 1.0,
            "nats_original": 1.0,
            "bpb_stderr": 0.0,
        }
        artifact = bytecap.Artifact(None, b"", {"texts": [text], "model": "m", "kl_nats": 0.0, "seconds": 1.0})
        with pytest.raises(bytecap.TextError, match="cannot be compared"):
            module._bits(artifact, [contenders.Toll(100, 9, 0.0)])
        found = module._bits(artifact, [contenders.Toll(100, 10, 20.0)])
        assert found["bpb"] == pytest.approx((30 / math.log(2) + 20) / 100)


class TestBadInput:
    def test_no_model_fits(self, two, texts):
        with pytest.raises(BudgetError, match=r"no model fits 500 bytes.*rotary.*biased") as caught:
            choose(two, 500, evaluation=texts["val"], calibration=texts["calib"], **SMALL)
        assert caught.value.floor > 500

    def test_a_model_twice(self, two, refused, texts):
        again = two[0] / ".." / two[0].name
        with pytest.raises(UsageError, match="named twice"):
            choose([two[0], again], "40kB", **SMALL)
        assert "named twice" in refused("choose", "demo", "demo", "--budget", "40kB", "--eval", texts["val"])

    def test_none_can_be_read(self, refused, texts, tmp_path):
        (tmp_path / "empty").mkdir()
        said = refused("choose", tmp_path / "empty", "--budget", "40kB", "--eval", texts["val"])
        assert "no model can be fitted" in said or "empty" in said

    def test_bits_per_parameter_are_no_common_cap(self, refused, texts):
        assert "3bpp" in refused("choose", "demo", "--budget", "3bpp", "--eval", texts["val"])

    def test_the_output_is_an_input(self, refused, texts):
        assert "--eval" in refused("choose", "demo", "--budget", "1MB", "--eval", texts["val"], "-o", texts["val"])


@pytest.mark.slow
def test_one_that_cannot_be_read_is_named_and_the_others_go_on(run, two, texts, tmp_path):
    broken, page, target = tmp_path / "broken", tmp_path / "page.html", tmp_path / "best.bcap"
    broken.mkdir()
    (broken / "config.json").write_text("{", "utf-8")
    code, out, err = run(
        "choose", broken, two[0], "--budget", "30kB", "--eval", texts["val"], "--calib", texts["calib"], *FAST,
        "-o", target, "--report", page, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["best"] == two[0].name
    assert "out" in found["rows"][0]
    assert "whole" not in found["rows"][0]
    assert target.stat().st_size == found["file_bytes"]
    shown = page.read_text("utf-8")
    assert "broken" in shown
    assert "<svg" in shown
    assert two[0].name in shown


def scored(size, bpb):
    return {
        "file_bytes": size,
        "bpb": bpb,
        "bpb_stderr": 0.01,
        "bpb_original": bpb - 0.1,
        "kl_nats": 0.1,
        "seconds": 1.0,
    }


def made_up(budgets):
    """The report of two models, of which one is out at the first budget."""
    rows = []
    for model, low in (("small<b>", 1.5), ("large", 1.2)):
        for i, budget in enumerate(budgets):
            row = {"model": model, "budget_bytes": budget, "parameters": 1000, "floor_bytes": 400}
            if model == "large" and i == 0:
                rows.append(row | {"out": "its smallest file has 400 bytes"})
                continue
            row |= {"short": scored(budget, low + 0.1 / (i + 1))}
            rows.append(
                row | ({"whole": scored(budget, low), "best": True} if model == "large" or i == 0 else {"out": "x"})
            )
    best = next(r for r in rows if r.get("best") and r["budget_bytes"] == budgets[-1])
    envelope = [{"budget_bytes": r["budget_bytes"], "model": r["model"], **r["whole"]} for r in rows if "whole" in r]
    return {
        "rows": rows, "best": best["model"], "budget_bytes": budgets[-1], "evaluation": ["a<i>.txt"],
        "evaluation_bytes": 900, "envelope": sorted(envelope, key=lambda e: e["budget_bytes"]), **best["whole"],
    }  # fmt: skip


CHANGED = {
    "lower": {"normalizer": {"type": "Lowercase"}},
    "vowels": {"normalizer": {"type": "Replace", "pattern": {"Regex": "[aeiou]"}, "content": ""}},
    "bare": {"normalizer": {"type": "Lowercase"}, "decoder": None},
}


class TestTokenizers:
    """A text that says less is shorter: a model is not to win by losing part of it."""

    @pytest.fixture
    def with_tokenizer(self, two, tmp_path):
        """Function: a model whose tokenizer has other members."""

        def get(**members):
            directory = tmp_path / "changed"
            shutil.copytree(two[0], directory)
            found = json.loads((directory / "tokenizer.json").read_text("utf-8")) | members
            (directory / "tokenizer.json").write_text(json.dumps(found), "utf-8")
            return directory

        return get

    @pytest.mark.parametrize("kind", CHANGED)
    def test_one_that_loses_part_of_the_text_is_out(self, with_tokenizer, two, texts, kind):
        path = with_tokenizer(**CHANGED[kind])
        with pytest.warns(bytecap.BytecapWarning, match=r"do not give back [\d,]+ characters of val\.txt"):
            found = contenders.plan([two[1], path], "40kB", evaluation=texts["val"], method="uniform")
        rows = {r["model"]: r for r in found["rows"]}
        assert "another text" in rows["changed"]["out"]
        assert "planned" in rows[two[1].name]

    def test_one_without_a_decoder_may_lose_nothing(self, with_tokenizer, texts):
        found = contenders.plan([with_tokenizer(decoder=None)], "40kB", evaluation=texts["val"], method="uniform")
        assert "planned" in found["rows"][0]

    def test_tokens_that_the_model_does_not_know(self, with_tokenizer, two, texts):
        vocabulary = json.loads((two[0] / "tokenizer.json").read_text("utf-8"))["model"]
        token = next(t for t, i in vocabulary["vocab"].items() if i == vocabulary["vocab"]["e"])
        path = with_tokenizer(model=vocabulary | {"vocab": vocabulary["vocab"] | {token: 5000}})
        with pytest.warns(bytecap.BytecapWarning, match=r"left out: val\.txt: the tokenizer gives token 5000"):
            contenders.plan([two[1], path], "40kB", evaluation=texts["val"], method="uniform")


class TestDryRun:
    """`--dry-run` says it without a fit."""

    @pytest.mark.slow
    def test_it_lists_floors_and_what_would_be_fitted(self, two, texts, monkeypatch):
        monkeypatch.setattr(module, "fit_config", None)
        options = {"evaluation": texts["val"], "evaluation_bytes": 3000, "method": "uniform"}
        found = contenders.plan(two, "40kB", budgets=["800"], finalists=1, **options)
        by = {(r["model"], r["budget_bytes"]): r for r in found["rows"]}
        assert len(by) == 4
        for model in two:
            assert "smallest file" in by[model.name, 800]["out"]
            assert by[model.name, 800]["floor_bytes"] > 800
            there = by[model.name, 40_000]
            assert there["planned"] == "short fit, the best 1 whole"
            assert there["bits_per_parameter"] == pytest.approx(320_000 / load_checkpoint(model).parameters)
            assert there["evaluation_tokens"] > 100
        assert (found["short_fits"], found["whole_fits"]) == (2, 1)
        assert contenders.plan(two, "40kB", **options)["whole_fits"] == 2

    @pytest.mark.slow
    def test_the_command_writes_nothing(self, run, two, texts, tmp_path):
        target = tmp_path / "best.bcap"
        asked = ("choose", *two, tmp_path / "gone", "--budget", "40kB", "--eval", texts["val"], "--method", "uniform")
        code, out, err = run(*asked, "-o", target, "--dry-run")
        assert (code, target.exists()) == (0, False)
        assert "at most 2 short fits and 2 whole ones" in out
        assert "smallest file" in out
        assert "gone" in out
        assert "gone is left out" in err
        code, out, _ = run(*asked, "--dry-run", "--json")
        assert code == 0
        assert json.loads(out)["dry_run"] is True
        code, _, err = run(*asked[:3], "--budget", "500", "--eval", texts["val"], "--dry-run")
        assert code != 0
        assert "no model fits 500 bytes" in err
        code, _, err = run(*asked, "--dry-run", "--report", tmp_path / "page.html")
        assert code == 2
        assert "--report" in err


class TestPage:
    @pytest.mark.parametrize("budgets", [[1000], [1000, 2000], [1000, 2000, 70_000_000]])
    def test_it_is_sound_and_names_every_model_and_reason(self, budgets):
        text = page(made_up(budgets))
        found = sound(text)
        assert "small<b>" not in text
        assert "small&lt;b&gt;" in text
        assert "a&lt;i&gt;.txt" in text
        assert "out: its smallest file has 400 bytes" in text
        assert len([t for t in found.tips if "fit:" in t]) == 2 * (2 * len(budgets) - 1)  # broad and slim

    def test_the_table_on_the_terminal(self, capsys):
        print_choice(made_up([1000, 2000]))
        said = capsys.readouterr().out
        assert "best: large, 1.2000 ± 0.0100 bits per byte on 900 bytes, 2,000 bytes" in said
        assert "small<b>" in said
        assert "its smallest file has 400 bytes" in said


class TestOriginals:
    """No model is fitted that could only win by being better than its own original."""

    def entry(self, name, original, **short):
        rows = {b: {"model": name, "budget_bytes": b} for b in (1, 2)}
        for budget, bpb in zip(rows, short.get("bpb", ()), strict=False):
            rows[budget]["short"] = {"bpb": bpb}
        return contenders.Entry(name, name, rows, original=original)

    def test_a_model_is_out_where_a_file_is_better_than_its_original(self):
        large, small = self.entry("large", 1.0, bpb=(3.0, 1.5)), self.entry("small", 2.0)
        module._outdone(small, [small, large], ("short",))
        assert small.left() == [1]
        assert small.rows[2]["out"] == "its original has 2.0000 bits per byte, more than the best file here"
        module._outdone(large, [small, large], ("short",))
        assert large.left() == [1, 2], "nobody is outdone by files of its own"

    @pytest.mark.slow
    def test_the_best_original_is_fitted_first_and_others_only_where_they_may_win(self, two, texts, monkeypatch):
        real, scores, fitted = module.fit_config, {two[0].name: 9.0, two[1].name: 1.0}, []

        def fit(model, config):
            fitted.append((Path(model.name).name, config.budget))
            return real(model, config)

        def scored(entry, *_):
            entry.original = scores[entry.name]

        monkeypatch.setattr(module, "fit_config", fit)
        monkeypatch.setattr(module, "original_bits", scored)
        same = SMALL | {"tokens": SMALL["short_tokens"]}
        found = choose(two, 40_000, budgets=["25kB"], evaluation=texts["val"], calibration=texts["calib"], **same)
        assert fitted == [(two[1].name, 25_000), (two[1].name, 40_000)], "and no whole fit repeats a short one"
        assert found.report["best"] == two[1].name
        assert "its original has 9.0000" in row(found, two[0], 40_000)["out"]
        assert row(found, two[1], 40_000)["whole"] == row(found, two[1], 40_000)["short"]

    @pytest.mark.slow
    def test_an_original_is_scored_as_in_its_fits(self, choice):
        for r in choice[0].report["rows"]:
            if "short" in r:
                assert r["bpb_original"] == pytest.approx(r["short"]["bpb_original"], rel=1e-6)


@pytest.mark.slow
def test_a_short_fit_stands_where_the_whole_one_fails(two, texts, monkeypatch):
    real = module.fit_config

    def failing(model, config):
        if config.tokens == SMALL["tokens"]:
            raise bytecap.CheckpointError("the weights are gone")
        return real(model, config)

    monkeypatch.setattr(module, "fit_config", failing)
    with pytest.warns(bytecap.BytecapWarning, match="its short fits stand: the weights are gone"):
        found = choose(two[:1], 40_000, evaluation=texts["val"], calibration=texts["calib"], **SMALL)
    (only,) = found.report["rows"]
    assert only["whole_failed"] == "the weights are gone"
    assert only["whole"] == only["short"]
    assert found.report["bpb"] == only["short"]["bpb"]
    assert len(found.best.data) <= 40_000
