"""The thesis: rules that decide both ways on records whose answer is known."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from bytecap.errors import UsageError
from bytecap.report.thesis import SIGNS, page
from bytecap_lab.thesis import experiments
from bytecap_lab.thesis.evidence import read
from bytecap_lab.thesis.measures import measures
from bytecap_lab.thesis.statistics import Draw, Interval, Missing, kendall, pooled, standard, taken
from bytecap_lab.thesis.verdicts import REGISTRATION, judge, whole
from pages import sound

DOCUMENTS = 40
TOKENS = 100.0
SIZES = (500, 1000, 2000, 4000, 8000)  # of a base of 100,000 bytes
UNITS = 12
TEXTS = {"record": "texts", "key": "t", "texts": [{"name": "a", "errors_over": "documents", "tokens": [TOKENS] * 40}]}


def sums(gain, noise=0.05, seed=0):
    """Sums over documents of something that is worth `gain` nats per token."""
    rng = np.random.default_rng(seed)
    return (TOKENS * gain * (1 + noise * rng.normal(size=DOCUMENTS))).tolist()


def arm(slope, *, power=1.0, seed=1, side=0.0, survival=0.9):
    """Points of an arm that recovers slope * bytes ** power."""
    return {
        "points": [
            {"bytes": b, "side_bytes": int(side * b), "layer_bytes": b, "nominal_bytes": survival * b, "units": 3,
             "paths": {"rows": 3}, "kl": sums(slope * b * (b / 4000) ** (power - 1), seed=seed + i)}
            for i, b in enumerate(SIZES)
        ]
    }  # fmt: skip


def singles(worth):
    """Exceptions of twelve matrices worth so many nats a byte, finer steps worth 1e-5."""
    return {
        "exceptions": [{"unit": f"u{i}", "path": "rows", "setting": "", "bytes": 100, "promised_bytes": 100.0,
                        "promised_nats": w, "kl": sums(100 * w, seed=i)} for i, w in enumerate(worth)],
        "steps": [{"unit": f"u{i}", "bytes": 100, "kl": sums(1e-3, seed=50 + i)} for i in range(UNITS)],
    }  # fmt: skip


WORTH = np.linspace(3e-5, 1e-6, UNITS)
OWN = {f"u{i}": float(w) for i, w in enumerate(WORTH)}
BACKWARDS = {f"u{i}": -float(w) for i, w in enumerate(WORTH)}
SECONDS = {"decode": {"global": [1.0, 1.1, 0.9] * 3, "exceptions": [1.01, 1.09, 0.92] * 3},
           "multiply": {"global": [2.0] * 9, "exceptions": [2.0] * 9}}  # fmt: skip


def lines(where="grid", model="m", recipe="mini", seed=0, registration=REGISTRATION, **changes):
    """Records of a model on a base; `changes` replace measurements, underscores standing for spaces."""
    made = {
        "base": {"bytes": 100_000, "budget_bytes": 120_000, "units": UNITS, "parameters": 300_000,
                 "kl": sums(0.3, seed=9)},
        "arm global": arm(1e-5), "arm ranked": arm(1.1e-5, seed=11), "arm exceptions": arm(1.1e-5, seed=21),
        "arm structured": arm(1.1e-5, seed=31, survival=0.95), "arm irregular": arm(0.8e-5, seed=41, survival=0.5),
        "singles": singles(WORTH), "rankings": {"rankings": {"own": OWN, "seed 1": OWN, "text a": OWN, "text b": OWN}},
        "paths": {"paths": {"rows": {"bytes": 4000, "kl": sums(0.04)}, "columns": {"bytes": 4000, "kl": sums(0.02)}}},
        "timing": SECONDS,
        **{k.replace("_", " "): v for k, v in changes.items()},
    }  # fmt: skip
    head = {"record": "measure", "base": where, "model": model, "recipe": recipe, "training_seed": seed,
            "registration": registration, "texts_key": "t", "command": "bytecap thesis", "host": "h", "setting":
            {"calibration": [], "evaluation": []}, "cpu_seconds": 1.0}  # fmt: skip
    return [TEXTS] + [{**head, "key": f"{where}{model}{k}", "what": k, **v} for k, v in made.items() if v is not None]


def one(name, records, base="grid"):
    """Verdict of an experiment on the first model."""
    found = judge(records, [name])["experiments"][0]
    return next(c for c in found["cells"] if c["base"] == base)


def group(name, every):
    """Group verdicts of an experiment over five training seeds, or what is given."""
    return judge([r for mine in every for r in mine], [name])["experiments"][0]


class TestRegistration:
    def test_it_is_never_edited(self):
        text = (Path(__file__).parents[1] / "docs" / "thesis.md").read_text("utf-8").partition("\n## Amendments")[0]
        assert hashlib.sha256(text.encode()).hexdigest() == REGISTRATION

    def test_all_eight_are_there_and_what_they_need_can_be_measured(self):
        found = experiments.found()
        assert [m.ORDER for m in found.values()] == list(range(1, 9))
        assert [m.KIND for m in found.values()] == ["support"] * 4 + ["falsifier"] * 4
        assert {n for m in found.values() for n in m.NEEDS} <= set(measures())

    def test_experiments_are_chosen_by_name_or_number(self):
        assert list(experiments.chosen(["7", "selection"])) == ["selection", "metadata"]
        with pytest.raises(UsageError, match="unknown experiment '9': there are 1 selection"):
            experiments.chosen(["9"])


class TestStatistics:
    def test_the_standard_rule(self):
        assert standard(Interval(0.06, 0.01, 0.1, 0.02))[0] == "supported"
        assert standard(Interval(0.04, 0.01, 0.1, 0.02))[0] == "undecided"
        assert standard(Interval(0.06, -0.01, 0.1, 0.02))[0] == "undecided"
        assert standard(Interval(0.02, -0.01, 0.04, 0.01))[0] == "falsified"

    def test_intervals_cover_the_truth_as_often_as_they_say(self):
        rng, hits = np.random.default_rng(0), 0
        draw = Draw([{"tokens": [TOKENS] * 40}])
        for _ in range(200):
            found = Interval.of(draw.mean(TOKENS * (1 + rng.normal(size=40))))
            hits += found.low <= 1 <= found.high
        assert 0.89 <= hits / 200 <= 0.98

    def test_texts_weigh_equally(self):
        draw = Draw([{"tokens": [1.0, 1.0]}, {"tokens": [100.0]}])
        assert draw.mean([2.0, 4.0, 100.0])[0] == pytest.approx((3 + 1) / 2)

    def test_models_widen_the_interval(self):
        same = [np.full(2001, v) for v in (0.1, 0.1, 0.1)]
        apart = [np.full(2001, v) for v in (0.0, 0.1, 0.2)]
        assert Interval.of(pooled(same)).stderr == pytest.approx(0, abs=1e-12)
        assert Interval.of(pooled(apart)).stderr == pytest.approx(0.1 / np.sqrt(3), rel=0.1)
        assert Interval.of(pooled(apart)).mean == pytest.approx(0.1)

    def test_a_ratio_over_nothing_has_no_interval(self):
        with pytest.raises(Missing, match="not surely above 0"):
            Interval.of(np.array([1.0] + [np.nan] * 500 + [1.0] * 1500))

    def test_ranks_and_room(self):
        assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(2 / 3)
        assert np.isnan(kendall([1, 1], [1, 2]))
        assert taken(np.array([[1.0, 3.0], [3.0, 1.0]]), np.array([2.0, 4.0]), 3.0).tolist() == [[0, 0.75], [1, 0.25]]

    def test_power_is_the_smallest_effect_seen_four_times_in_five(self):
        assert Interval(0, 0, 0, 0.01).detectable == pytest.approx(0.028)


class TestRules:
    @pytest.mark.parametrize(
        ("slope", "word"),
        [(1.2e-5, "supported"), (1.0e-5, "falsified"), (0.5e-5, "falsified"), (1.04e-5, "undecided")],
    )
    def test_selection(self, slope, word):
        assert one("selection", lines(arm_ranked=arm(slope, seed=11)))["verdict"] == word

    @pytest.mark.parametrize(("kl", "word"), [(0.32, "supported"), (0.2, "falsified")])
    def test_selection_on_golf_must_beat_the_grid_too(self, kl, word):
        grid = lines(base={"bytes": 100_000, "budget_bytes": 1, "units": 1, "parameters": 1, "kl": sums(kl, seed=9)})
        found = one("selection", grid + lines("golf", arm_ranked=arm(1.2e-5, seed=11)), "golf")
        assert found["verdict"] == word
        assert found["effects"]["lead"]["effect"] == pytest.approx(0.2, abs=0.02)

    def test_selection_on_golf_without_the_grid(self):
        found = one("selection", lines("golf"), "golf")
        assert (found["verdict"], found["reason"]) == ("undecided", "the grid base, golf's rival, was not measured")

    @pytest.mark.parametrize(("power", "word"), [(1.0, "falsified"), (0.01, "supported")])
    def test_saturation(self, power, word):
        found = one("saturation", lines(arm_exceptions=arm(1e-5, power=power)))
        assert found["verdict"] == word
        if power == 1.0:
            assert found["effects"]["share"]["effect"] == pytest.approx(0.9 * 8000 / 120_000, rel=0.01)

    def test_saturation_of_nothing_is_undecided(self):
        assert one("saturation", lines(arm_exceptions=arm(-1e-6)))["verdict"] == "undecided"

    @pytest.mark.parametrize(
        ("slope", "survival", "word"),
        [(1.1e-5, 0.95, "supported"), (0.7e-5, 0.95, "falsified"), (1.1e-5, 0.4, "falsified")],
    )
    def test_structure(self, slope, survival, word):
        found = one("structure", lines(arm_structured=arm(slope, seed=31, survival=survival)))
        assert found["verdict"] == word

    @pytest.mark.parametrize(("slope", "word"), [(1.4e-5, "supported"), (1.1e-5, "falsified")])
    def test_repetition(self, slope, word):
        pairs = [
            [*lines(seed=s, model=f"p{s}"),
             *lines(seed=s, model=f"l{s}", recipe="looped", arm_exceptions=arm(slope, seed=61))] for s in range(3)
        ]  # fmt: skip
        found = group("repetition", pairs)
        assert [g["recipe"] for g in found["groups"]] == ["looped"]
        assert found["verdict"] == word
        assert group("repetition", pairs[:2])["reason"].startswith("2 of 3 models")

    def test_repetition_without_a_looped_model(self):
        assert one("repetition", lines())["reason"] == "no block of this model is used twice"
        found = one("repetition", lines(recipe="looped"))
        assert found["reason"] == "the plain model of seed 0 was not measured"

    @pytest.mark.parametrize(("worth", "word"), [(WORTH, "supported"), (np.full(UNITS, 0.9e-5), "falsified")])
    def test_diffuseness(self, worth, word):
        found = one("diffuseness", lines(singles=singles(worth)))
        assert found["verdict"] == word
        if word == "falsified":
            assert found["effects"]["gini"]["effect"] == pytest.approx(0, abs=0.02)
            assert found["effects"]["share of the best quarter"]["effect"] == pytest.approx(0.25, abs=0.01)

    def test_noise_is_no_concentration(self):
        noisy = singles(np.full(UNITS, 1e-6))
        for i, s in enumerate(noisy["exceptions"]):
            s["kl"] = sums(1e-4, noise=2.0, seed=100 + i)
        assert one("diffuseness", lines(singles=noisy))["effects"]["gini"]["effect"] < 0.3

    def test_instability_needs_all_dimensions(self):
        found = one("instability", lines())
        assert (found["verdict"], found["reason"]) == ("undecided", "not measured: training seeds")
        assert group("instability", [lines(seed=s, model=f"m{s}") for s in range(5)])["verdict"] == "supported"

    @pytest.mark.parametrize("which", ["seed 1", "text a"])
    def test_one_unstable_dimension_falsifies(self, which):
        rankings = {"own": OWN, "seed 1": OWN, "text a": OWN, which: BACKWARDS}
        found = one("instability", lines(rankings={"rankings": rankings}))
        assert found["verdict"] == "falsified"
        every = [lines(seed=s, model=f"m{s}", rankings={"rankings": rankings}) for s in range(5)]
        assert group("instability", every)["verdict"] == "falsified"

    def test_training_seeds_that_disagree_falsify(self):
        def mine(seed):
            worth = WORTH[::-1] if seed % 2 else WORTH
            own = {f"u{i}": float(w) for i, w in enumerate(worth)}
            rankings = {"rankings": {"own": own, "seed 1": own, "text a": own}}
            return lines(seed=seed, model=f"m{seed}", singles=singles(worth), rankings=rankings)

        found = group("instability", [mine(s) for s in range(5)])
        assert (found["verdict"], found["groups"][0]["reason"]) == ("falsified", "regret over training seeds")

    @pytest.mark.parametrize(
        ("slope", "side", "word", "reason"),
        [
            (1.1e-5, 0.1, "supported", ""), (0.8e-5, 0.5, "falsified", ""),
            (0.8e-5, 0.1, "undecided", "no win to erase"),
        ],
    )  # fmt: skip
    def test_metadata(self, slope, side, word, reason):
        found = one("metadata", lines(arm_exceptions=arm(slope, seed=21, side=side)))
        assert (found["verdict"], found["reason"]) == (word, reason)

    @pytest.mark.parametrize(
        ("times", "slope", "word"),
        [
            (1.0, 0.5e-5, "supported"),
            (1.5, 1.2e-5, "supported"),
            (1.5, 0.9e-5, "falsified"),
            (3.0, 1.2e-5, "undecided"),
        ],
    )
    def test_execution(self, times, slope, word):
        slow = {**SECONDS, "decode": {"global": [1.0, 1.1] * 5, "exceptions": [times, 1.1 * times] * 5}}
        found = one("execution", lines(timing=slow, arm_exceptions=arm(slope, seed=21)))
        assert found["verdict"] == word


class TestVerdicts:
    def test_only_registered_models_count(self):
        every = [lines(seed=s, model=f"m{s}", registration="another") for s in range(5)]
        found = group("selection", every)
        assert found["groups"] == []
        assert found["verdict"] == "undecided"
        assert all(c["verdict"] == "supported" and not c["counts"] for c in found["cells"])

    def test_groups_need_their_models(self):
        every = [lines(seed=s, model=f"m{s}") for s in range(5)]
        assert group("selection", every)["verdict"] == "supported"
        assert group("selection", every[:4])["groups"][0]["reason"] == "4 of 5 models"
        assert (
            group("selection", [lines(recipe="small", seed=s, model=f"m{s}") for s in range(3)])["verdict"]
            == "supported"
        )

    def test_bases_must_agree(self):
        assert whole([("supported", ""), ("supported", "")]) == ("supported", "")
        assert whole([("supported", ""), ("undecided", "few")]) == ("undecided", "few")
        assert whole([("falsified", ""), ("undecided", "few")])[0] == "falsified"
        assert whole([("falsified", ""), ("supported", "")]) == ("undecided", "groups or bases disagree")

    def test_a_measurement_that_is_missing_or_refused_says_so(self):
        assert one("execution", lines(timing=None))["reason"] == "timing was not measured"
        found = one("execution", lines(timing={"refused": "no budget", "floor_bytes": 3}))
        assert found["reason"] == "the base cannot get below the budget: no budget"
        assert "recover nothing" in one("selection", lines(arm_global=arm(-1e-5)))["reason"]

    def test_other_tokens_replace_what_was_measured_before(self):
        later = [
            {**r, "texts_key": "u", "key": "u"} if r["record"] == "measure" else {**r, "key": "u"} for r in lines()
        ]
        (found,) = read(lines() + later[:3])
        assert list(found.lines) == ["base", "arm global"]

    @pytest.mark.slow
    def test_the_page_holds_every_verdict(self):
        every = [r for s in range(5) for b in ("grid", "golf") for r in lines(b, seed=s, model=f"m{s}")]
        found = judge(every)
        text = page(found)
        parser = sound(text)
        assert {f"effects-{n}" for n in experiments.found()} <= set(parser.names)
        assert all(SIGNS[e["verdict"]] in text and e["hypothesis"] in text for e in found["experiments"])
        assert len(parser.tips) >= 8
        cards = re.findall(r"<li>([^<]*<b>.*?)<details>", text.partition('class="cards verdicts"')[2])
        assert len(cards) == 8
        for card, e in zip(cards, found["experiments"], strict=True):
            words = re.sub(r"<title>.*?</title>|<[^>]*>", " ", card)
            assert len(words.split()) <= len(f"{e['title']} {e['hypothesis']}".split()) + 4, words
            assert card.count('<svg class="strip"') == any(e["main"] in g["effects"] for g in e["groups"])
        assert text.count('<svg class="strip"') >= 6
        assert "bytecap thesis" in text
