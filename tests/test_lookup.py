"""Gradients at lookups against the table's own gradient, one sequence at a time."""

import pytest
import torch
from torch import nn

from bytecap.calibration import probe as probing
from bytecap.calibration.embedding_gradients import Lookup, looked_up
from bytecap.calibration.moments import Moment
from bytecap.calibration.probe import probe
from bytecap.model.checkpoint import find_units
from bytecap.model.forward import logits_of
from bytecap.model.linears import linear_weights
from conftest import build
from test_probe import windows_of

pytestmark = pytest.mark.numeric

TABLE = "model.embed_tokens.weight"


def fixed(module, ids, mask, _generator):
    """The loss of labels that no batch size changes."""
    logits = logits_of(module(ids[:, :-1]))[mask]
    return nn.functional.cross_entropy(logits.float(), ids[:, 1:][mask], reduction="sum")


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.float32)
    monkeypatch.setattr(probing, "fisher_loss", fixed)


def by_sequence(module, windows):
    """Second moment and row energies of the table's gradient, a window at a time."""
    table = dict(module.named_parameters())[TABLE]
    moment, rows = 0.0, 0.0
    for w in windows:
        ids = torch.tensor([w.tokens])
        table.requires_grad_(True)
        fixed(module, ids, torch.ones(1, len(w.tokens) - 1, dtype=torch.bool), None).backward()
        g, table.grad = table.grad.double(), None
        table.requires_grad_(False)
        moment, rows = moment + g.T @ g, rows + g.square().sum(1)
    return moment, rows


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("batch", [1, 64, 10_000])
def test_a_batch_says_what_its_sequences_say_one_by_one(monkeypatch, batch):
    monkeypatch.setattr(probing, "batch_tokens", lambda _: 2 * batch)
    module = build("rotary", tie_word_embeddings=False)
    module.requires_grad_(False)
    windows = windows_of(5) + windows_of(4, 13, seed=1)
    found = probe(module, find_units(module), windows)
    (use,) = found.uses[TABLE]
    moment, rows = by_sequence(module, windows)
    torch.testing.assert_close(use.moment, moment, rtol=1e-4, atol=1e-4 * float(moment.diagonal().max()))
    torch.testing.assert_close(use.rows, rows, rtol=1e-4, atol=1e-4 * float(rows.max()))
    assert float(use.weight) == pytest.approx(float(rows.sum()), rel=1e-5)


class Reading(nn.Module):
    """Tables of tokens: read once, twice, raw as well, only raw, never; and one of positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("once", "twice", "also", "raw", "never", "places"):
            setattr(self, name, nn.Embedding(9, 4))

    def forward(self, ids):
        places = self.places(torch.arange(ids.shape[1])[None])
        x = self.once(ids) * self.twice(ids) + self.twice(ids) + self.raw.weight[ids] + places + self.also(ids)
        return x @ self.also.weight.T


def test_only_single_lookups_of_the_batch_s_own_tokens_are_taken():
    module = Reading()
    module.requires_grad_(False)
    tables = {n: m for n, (m, kind) in linear_weights(module).items() if kind == "embedding"}
    assert len(tables) == 6
    ids = torch.tensor([[3, 1, 1], [1, 3, 0]])
    assert looked_up(tables, ids, lambda: module(ids).square().sum()) == {"once.weight"}
    assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    assert not any(m._forward_hooks for m in tables.values())


@pytest.mark.usefixtures("plain")
def test_a_head_that_reads_the_table_raw_keeps_the_table_s_own_gradient():
    module = build("rotary", tie_word_embeddings=False)
    module.requires_grad_(False)

    class Raw(type(module)):
        def forward(self, ids):
            return self.model(ids).last_hidden_state @ self.model.embed_tokens.weight.T

    module.__class__ = Raw
    windows = windows_of(1)  # whose batch is one sequence
    (use,) = probe(module, find_units(module), windows).uses[TABLE]
    moment, rows = by_sequence(module, windows)
    torch.testing.assert_close(use.rows, rows, rtol=1e-4, atol=1e-4 * float(rows.max()))
    torch.testing.assert_close(use.moment, moment, rtol=1e-4, atol=1e-4 * float(moment.diagonal().max()))


@pytest.mark.usefixtures("plain")
def test_batches_are_halved_where_memory_ends_and_hooks_go(monkeypatch):
    module, windows, sizes, said = build("rotary"), windows_of(4), [], []
    units = find_units(module)
    whole = probe(module, units, windows)
    losses = probing._losses

    def scarce(quantized_copy, windows, tokens, *rest):
        sizes.append(tokens)
        yield next(losses(quantized_copy, windows, tokens, *rest))
        if tokens > 30:
            raise torch.OutOfMemoryError
        yield from list(losses(quantized_copy, windows, tokens, *rest))[1:]

    monkeypatch.setattr(probing, "_losses", scarce)
    monkeypatch.setattr(probing, "batch_tokens", lambda _: 200)
    found = probe(module, units, windows, note=said.append)
    assert sizes == [100, 50, 25]
    assert len(said) == 2
    assert "statistics: out of device memory" in said[0]
    for name, uses in whole.uses.items():
        for one, two in zip(uses, found.uses[name], strict=True):
            torch.testing.assert_close(one.rows, two.rows, rtol=1e-4, atol=1e-6 * float(one.rows.max()))
    monkeypatch.setattr(probing, "_losses", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(MemoryError, match="does not hold one window"):
        probe(module, units, windows)


@pytest.mark.usefixtures("plain")
def test_a_model_with_positions_keeps_their_own_gradient():
    module = build("transposed")
    found = probe(module, find_units(module), windows_of(3))
    tables = [n for n, (_, kind) in linear_weights(module).items() if kind == "embedding"]
    assert len(tables) == 2
    assert all(float(found.uses[n][-1].rows.sum()) > 0 for n in tables)


def test_what_comes_after_a_lookup_may_change_it_in_place():
    table, moment = nn.Embedding(5, 3), Moment(3, torch.device("cpu"))
    rows, weight = torch.zeros(5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    table.weight.requires_grad_(False)
    table.register_forward_hook(Lookup(moment, rows, weight).forward_hook)
    ids = torch.tensor([[1, 1, 4], [1, 2, 2]])
    (table(ids).mul_(2) * torch.arange(1.0, 19).reshape(2, 3, 3)).sum().backward()
    g = 2 * torch.arange(1.0, 19).reshape(2, 3, 3).double()
    each = torch.stack([g[0, 0] + g[0, 1], g[0, 2], g[1, 0], g[1, 1] + g[1, 2]])
    torch.testing.assert_close(moment.whole(), each.T @ each)
    energy = each.square().sum(1)
    torch.testing.assert_close(
        rows, torch.stack([energy[0] * 0, energy[0] + energy[2], energy[3], energy[0] * 0, energy[1]])
    )
    torch.testing.assert_close(weight, energy.sum())
    with torch.no_grad():
        assert torch.equal(table(ids), table.weight[ids])
