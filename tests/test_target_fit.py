"""How far targets go: fits to one half of the tokens, tried on the other; and where a walk finds its inputs."""

import pytest
import torch

from bytecap.allocation import asymmetric_targets, target_fit
from bytecap.allocation.target_fit import Moments
from bytecap.allocation.written_streams import streams_written
from bytecap.model.linears import linear_weights
from conftest import build
from test_probe import windows_of

WEIGHT, ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(9)), torch.ones(6)


def batches_of(tokens, noise, lack, count=8):
    """Pairs of inputs: behind the prefix they lack a share of themselves, and something that is only noise."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        seen = torch.randn(tokens, 8, generator=generator)
        yield seen + lack * seen + noise * torch.randn(tokens, 8, generator=generator), seen


def fitted(*pairs, most=1.0):
    found = Moments()
    for x, seen in pairs:
        found.add(x, seen, None)
    return found.fit([(WEIGHT, ROWS)], most)


class TestStrength:
    def test_of_what_holds_on_all_tokens(self):
        fix, strength, _ = fitted(*batches_of(200, noise=0.1, lack=0.3))
        assert strength > 0.95
        torch.testing.assert_close(strength * fix, 0.3 * torch.eye(8), atol=0.06, rtol=0)

    def test_of_noise(self):
        assert fitted(*batches_of(20, noise=1.0, lack=0.0))[1] < 0.4

    def test_grows_with_tokens(self):
        few, many = (fitted(*batches_of(n, noise=1.0, lack=0.15))[1] for n in (16, 400))
        assert few + 0.15 < many

    def test_is_at_most_what_is_asked_for(self):
        assert fitted(*batches_of(200, noise=0.1, lack=0.3), most=0.25)[1] == 0.25
        assert fitted(next(batches_of(200, noise=0.1, lack=0.3)))[1] == 0.4  # one batch: nothing to try it on

    def test_of_wide_matrices_is_found_by_their_rows_alone(self, monkeypatch):
        """The whole fit is solved for once, and not for any trial."""
        pairs = list(batches_of(40, noise=0.5, lack=0.3))
        fix, strength, _ = fitted(*pairs)
        solved, inner = [], target_fit._solved
        monkeypatch.setattr(target_fit, "_WIDE", 8)
        monkeypatch.setattr(target_fit, "_solved", lambda *a: solved.append([len(s) for s in a[2:]]) or inner(*a))
        found = fitted(*pairs)
        assert 0.1 < strength < 0.99
        assert found[1] == pytest.approx(strength, rel=1e-5)
        torch.testing.assert_close(found[0], fix)
        assert solved == [[len(WEIGHT)]] * 4 + [[8]]

    def test_tokens_of_padding_count_for_nothing(self):
        (x, seen), mask = next(batches_of(10, noise=0.1, lack=0.3)), torch.arange(10)[None] < 7
        whole, part = Moments(), Moments()
        whole.add(x[None], seen[None], mask)
        part.add(x[None, :7], seen[None, :7], None)
        torch.testing.assert_close(whole.fit([(WEIGHT, ROWS)], 1.0)[0], part.fit([(WEIGHT, ROWS)], 1.0)[0])


class TestStreams:
    """The lack of a residual stream, as far as the unit's inputs tell it."""

    LACK = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))

    def fitted(self, noise, told):
        found, generator = Moments(), torch.Generator().manual_seed(1)
        for x, seen in batches_of(200, noise=0.1, lack=0.3):
            lack = told * seen @ self.LACK.T + noise * torch.randn(200, 6, generator=generator)
            found.add(x, seen, None, lack)
        return found.fit([(WEIGHT, ROWS)], 1.0)

    def test_are_made_up_for(self):
        fix, strength, stream = self.fitted(0.1, 1.0)
        torch.testing.assert_close(stream, self.LACK, atol=0.1, rtol=0)
        torch.testing.assert_close(strength * fix, 0.3 * torch.eye(8), atol=0.1, rtol=0)

    def test_are_left_alone_where_inputs_say_nothing(self):
        assert self.fitted(10.0, 0.0).stream.norm() < 0.3 * self.LACK.norm()

    def test_go_with_a_unit_of_which_some_rows_are_tried(self):
        found = Moments()
        for x, seen in batches_of(200, noise=0.1, lack=0.0):
            found.add(x, seen, None, seen @ self.LACK.T)
        stream = found.fit([(WEIGHT[::2], ROWS[::2])], 1.0).stream
        torch.testing.assert_close(stream, self.LACK, atol=0.1, rtol=0)

    @pytest.mark.parametrize(("kind", "wanted"), [("rotary", {"o_proj": "", "down_proj": "post_attention_layernorm"})])
    def test_are_found_by_their_sums(self, kind, wanted):
        model, windows = build(kind), windows_of(1)
        block = model.model.layers[1]
        calls = []
        handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        model(torch.tensor([windows[0].tokens]), use_cache=False)
        handle.remove()
        ((args, kwargs),) = calls
        maps = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        found = streams_written(block, args[0], lambda: block(*args, **kwargs), maps)
        assert {n.rpartition(".")[2]: path for n, path in found.items()} == wanted


@pytest.mark.parametrize("kind", ["rotary", "transposed"])
def test_stages_inside_a_block_have_the_inputs_of_a_whole_pass(kind):
    model, windows = build(kind), windows_of(3)
    assert asymmetric_targets._chain_of(model, windows, "cpu") is None  # which its caches would make wrong
    model.config.use_cache = False
    chain = asymmetric_targets._chain_of(model, windows, "cpu")
    order = asymmetric_targets._stages_of(model, windows, "cpu")
    points = asymmetric_targets._points(model, order, chain)
    assert len(points) < len(order)  # blocks hold several stages
    seen, handles = {}, []
    for names in order:
        module = linear_weights(model)[names[0]][0]
        handles.append(module.register_forward_pre_hook(lambda _, args, n=names[0]: seen.__setitem__(n, args[0])))
    (data,) = asymmetric_targets.passes_of(windows, 10_000, "cpu")
    with torch.no_grad():
        data[0](model)
        for handle in handles:
            handle.remove()
        (walk,) = asymmetric_targets._walks(model, [data], points)
        calls = {}
        for names in order:
            point = asymmetric_targets._point(names, chain)
            calls[point] = calls.get(point) or walk.advance()
            (found,) = calls[point].inputs_of(linear_weights(model)[names[0]][0], chain)
            torch.testing.assert_close(found, seen[names[0]])
        walk.cancel()


def test_blocks_that_keep_state_are_not_run_again():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x, cache):
            cache.update({len(cache): x})
            return self.inner(x)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = torch.nn.Embedding(300, 4), torch.nn.ModuleList(Block() for _ in range(2))

        def forward(self, ids):
            x, cache = self.embed(ids), {}
            for block in self.blocks:
                x = block(x, cache)
            return x

    assert asymmetric_targets._chain_of(Model(), windows_of(2), "cpu") is None
