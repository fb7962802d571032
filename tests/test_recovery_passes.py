"""Passes of a recovery: gradients of the KL, windows of iterations, efforts."""

import pytest
import torch

from bytecap.calibration import kl_gradient
from bytecap.calibration.kl_gradient import gradient
from bytecap.errors import UsageError
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.job.effort import Effort
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.evaluation import kl_to
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.sources import load_sets
from bytecap.progress import Silent
from bytecap.recovery import kl_passes
from bytecap.recovery.sections import _joined


@pytest.mark.numeric
class TestGradient:
    def test_the_gradient_is_that_of_the_kl(self, model_directory, texts):
        model = load_checkpoint(model_directory("rotary"))
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
        load_values(quantized_copy, {name: (start + noise).numpy()})
        about, fast = gradient(model.module, quantized_copy, [name], sets.statistics, device="cpu", fast=True)
        assert about == pytest.approx(kl, rel=0.1)
        assert about != kl
        assert fast[name].dtype == torch.float32
        assert torch.cosine_similarity(fast[name].flatten(), found[name].flatten(), 0) > 0.95


class TestCurve:
    def test_a_second_recovery_goes_on_where_the_first_ended(self):
        own = {"tokens": 10, "stages": [1], "kl_before": 0.5, "curve": [(0.0, 0, 0.5), (4.0, 3, 0.4)]}
        later = {"tokens": 5, "stages": [2], "kl_before": 0.4, "curve": [(0.5, 0, 0.4), (2.0, 7, 0.3)]}
        assert _joined(own, later) == {
            "tokens": 15, "stages": [1, 2], "kl_before": 0.5,
            "curve": [(0.0, 0, 0.5), (4.0, 3, 0.4), (4.5, 3, 0.4), (6.0, 10, 0.3)],
        }  # fmt: skip

    def test_rows_that_do_not_count_may_hold_anything(self):
        torch.manual_seed(0)
        found, target = torch.randn(3, 8), torch.randn(3, 8)
        real, ids = torch.tensor([True, False, True]), torch.zeros(1, 3, dtype=torch.long)
        whole = kl_gradient.divergence(found, target, real, ids, 0.2)
        found[1, 2] = float("nan")
        total, slopes = kl_gradient.divergence(found, target, real, ids, 0.2)
        assert total == whole[0] > 0
        assert torch.equal(slopes, whole[1])
        assert not slopes[1].any()
        some = kl_gradient.divergence(found[::2], target[::2])  # all rows count by default
        assert some[0] == pytest.approx(float(kl_gradient.divergence(found, target, real)[0]))

    def test_skipped_iterations_count(self, model_directory, texts):
        model = load_checkpoint(model_directory("rotary"))
        sets = load_sets(
            model, texts["calib"], texts["val"], tokens=600, evaluation_tokens=600, window=128, reporter=Silent()
        )
        job = Job(model, sets, 0, lambda *_: 0, "cpu", Silent(), FitConfig(0))
        passes = kl_passes.Passes(job, copy_of(model.module))
        passes.skip(3, seconds=100.0)
        passes.check()
        [(seconds, iterations, kl)] = passes.curve
        assert seconds >= 100
        assert iterations == 3
        assert kl == pytest.approx(0, abs=1e-9)


class TestEffort:
    @pytest.mark.parametrize("text", ["0", "ten", "-3", "1.5", "3d", "", "0s"])
    def test_nonsense_is_refused(self, text):
        with pytest.raises(UsageError, match="neither a number of steps"):
            Effort.parse(text)

    @pytest.mark.parametrize(("text", "share"), [("10", 0.5), ("20s", 0.1), ("1m", 1 / 30), ("0.5h", 1 / 900)])
    def test_share_of_the_work(self, text, share):
        assert Effort.parse(text).share(5, 2.0) == pytest.approx(share)
