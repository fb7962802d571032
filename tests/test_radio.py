from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bytecap
from bytecap.calibration.weight_gradients import _Hidden, mean_squared_gradients
from bytecap.format.coders import Shared, run
from bytecap.format.coders.companded import dequantize
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.methods.baselines import companding, radio
from bytecap.methods.baselines.companding import Companding, cut
from bytecap.methods.baselines.radio import Spectrum, _Fit, bias_names, depths_at, dual_ascent
from bytecap.model.checkpoint import find_units, load_checkpoint
from bytecap.model.texts import Window
from bytecap.types import Unit
from conftest import BUDGET


@pytest.fixture(scope="module")
def groups():
    """Groups of all matrices of the demo model, gradients from a few random tokens."""
    model = load_checkpoint("demo")
    rng = np.random.default_rng(0)
    windows = [Window(tuple(rng.integers(0, 2048, 65).tolist()), 256) for _ in range(4)]
    found = mean_squared_gradients(model.module, model.units, windows)
    weights = {u.name: model.module.state_dict()[u.name].float() for u in model.units if u.linear}
    return {n: (w, cut(w, found.square[n], 128)) for n, w in weights.items()}


def joined(groups):
    importance = np.concatenate([g.importance.reshape(-1) for _, g in groups.values()])
    weights = np.concatenate([g.counts() for _, g in groups.values()])
    return importance, weights


@pytest.mark.numeric
@pytest.mark.parametrize("rate", [0.3, 2.0, 3.3, 5.0, 7.9])
def test_dual_ascent_meets_the_rate_and_equalises_slopes(groups, rate):
    importance, weights = joined(groups)
    depth = depths_at(importance, dual_ascent(Spectrum.of(g for _, g in groups.values()), rate))
    assert abs(weights @ depth / weights.sum() - rate) < 1e-3
    inside = (depth > 0) & (depth < 8)
    slopes = np.exp2(importance - 2 * depth)[inside]
    assert slopes.max() / slopes.min() < 1 + 1e-6
    assert np.exp2(importance[depth == 0]).max(initial=0) <= slopes.max() * (1 + 1e-6)
    whole = np.rint(depth)
    inside &= (whole > 0) & (whole < 8)
    slopes = np.exp2(importance - 2 * whole)[inside]
    assert slopes.max() / slopes.min() < 4.1


@pytest.mark.numeric
def test_sets_are_equal_and_every_row_is_in_one(groups):
    for weight, group in groups.values():
        assert group.sets.shape == (len(weight),)
        assert group.sizes.sum() == len(weight)
        assert group.sizes.max() - group.sizes.min() <= 1
        assert group.importance.shape == (len(group.sizes), weight.shape[1])


@pytest.mark.numeric
def test_a_bit_more_means_less_error_and_depth_0_is_the_mean(groups):
    weight = next(iter(groups.values()))[0][:, :24]
    errors = []
    for depth in range(9):
        part = Companding.start(weight, cut(weight, torch.ones_like(weight), 128))
        part.move(np.full(part.groups.importance.shape, depth, np.uint8))
        errors.append(float((weight - torch.from_numpy(dequantize(part.code))).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert 0.5 * float(weight.var()) < errors[0] < float(weight.var())
    for depth in range(1, 7):
        assert errors[depth] < 0.5 * errors[depth - 1]  # near the factor 4 of the model


@pytest.mark.numeric
def test_depths_may_move_group_by_group(groups):
    weight, group = list(groups.values())[6]
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 9, group.importance.shape).astype(np.uint8) for _ in range(2))
    moved, direct = Companding.start(weight, group), Companding.start(weight, group)
    moved.move(a)
    moved.move(b)
    direct.move(b)
    np.testing.assert_array_equal(dequantize(moved.code), dequantize(direct.code))


@pytest.mark.numeric
def test_groups_are_quantized_alike_whatever_lies_beside_them(groups, monkeypatch):
    weight, group = list(groups.values())[6]
    depths = np.random.default_rng(2).integers(0, 9, group.importance.shape).astype(np.uint8)
    whole, slowly = Companding.start(weight, group), Companding.start(weight, group)
    whole.move(depths)
    monkeypatch.setitem(companding._TOGETHER, "cpu", 3 * int(group.sizes.max()))
    slowly.move(depths)
    some = whole.some(3)
    some.move(np.ascontiguousarray(depths[:, ::3]))
    np.testing.assert_array_equal(dequantize(slowly.code), dequantize(whole.code))
    np.testing.assert_array_equal(dequantize(some.code), dequantize(whole.code)[:, ::3])


@pytest.mark.numeric
def test_sizes_of_large_models_are_estimated_from_some_columns(groups, monkeypatch):
    monkeypatch.setattr(radio, "_SAMPLED", sum(w.numel() for w, _ in groups.values()) // 3)
    job = SimpleNamespace(
        model=SimpleNamespace(units=tuple(Unit(n, tuple(w.shape), "F32") for n, (w, _) in groups.items()))
    )
    fit = _Fit(job, {n: Companding.start(w, g) for n, (w, g) in groups.items()}, {}, {}, True)
    fit.move(2.5)
    about, real = (sum(len(s.data) for s in fit.sections(estimate=e).values()) for e in (True, False))
    assert all(p.weight.shape[1] < fit.parts[n].weight.shape[1] for n, p in fit.samples.items())
    assert about == pytest.approx(real, rel=0.1)


@pytest.mark.numeric
def test_squared_gradients_are_those_of_single_tokens():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11)).eval()
    units = find_units(module)
    found = mean_squared_gradients(module, units, [Window(tuple(range(11)), 11)], kind="loss", seed=3)
    assert found.tokens == 10
    torch.testing.assert_close(found.inputs["1.weight"], module[0].weight[:10].double().mean(0), atol=1e-2, rtol=1e-2)
    total = found.square["0.weight"]
    assert total.shape == (11, 4)
    assert (total[10] > 0).all()  # never an input, but not without worth
    assert (total[:10] > total[10]).all()
    x = module[0].weight[:10].square()  # the squared gradient is a sum of outer products of g^2 and x^2
    ratio = found.square["1.weight"] @ torch.linalg.pinv(x)
    torch.testing.assert_close(ratio @ x, found.square["1.weight"], atol=1e-3, rtol=3e-2)


class Tower(torch.nn.Module):
    """A table, a map to hidden states and a head; every token stands alone."""

    def __init__(self, head_scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.map = torch.nn.Embedding(24, 6), torch.nn.Linear(6, 4, bias=False)
        self.head = torch.nn.Linear(4, 24, bias=False)
        self.head.weight.data *= head_scale * torch.tensor([10.0, 1, 1, 1])  # the loss sees one output most

    def forward(self, ids):
        return self.head(self.map(self.table(ids)))


WINDOWS = [Window(tuple(np.random.default_rng(i).integers(0, 24, 65).tolist()), 65) for i in range(48)]


@pytest.mark.numeric
class TestComponents:
    def found(self, kind, monkeypatch, module=None):
        monkeypatch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.float32)
        monkeypatch.setattr("bytecap.calibration.weight_gradients._SAMPLED", 1)
        module = (module or Tower()).eval()
        return mean_squared_gradients(module, find_units(module), WINDOWS, kind=kind)

    def test_all_directions_of_the_hidden_states_count_alike(self, monkeypatch):
        """With every component in turn, sum_k u_ki^2 = 1: the map's rows differ for the loss, not for the paper."""
        rows = {kind: self.found(kind, monkeypatch).square["map.weight"].sum(1) for kind in ("components", "loss")}
        assert float(rows["components"].max() / rows["components"].min()) < 1.3
        assert float(rows["loss"].max() / rows["loss"].min()) > 10
        assert float(rows["components"].sum()) == pytest.approx(float(rows["loss"].sum()), rel=1e-4)  # in nats

    def test_columns_are_those_of_the_inputs(self, monkeypatch):
        module = Tower()
        found = self.found("components", monkeypatch, module).square["map.weight"].sum(0)
        seen = module.table(torch.tensor([w.tokens[:-1] for w in WINDOWS])).reshape(-1, 6).square().mean(0)
        torch.testing.assert_close(found / found.sum(), seen / seen.sum(), rtol=1e-3, atol=1e-4)

    def test_the_head_has_the_gradients_of_the_loss(self, monkeypatch):
        by = {kind: self.found(kind, monkeypatch).square for kind in ("components", "loss")}
        torch.testing.assert_close(by["components"]["head.weight"], by["loss"]["head.weight"])
        assert not torch.allclose(by["components"]["table.weight"], by["loss"]["table.weight"])
        assert (by["components"]["table.weight"] > 0).all()

    def test_a_sample_of_tokens_is_enough(self, monkeypatch):
        whole = self.found("components", monkeypatch).square["map.weight"]
        monkeypatch.undo()
        module = Tower().eval()
        part = mean_squared_gradients(module, find_units(module), WINDOWS).square["map.weight"]
        torch.testing.assert_close(part, whole, rtol=0.5, atol=0.1 * float(whole.mean()))

    def test_components_are_principal(self):
        module = Tower().eval()
        with torch.no_grad():
            module.map.weight[2] *= 20
        first, *_ = _Hidden(module).components(module, WINDOWS, 256)
        states = [module.map(module.table(torch.tensor(w.tokens[:-1]))) for w in WINDOWS]
        covariance = torch.cov(torch.cat(states).T.detach())
        _, vectors = torch.linalg.eigh(covariance)
        assert abs(float(first @ vectors[:, -1])) == pytest.approx(1, abs=1e-3)
        assert abs(float(first[2])) > 0.95


@pytest.mark.slow
def test_unknown_gradients_are_refused():
    with pytest.raises(bytecap.UsageError, match="use components or loss"):
        bytecap.fit("demo", 600_000, method="radio", tokens=512, evaluation_tokens=512, options={"gradients": "x"})


@pytest.mark.parametrize("depth", [0, 1, 3, 8])
def test_extreme_groups(depth):
    weight = torch.tensor([[0, 1e-9, 1e4, 3.0], [0, -1e-9, -3e4, 3.0], [0, 0, 5, 3.0]])
    part = Companding.start(weight, cut(weight, torch.zeros_like(weight), 64))
    part.move(np.full((1, 4), depth, np.uint8))
    assert np.isfinite(part.code.scales).all()
    assert np.isfinite(part.code.offsets).all()
    assert part.code.codes.max() < 1 << depth
    assert part.code.offsets[0, 3] == 3


def test_biases_are_found_by_name():
    units = {n: Unit(n, (3,), "F32") for n in ("a.weight", "a.bias", "b.weight")}
    assert bias_names(units) == {"a.weight": "a.bias"}


@pytest.mark.numeric
def test_a_bias_takes_up_the_mean_error():
    torch.manual_seed(1)
    units = {"a.weight": Unit("a.weight", (8, 6), "F32", linear=True), "a.bias": Unit("a.bias", (8,), "F32")}
    weight, bias, mean = torch.randn(8, 6), torch.randn(1, 8), torch.randn(6, dtype=torch.float64)
    part = Companding.start(weight, cut(weight, torch.ones_like(weight), 64))
    part.move(np.full(part.groups.importance.shape, 2, np.uint8))
    job = SimpleNamespace(model=SimpleNamespace(units=tuple(units.values())))
    sections = _Fit(job, {"a.weight": part}, {"a.weight": mean}, {"a.bias": bias}, True).sections(estimate=False)
    (stored,) = run([EXACT.decode(sections["a.bias"].data, (1, 8), "F32", Shared())])
    before, after = weight.double() @ mean + bias[0], torch.from_numpy(dequantize(part.code)).double() @ mean
    torch.testing.assert_close(after + torch.from_numpy(stored[0]).double(), before, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "budget", "kl"), [("tiny", BUDGET, 0.05), pytest.param("demo", 600_000, 2, marks=pytest.mark.nightly)]
)
def test_fit_is_under_the_cap(model_directory, model, budget, kl):
    options, sizes = {"accounting": "published"}, {"tokens": 4096, "evaluation_tokens": 2048}
    model = model_directory() if model == "tiny" else model
    result = bytecap.fit(model, budget, method="radio", options=options, **sizes)
    assert len(result.data) <= budget
    assert result.report["slack_bytes"] <= result.report["allowed_slack_bytes"]
    assert result.report["kl_nats"] < kl
