"""Any torch module: losses of all kinds, weights that hooks do not see, shared blocks, values back into a module."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

import bytecap
from bytecap.allocation import asymmetric_targets
from bytecap.allocation.target_fit import Moments
from bytecap.calibration.probe import probe
from bytecap.format.ledger import by_unit
from bytecap.model.batches import Batch, Look
from bytecap.model.module import model_of, next_token
from bytecap.model.texts import Window
from bytecap.model.weight_reads import count_uses
from bytecap.pipeline.fit_module import with_loss
from bytecap.progress import Silent

VOCABULARY = 64


def ids(rows=40, length=65, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


class Odd(nn.Module):
    """Everything that no hook on a linear module sees, in one language model."""

    def __init__(self, dim=32):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.mix = nn.Parameter(torch.randn(4, dim // 4, dim // 4) * 0.3)  # einsum, per head
        self.gain = nn.Parameter(torch.ones(4) + 0.1 * torch.randn(4))
        self.fused = nn.Parameter(torch.randn(2 * dim, dim) * 0.2)  # F.linear
        self.conv = nn.Conv1d(dim, dim, 3, groups=2)
        self.raw = nn.Linear(dim, dim)  # its module is never called
        self.once = nn.Linear(dim, dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, dim))
        self.register_buffer("steps", torch.tensor(12345))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, tokens):
        x = self.embedding(tokens)
        parts = x.unflatten(-1, (4, -1))
        x = x + (torch.einsum("blhi,hij->blhj", parts, self.mix) * self.gain[:, None]).flatten(-2)
        a, b = F.linear(x, self.fused).chunk(2, -1)
        x = x + torch.tanh(a) * b * self.scale
        x = x + self.conv(F.pad(x.mT, (2, 0))).mT
        x = x + F.linear(x, self.raw.weight, self.raw.bias) + self.once(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return 0.1 * F.linear(x, self.embedding.weight)


class Speaking(nn.Module):
    """`forward(ids, targets) -> loss` around a module with logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens, targets):
        return F.cross_entropy(self.inner(tokens).flatten(0, 1), targets.flatten())


class Looped(nn.Module):
    """`shared` is used several times through different rotations of its input and output, `once` one time."""

    def __init__(self, uses, *, chain=False, dim=64):
        super().__init__()
        torch.manual_seed(0)
        self.uses, self.chain = uses, chain
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.once, self.shared = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        for m in (self.once, self.shared):
            nn.init.normal_(m.weight, std=dim**-0.5)
        order = torch.Generator().manual_seed(1)
        self.turns = [torch.randperm(dim, generator=order) for _ in range(16)]

    def forward(self, tokens):
        x = self.embedding(tokens)
        y = self.once(x)
        for i in range(self.uses):
            source = F.rms_norm(x + y, x.shape[-1:]) if self.chain else x
            y = y + self.shared(source[..., self.turns[2 * i]])[..., self.turns[2 * i + 1]]
        return 0.1 * self.head(y)


def bits(artifact):
    return {line.unit: 8 * line.bytes / line.parameters for line in by_unit(artifact.ledger()) if line.parameters}


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    return Odd()


class TestFit:
    @pytest.mark.slow
    def test_everything_in_the_state_dict_comes_back(self, odd, tmp_path):
        before = {n: t.clone() for n, t in odd.state_dict().items()}
        path = tmp_path / "odd.bcap"
        artifact = bytecap.fit(odd, budget=9000, calibration=[ids()], output=path)
        assert path.stat().st_size <= 9000
        assert all(torch.equal(t, before[n]) for n, t in odd.state_dict().items())
        assert not any(hasattr(p, "grad") and p.grad is not None for p in odd.parameters())
        owners = {line.unit for line in by_unit(artifact.ledger())}
        assert set(before) <= owners
        values = bytecap.load(path)
        for name in ("scale", "steps", "mask"):  # buffers are exact
            assert np.array_equal(values[name], before[name].numpy())
            assert values[name].dtype == before[name].numpy().dtype
        assert artifact.report["kl_nats"] < 0.02
        assert artifact.report["bpb_artifact"] != artifact.report["bpb_artifact"]  # nobody counted bytes

    @pytest.mark.slow
    def test_loss_only_module_measures_the_same(self, odd):
        logits = bytecap.fit(odd, budget=9000, calibration=[ids()])
        loss = bytecap.fit(Speaking(odd), budget=9100, calibration=[ids()])
        assert loss.report["kl_nats"] == pytest.approx(logits.report["kl_nats"], rel=0.25)
        assert loss.report["same_top1"] > 0.8

    @pytest.mark.slow
    def test_a_loss_that_is_the_next_token_takes_the_same_way(self, odd):
        def loss(module, batch):
            return F.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

        assert (
            bytecap.fit(odd, 9000, calibration=[ids()], loss=loss).data
            == bytecap.fit(odd, 9000, calibration=[ids()]).data
        )

    @pytest.mark.slow
    def test_arbitrary_loss_batches_and_own_score(self, tmp_path):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 8))
        batches = [{"x": torch.randn(64, 24), "y": None} for _ in range(24)]
        with torch.no_grad():
            batches = [{"x": b["x"], "y": teacher(b["x"]) + 0.3 * torch.randn(64, 8)} for b in batches]

        def loss(module, batch):
            return (module(batch["x"]) - batch["y"]).square().mean() / 0.18 * 8

        @torch.no_grad()
        def evaluate(module):
            return float(np.mean([float(loss(module, b)) for b in batches[-4:]]))

        path = tmp_path / "a.bcap"
        report = {}
        for size in (1500, 2000):
            found = bytecap.fit(teacher, size, calibration=iter(batches), loss=loss, evaluate=evaluate, output=path)
            assert path.stat().st_size <= size
            report[size] = found.report
        assert report[2000]["score_original"] == pytest.approx(evaluate(teacher))
        assert report[2000]["measured_delta_nats"] < report[1500]["measured_delta_nats"]
        target = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 8))
        bytecap.load_into(path, target)
        assert evaluate(target) == pytest.approx(report[2000]["score_artifact"])

    def test_half_precision_modules_and_lossless_budgets(self, tmp_path):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)).bfloat16()
        module.register_buffer("count", torch.arange(70_000, 70_004))
        path = tmp_path / "whole.bcap"
        assert bytecap.fit(module, 100_000, calibration=[ids()], output=path).report["lossless"]
        target = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)).bfloat16()
        target.register_buffer("count", torch.zeros(4, dtype=torch.long))
        bytecap.load_into(path, target)
        assert all(torch.equal(t, module.state_dict()[n]) for n, t in target.state_dict().items())

    @pytest.mark.slow
    def test_methods_that_need_only_statistics_run_on_a_loss(self, odd):
        for method in ("uniform", "golf"):
            assert len(bytecap.fit(Speaking(odd), 30_000, calibration=[ids()], method=method).data) <= 30_000
        with pytest.raises(bytecap.UsageError, match="radio needs a module whose forward"):
            bytecap.fit(Speaking(odd), 12_000, calibration=[ids()], method="radio")


class TestStatistics:
    @pytest.mark.slow
    def test_what_hooks_miss_gets_its_own_gradients(self, odd):
        model = model_of(odd)
        windows = [Window(tuple(r), 0) for r in ids().tolist()]
        found = probe(model.module, model.units, windows)
        exact = _fisher(odd, ids())
        for name in ("mix", "fused", "conv.weight", "raw.weight", "once.weight", "attention.in_proj_weight",
                     "attention.out_proj.weight"):  # fmt: skip
            (use,) = found.uses[name]
            traced = float(use.rows.sum()) / found.tokens
            if name == "once.weight":  # by hooks: rows are energies of the output
                traced = float(use.moment.trace() * use.rows.sum() / use.weight / found.tokens)
            assert traced == pytest.approx(exact[name], rel=0.2), name
        assert float(found.diagonal["gain"].sum()) == pytest.approx(exact["gain"], rel=0.3)

    def test_a_loss_gives_the_statistics_that_logits_give(self):
        module = Looped(2)
        windows = [Window(tuple(r), 0) for r in ids().tolist()]
        sets = with_loss(_sets_of(windows), next_token)
        model, speaking = model_of(module), model_of(Speaking(module))
        a = probe(model.module, model.units, windows)
        b = probe(speaking.module, speaking.units, sets.statistics)
        for name in ("once.weight", "shared.weight", "head.weight"):
            one, two = a.uses[name][0], b.uses[f"inner.{name}"][0]
            assert float(one.weight) == pytest.approx(float(two.weight), rel=0.05)
            assert torch.allclose(one.moment, two.moment, rtol=0.3, atol=0.1 * float(one.moment.abs().max()))

    def test_kl_is_seen_through_a_loss(self, odd):
        other = model_of(odd).module
        with torch.no_grad():
            other.fused.mul_(0.8)
        batch = Batch((), 0, ids(4), lambda m, x: F.cross_entropy(m(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()), 256)
        with torch.no_grad():
            p, q = (torch.log_softmax(m(ids(4)[:, :-1]), -1) for m in (odd, other))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert Look.at(odd, batch, "cpu").kl(Look.at(other, batch, "cpu")) == pytest.approx(kl, rel=1e-3)


def _sets_of(windows):
    from bytecap.model.texts import Text, TokenSets

    return TokenSets(tuple(windows), tuple(windows[:2]), (Text("held", tuple(windows[:2])),), 0)


def test_behind_a_prefix_of_zeros_nothing_drifts():
    found = Moments()
    found.add(torch.randn(1, 5, 3), torch.zeros(1, 5, 3), None)
    assert not found.fit([(torch.ones(2, 3), torch.ones(2))], 1.0)[0].any()


def _fisher(module, tokens):
    """Trace of the true Fisher of every parameter, token by token from many draws of labels."""
    total = dict.fromkeys(dict(module.named_parameters()), 0.0)
    torch.manual_seed(5)
    for _ in range(6):
        for row in tokens[:24]:
            logits = module(row[None, :-1])[0]
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            module.zero_grad()
            F.cross_entropy(logits, labels, reduction="sum").backward()
            for name, p in module.named_parameters():
                total[name] += float(p.grad.square().sum()) / (6 * 24 * len(labels))
    module.zero_grad()
    return total


@pytest.mark.numeric
class TestShared:
    @pytest.mark.slow
    @pytest.mark.parametrize("chain", [False, True])
    def test_half_a_bit_for_every_doubling_of_uses(self, chain):
        extra = []
        for uses in (1, 2, 4, 8):
            artifact = bytecap.fit(Looped(uses, chain=chain), 6600, calibration=[ids()])
            assert len(artifact.data) <= 6600
            assert artifact.report["parameters"] == 4 * 64 * 64  # stored once
            found = bits(artifact)
            extra.append(found["shared.weight"] - found["once.weight"])
        assert all(b > a + 0.15 for a, b in pairwise(extra)), extra
        assert extra[-1] - extra[0] == pytest.approx(1.5, abs=0.35)  # three doublings

    def test_statistics_add_up_over_calls_and_names(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.embedding, block = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)
                self.first, self.second, self.head = block, block, nn.Linear(16, VOCABULARY)

            def forward(self, tokens):
                return self.head(self.second(torch.tanh(self.first(self.embedding(tokens)))))

        model = model_of(Twice())
        (unit,) = [u for u in model.units if u.name == "first.weight"]
        assert unit.aliases == ("second.weight",)
        windows = [Window(tuple(r), 0) for r in ids().tolist()]
        found = probe(model.module, model.units, windows)
        (use,) = found.uses["first.weight"]
        assert count_uses(model.module, lambda m: m(ids(1)))["first.weight"] == 2
        apart = Twice()
        apart.second = nn.Linear(16, 16)
        apart.second.load_state_dict(apart.first.state_dict())
        model = model_of(apart)
        parts = probe(model.module, model.units, windows).uses
        summed = sum(parts[n][0].moment for n in ("first.weight", "second.weight"))
        assert torch.allclose(use.moment, summed, rtol=1e-3, atol=1e-6 * float(summed.max()))

    def test_drift_leaves_shared_and_raw_weights_alone(self, odd):
        looped = Looped(2)
        assert [n for group in asymmetric_targets.stages(looped, lambda m: m(ids(1))) for n in group] == [
            "once.weight",
            "head.weight",
        ]
        assert [n for group in asymmetric_targets.stages(odd, lambda m: m(ids(1))) for n in group] == ["once.weight"]

    @pytest.mark.slow
    @pytest.mark.parametrize("rare", [True, False])
    def test_an_order_that_depends_on_the_data_has_no_drift_targets(self, rare):
        class Branching(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

            def forward(self, x):
                return self.c(torch.relu(self.b(self.a(x)) if x[0, 0] > 0 else self.a(self.b(x))))

        torch.manual_seed(0)
        batches = [(torch.randn(32, 16), torch.randint(16, (32,))) for _ in range(24)]
        for i, (x, _) in enumerate(batches):
            x[0, 0] = -1.0 if i == 5 or (not rare and i % 2) else 1.0
        reporter = Silent()
        found = bytecap.fit(
            Branching(), 1400, calibration=batches, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), reporter=reporter
        )
        assert found.report["kl_nats"] < 0.05
        if rare:  # seen by no sample of batches, so noticed on the way
            assert any("no drift targets" in note for note in reporter.notes)


class TestBadInput:
    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda _m, _b: torch.tensor(float("nan")), "returned nan"),
            (lambda m, b: m(b), r"one number, not a tensor of shape \(64, 4\)"),
            (lambda _m, _b: 1.0, "scalar tensor, not float"),
            (lambda _m, _b: torch.tensor(1.0), "no gradient"),
            (lambda m, _b: m(torch.ones(2, 3)).sum(), "the loss raised RuntimeError"),
        ],
    )
    def test_losses(self, loss, message):
        with pytest.raises(bytecap.UsageError, match=message):
            bytecap.fit(nn.Linear(64, 4), 900, calibration=[torch.randn(64, 64)] * 8, loss=loss)

    def test_no_loss_for_batches_that_need_one(self):
        with pytest.raises(bytecap.UsageError, match="loss=callable"):
            bytecap.fit(nn.Linear(64, 4), 900, calibration=[torch.randn(64, 64)] * 8)

    def test_no_parameters(self):
        with pytest.raises(bytecap.CheckpointError, match="no parameters"):
            bytecap.fit(nn.Sequential(nn.GELU()), 900, calibration=[ids()])

    def test_token_beyond_the_vocabulary(self, odd):
        with pytest.raises(bytecap.TextError, match="token id 64, but the vocabulary has 64"):
            bytecap.fit(odd, 9000, calibration=[torch.full((20, 30), VOCABULARY)])

    def test_too_few_batches(self):
        with pytest.raises(bytecap.TextError, match="too few"):
            bytecap.fit(nn.Linear(64, 4), 900, calibration=[torch.randn(8, 64)], loss=lambda m, b: m(b).mean())

    def test_dtype_that_cannot_be_stored(self):
        module = nn.Module()
        module.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(bytecap.CheckpointError, match="weight has the dtype complex64"):
            bytecap.fit(module, 9000, calibration=[ids()])

    def test_weights_that_are_not_finite(self, odd):
        module = model_of(odd).module
        module.mix.data[1, 2, 3] = torch.inf
        with pytest.raises(bytecap.CheckpointError, match=r"mix holds inf at index \[1, 2, 3\]"):
            bytecap.fit(module, 9000, calibration=[ids()])

    @pytest.mark.slow
    def test_unused_parameters_are_said(self):
        module = Looped(1)
        module.idle = nn.Linear(8, 8)
        with pytest.warns(bytecap.BytecapWarning, match=r"no gradient reaches idle\.weight"):
            found = bytecap.fit(module, 6700, calibration=[ids()])
        assert any("idle.weight" in said for said in found.report["warnings"])
