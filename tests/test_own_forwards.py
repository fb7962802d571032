"""Model code of its own kind: forwards, weights kept in float32, code that fails, vectors that are no tokens."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bytecap.allocation.asymmetric_targets import stages
from bytecap.allocation.target_fit import Moments
from bytecap.calibration.probe import fisher_loss, probe
from bytecap.calibration.residual_streams import streams_of
from bytecap.calibration.weight_gradients import mean_squared_gradients
from bytecap.errors import CheckpointError
from bytecap.model.checkpoint import find_units
from bytecap.model.forward import batches, fast_copy, in_fast_dtype
from bytecap.recovery.blocks import recover
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
    def test_what_a_class_keeps_in_float32_stays(self):
        module = build("rotary")
        module._keep_in_fp32_modules_strict = {"mlp.gate_proj", "norm"}
        found = fast_copy(module, torch.device("cpu"), torch.bfloat16)
        kept = {n for n, p in found.named_parameters() if p.dtype == torch.float32}
        assert kept == {"model.norm.weight", *(f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2))}
        for name, p in found.named_parameters():
            wanted = module.get_parameter(name)
            assert torch.equal(p, wanted if name in kept else wanted.bfloat16()), name
        assert {p.dtype for p in module.parameters()} == {torch.float32}


class Mixed(nn.Module):
    """Computes one factor in float32 whatever its weight is in, as some classes of transformers do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return x.float() @ self.inner.weight


class LateFailure(nn.Module):
    """Fails in bfloat16 in the second batch of a probe."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)
        self.calls = 0

    def forward(self, x):
        self.calls += x.requires_grad
        return x @ (self.inner.weight.float() if self.calls > 2 else self.inner.weight)


class OneWay(nn.Module):
    """Gives outputs, and no gradients: its way back fails, as that of reversible layers in evaluation does."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x * 2

        @staticmethod
        def backward(_, __):
            raise AssertionError("only in training\nsecond line")

    def forward(self, x):
        return self.Function.apply(x)


class TestCodeThatFails:
    def test_what_fails_in_bfloat16_is_done_in_float32(self, monkeypatch):
        module, windows, notes = build("rotary"), windows_of(5), []
        module.model.layers[0].mlp = Mixed()
        units = find_units(module)
        wanted, gradients = probe(module, units, windows), mean_squared_gradients(module, units, windows)
        monkeypatch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.bfloat16)
        done = []
        found = probe(module, units, windows, note=notes.append, progress=done.append)
        assert sum(done) == found.tokens
        assert [n for n in notes if "float32" in n and "LlamaForCausalLM" in n and "bfloat16" in n] == notes
        assert len(notes) == 1
        for name, uses in wanted.uses.items():
            for one, other in zip(uses, found.uses[name], strict=True):
                assert torch.equal(one.rows, other.rows), name
        done = []
        again = mean_squared_gradients(module, units, windows, note=notes.append, progress=done.append)
        assert sum(done) == again.tokens
        assert len(notes) == 2
        assert all(torch.equal(again.square[n], value) for n, value in gradients.square.items())

    def test_tokens_of_a_first_run_are_taken_back(self, monkeypatch):
        monkeypatch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.bfloat16)
        module, done = build("rotary"), []
        module.model.layers[0].mlp = LateFailure()
        found = probe(module, find_units(module), windows_of(60), progress=done.append)
        assert min(done) < 0
        assert sum(done) == found.tokens

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("work", [probe, mean_squared_gradients])
    def test_what_fails_in_float32_too_is_one_line(self, monkeypatch, dtype, work):
        monkeypatch.setattr("bytecap.model.forward.fast_dtype", lambda _: dtype)
        module = build("rotary")
        module.model.layers[0].mlp = OneWay()
        said = r"LlamaForCausalLM cannot be differentiated .*\(AssertionError: only in training\).* --method uniform"
        with pytest.raises(CheckpointError, match=said):
            work(module, find_units(module), windows_of(3))

    @pytest.mark.parametrize(
        "error", [CheckpointError("ours"), MemoryError("none left"), IndexError("a mistake of ours")]
    )
    def test_what_is_not_the_models_is_no_reason(self, monkeypatch, error):
        """Errors of ours, a lack of memory, and mistakes in our own code stay what they are, and nothing runs twice."""
        monkeypatch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.bfloat16)
        calls = []

        def work(dtype):
            calls.append(dtype)
            raise error

        with pytest.raises(type(error), match=str(error)):
            in_fast_dtype(build("rotary"), torch.device("cpu"), work)
        assert calls == [torch.bfloat16]


class TestVectorsThatAreNotTokens:
    def test_a_layer_that_reads_more_of_them(self):
        """Some decoders put several streams one behind the other: all of their vectors count."""
        x, mask = torch.randn(2, 12, 6), torch.tensor([[True, True, True, False], [True, False, True, True]])
        found, wanted = Moments(), Moments()
        found.add(x, 0.5 * x, mask)
        wanted.add(x, 0.5 * x, None)
        weights = [(torch.randn(3, 6), torch.ones(3))]
        assert torch.equal(found.fit(weights, 1.0)[0], wanted.fit(weights, 1.0)[0])
        real, flat = Moments(), Moments()
        real.add(x[:, :4], 0.5 * x[:, :4], mask)
        flat.add(x[:, :4][mask], 0.5 * x[:, :4][mask], None)
        assert torch.equal(real.fit(weights, 1.0)[0], flat.fit(weights, 1.0)[0])

    def test_blocks_that_read_more_of_them_are_not_tuned(self):
        class Streams(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(512, 8)
                self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

            def forward(self, ids):
                x = torch.cat([self.table(ids)] * 3, 1)
                for layer in self.layers:
                    x = layer(x)
                return x[:, : ids.shape[1]] @ self.table.weight.T

        module, notes = Streams(), []
        job = SimpleNamespace(
            model=SimpleNamespace(module=module), sets=SimpleNamespace(statistics=windows_of(3)), device="cpu",
            reporter=SimpleNamespace(note=notes.append),
        )  # fmt: skip
        parts = {f"layers.{i}.weight": SimpleNamespace(stored=lambda i=i: module.layers[i].weight) for i in range(2)}
        assert recover(job, parts, steps=3) == set()
        assert notes == ["the blocks do not read one vector a token: nothing is tuned"]
