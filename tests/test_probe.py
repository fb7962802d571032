"""Streamed statistics against explicit gradients, one token or one sequence at a time."""

import copy
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from bytecap.calibration import metric as sensitivity
from bytecap.calibration import probe as probing
from bytecap.calibration.probe import fisher_loss, fisher_loss_of, probe
from bytecap.model.batches import Batch
from bytecap.model.checkpoint import demo_directory, find_units, load_checkpoint
from bytecap.model.evaluation import kl_to
from bytecap.model.fisher import fisher_change
from bytecap.model.forward import batches, logits_of
from bytecap.model.quantized_copy import swapped
from bytecap.model.sources import encoder
from bytecap.model.texts import Window, cut_windows, load_text
from conftest import VOCABULARY, build

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.float32)


def windows_of(count, length=24, seed=0):
    rng = np.random.default_rng(seed)
    return [Window(tuple(rng.integers(0, VOCABULARY, length).tolist()), length) for _ in range(count)]


class Chain(nn.Module):
    """Token by token, without mixing: each token's gradient is its own. Embedding, two maps, a tied or free head."""

    def __init__(self, tied=True, twice=False, width=12, vocabulary=40):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(vocabulary, width)
        self.inner = nn.Linear(width, width, bias=True)
        self.twice = twice
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = torch.tanh(self.inner(self.embed(ids)))
        return self.head(torch.tanh(self.inner(x)) if self.twice else x)


def chain_windows(count=6, length=9, vocabulary=40):
    rng = np.random.default_rng(3)
    return [Window(tuple(rng.integers(0, vocabulary, length).tolist()), length) for _ in range(count)]


def changes_drawn(module, windows, seed, tokens):
    """Every batch's ids, mask and the gradients (n, vocabulary) of logits that `fisher_loss` gives with this seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for ids, mask in batches(windows, tokens):
        logits = logits_of(module(ids[:, :-1]))[mask].detach().requires_grad_()
        drawn.append((ids, mask, torch.autograd.grad(fisher_loss_of(logits, generator), logits)[0]))
    return drawn


def gradients_by_token(module, windows, seed=0):
    """Gradient of every parameter for every predicted token by itself, and that token's input id."""
    module = copy.deepcopy(module)
    for p in module.parameters():
        p.requires_grad_(True)
    found = []
    for ids, mask, changes in changes_drawn(module, windows, seed, 2048):
        at = 0
        for row in range(len(ids)):
            for position in range(int(mask[row].sum())):
                logits = logits_of(module(ids[row : row + 1, : position + 1]))[0, -1]
                gradient = torch.autograd.grad((logits * changes[at]).sum(), list(module.parameters()))
                found.append(dict(zip((n for n, _ in module.named_parameters()), gradient, strict=True)))
                at += 1
    return found


def explicit(module, windows, seed=0):
    return {n: torch.stack([g[n] for g in gradients_by_token(module, windows, seed)]).double() for n in
            dict(module.named_parameters())}  # fmt: skip


class TestFisherLoss:
    def test_gradients_have_the_covariance_of_sampled_labels(self):
        logits = torch.tensor([[2.0, 0.5, -1.0, 0.0, -3.0]]).expand(20_000, 5).clone().requires_grad_()
        (g,) = torch.autograd.grad(fisher_loss_of(logits, torch.Generator().manual_seed(0)), logits)
        p = torch.softmax(logits[0].detach(), 0)
        # 5 entries' worth of noise: 20,000 draws of products below 1 have standard errors below 0.003
        torch.testing.assert_close(g.T @ g / len(g), torch.diag(p) - torch.outer(p, p), atol=0.015, rtol=0)
        torch.testing.assert_close(g.mean(0), torch.zeros(5), atol=0.015, rtol=0)

    def test_energies_of_a_token_vary_less_than_with_labels(self):
        """A confident prediction: a label nearly always says nothing, and seldom very much."""
        logits = torch.tensor([[6.0, 0.0, 0.0, 0.0]]).expand(4000, 4).clone().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        (g,) = torch.autograd.grad(fisher_loss_of(logits, generator), logits)
        p = torch.softmax(logits.detach(), 1)
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        by_signs, by_labels = (x.square().sum(1) for x in (g, p - nn.functional.one_hot(labels, 4)))
        assert float(by_signs.std() / by_signs.mean()) < float(by_labels.std() / by_labels.mean()) / 4


class TestLinear:
    @pytest.mark.parametrize("guided", [True, False])
    def test_moments_against_one_token_at_a_time(self, guided):
        module, windows = Chain(tied=False), chain_windows()
        found = probe(module, find_units(module), windows, guided=guided)
        (use,) = found.uses["inner.weight"]
        gradient = explicit(module, windows)["inner.weight"]  # (tokens, rows, cols): g x^T of each token
        ids = torch.cat([ids[:, :-1][mask] for ids, mask in batches(windows, 2048)])
        x = module.embed.weight.detach()[ids].double()
        g = (gradient @ x[:, :, None])[:, :, 0] / x.square().sum(1, keepdim=True)
        torch.testing.assert_close(use.rows, g.square().sum(0), rtol=1e-5, atol=1e-9)
        w = g.square().mean(1) if guided else torch.ones(len(x), dtype=torch.float64)
        torch.testing.assert_close(use.moment, torch.einsum("t,ti,tj->ij", w, x, x), rtol=1e-4, atol=1e-7)
        assert float(use.weight) == pytest.approx(float(w.sum()), rel=1e-5)
        assert found.tokens == len(x)

    @pytest.mark.parametrize("guided", [True, False])
    def test_predicted_distortion_against_explicit_gradients(self, guided):
        """Guided: exact but for the half token of smoothing and the 300 random perturbations' own noise."""
        module, windows = Chain(tied=False), chain_windows(count=40)
        units = find_units(module)
        found = probe(module, units, windows, guided=guided)
        metric = sensitivity.join(found.uses["inner.weight"], found.tokens)
        assert float(metric.rows.mean()) == pytest.approx(1, rel=1e-6)
        gradient = explicit(module, windows)["inner.weight"]
        generator = torch.Generator().manual_seed(0)
        predicted, fisher = 0.0, 0.0
        for _ in range(300):
            error = torch.randn(12, 12, generator=generator, dtype=torch.float64)
            predicted += metric.distortion(error)
            fisher += float(0.5 * (gradient * error).sum((1, 2)).square().mean())
        assert predicted == pytest.approx(fisher, rel=0.06 if guided else 0.25)

    def test_vectors_have_the_diagonal_of_the_fisher(self):
        module, windows = Chain(tied=False), chain_windows(count=4)
        found = probe(module, find_units(module), windows)
        assert set(found.diagonal) == {"inner.bias"}
        assert found.diagonal["inner.bias"].shape == (12,)
        assert (found.diagonal["inner.bias"] > 0).all()

    @pytest.mark.parametrize("kind", ["transposed", "biased"])
    def test_orientation_is_outputs_by_inputs_whatever_the_layout(self, kind):
        module = build(kind)
        units = find_units(module)
        found = probe(module, units, windows_of(2))
        for u in units:
            if u.name in found.uses:
                rows, cols = u.matrix_shape
                for use in found.uses[u.name]:
                    assert use.rows.shape == (rows,)
                    assert use.moment.shape == (cols, cols)
        linear = {u.name for u in units if u.linear}
        assert set(found.uses) == linear
        assert set(found.diagonal) == {u.name for u in units} - linear


class TestEmbedding:
    def test_input_use_against_one_token_at_a_time(self):
        module, windows = Chain(tied=False), chain_windows()
        found = probe(module, find_units(module), windows)
        (use,) = found.uses["embed.weight"]
        total = explicit(module, windows)["embed.weight"].sum(0)  # a batch's gradients of one row arrive summed
        torch.testing.assert_close(use.rows, total.square().sum(1), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(use.moment, total.T @ total, rtol=1e-4, atol=1e-7)
        assert float(use.weight) == pytest.approx(float(total.square().sum()), rel=1e-4)

    def test_a_tied_tensor_has_both_uses(self):
        module = Chain(tied=True)
        units = find_units(module)
        (unit,) = [u for u in units if u.aliases]
        found = probe(module, units, chain_windows())
        head, embedding = found.uses[unit.name]
        assert head.rows.shape == embedding.rows.shape == (40,)
        free = Chain(tied=False)
        with torch.no_grad():
            free.head.weight.copy_(module.head.weight)
            free.embed.weight.copy_(module.embed.weight)
            free.inner.load_state_dict(module.inner.state_dict())
        apart = probe(free, find_units(free), chain_windows())
        torch.testing.assert_close(head.moment, apart.uses["head.weight"][0].moment)
        torch.testing.assert_close(embedding.moment, apart.uses["embed.weight"][0].moment)

    def test_predicted_distortion_of_a_tied_embedding_against_per_sample_gradients(self, monkeypatch):
        """1/2 sum G e H e^T against the Fisher form 1/2 mean (g . e)^2 of explicit gradients.

        The metric drops the cross terms between uses and between rows (Kronecker structure), and both sides share the
        signs, so what is left after averaging 400 random perturbations is that approximation: 25% is asked for,
        0.25 is also what the correction factors downstream may have to make up for.
        """
        monkeypatch.setattr(probing, "batch_tokens", lambda _: 11)  # a batch is one sample of an embedding's gradient
        module, windows = Chain(tied=True, width=10), chain_windows(count=40, length=11)
        units = find_units(module)
        unit = next(u for u in units if u.aliases)
        metric = sensitivity.join(probe(module, units, windows).uses[unit.name], 400)
        gradient = explicit(module, windows)["embed.weight"]
        generator = torch.Generator().manual_seed(0)
        predicted, fisher = 0.0, 0.0
        for _ in range(400):
            error = torch.randn(unit.shape, generator=generator, dtype=torch.float64)
            predicted += metric.distortion(error)
            fisher += float(0.5 * (gradient * error).sum((1, 2)).square().mean())
        assert predicted == pytest.approx(fisher, rel=0.25)

    @pytest.mark.slow
    def test_rows_of_an_embedding_are_ranked_as_per_sample_gradients_rank_them(self, monkeypatch):
        monkeypatch.setattr(probing, "batch_tokens", lambda _: 11)
        module, windows = Chain(tied=True, width=10), chain_windows(count=160, length=11)
        units = find_units(module)
        unit = next(u for u in units if u.aliases)
        metric = sensitivity.join(probe(module, units, windows).uses[unit.name], 1600)
        energy = explicit(module, windows)["embed.weight"].square().sum((0, 2))
        assert np.corrcoef(energy.log().numpy(), metric.rows.log().numpy())[0, 1] > 0.8


class TestSharing:
    def test_a_tensor_used_twice_has_statistics_that_add_up(self):
        module, windows = Chain(tied=False, twice=True), chain_windows(count=30, length=10)
        units = find_units(module)
        found = probe(module, units, windows)
        (use,) = found.uses["inner.weight"]
        inputs, gradients = [], []

        def keep(_module, args, output):
            inputs.append(args[0].detach().reshape(-1, 12).double())
            output.register_hook(lambda g: gradients.append(g.reshape(-1, 12).double()))

        quantized_copy = copy.deepcopy(module)
        handle = quantized_copy.inner.register_forward_hook(keep)
        generator = torch.Generator().manual_seed(0)
        for ids, mask in batches(windows, 2048):
            fisher_loss(quantized_copy, ids, mask, generator).backward()
        handle.remove()
        gradients.reverse()  # the second use's gradient comes first
        assert len(inputs) == len(gradients) == 2
        moment = sum(
            torch.einsum("t,ti,tj->ij", g.square().mean(1), x, x) for x, g in zip(inputs, gradients, strict=True)
        )
        torch.testing.assert_close(use.moment, moment, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(use.rows, sum(g.square().sum(0) for g in gradients), rtol=1e-4, atol=1e-9)

    def test_uses_are_joined_with_their_own_scales(self):
        module = Chain(tied=True)
        units = find_units(module)
        unit = next(u for u in units if u.aliases)
        found = probe(module, units, chain_windows())
        uses = found.uses[unit.name]
        joined = sensitivity.join(uses, found.tokens)
        parts = [sensitivity.join([u], found.tokens) for u in uses]
        rows = len(joined.rows) / found.tokens
        unseen = (1 + 0.02 * rows) / (1 + 0.5 * rows)  # a head predicts every row, so that less is given to all
        torch.testing.assert_close(joined.hessian, (parts[0].hessian + parts[1].hessian) * unseen)
        assert float(joined.rows.mean()) == pytest.approx(1, rel=1e-6)


class TestStreaming:
    def test_sums_do_not_depend_on_the_order_of_windows_of_one_length(self):
        """Signs are drawn in order, so only the expectation is the same; with a fixed loss, so are the sums."""
        module, windows = Chain(tied=False), chain_windows(count=12)

        def fixed(quantized_copy, ids, mask, _generator):
            logits = logits_of(quantized_copy(ids[:, :-1]))[mask]
            return nn.functional.cross_entropy(logits, ids[:, 1:][mask], reduction="sum")

        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probing, "fisher_loss", fixed)
            for tokens, order in ((2048, windows), (30, windows), (9, windows[::-1])):
                patch.setattr(probing, "batch_tokens", lambda _, tokens=tokens: tokens)
                found.append(probe(module, find_units(module), order))
        for other in found[1:]:
            assert other.tokens == found[0].tokens
            for name in ("inner.weight", "head.weight"):
                torch.testing.assert_close(
                    other.uses[name][0].moment, found[0].uses[name][0].moment, rtol=1e-5, atol=1e-9
                )
                torch.testing.assert_close(other.uses[name][0].rows, found[0].uses[name][0].rows, rtol=1e-5, atol=1e-9)

    def test_padding_counts_for_nothing(self):
        module = Chain(tied=False)
        long, short = chain_windows(1, 12)[0], chain_windows(1, 5)[0]
        together = probe(module, find_units(module), [long, short])
        assert together.tokens == 11 + 4
        apart = [probe(module, find_units(module), [w]) for w in (long, short)]
        assert apart[0].tokens + apart[1].tokens == 15
        # the mask leaves padded positions without gradient: only real inputs appear in the embedding's rows
        seen = set(long.tokens[:-1]) | set(short.tokens[:-1])
        rows = together.uses["embed.weight"][0].rows
        assert {int(i) for i in rows.nonzero()[:, 0]} <= seen

    def test_sums_are_float64_and_of_one_size_whatever_the_length(self):
        module = build("rotary")
        units = find_units(module)
        sizes = []
        for count in (2, 30):
            found = probe(module, units, windows_of(count))
            tensors = [t for uses in found.uses.values() for u in uses for t in (u.moment, u.rows, u.weight)]
            assert all(t.dtype == torch.float64 for t in tensors)
            sizes.append(sum(t.numel() for t in tensors) + sum(d.size for d in found.diagonal.values()))
        assert sizes[0] == sizes[1]

    def test_memory_does_not_grow_with_the_number_of_tokens(self):
        module, peaks = Chain(tied=False), []
        for count in (40, 400):
            windows = chain_windows(count, 20)
            tracemalloc.start()
            live = torch.zeros(1)
            probe(module, find_units(module), windows)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            del live
        assert peaks[1] < 2 * peaks[0] + 200_000

    def test_the_module_is_left_untouched(self):
        module = build("rotary")
        before = {n: t.clone() for n, t in module.state_dict().items()}
        probe(module, find_units(module), windows_of(2))
        assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
        assert module.lm_head.weight is module.model.embed_tokens.weight

    def test_the_seed_decides(self):
        module, windows = build("biased"), windows_of(3)
        units = find_units(module)
        one, two, three = (probe(module, units, windows, seed=s) for s in (0, 0, 1))
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(one.uses[name][0].moment, two.uses[name][0].moment)
        assert not torch.equal(one.uses[name][0].moment, three.uses[name][0].moment)


@pytest.fixture(scope="module")
def embedded():
    """The embedded model, its metrics from 6,144 tokens, and 3,072 other tokens."""
    model = load_checkpoint("demo")
    windows = load_text(demo_directory() / "calib.txt", encoder(model.files), window=256, limit=9216).windows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bytecap.model.forward.fast_dtype", lambda _: torch.float32)
        found = probe(model.module, model.units, windows[::3] + windows[1::3])
    return model, sensitivity.metrics(model.units, found), windows[2::3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight"])
def test_the_prediction_is_the_divergence_of_a_small_perturbation(embedded, name):
    """Kappa is close to 1: measured over predicted KL of random noise small enough for the quadratic form."""
    model, metrics, windows = embedded
    unit = next(u for u in model.units if u.name == name)
    weight = model.tensor(unit)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * weight.std() * 0.04
    quantized_copy = copy.deepcopy(model.module)
    with swapped(quantized_copy, {name: (weight + noise).numpy()}):
        kl, _ = kl_to(model.module, quantized_copy, windows)
    assert kl == pytest.approx(metrics[name].distortion(noise), rel=0.25)


def test_windows_cover_every_token_once():
    windows = cut_windows(list(range(30)), [1] * 30, 7)
    assert [t for w in windows for t in w.tokens[1:]] == list(range(1, 30))


class TestLossesOfModules:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_cross_entropy_inside_a_loss_gets_gradients_along_signs(self, reduction):
        """The same sums as without the loss, where labels of padding count for nothing."""
        weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)), torch.arange(9) % 6
        labels[5:7] = -100

        def loss(_module, data):
            return nn.functional.cross_entropy(data @ weight.T, labels, reduction=reduction)

        batch = Batch((), 0, x, loss, 7)
        found = batch.fisher_loss(nn.Identity(), torch.Generator().manual_seed(3), torch.device("cpu"))
        found.backward()
        logits = (x @ weight.T).detach()
        change = fisher_change(logits, torch.Generator().manual_seed(3)) * (labels != -100)[:, None]
        torch.testing.assert_close(weight.grad, change.T @ x * (1 if reduction == "mean" else 7))
        assert float(found.detach()) == pytest.approx(float(loss(None, x).detach()) * 7, rel=1e-5)

    def test_smoothed_labels_are_drawn(self):
        weight = torch.zeros(6, 4, requires_grad=True)
        batch = Batch(
            (), 0, torch.ones(9, 4),
            lambda _module, data: nn.functional.cross_entropy(
                data @ weight.T, torch.zeros(9, dtype=torch.long), label_smoothing=0.1
            ), 9,
        )  # fmt: skip
        batch.fisher_loss(nn.Identity(), torch.Generator().manual_seed(3), torch.device("cpu")).backward()
        assert len(weight.grad[:, 0].unique()) > 2  # 9 draws from 6 classes: not all are 0
