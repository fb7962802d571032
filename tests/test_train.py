"""Layers trained as they are stored, their export, and the rate of coded bytes against the real coder."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import bytecap
from bytecap.allocation.planner import Planner
from bytecap.calibration.metric import Metric
from bytecap.format.ledger import total
from bytecap.job import Section
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.module import model_of
from bytecap.quantization.options import Options
from bytecap.quantization.quantizer import prepare
from bytecap.quantization.rules import initial_rules
from bytecap.reference import decode_file
from bytecap.types import as_matrix
from bytecap_lab import train
from bytecap_lab.train import PQuantLinear, estimate
from bytecap_lab.train.convert import RoundedInputLinear

rate = train.rate


class Net(nn.Module):
    """A tied embedding, an attention-like square layer used twice, and a feed-forward pair."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.mix = nn.Linear(32, 32)
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 128, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for _ in range(2):
            x = x + self.mix(functional.rms_norm(x, (32,)))
        return self.head(x + self.down(torch.relu(self.up(functional.rms_norm(x, (32,))))))


def choose(name, _layer):
    return {"up": {"wide": 6, "axis": "out"}, "down": {"wide": 6}}.get(name, {"wide": 0})


def net(seed=0, **how):
    torch.manual_seed(seed)
    module = Net()
    return module, train.replace(module, choose=choose, **how)


def ids(batches=4, seed=1):
    """Token ids in which every token says what the next one is."""
    torch.manual_seed(seed)
    start = torch.randint(128, (batches, 16, 1))
    return list((start + 3 * torch.arange(33)) % 128)


def taught(module, steps=40, extra=None):
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2, betas=(0.9, 0.95))
    for step in range(steps):
        batch = ids()[step % 4]
        loss = functional.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        (loss if extra is None else loss + extra(module)).backward()
        optimizer.step()
    return float(loss.detach()), optimizer


class TestLayer:
    @pytest.mark.parametrize(("axis", "wide"), [("in", 3), ("out", 3), ("in", 0), ("out", 0), ("in", 12), ("out", 8)])
    def test_forward_is_the_sum_of_its_branches(self, axis, wide):
        torch.manual_seed(0)
        layer = PQuantLinear(12, 8, True, wide=wide, axis=axis)
        w, x = layer.weight.detach().numpy().astype(np.float64), torch.randn(5, 12)
        inner = np.zeros(w.shape, bool)
        inner[:, :wide] |= axis == "in"
        inner[:wide] |= axis == "out"
        both = axis == "in" and 0 < wide < 12
        assert (layer.alpha.item(), layer.beta.item()) == pytest.approx((2.0, 0.2) if both else (1.0, 1.0))
        narrow = np.where(inner, 0.0, w)
        count = (~inner).sum(1, keepdims=True)
        mean = w[~inner].mean() if count.any() else 0.0
        one = np.where(w >= mean, 1, -1) * np.abs(narrow).sum(1, keepdims=True) / np.maximum(count, 1) * ~inner
        peak = np.abs(np.where(inner, w, 0)).max(0 if axis == "in" else 1, keepdims=True)
        eight = np.round(w / np.maximum(peak, 1e-30) * 127) * peak / 127 * inner
        y8, y1 = (x.double() @ torch.from_numpy(part).T for part in (eight, one))
        wanted = layer.alpha.item() * y8 + layer.beta.item() * y1 + layer.bias.double()
        assert torch.allclose(layer(x).double().detach(), wanted.detach(), rtol=2e-3, atol=2e-3)

    def test_gradients_go_straight_through(self):
        torch.manual_seed(0)
        layer = PQuantLinear(6, 4, wide=2)
        g = torch.randn(4, 6)
        (layer.quantized() * g).sum().backward()
        assert torch.allclose(layer.weight.grad, torch.cat([2.0 * g[:, :2], 0.2 * g[:, 2:]], 1))
        value = layer.quantized().detach()
        assert float(layer.alpha.grad) == pytest.approx(float((value * g)[:, :2].sum()) / 2.0, rel=1e-4)
        assert float(layer.beta.grad) == pytest.approx(float((value * g)[:, 2:].sum()) / 0.2, rel=1e-4)

    def test_it_learns(self):
        module, _ = net()
        before = module.down.alpha.item()
        first, _ = taught(copy.deepcopy(module), 1)
        last, _ = taught(module, 60)
        assert last < first - 1.0
        assert module.down.alpha.item() != before

    @pytest.mark.parametrize("how", [{"wide": 7}, {"wide": -1}, {"axis": "sideways"}, {"activations": 1}])
    def test_refused(self, how):
        with pytest.raises(bytecap.UsageError):
            PQuantLinear(6, 4, **how)

    def test_schedule(self):
        found = [train.schedule(s, 1000, warm_up=10) for s in range(1000)]
        rates, decays = zip(*found, strict=True)
        assert decays == (0.1,) * 500 + (0.0,) * 500
        assert max(rates) == rates[9]
        assert rates[0] == pytest.approx(1.5e-4)
        assert all(a > b for a, b in pairwise(rates[10:]))
        assert rates[499] > 1.5 * rates[500]  # the second phase begins lower
        with pytest.raises(bytecap.UsageError, match="step 10 of 10"):
            train.schedule(10, 10)


class TestReplace:
    def test_in_place_with_weights_kept(self):
        module = Net()
        weight = module.up.weight
        assert train.replace(module, 0.25) == ["mix", "up", "down"]  # the head is tied
        assert type(module.head) is nn.Linear
        assert module.up.weight is weight
        assert (module.up.wide, module.down.wide, module.mix.bias is not None) == (8, 16, True)

    def test_shared_layers_stay_shared(self):
        inner = nn.Linear(8, 8)
        module = nn.Sequential(inner, nn.ReLU(), inner)
        assert train.replace(module) == ["0"]
        assert module[0] is module[2]
        finished = train.inference(module)
        assert finished[0] is finished[2]
        assert list(train.sections(module)) == ["0.weight"]

    def test_nothing_to_replace(self):
        with pytest.raises(bytecap.UsageError, match=r"holds no nn\.Linear"):
            train.replace(nn.Embedding(4, 4))
        with pytest.raises(bytecap.UsageError, match=r"holds no nn\.Linear"):
            train.replace(Net(), choose=lambda *_: None)

    @pytest.mark.parametrize("activations", [None, 8])
    def test_inference_gives_the_same_outputs(self, activations):
        module, _ = net(activations=activations)
        finished = train.inference(module)
        assert type(finished.up) is (nn.Linear if activations is None else RoundedInputLinear)
        assert torch.equal(finished(ids()[0]), module(ids()[0]))
        assert not any(isinstance(m, PQuantLinear) for m in finished.modules())
        assert isinstance(module.up, PQuantLinear)  # the trained one is left as it is


def blank(module):
    """The inference form of a module with all values lost."""
    fresh = train.inference(module)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    return fresh


class TestExport:
    def test_bit_for_bit_within_the_cap(self, tmp_path):
        module, names = net()
        taught(module, 5)
        path = tmp_path / "net.bcap"
        result = train.export(module, path, 7200, calibration=ids(), method="uniform", device="cpu")
        assert path.stat().st_size == len(result.data) <= 7200
        loaded = blank(module)
        bytecap.load_into(path, loaded)
        decoded = decode_file(path.read_bytes())
        for name in names:
            wanted = getattr(module, name).quantized().detach()
            assert torch.equal(getattr(loaded, name).weight, wanted)
            assert np.array_equal(decoded[f"{name}.weight"], wanted.numpy())
        assert result.report["kl_nats"] < 0.2  # only the embedding differs from what is scored
        kinds = {(e.unit, e.kind) for e in result.ledger()}
        assert {("up.weight", "payload"), ("up.weight", "rows payload"), ("down.weight", "columns payload")} <= kinds
        assert total(result.ledger()) == len(result.data)

    @pytest.mark.nightly
    def test_the_default_method_fills_the_rest(self, tmp_path):
        module, names = net()
        taught(module, 20)
        result = train.export(module, tmp_path / "net.bcap", 7200, calibration=ids(), device="cpu")
        assert 7200 - 64 <= len(result.data) <= 7200
        loaded = blank(module)
        bytecap.load_into(tmp_path / "net.bcap", loaded)
        assert all(torch.equal(getattr(loaded, n).weight, getattr(module, n).quantized()) for n in names)
        assert 0 < result.report["kl_nats"] < 0.1

    def test_nothing_but_branches(self, tmp_path):
        module = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 48, bias=False))
        train.replace(module, 0.1)
        batches = [(torch.randn(16, 64), torch.randint(48, (16,))) for _ in range(8)]
        result = train.export(
            module, tmp_path / "m.bcap", 2000, calibration=batches,
            loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]), device="cpu",
        )  # fmt: skip
        assert result.report["kl_nats"] == pytest.approx(0, abs=1e-6)
        assert np.array_equal(bytecap.load(tmp_path / "m.bcap")["0.weight"], module[0].quantized().detach().numpy())

    def test_refused(self, tmp_path):
        module, _ = net()
        path = tmp_path / "net.bcap"
        with pytest.raises(bytecap.BudgetError, match="below the floor"):
            train.export(module, path, 900, calibration=ids())
        with pytest.raises(bytecap.UsageError, match="holds no PQuantLinear"):
            train.export(Net(), path, 9000, calibration=ids())
        with pytest.raises(bytecap.UsageError, match="stranger, which is no unit"):
            bytecap.fit(Net(), 9000, calibration=ids(), given={"stranger": Section(2, b"")})
        assert not path.exists()


def plain(matrices):
    """A module of linear layers with these weights."""
    module = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in matrices)
    for layer, w in zip(module, matrices, strict=True):
        layer.weight.data = w.clone()
    return module


def coded(matrices, step):
    """A module and the bytes of the default coder's real sections at one step, under tables that have settled."""
    module = plain(matrices)
    model, items = model_of(module), []
    for u in model.units:
        rows, cols = u.matrix_shape
        metric = Metric(torch.eye(cols, dtype=torch.float64), torch.ones(rows, dtype=torch.float64))
        items.append(prepare(u, model.tensor(u), metric, Options(damping=1e-12)))
    planner = Planner.of(items, [], Options())
    steps = dict.fromkeys(planner.names, step)
    rules = initial_rules(planner.options)
    for _ in range(2):
        rules = planner.settle(steps, rules).rules
    state = planner.settle(steps, rules, refit=False)
    return module, sum(len(data) for _, data in planner.encode(state).values())


@pytest.fixture(scope="module")
def real():
    """Matrices of the embedded model."""
    model = load_checkpoint("demo")
    units = [u for u in model.units if u.linear and ("layers.2." in u.name)]
    return [as_matrix(u, model.tensor(u).detach()) for u in units]


def spread(matrices, strength):
    """Matrices with columns of other sizes, the mean square kept."""
    found = []
    for i, w in enumerate(matrices):
        torch.manual_seed(i)
        wide = w * torch.exp(strength * torch.randn(w.shape[1]))
        found.append(wide * (w.square().mean() / wide.square().mean()).sqrt())
    return found


@pytest.mark.slow
class TestRate:
    @pytest.mark.parametrize("bits", [1.5, 3.0, 5.0])
    def test_against_the_real_coder(self, real, bits):
        step = train.step_for(plain(real), bits)
        module, wanted = coded(real, step)
        assert float(rate(module, step=step).detach()) == pytest.approx(wanted, rel=0.02)
        count = sum(w.numel() for w in real)
        assert float(rate(module, bits=bits).detach()) * 8 / count == pytest.approx(bits, rel=0.01)

    def test_ranks_models_of_different_spread(self, real):
        step, pairs = 0.08, []
        for strength in (0.0, 0.5, 1.0):
            module, wanted = coded(spread(real[-3:], strength), step)
            pairs.append((float(rate(module, step=step).detach()), wanted))
        assert [p[0] for p in sorted(pairs, key=lambda p: p[1])] == sorted(p[0] for p in pairs)
        assert all(a == pytest.approx(b, rel=0.02) for a, b in pairs)
        assert pairs[0][1] > 1.05 * pairs[-1][1]  # there is something to rank

    def test_gradient_is_that_of_the_length_under_a_uniform_shift(self, real):
        """Central differences of the mean over shifts, under tables and classes as they were."""
        weight, step = real[3][None], 0.15
        parts = estimate._code(weight, step)
        plain, path = estimate._lengths([parts])
        _, (gradient,) = estimate._total([weight], step)

        def length(w, fine, table):
            """Mean over shifts by up to half a symbol of what a symbol costs."""
            x = w.abs()[..., None] / step * (2 if fine else 1) + (torch.arange(200) + 0.5) / 200 - 0.5
            if fine:
                low = x.abs().floor().long()
                return (table[low] + table[low + 1]).mean(-1) / 2
            return table[(x.abs() + 0.5).floor().long()].mean(-1)

        generator, checked = torch.Generator().manual_seed(0), 0
        for _ in range(60):
            i, j = (int(torch.randint(n, (1,), generator=generator)) for n in weight.shape[1:])
            fine = bool(parts.fine[0, 0, j])
            if abs(weight[0, i, j]) < step:  # around zero both sides of the line meet
                continue
            table = (path if fine else plain)[int(parts.cls[0, i, j])]
            h = 0.02 * step
            up, down = (length(weight[0, i, j] + s * h * weight[0, i, j].sign(), fine, table) for s in (1, -1))
            slope = float((up - down) / (2 * h)) * float(weight[0, i, j].sign())
            assert slope == pytest.approx(float(gradient[0, i, j]), abs=0.35 / step)
            checked += 1
        assert checked > 20

    def test_descent_saves_real_bytes_as_promised(self, real):
        step = train.step_for(plain(real), 3.0)
        module, before = coded(real, step)
        value = rate(module, step=step)
        value.backward()
        weights = [m.weight for m in module.children()]
        gradients = [w.grad / w.grad.abs().mean() for w in weights]
        moved = [w.detach() - 0.1 * step * g for w, g in zip(weights, gradients, strict=True)]
        promised = sum(float((w.grad * 0.1 * step * g).sum()) for w, g in zip(weights, gradients, strict=True))
        saved = before - coded(moved, step)[1]
        assert promised > 0.005 * before
        assert saved == pytest.approx(promised, rel=0.3)

    def test_energies_and_slope(self):
        module = Net()
        _, optimizer = taught(module, 4)
        known = train.energies(optimizer, module, 512)
        assert set(known) == {"embedding.weight", "mix.weight", "up.weight", "down.weight"}
        count = sum(e.numel() for e in known.values())
        values = [float(rate(module, slope=s, energies=known).detach()) * 8 / count for s in (1e-4, 4e-4)]
        assert values[0] - values[1] == pytest.approx(1.0, abs=0.1)  # four times the price of a byte is a bit less
        free = [float(rate(module, bits=3, energies=e).detach()) * 8 / count for e in (None, known)]
        assert free == pytest.approx([3.0, 3.0], rel=0.01)
        doubled = {n: 4 * e for n, e in known.items()}  # steps follow energies
        steps = [train.step_for(module, 3, energies=e) for e in (known, doubled)]
        assert steps[1] == pytest.approx(2 * steps[0], rel=0.02)  # that of a weight of energy 1: the same for weights
        with pytest.raises(bytecap.UsageError, match="a slope needs energies"):
            rate(module, slope=1e-7)
        with pytest.raises(bytecap.UsageError, match=r"no energies of embedding\.weight"):
            rate(module, energies={})
        with pytest.raises(bytecap.UsageError, match="after a step"):
            train.energies(torch.optim.Adam(module.parameters()), module, 512)

    def test_what_counts(self):
        module, _ = net()
        assert set(estimate.matrices(module)) == {"embedding.weight"}  # the rate of the others is fixed
        with pytest.raises(bytecap.UsageError, match="holds no matrix"):
            rate(nn.LayerNorm(4))

    def test_in_a_loss_it_saves_bytes(self):
        found = []
        for extra in (None, lambda m: 5e-3 * rate(m, step=0.05)):
            torch.manual_seed(0)
            module = Net()
            loss, _ = taught(module, 60, extra)
            found.append((loss, float(rate(module, step=0.05).detach())))
        (usual, before), (regular, after) = found
        assert after < 0.95 * before
        assert regular < usual + 1.0


@pytest.mark.nightly
def test_the_documented_example_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text("utf-8")
    (script,) = [b.removeprefix("python\n") for b in text.split("```")[1::2] if b.startswith("python\n")]
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "training.py", "exec"), {})  # noqa: S102 (our own page)
    assert (tmp_path / "small.bcap").stat().st_size <= 4600
