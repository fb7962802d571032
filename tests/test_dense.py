"""Streamed statistics of any small module against dense ones: every use of every weight, every token by itself."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bytecap.calibration.probe import fisher_loss, probe
from bytecap.model.checkpoint import find_units
from bytecap.model.forward import batches
from bytecap.model.texts import Window

pytestmark = pytest.mark.numeric


class Loop(nn.Module):
    """An embedding, a map used several times over, a head that may be the embedding; no token sees another."""

    def __init__(self, vocabulary, width, times, tied, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, width)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.times = times
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(self.times):
            x = torch.tanh(self.inner(x))
        return self.head(x)


@st.composite
def cases(draw):
    vocabulary, width = draw(st.integers(3, 17)), draw(st.integers(1, 7))
    module = Loop(vocabulary, width, draw(st.integers(1, 4)), draw(st.booleans()), draw(st.integers(0, 99)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    lengths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=6))
    windows = [Window(tuple(rng.integers(0, vocabulary, n).tolist()), n) for n in lengths]
    return module, windows, draw(st.booleans())


def dense(module, windows, tokens):
    """By linear map, every use's inputs and output gradients (tokens, width); by batch, the embedding's gradient."""
    quantized_copy, seen, sums = copy.deepcopy(module), {"inner": [], "head": []}, []
    outputs = []

    def keep(name, mask):
        def hook(_module, args, output):
            gradient = []
            output.register_hook(gradient.append)
            seen[name].append((args[0].detach()[mask].double(), gradient, mask))

        return hook

    def embedded(_module, args, output):
        output.register_hook(lambda g, ids=args[0]: outputs.append((ids, g)))

    generator = torch.Generator().manual_seed(0)
    for ids, mask in batches(windows, tokens):
        handles = [getattr(quantized_copy, n).register_forward_hook(keep(n, mask)) for n in seen]
        handles.append(quantized_copy.embed.register_forward_hook(embedded))
        fisher_loss(quantized_copy, ids, mask, generator).backward()
        for handle in handles:
            handle.remove()
        at, g = outputs.pop()
        total = torch.zeros(quantized_copy.embed.weight.shape, dtype=torch.float64)
        total.index_add_(0, at.reshape(-1), g.reshape(-1, g.shape[-1]).double())
        sums.append(total)
    found = {n: [(x, g[0][mask].double()) for x, g, mask in uses] for n, uses in seen.items()}
    return found, sums


def check_map(use, seen, guided):
    x, g = (torch.cat(parts) for parts in zip(*seen, strict=True))
    near = {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(use.rows, g.square().sum(0), **near)
    w = g.square().mean(1) if guided else torch.ones(len(x), dtype=torch.float64)
    torch.testing.assert_close(use.moment, torch.einsum("t,ti,tj->ij", w, x, x), **near)
    assert float(use.weight) == pytest.approx(float(w.sum()), rel=1e-3, abs=1e-9)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(cases())
def test_moments_of_maps_used_any_number_of_times_and_of_tied_heads(case):
    module, windows, guided = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.float32)
        found = probe(module, find_units(module), windows, guided=guided)
        seen, sums = dense(module, windows, 2048)
    check_map(found.uses["inner.weight"][0], seen["inner"], guided)
    tied = module.head.weight is module.embed.weight
    uses = found.uses["embed.weight"]
    assert len(uses) == 1 + tied
    check_map(uses[0] if tied else found.uses["head.weight"][0], seen["head"], guided)
    rows = sum(t.square().sum(1) for t in sums)
    torch.testing.assert_close(uses[-1].rows, rows, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(uses[-1].moment, sum(t.T @ t for t in sums), rtol=1e-3, atol=1e-6)
    assert found.tokens == sum(w.predicted for w in windows)
