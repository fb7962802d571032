"""Modules whose predictions change with later tokens are no language models."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import bytecap
from bytecap.model.batches import Batch
from bytecap.model.texts import Window
from test_modules import VOCABULARY, Looped, ids


class Peeking(nn.Module):
    """A prediction sees the token after the next, a little."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + 0.1 * torch.roll(x, -1, 1))


def predicted(module, batch):
    return F.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class TestCausality:
    def test_a_module_that_sees_later_tokens_is_no_language_model(self):
        with pytest.raises(bytecap.CheckpointError, match=r"\(Peeking\) is no causal language model: its predictions"):
            bytecap.fit(Peeking(), budget=4000, calibration=[ids()])

    def test_it_is_stored_by_a_loss_of_its_own(self, monkeypatch):
        kinds = []
        monkeypatch.setattr(
            "bytecap.pipeline.fit_module.finish",
            lambda opened, sets, _: kinds.append(type(sets.statistics[0])) or opened,
        )
        bytecap.fit(Peeking(), budget=4000, calibration=ids().split(8), loss=predicted)
        bytecap.fit(Looped(1), budget=4000, calibration=ids().split(8), loss=predicted)
        assert kinds == [Batch, Window]  # logits of the second say everything
