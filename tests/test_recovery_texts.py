"""Texts and samples that recovery reads, and the checks between its iterations."""

from pathlib import Path

import pytest
import torch

from bytecap.errors import TextError
from bytecap.job import Job
from bytecap.job.config import FitConfig
from bytecap.model.calibration_text import GENERAL, SELF, SELF_MOST
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.evaluation import kl_to
from bytecap.model.quantized_copy import copy_of
from bytecap.model.sampling import sample
from bytecap.model.sources import load_sets, recovery_texts, with_recovery
from bytecap.model.texts import Window
from bytecap.pipeline.token_sets import token_sets
from bytecap.progress import Silent
from bytecap.recovery import kl_passes
from bytecap.system.cache import Store

BUDGET = 12_000  # some two bits a weight


class TestTexts:
    def sets(self, model, texts):
        return load_sets(
            model, texts["calib"], texts["val"], tokens=600, evaluation_tokens=600, window=128, reporter=Silent()
        )

    def test_recovery_windows_are_in_no_other_set_that_measures(self, model_directory, texts):
        model = load_checkpoint(model_directory("rotary"))
        sets = self.sets(model, texts)
        found = with_recovery(model, sets, [texts["calib"], texts["val"]], window=128, reporter=Silent())
        held = {w.tokens for group in (sets.correction, *(t.windows for t in sets.evaluation)) for w in group}
        assert found.recovery
        assert not held & {w.tokens for w in found.recovery}
        assert held & {w.tokens for w in (*sets.correction, *sets.evaluation[0].windows)}
        assert with_recovery(model, sets, None, reporter=Silent()) is sets

    def test_a_text_that_evaluation_holds_is_refused(self, model_directory, texts, tmp_path):
        model = load_checkpoint(model_directory("rotary"))
        path = tmp_path / "same.txt"
        path.write_text("The quick brown fox. " * 30, "utf-8")
        sets = load_sets(model, texts["calib"], path, tokens=600, window=128, reporter=Silent())
        with pytest.raises(TextError, match=r"same\.txt holds nothing"):
            with_recovery(model, sets, path, window=128, reporter=Silent())


class TestStandIns:
    """Recovery reads text by the rules of calibration."""

    def test_nothing_given_is_samples_and_general_text(self, model_directory, texts):
        model = load_checkpoint(model_directory("rotary"))
        assert recovery_texts(model, []) == [Path(SELF), Path(GENERAL)]
        assert recovery_texts(model, [Path("general:2"), texts["calib"]]) == [Path(GENERAL), texts["calib"]]
        assert [p.name for p in recovery_texts(load_checkpoint("demo"), [])] == ["calib.txt"]

    def test_a_model_that_cannot_be_sampled_reads_general_text(self, model_directory, monkeypatch):
        monkeypatch.setattr("bytecap.model.sources.of_transformers", lambda _: False)
        assert recovery_texts(load_checkpoint(model_directory("rotary")), []) == [Path(GENERAL)]

    def test_both_are_read_and_the_sampler_is_asked_once(self, model_directory, texts, monkeypatch):
        monkeypatch.setitem(SELF_MOST, "cpu", 640)
        monkeypatch.setattr("bytecap.model.sources.RECOVERY_TOKENS", 4000)
        model, asked = load_checkpoint(model_directory("rotary")), []
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


class TestChecks:
    @pytest.mark.parametrize(("most", "passes_of_original"), [(2**27, 1), (0, 3)])
    def test_the_original_reads_the_correction_tokens_once(
        self, model_directory, texts, monkeypatch, most, passes_of_original
    ):
        monkeypatch.setitem(kl_passes._REMEMBERED, "cpu", most)
        model = load_checkpoint(model_directory("rotary"))
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
        module, sizes = load_checkpoint(model_directory("rotary")).module, []
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

    @pytest.mark.slow
    def test_they_are_kept_in_the_store(self, model_directory, texts, tmp_path, monkeypatch):
        monkeypatch.setitem(SELF_MOST, "cpu", 640)
        model, calls = load_checkpoint(model_directory("rotary")), []

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

    @pytest.mark.slow
    def test_windows_come_from_the_model_alone_and_again(self, model_directory, texts, monkeypatch):
        monkeypatch.setitem(SELF_MOST, "cpu", 4096)
        model = load_checkpoint(model_directory("rotary"))
        sets = TestTexts().sets(model, texts)
        found, again = (with_recovery(model, sets, "self", window=32, reporter=Silent()) for _ in range(2))
        assert found.recovery == again.recovery
        assert all(w.predicted == 32 for w in found.recovery)
        assert sum(w.predicted for w in found.recovery) >= 4096 - 32 * 20
        text = " ".join(str(t) for w in sets.statistics for t in w.tokens)
        assert sum(" ".join(map(str, w.tokens[1:9])) in text for w in found.recovery) < len(found.recovery) / 10

    def test_samples_follow_the_model(self, model_directory):
        module = load_checkpoint(model_directory("rotary")).module
        windows = sample(module, [5], 4000, window=1, seed=0, device="cpu")
        chances = module(torch.tensor([[5]])).logits[0, -1].softmax(-1)
        counts = torch.bincount(torch.tensor([w.tokens[1] for w in windows]), minlength=len(chances)) / len(windows)
        assert float((counts - chances).abs().max()) < 0.03
