"""Linear maps whose class has a forward of its own, and weights that a class keeps in float32."""

import copy

import pytest
import torch
from torch import nn

from bytecap.allocation.asymmetric_targets import stages
from bytecap.calibration.probe import fisher_loss, probe
from bytecap.calibration.residual_streams import streams_of
from bytecap.calibration.weight_gradients import mean_squared_gradients
from bytecap.model.checkpoint import find_units
from bytecap.model.forward import batches, fast_copy
from conftest import build
from test_probe import windows_of

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.float32)


class Pair(nn.Linear):
    """A router: its scores, and the logits they were made of."""

    def forward(self, x):
        found = super().forward(x)
        return torch.sigmoid(found), found


class Groups(nn.Linear):
    """Every group of channels goes through its own rows of one weight."""

    def __init__(self, cols, rows, groups):
        super().__init__(cols // groups, rows, bias=False)
        self.groups = groups

    def forward(self, x):
        parts = x.unflatten(-1, (self.groups, -1))
        return torch.einsum("...gc,grc->...gr", parts, self.weight.unflatten(0, (self.groups, -1))).flatten(-2)


class Routed(nn.Module):
    """The multilayer perceptron of a block, through a linear map with a forward of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.down = inner, nn.Linear(64, 32, bias=False)

    def forward(self, x):
        found = self.inner(x)
        return self.down(found[0] if isinstance(found, tuple) else found)


class TestForwardsOfTheirOwn:
    """Linear maps in models of transformers whose class does more than `x @ weight.T`."""

    @pytest.fixture(params=[lambda: Pair(32, 64, bias=False), lambda: Groups(32, 64, 4)], ids=["pair", "groups"])
    def module(self, request):
        module = build("rotary")
        torch.manual_seed(3)
        module.model.layers[0].mlp = Routed(request.param())
        return module

    def test_weights_collect_their_own_gradients(self, module):
        windows, name = windows_of(5), "model.layers.0.mlp.inner.weight"
        found = probe(module, find_units(module), windows)
        other, generator = copy.deepcopy(module).requires_grad_(requires_grad=True), torch.Generator().manual_seed(0)
        rows = torch.zeros(64, dtype=torch.float64)
        for ids, mask in batches(windows, 1):
            fisher_loss(other, ids, mask, generator).backward()
            weight = other.get_parameter(name)
            rows += weight.grad.double().square().sum(1)
            weight.grad = None
        (use,) = found.uses[name]
        torch.testing.assert_close(use.rows, rows, rtol=1e-3, atol=1e-9)

    def test_other_hooks_leave_them_out(self, module):
        units, windows, name = find_units(module), windows_of(3), "model.layers.0.mlp.inner.weight"
        assert name not in mean_squared_gradients(module, units, windows).square
        ids = torch.tensor([windows[0].tokens])
        assert all(name not in group for group in stages(module, lambda m: m(ids)))
        assert all(name not in s.sides for s in streams_of(module, units, windows))


class TestFastCopies:
    def test_what_a_class_keeps_in_float32_stays(self, monkeypatch):
        monkeypatch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.bfloat16)
        module = build("rotary")
        module._keep_in_fp32_modules_strict = {"mlp.gate_proj", "norm"}
        found = fast_copy(module, torch.device("cpu"))
        kept = {n for n, p in found.named_parameters() if p.dtype == torch.float32}
        assert kept == {"model.norm.weight", *(f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2))}
        for name, p in found.named_parameters():
            wanted = module.get_parameter(name)
            assert torch.equal(p, wanted if name in kept else wanted.bfloat16()), name
        assert {p.dtype for p in module.parameters()} == {torch.float32}
