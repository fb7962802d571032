"""Recovery: shadows give back the same integers, the file never grows, nothing is tuned on what is measured."""

import re

import numpy as np
import pytest
import torch

import bytecap
from bytecap import recover
from bytecap.core import Unit
from bytecap.errors import TextError, UsageError
from bytecap.methods.waterfill import Planner
from bytecap.model.checkpoint import load_model
from bytecap.model.evaluate import kl_to
from bytecap.model.gradient import gradient
from bytecap.progress import Silent
from bytecap.recover import Effort, shadow
from bytecap.sensitivity import Metric
from bytecap.sources import load_sets, with_recovery
from bytecap.swap import load_values, twin_of
from bytecap.sweep import Options, prepare
from bytecap.trim import allowed_slack
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


class TestWholeFits:
    def test_recovery_lowers_the_kl_of_a_trained_model(self, fit):
        found, notes = fit("demo", 430_000, recover="8", evaluation_tokens=300)
        line = next(n for n in notes if "before" in n)
        before, after = (float(x) for x in re.findall(r"[0-9]\.[0-9]+", line))
        assert found.report["predicted_delta_nats"] == pytest.approx(after, abs=1e-4)
        assert after < 0.98 * before
        assert 0 <= 430_000 - len(found.data) <= allowed_slack(430_000)

    def test_never_worse_and_the_same_bytes_twice(self, fit, plain):
        found, again = fit(recover="4")[0], fit(recover="4")[0]
        assert found.data == again.data
        assert len(found.data) <= BUDGET
        assert found.report["predicted_delta_nats"] <= plain.report["predicted_delta_nats"]

    def test_diverging_ships_what_was_best_and_says_so(self, fit, plain, monkeypatch):
        monkeypatch.setattr(recover, "RATE", 300.0)
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

        monkeypatch.setattr(recover, "gradient", scarce)
        _, notes = fit(recover="1")
        assert sizes == [1024, 512, 256]
        assert sum("out of device memory" in n for n in notes) == 2

    def test_a_text_without_recovery_is_refused(self, refused, job, texts):
        assert "--recover-text is read by --recover" in refused(*job(), "--recover-text", texts["calib"])


class TestShadows:
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("trellis", [True, False])
    def test_rounding_a_shadow_gives_the_same_integers(self, groups, trellis):
        torch.manual_seed(1)
        inputs = torch.randn(groups, 400, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
        metric = Metric(inputs.transpose(1, 2) @ inputs / 400, torch.rand(64, dtype=torch.float64) + 0.5)
        options = Options(trellis=trellis)
        item = prepare(Unit("w", (64, 24), "F32"), torch.randn(64, 24), metric, options)
        planner = Planner([item], [], options)
        state = planner.settle({"w": 2.0}, refit=False)
        planner.matrices = [shadow(item, torch.from_numpy(planner.decode(state, "w")))]
        again = planner.settle({"w": 2.0}, refit=False)
        assert np.abs(state.coded["w"].code.symbols).max() > 1
        assert (again.coded["w"].code.symbols == state.coded["w"].code.symbols).mean() > 0.99

    def test_the_gradient_is_that_of_the_kl(self, model_directory, texts):
        model = load_model(model_directory("rotary"))
        sets = load_sets(
            model, texts["calib"], texts["val"], tokens=600, evaluation_tokens=600, window=128, reporter=Silent()
        )
        twin = twin_of(model.module)
        name = "model.layers.1.mlp.up_proj.weight"
        torch.manual_seed(0)
        start = model.module.state_dict()[name].float()
        noise = 0.05 * torch.randn(start.shape)
        load_values(twin, {name: (start + noise).numpy()})
        kl, found = gradient(model.module, twin, [name], sets.statistics, device="cpu")
        assert kl == pytest.approx(kl_to(model.module, twin, sets.statistics)[0], rel=1e-4)
        values = []
        for sign in (-1, 1):
            load_values(twin, {name: (start + noise * (1 + 0.05 * sign)).numpy()})
            values.append(kl_to(model.module, twin, sets.statistics)[0])
        assert float((found[name] * noise).sum()) == pytest.approx((values[1] - values[0]) / 0.1, rel=0.05)
        assert not any(p.requires_grad for p in twin.parameters())


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


class TestEffort:
    @pytest.mark.parametrize("text", ["0", "ten", "-3", "1.5", "3d", "", "0s"])
    def test_nonsense_is_refused(self, text):
        with pytest.raises(UsageError, match="neither a number of steps"):
            Effort.parse(text)

    @pytest.mark.parametrize(("text", "share"), [("10", 0.5), ("20s", 0.1), ("1m", 1 / 30), ("0.5h", 1 / 900)])
    def test_share_of_the_work(self, text, share):
        assert Effort.parse(text).share(5, 2.0) == pytest.approx(share)

    def test_other_methods_have_nothing_to_recover(self, refused, job):
        assert "--recover is for --method bytecap" in refused(*job(), "--recover", "5")
