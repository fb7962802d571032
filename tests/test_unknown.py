"""Units that calibration says nothing about, or nothing finite, are kept safe, or refused with unit and window."""

import numpy as np
import pytest
import torch
from torch import nn

import bytecap
from bytecap import BudgetError, CheckpointError, UsageError
from bytecap.calibration.metric import Metric, factor
from bytecap.progress import Silent

VOCABULARY = 48
CALIBRATION = [torch.randint(VOCABULARY, (8, 33), generator=torch.Generator().manual_seed(i)) for i in range(5)]


class Told(Silent):
    """Keeps warnings beside notes."""

    def warn(self, text):
        self.notes.append(text)


class Towered(nn.Module):
    """A language model with a tower that text never reaches."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.tower = nn.Linear(96, 96)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids):
        return self.head(self.table(ids))


def fit(module, budget, said=None, **options):
    return bytecap.fit(module, budget, calibration=CALIBRATION, reporter=said or Told(), **options)


@pytest.fixture(scope="module")
def towered():
    torch.manual_seed(0)
    return Towered()


class TestUnused:
    @pytest.mark.slow
    def test_is_kept_at_a_safe_rate_and_said(self, towered):
        said = Told()
        found = fit(towered, 16_000, said)
        values, tower = found.tensors(), towered.tower
        error = np.abs(values["tower.weight"] - tower.weight.detach().numpy())
        assert error.max() <= 2**-5 * tower.weight.abs().max().item()
        np.testing.assert_array_equal(values["tower.bias"], tower.bias.detach())
        assert any("no gradient reaches tower.weight, tower.bias" in n and "--unused drop" in n for n in said.notes)

    def test_a_budget_below_it_names_the_way_out(self, towered):
        with pytest.raises(BudgetError, match=r"2 units that no gradient reaches hold .*--unused drop"):
            fit(towered, 8000)

    @pytest.mark.slow
    def test_it_can_be_dropped(self, towered):
        said = Told()
        assert len(fit(towered, 8000, said, unused="drop").data) <= 8000
        assert any("stored coarsely, as asked" in n for n in said.notes)

    def test_another_word(self, towered):
        with pytest.raises(UsageError, match="'throw' for units that no gradient reaches: use keep or drop"):
            fit(towered, 8000, unused="throw")

    @pytest.mark.slow
    def test_experts_that_no_token_reaches(self):
        class Routed(nn.Module):
            """Tokens go to the first two of four experts only."""

            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(VOCABULARY, 32)
                self.experts = nn.Parameter(torch.randn(4, 32, 32) / 6)
                self.head = nn.Linear(32, VOCABULARY)

            def forward(self, ids):
                x = self.table(ids)
                chosen = self.experts[ids % 2]  # (batch, length, 32, 32)
                return self.head(x + torch.einsum("blij,blj->bli", chosen, x).tanh())

        torch.manual_seed(0)
        module, said = Routed(), Told()
        found = fit(module, 5000, said).tensors()["experts"]
        assert any("no token reaches 2 experts of experts" in n for n in said.notes)
        error = np.abs(found - module.experts.detach().numpy()).reshape(4, -1).mean(1)
        assert error[2:].max() < 3 * error[:2].max()


class Rooted(nn.Module):
    """Finite for all tokens, but where one is 7 a root is taken whose gradient is not."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.map = nn.Linear(32, 40)
        self.back = nn.Linear(40, 32)
        self.head = nn.Linear(32, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        z = self.map(x)
        y = torch.where(z > 0, z.sqrt(), 0.0) if bool((ids == 7).any()) else z.tanh()
        return self.head(x + self.back(y))


class TestNotFinite:
    def test_unit_and_window_are_named(self):
        torch.manual_seed(0)
        batches = [x.clone() for x in CALIBRATION]
        for x in batches:
            x[x == 7] = 8
        batches[1][0, 3] = 7
        with pytest.raises(CheckpointError, match=r"the gradients of \S+ are not finite on window \d+ of") as e:
            bytecap.fit(Rooted(), 5000, calibration=batches, evaluation=[batches[0]])
        assert f"begin with {batches[1][0, 0].item()}, {batches[1][0, 1].item()}, " in str(e.value)

    @pytest.mark.parametrize("method", ["owq", "radio"])
    def test_baselines_refuse_too(self, method):
        torch.manual_seed(0)
        with pytest.raises(CheckpointError, match="are not finite"):
            fit(Rooted(), 9000, method=method)

    def test_a_weight_far_too_large_is_named(self):
        torch.manual_seed(0)
        module = Rooted()
        with torch.no_grad():
            module.map.weight[3, 4] = 1e20
            module.back.weight.mul_(1e-20)
        with pytest.raises(CheckpointError, match=r"the largest weight of the model is 1e\+20 in map\.weight"):
            fit(module, 5000)

    def test_no_factor_is_looked_for(self):
        with pytest.raises(CheckpointError, match="not finite"):
            factor(Metric(torch.full((3, 3), torch.nan, dtype=torch.float64), torch.ones(2)), 1e-3)
