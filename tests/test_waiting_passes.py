"""Passes that wait, and what they let go of meanwhile."""

from functools import partial

import pytest
import torch
from torch import nn

from bytecap.allocation.waiting_passes import WaitingPass, is_spent
from bytecap.model.chain import Chain


class Blocks(nn.Module):
    """An embedding, three blocks, a head; `again` says what the head adds to its input."""

    def __init__(self, again="nothing"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(11, 4)
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.again = again
        self.register_buffer("kept", torch.rand(1, 5, 4, generator=generator))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, ids):
        x = first = self.kept if self.again == "buffer" else self.embed(ids) if ids.dtype == torch.int64 else ids
        for part in self.parts:
            x = part(x)
        if self.again == "shape":
            x = x + first.shape[-1]
        elif self.again == "values":
            x = x + first
        elif self.again == "storage":
            x = x + torch.empty(0).set_(first.untyped_storage(), 0, first.shape)
        return {"logits": [x]}


CHAIN, IDS = Chain("parts", 3, 0), torch.tensor([[3, 1, 4, 1, 5]])


def run(ids, model):
    return model(ids)


@pytest.mark.parametrize(
    ("again", "spent"), [("nothing", True), ("shape", True), ("values", False), ("storage", False), ("buffer", False)]
)
@torch.no_grad()
def test_an_input_that_is_read_again_is_not_spent(again, spent):
    model = Blocks(again)
    assert is_spent(model, partial(run, IDS), CHAIN) is spent
    assert model.kept.isfinite().all()


@torch.no_grad()
def test_a_batch_that_is_the_first_input_keeps_its_values():
    batch = torch.rand(1, 5, 4)
    before = batch.clone()
    assert not is_spent(Blocks(), partial(run, batch), CHAIN)
    assert torch.equal(batch, before)


@torch.no_grad()
def test_a_model_may_refuse_what_is_no_number():
    class Refusing(Blocks):
        def forward(self, ids):
            x = first = self.embed(ids)
            for part in self.parts:
                x = part(x)
            if not first.isfinite().all():
                raise KeyError("no number")
            return x

    assert not is_spent(Refusing(), partial(run, IDS), CHAIN)


@torch.no_grad()
def test_a_pass_without_tensors_says_nothing():
    assert not is_spent(model := Blocks(), lambda _: model(IDS) and None, CHAIN)


@pytest.mark.parametrize("spent", [None, CHAIN])
@torch.no_grad()
def test_values_are_let_go_of_once_their_block_has_run(spent):
    model, inputs = Blocks(), []
    for part in model.parts:
        part.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    model(IDS)
    waiting = WaitingPass(model, partial(run, IDS), model.parts, spent)
    calls = [waiting.advance() for _ in model.parts]
    held = [torch.equal(c.args[0], x) for c, x in zip(calls, inputs, strict=False)]
    assert held == [spent is None, True, True]
    assert calls[0].args[0].shape == (1, 5, 4)
    assert (calls[0].args[0].untyped_storage().nbytes() == 4) is (spent is not None)
    waiting.cancel()
