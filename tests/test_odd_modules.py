"""Modules that are not plain trees of parameters: extra state, wrappers, shared and expanded memory, infinities."""

import numpy as np
import pytest
import torch
from torch import nn

import bytecap
from bytecap import ArtifactError, CheckpointError
from bytecap.model.factory import fill
from bytecap.progress import Silent

VOCABULARY = 48
CALIBRATION = [torch.randint(VOCABULARY, (8, 33), generator=torch.Generator().manual_seed(i)) for i in range(5)]
BUDGET = 6000


def fit(module, path=None, budget=BUDGET, **options):
    return bytecap.fit(module, budget, calibration=CALIBRATION, output=path, **options)


class Plain(nn.Module):
    """Embedding, a block, and a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(x + self.block(x))


def seeded(kind, seed=0):
    torch.manual_seed(seed)
    return kind()


def assert_holds(module, path):
    values = bytecap.load(path)
    for name, tensor in module.state_dict().items():
        if not name.endswith("_extra_state"):
            np.testing.assert_array_equal(tensor.float().numpy(), values[name].astype(np.float32), err_msg=name)


class TestExtraState:
    @pytest.mark.slow
    @pytest.mark.parametrize("state", [{"scale": 2}, None, torch.ones(3)], ids=["dictionary", "none", "tensor"])
    def test_is_said_and_left_to_the_module(self, tmp_path, state):
        class Extra(Plain):
            def get_extra_state(self):
                return state

            def set_extra_state(self, _state):
                raise AssertionError("nobody asked")

        said = Silent()
        module = seeded(Extra)
        fit(module, tmp_path / "m.bcap", reporter=said)
        assert any("_extra_state" in n for n in said.notes)
        other = seeded(Extra, 1)
        bytecap.load_into(tmp_path / "m.bcap", other)
        assert_holds(other, tmp_path / "m.bcap")


class Elsewhere(torch.Tensor):
    """A tensor whose values are another one's, as those of sharded and quantized weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*[a.inner if isinstance(a, Elsewhere) else a for a in args], **(kwargs or {}))


class TestNoValues:
    def test_meta_modules_are_refused(self):
        with torch.device("meta"):
            module = Plain()
        with pytest.raises(CheckpointError, match=r"table\.weight holds no values, it is on the meta device"):
            fit(module)

    def test_lazy_modules_are_refused(self):
        module = seeded(Plain)
        module.head = nn.LazyLinear(VOCABULARY)
        with pytest.raises(CheckpointError, match=r"head\.weight holds no values, it is lazy: run one batch"):
            fit(module)

    @pytest.mark.parametrize(("kind", "said"), [
        (lambda: torch.eye(4).to_sparse(), "a tensor of the layout sparse_coo: make it dense"),
        (lambda: torch.eye(4).to_mkldnn(), "a tensor of the layout _mkldnn: make it dense"),
        (lambda: Elsewhere(torch.eye(4)), "an? Elsewhere: make it an ordinary tensor"),
    ])  # fmt: skip
    def test_values_that_lie_elsewhere_are_refused(self, tmp_path, kind, said):
        """Sparse tensors, and subclasses that keep their values in others: all of the latter have one address, 0."""
        module = seeded(Plain)
        module.register_buffer("odd", kind())
        with pytest.raises(CheckpointError, match=f"odd holds no values, it is {said}"):
            fit(module)
        whole = seeded(Plain)
        whole.register_buffer("odd", torch.eye(4))
        fit(whole, tmp_path / "m.bcap")
        with pytest.raises(ArtifactError, match=rf"odd holds no values in the module \(it is {said}"):
            bytecap.load_into(tmp_path / "m.bcap", module)

    @pytest.mark.slow
    def test_nothing_is_changed_where_one_tensor_holds_no_values(self, tmp_path):
        fit(seeded(Plain), tmp_path / "m.bcap")
        other = seeded(Plain, 1)
        before = other.table.weight.detach().clone()
        other.head = nn.Linear(32, VOCABULARY, bias=False, device="meta")
        with pytest.raises(ArtifactError, match=r"head\.weight holds no values"):
            bytecap.load_into(tmp_path / "m.bcap", other)
        assert torch.equal(other.table.weight, before)


class TestInfinities:
    @pytest.mark.slow
    @pytest.mark.parametrize("value", [-float("inf"), float("inf"), float("nan")])
    @pytest.mark.parametrize("budget", [BUDGET, 60_000], ids=["lossy", "lossless"])
    def test_buffers_are_stored_exactly(self, tmp_path, value, budget):
        module = seeded(Plain)
        mask = torch.full((5, 5), value).triu(1)
        module.register_buffer("mask", mask)
        module.register_buffer("narrow", torch.full((3,), value, dtype=torch.bfloat16))
        fit(module, tmp_path / "m.bcap", budget)
        np.testing.assert_array_equal(bytecap.load(tmp_path / "m.bcap")["mask"], mask.numpy())
        other = seeded(Plain, 1)
        other.register_buffer("mask", torch.zeros(5, 5))
        other.register_buffer("narrow", torch.zeros(3, dtype=torch.bfloat16))
        bytecap.load_into(tmp_path / "m.bcap", other)
        assert_holds(other, tmp_path / "m.bcap")

    @pytest.mark.parametrize("side", [200, 700])
    def test_a_buffer_that_fills_the_budget_is_named(self, side):
        """Kept exactly, it is what a larger budget has to hold, however coarse all units are."""
        module = seeded(Plain)
        module.register_buffer("mask", torch.randn(side, side))
        with pytest.raises(bytecap.BudgetError, match=r"the largest units are mask \d{6,7}, ") as caught:
            fit(module, budget=20_000)
        assert caught.value.floor > 3 * side**2

    def test_parameters_are_refused(self):
        module = seeded(Plain)
        with torch.no_grad():
            module.head.weight[2, 3] = -float("inf")
        with pytest.raises(CheckpointError, match=r"head\.weight holds -inf at index \[2, 3\]"):
            fit(module)


class Turned(Plain):
    """The head is the embedding, stored the other way round."""

    def __init__(self):
        super().__init__()
        self.head = None
        self.out = nn.Parameter(self.table.weight.data.T)

    def forward(self, ids):
        x = self.table(ids)
        return (x + self.block(x)) @ self.out


class Expanded(Plain):
    """One gain, seen as a vector."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1).expand(32))

    def forward(self, ids):
        x = self.table(ids) * self.gain
        return self.head(x + self.block(x))


class TestSharedMemory:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [Turned, Expanded])
    @pytest.mark.parametrize("budget", [BUDGET, 60_000], ids=["lossy", "lossless"])
    def test_a_fit_of_it_loads_and_gives_the_measured_loss(self, tmp_path, kind, budget):
        module = seeded(kind)
        report = fit(module, tmp_path / "m.bcap", budget).report
        other = seeded(kind, 1)
        bytecap.load_into(tmp_path / "m.bcap", other)
        assert_holds(other, tmp_path / "m.bcap")
        again = fit(other, None, 200_000)
        assert again.report["nats_original"] == pytest.approx(report["nats_artifact"], rel=1e-5)

    def test_sharing_stays_where_values_allow_it(self, tmp_path):
        module = seeded(Turned)
        fit(module, tmp_path / "m.bcap", 60_000)
        other = seeded(Turned, 1)
        bytecap.load_into(tmp_path / "m.bcap", other)
        assert other.out.data_ptr() == other.table.weight.data_ptr()

    def test_two_values_for_one_tensor_change_nothing(self, tmp_path):
        fit(seeded(Plain), tmp_path / "m.bcap", 60_000)
        other = seeded(Plain, 1)
        other.head.weight = nn.Parameter(other.table.weight.data)
        before = {n: t.clone() for n, t in other.state_dict().items()}
        with pytest.raises(ArtifactError, match="one tensor in the module and two in the artifact"):
            bytecap.load_into(tmp_path / "m.bcap", other)
        assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


class Wrapper(nn.Module):
    """torch.compile and FSDP leave marks in names."""

    def __init__(self, module, name):
        super().__init__()
        self.add_module(name, module)
        self.inner = name

    def forward(self, *args):
        return getattr(self, self.inner)(*args)


def wrapped(module):
    module.block = Wrapper(Wrapper(module.block, "_fsdp_wrapped_module"), "_checkpoint_wrapped_module")
    return Wrapper(Wrapper(module, "_orig_mod"), "module")


class TestWrappers:
    @pytest.mark.slow
    def test_a_wrapped_module_gives_a_file_for_the_plain_one_and_back(self, tmp_path):
        fit(wrapped(seeded(Plain)), tmp_path / "wrapped.bcap")
        plain = seeded(Plain, 1)
        bytecap.load_into(tmp_path / "wrapped.bcap", plain)
        fit(seeded(Plain), tmp_path / "plain.bcap")
        other = wrapped(seeded(Plain, 1))
        bytecap.load_into(tmp_path / "plain.bcap", other)
        values = bytecap.load(tmp_path / "plain.bcap")
        assert torch.equal(next(other.parameters()), torch.from_numpy(values["table.weight"]))
        held = {n.rpartition(".")[0]: v for n, v in bytecap.load(tmp_path / "wrapped.bcap").items()}
        np.testing.assert_array_equal(plain.head.weight.detach(), held["module._orig_mod.head"])

    def test_checkpoints_of_wrapped_modules_fill_plain_ones_and_back(self):
        source, plain = wrapped(seeded(Plain)), seeded(Plain, 1)
        fill(plain, source.state_dict(), "checkpoint")
        assert torch.equal(plain.block[0].weight, seeded(Plain).block[0].weight)
        other = wrapped(seeded(Plain, 2))
        fill(other, plain.state_dict(), "checkpoint")
        assert torch.equal(next(other.parameters()), plain.table.weight)


def test_float64_that_float32_does_not_hold_is_not_called_lossless():
    module = seeded(Plain).double()
    assert fit(module, None, 200_000).report["lossless"] is True  # widened float32
    with torch.no_grad():
        module.head.weight.div_(3)
    said = Silent()
    assert fit(module, None, 200_000, reporter=said).report["lossless"] is False
    assert any("float64 rounded to float32, head.weight" in n for n in said.notes)
