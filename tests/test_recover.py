"""Recovery: what is coded stays what it is, the file never grows, nothing is tuned on what is measured."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import bytecap
from bytecap.allocation.planner import Planner, VectorUnit
from bytecap.calibration.kl_gradient import gradient
from bytecap.calibration.metric import Metric
from bytecap.errors import TextError, UsageError
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.job import Job, Section
from bytecap.job.config import FitConfig
from bytecap.job.effort import Effort
from bytecap.methods.rate_control import allowed_slack, fit_units
from bytecap.model.calibration_text import GENERAL, SELF, SELF_MOST
from bytecap.model.checkpoint import load_model
from bytecap.model.evaluation import kl_to
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.sampling import sample
from bytecap.model.sources import load_sets, recovery_texts, with_recovery
from bytecap.model.texts import Window
from bytecap.pipeline.token_sets import token_sets
from bytecap.progress import Silent
from bytecap.quantization.quantizer import Options, prepare
from bytecap.quantization.rules import initial_rules
from bytecap.recovery import checkpointing, kl_passes, tuning
from bytecap.recovery.parameters import TunedParameters
from bytecap.recovery.sections import _joined
from bytecap.report.fit import page
from bytecap.system.cache import Store
from bytecap.types import Unit
from conftest import SMALL

BUDGET = 12_000  # some two bits a weight


@pytest.fixture(scope="module")
def fit(model_directory, texts):
    """Function: a fit of one model, and what it said."""

    def run(model=None, budget=BUDGET, **changes):
        said = Silent()
        found = bytecap.fit(
            model or model_directory("rotary"), budget, calibration=texts["calib"], evaluation=texts["val"],
            reporter=said, **{**SMALL, **changes},
        )  # fmt: skip
        return found, said.notes

    return run


@pytest.fixture(scope="module")
def plain(fit):
    return fit()[0]


@pytest.mark.slow
class TestWholeFits:
    @pytest.mark.nightly
    def test_recovery_lowers_the_kl_of_a_trained_model(self, fit, monkeypatch):
        monkeypatch.setitem(kl_passes._TOKENS, "cpu", 512)
        found, notes = fit("demo", 430_000, recover="16", evaluation_tokens=300)
        line = next(n for n in notes if re.search("before, .* after$", n) and "iterations" not in n)
        before, after = (float(x) for x in re.findall(r"[0-9]\.[0-9]+", line))
        assert found.report["predicted_delta_nats"] == pytest.approx(after, abs=1e-4)
        assert after < before
        assert 0 <= 430_000 - len(found.data) <= allowed_slack(430_000)
        assert [s["moves"] for s in found.report["recovery"]["stages"]] == [14, 2]
        assert found.report["without_recovery"]["kl_nats"] != found.report["kl_nats"]
        assert all(found.report["without_recovery"][f"{w}_difference_stderr"] > 0 for w in ("kl", "delta"))

    @pytest.mark.numeric
    def test_never_worse_and_the_same_bytes_twice(self, fit, plain):
        found, again = fit(recover="8")[0], fit(recover="8")[0]
        assert found.data == again.data
        assert len(found.data) <= BUDGET
        assert found.report["predicted_delta_nats"] <= plain.report["predicted_delta_nats"]
        assert found.report["without_recovery"]["kl_nats"] == pytest.approx(plain.report["kl_nats"])
        record = found.report["recovery"]
        integers, values = (s["moves"] for s in record["stages"])
        assert [i for _, i, _ in record["curve"]] == [0, integers, integers + values] == [0, integers, 8]
        assert record["curve"][0][2] == record["kl_before"]
        assert record["curve"][1][2] == pytest.approx(record["stages"][0]["kl"])
        seconds = [s for s, _, _ in record["curve"]]
        assert seconds == sorted(seconds)
        drawn = page(found.report, found.ledger())
        assert "<h2>Recovery</h2>" in drawn
        assert all(f"{i} iterations: KL {kl:.4f}" in drawn for _, i, kl in record["curve"])
        assert "<h2>Recovery</h2>" not in page(plain.report, plain.ledger())

    @pytest.mark.numeric
    def test_diverging_ships_what_was_best_and_says_so(self, fit, plain, monkeypatch):
        monkeypatch.setattr(tuning, "RATE", 300.0)
        monkeypatch.setattr(tuning, "VALUES_RATE", 300.0)
        found, notes = fit(recover="12")
        assert any("diverges" in n for n in notes)
        assert any("stored as it was" in n for n in notes)
        assert found.data == plain.data

    def test_batches_are_halved_where_memory_ends(self, fit, monkeypatch):
        sizes = []

        def scarce(*args, batch, **kwargs):
            sizes.append(batch)
            if batch > 256:
                raise torch.OutOfMemoryError("no more")
            return gradient(*args, batch=batch, **kwargs)

        monkeypatch.setattr(kl_passes, "gradient", scarce)
        _, notes = fit(recover="1")
        assert sizes[:3] == [1024, 512, 256]
        assert set(sizes[3:]) <= {256}
        assert sum("out of device memory" in n for n in notes) == 2

    def test_a_text_read_more_than_once_is_said(self, fit, monkeypatch):
        monkeypatch.setitem(kl_passes._TOKENS, "cpu", 20_000)
        _, notes = fit(recover="1")
        assert any(re.search(r"text of [0-9,]+ tokens was read [0-9.]+ times", n) for n in notes)

    def test_a_killed_run_goes_on_to_the_same_bytes(self, fit, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpointing, "SECONDS", 0.0)
        whole = fit(recover="8", store=tmp_path / "one")[0]
        moves, move = [], tuning._TuningRun.iterate

        def killed(self, *args):
            if len(moves) == 4:
                raise KeyboardInterrupt
            moves.append(1)
            return move(self, *args)

        monkeypatch.setattr(tuning._TuningRun, "iterate", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(recover="8", store=tmp_path / "two")
        monkeypatch.setattr(tuning._TuningRun, "iterate", lambda self, *args: (moves.append(2), move(self, *args))[1])
        assert fit(recover="8", store=tmp_path / "two")[0].data == whole.data
        assert moves.count(2) < 8

    def test_a_text_without_recovery_is_refused(self, refused, job, texts):
        assert "--recover-text is read by --recover" in refused(*job(), "--recover-text", texts["calib"])


@pytest.mark.numeric
class TestTunedParameters:
    """A planner over random matrices, and its tuned tensors."""

    @pytest.fixture
    def planned(self, request):
        torch.manual_seed(1)
        options = Options(trellis=getattr(request, "param", True))
        items = []
        for name in "abc":
            inputs = torch.randn(400, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
            metric = Metric(inputs.T @ inputs / 400, torch.rand(64, dtype=torch.float64) + 0.5)
            items.append(prepare(Unit(name, (64, 24), "F32"), torch.randn(64, 24), metric, options))
        values = torch.randn(40).numpy()
        planner = Planner.of(items, [VectorUnit(Unit("v", (40,), "F32"), values, np.ones(40))], options)
        _, state = planner.search(dict.fromkeys("abcv", 1.0), 2000, initial_rules(options), start=2.0)
        state = planner.settle(dict.fromkeys("abcv", 2.0), state.rules)
        return planner, planner.settle(state.steps, state.rules, refit=False)

    @pytest.mark.parametrize("planned", [True, False], indirect=True)
    def test_values_are_those_a_reader_decodes(self, planned):
        planner, state = planned
        values = TunedParameters(planner, state, "cpu").values()
        assert set(values) == set("abcv")
        for name, found in values.items():
            assert np.allclose(found.numpy().reshape(-1), planner.decode(state, name).reshape(-1), atol=1e-5)

    def test_gradients_are_differences(self, planned):
        parameters = TunedParameters(*planned, "cpu")
        torch.manual_seed(2)
        lever = {n: torch.randn(t.shape) for n, t in parameters.values().items()}

        def loss():
            return sum(float((lever[n].double() * t).sum()) for n, t in parameters.values().items())

        found = parameters.gradients(lever, 0.0)
        assert set(found) == {"logs", "offsets", "vector v"}
        for tensor, name, at, step in ((parameters.logs, "logs", 1, 1e-2), (parameters.offsets, "offsets", 2, 8 / 256)):
            before = tensor[at].clone()
            sides = []
            for sign in (1, -1):
                tensor[at] = before + sign * step
                sides.append(loss())
            tensor[at] = before
            assert found[name][at] == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-2)
        assert torch.equal(found["vector v"], lever["v"])

    def test_a_target_bears_the_price_of_its_integer(self, planned):
        parameters = TunedParameters(*planned, "cpu")
        parameters.unfreeze()
        still = {n: torch.zeros_like(t) for n, t in parameters.values().items()}
        free, priced = (parameters.gradients(still, nats)["target a"] for nats in (0.0, 1.0))
        assert not free.any()
        far = parameters.targets()["target a"].abs() > 1.5
        assert (priced[far] * parameters.targets()["target a"][far] > 0).all()  # towards zero when it is taken away

    def test_what_has_not_moved_is_coded_as_it_was(self, planned):
        planner, state = planned
        parameters = TunedParameters(planner, state, "cpu")
        before = {n: t.clone() for n, t in parameters.values().items()}
        parameters.unfreeze()
        assert len(parameters.targets()) == 3
        beyond = parameters.code(parameters.matrices, 0.0)
        assert beyond == pytest.approx(0, abs=2)
        same = [(a == b).float().mean() for a, b in zip(before.values(), parameters.values().values(), strict=True)]
        assert min(same) > 0.97

    def test_coded_twice_it_starts_from_the_same_target(self, planned):
        parameters = TunedParameters(*planned, "cpu")
        parameters.unfreeze()
        parameters.targets()["target c"].mul_(1.1)
        first = parameters.code(["c"], 0.0)
        parameters.code(["c"], 0.3)
        assert parameters.code(["c"], 0.0) == first

    def test_settled_it_is_what_was_coded(self, planned):
        planner, state = planned
        parameters = TunedParameters(planner, state, "cpu")
        parameters.logs[:] = torch.tensor([0.05, 0.0, -0.05])
        parameters.offsets[1:] += 0.02
        parameters.vectors["v"].mul_(0.99)
        values = parameters.values()
        targets = [p.weight.clone() for p in planner.matrices]
        rounded_for = state.rules.shrink.offset.copy()
        moved, settled = parameters.settle()
        for n, found in values.items():
            assert np.allclose(moved.decode(settled, n).reshape(found.shape), found.numpy(), atol=1e-5)
        assert settled.rate == pytest.approx(state.rate, rel=1e-2)
        assert not torch.equal(moved.matrices[0].weight, targets[0])  # while what it started from stays as it was
        assert all(torch.equal(p.weight, t) for p, t in zip(planner.matrices, targets, strict=True))
        assert (state.rules.shrink.offset == rounded_for).all()

    def test_a_recovered_plan_is_trimmed_at_its_last_matrices_only(self, planned):
        planner, state = planned
        parameters = TunedParameters(planner, state, "cpu")
        before = {n: t.clone() for n, t in parameters.values().items()}
        planner, state = parameters.settle()
        tables = dump_shared(state.shared)

        def size(sections, tables):
            return len(tables) + sum(len(s.data) for s in sections.values())

        whole = size({n: Section(*c) for n, c in planner.encode(state).items()}, tables)
        packed = fit_units(planner, state, tables, size, whole - 40, ["c", "b"])
        assert whole - 40 - allowed_slack(0) <= size(packed.sections, tables) <= whole - 40
        after = {n: planner.decode(packed.state, n).reshape(t.shape) for n, t in before.items()}
        assert np.allclose(after["a"], before["a"], atol=1e-5)
        assert not np.allclose(after["c"], before["c"], atol=1e-5)
        assert fit_units(planner, state, tables, size, whole // 2, ["c", "b"]) is None

    def test_groups_hold_all_matrices_once(self, planned):
        parameters = TunedParameters(*planned, "cpu")
        assert parameters.groups(16) == [["a"], ["b"], ["c"]]
        assert parameters.groups(1) == [["a", "b", "c"]]

    def test_state_comes_back(self, planned):
        planner, state = planned
        parameters = TunedParameters(planner, state, "cpu")
        parameters.unfreeze()
        parameters.targets()["target b"].add_(0.3)
        parameters.code(["a", "b"], 0.01)
        parameters.vectors["v"].add_(0.1)
        parameters.targets()["target c"].add_(0.2)
        kept, values = parameters.state(), parameters.values()
        again = TunedParameters(planner, state, "cpu")
        again.resume(kept)
        assert list(again.targets()) == ["target c"]
        assert all(torch.equal(values[n], t) for n, t in again.values().items())


@pytest.mark.numeric
class TestGradient:
    def test_the_gradient_is_that_of_the_kl(self, model_directory, texts):
        model = load_model(model_directory("rotary"))
        sets = load_sets(
            model, texts["calib"], texts["val"], tokens=600, evaluation_tokens=600, window=128, reporter=Silent()
        )
        quantized_copy = copy_of(model.module)
        name = "model.layers.1.mlp.up_proj.weight"
        torch.manual_seed(0)
        start = model.module.state_dict()[name].float()
        noise = 0.05 * torch.randn(start.shape)
        load_values(quantized_copy, {name: (start + noise).numpy()})
        kl, found = gradient(model.module, quantized_copy, [name], sets.statistics, device="cpu")
        assert kl == pytest.approx(kl_to(model.module, quantized_copy, sets.statistics)[0], rel=1e-4)
        values = []
        for sign in (-1, 1):
            load_values(quantized_copy, {name: (start + noise * (1 + 0.05 * sign)).numpy()})
            values.append(kl_to(model.module, quantized_copy, sets.statistics)[0])
        assert float((found[name] * noise).sum()) == pytest.approx((values[1] - values[0]) / 0.1, rel=0.05)
        assert not any(p.requires_grad for p in quantized_copy.parameters())


class TestTexts:
    def sets(self, model, texts):
        return load_sets(
            model, texts["calib"], texts["val"], tokens=600, evaluation_tokens=600, window=128, reporter=Silent()
        )

    def test_recovery_windows_are_in_no_other_set_that_measures(self, model_directory, texts):
        model = load_model(model_directory("rotary"))
        sets = self.sets(model, texts)
        found = with_recovery(model, sets, [texts["calib"], texts["val"]], window=128, reporter=Silent())
        held = {w.tokens for group in (sets.correction, *(t.windows for t in sets.evaluation)) for w in group}
        assert found.recovery
        assert not held & {w.tokens for w in found.recovery}
        assert held & {w.tokens for w in (*sets.correction, *sets.evaluation[0].windows)}
        assert with_recovery(model, sets, None, reporter=Silent()) is sets

    def test_a_text_that_evaluation_holds_is_refused(self, model_directory, texts, tmp_path):
        model = load_model(model_directory("rotary"))
        path = tmp_path / "same.txt"
        path.write_text("The quick brown fox. " * 30, "utf-8")
        sets = load_sets(model, texts["calib"], path, tokens=600, window=128, reporter=Silent())
        with pytest.raises(TextError, match=r"same\.txt holds nothing"):
            with_recovery(model, sets, path, window=128, reporter=Silent())


class TestStandIns:
    """Recovery reads text by the rules of calibration."""

    def test_nothing_given_is_samples_and_general_text(self, model_directory, texts):
        model = load_model(model_directory("rotary"))
        assert recovery_texts(model, []) == [Path(SELF), Path(GENERAL)]
        assert recovery_texts(model, [Path("general:2"), texts["calib"]]) == [Path(GENERAL), texts["calib"]]
        assert [p.name for p in recovery_texts(load_model("demo"), [])] == ["calib.txt"]

    def test_a_model_that_cannot_be_sampled_reads_general_text(self, model_directory, monkeypatch):
        monkeypatch.setattr("bytecap.model.sources.of_transformers", lambda _: False)
        assert recovery_texts(load_model(model_directory("rotary")), []) == [Path(GENERAL)]

    def test_both_are_read_and_the_sampler_is_asked_once(self, model_directory, texts, monkeypatch):
        monkeypatch.setitem(SELF_MOST, "cpu", 640)
        monkeypatch.setattr("bytecap.model.sources.RECOVERY_TOKENS", 4000)
        model, asked = load_model(model_directory("rotary")), []
        sets = TestTexts().sets(model, texts)

        def sampler(tokens, *, firsts):
            asked.append((tokens, firsts))
            return tuple(Window((firsts[0], *range(i, i + 32)), 0) for i in range(20))

        found = with_recovery(
            model, sets, recovery_texts(model, []), window=32, sampler=sampler, reporter=Silent()
        ).recovery
        assert asked == [(640, sorted({w.tokens[0] for w in sets.statistics}))]
        own = {(asked[0][1][0], *range(i, i + 32)) for i in range(20)}
        assert {w.tokens for w in found} & own
        assert {w.tokens for w in found} - own
        held = {w.tokens for w in sets.evaluation[0].windows}
        assert not held & {w.tokens for w in found}


class TestCurve:
    def test_a_second_recovery_goes_on_where_the_first_ended(self):
        own = {"tokens": 10, "stages": [1], "kl_before": 0.5, "curve": [(0.0, 0, 0.5), (4.0, 3, 0.4)]}
        later = {"tokens": 5, "stages": [2], "kl_before": 0.4, "curve": [(0.5, 0, 0.4), (2.0, 7, 0.3)]}
        assert _joined(own, later) == {
            "tokens": 15, "stages": [1, 2], "kl_before": 0.5,
            "curve": [(0.0, 0, 0.5), (4.0, 3, 0.4), (4.5, 3, 0.4), (6.0, 10, 0.3)],
        }  # fmt: skip

    def test_skipped_iterations_count(self, model_directory, texts):
        model = load_model(model_directory("rotary"))
        job = Job(model, TestTexts().sets(model, texts), 0, lambda *_: 0, "cpu", Silent(), FitConfig(0))
        passes = kl_passes.Passes(job, copy_of(model.module))
        passes.skip(3, seconds=100.0)
        passes.check()
        [(seconds, iterations, kl)] = passes.curve
        assert seconds >= 100
        assert iterations == 3
        assert kl == pytest.approx(0, abs=1e-9)


class TestChecks:
    @pytest.mark.parametrize(("most", "passes_of_original"), [(2**27, 1), (0, 3)])
    def test_the_original_reads_the_correction_tokens_once(
        self, model_directory, texts, monkeypatch, most, passes_of_original
    ):
        monkeypatch.setitem(kl_passes._REMEMBERED, "cpu", most)
        model = load_model(model_directory("rotary"))
        sets = TestTexts().sets(model, texts)
        other = copy_of(model.module)
        with torch.no_grad():
            for p in other.parameters():
                p.data = p.data + 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        calls = []
        model.module.register_forward_hook(lambda *_: calls.append(1))
        kl_to(model.module, other, sets.correction)
        one = len(calls)
        job = Job(model, sets, 0, lambda *_: 0, "cpu", Silent(), FitConfig(0))
        passes = kl_passes.Passes(job, other)
        found = [passes.check() for _ in range(3)]
        assert len(calls) == one + one * passes_of_original
        assert found == [kl_to(model.module, other, sets.correction)[0]] * 3
        assert found[0] > 0


class TestOwnSamples:
    def test_windows_are_sampled_side_by_side(self, model_directory, monkeypatch):
        module, sizes = load_model(model_directory("rotary")).module, []
        forward = module.forward

        def seen(ids, **kwargs):
            if ids.shape[1] == 1:
                sizes.append(len(ids))
            if len(ids) > 16:
                raise torch.OutOfMemoryError
            return forward(ids, **kwargs)

        monkeypatch.setattr(module, "forward", seen)
        found = sample(module, [5, 6], 40 * 4, window=4, seed=0, device="cpu")
        assert sizes == [32, *[16] * 8, *[8] * 4]  # halved once, where memory ends
        assert [w.predicted for w in found] == [4] * 40

    def test_they_are_kept_in_the_store(self, model_directory, texts, tmp_path, monkeypatch):
        monkeypatch.setitem(SELF_MOST, "cpu", 640)
        model, calls = load_model(model_directory("rotary")), []

        def counted(*args, **kwargs):
            calls.append(kwargs["seed"])
            return sample(*args, **kwargs)

        monkeypatch.setattr("bytecap.model.sampling.sample", counted)

        def recovery(seed, store):
            config = FitConfig(
                BUDGET, calibration=["self", texts["calib"]], evaluation=texts["val"], recover="1", recover_text="self",
                seed=seed, tokens=600, evaluation_tokens=300, window=32,
            )  # fmt: skip
            return token_sets(model, config, "cpu", store, Silent())

        first, again = recovery(0, Store(tmp_path)), recovery(0, Store(tmp_path))
        assert calls == [0, 0]  # for calibration and for recovery
        assert first == again
        assert recovery(0, Store(None)) == first
        assert recovery(1, Store(tmp_path)).recovery != first.recovery

    def test_windows_come_from_the_model_alone_and_again(self, model_directory, texts, monkeypatch):
        monkeypatch.setitem(SELF_MOST, "cpu", 4096)
        model = load_model(model_directory("rotary"))
        sets = TestTexts().sets(model, texts)
        found, again = (with_recovery(model, sets, "self", window=32, reporter=Silent()) for _ in range(2))
        assert found.recovery == again.recovery
        assert all(w.predicted == 32 for w in found.recovery)
        assert sum(w.predicted for w in found.recovery) >= 4096 - 32 * 20
        text = " ".join(str(t) for w in sets.statistics for t in w.tokens)
        assert sum(" ".join(map(str, w.tokens[1:9])) in text for w in found.recovery) < len(found.recovery) / 10

    def test_samples_follow_the_model(self, model_directory):
        module = load_model(model_directory("rotary")).module
        windows = sample(module, [5], 4000, window=1, seed=0, device="cpu")
        chances = module(torch.tensor([[5]])).logits[0, -1].softmax(-1)
        counts = torch.bincount(torch.tensor([w.tokens[1] for w in windows]), minlength=len(chances)) / len(windows)
        assert float((counts - chances).abs().max()) < 0.03


class TestEffort:
    @pytest.mark.parametrize("text", ["0", "ten", "-3", "1.5", "3d", "", "0s"])
    def test_nonsense_is_refused(self, text):
        with pytest.raises(UsageError, match="neither a number of steps"):
            Effort.parse(text)

    @pytest.mark.parametrize(("text", "share"), [("10", 0.5), ("20s", 0.1), ("1m", 1 / 30), ("0.5h", 1 / 900)])
    def test_share_of_the_work(self, text, share):
        assert Effort.parse(text).share(5, 2.0) == pytest.approx(share)
