"""Channels of a stream: which matrices are on it, one order for all of them, one list in the file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bytecap
from bytecap import reference
from bytecap.allocation.overlay_menu import Choice
from bytecap.allocation.shared_channels import one_list, saved
from bytecap.calibration.residual_streams import ResidualStream, find_streams, streams_of
from bytecap.format import container
from bytecap.format.coders import Objects
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.overlays.channels import BOTH, COLUMNS, ROWS, places
from bytecap.format.wire.positions import LISTED, read_positions
from bytecap.format.wire.shared_objects import REFERENCE, read_object
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.texts import Window
from bytecap.quantization.overlays import UnitProblem, overlays
from bytecap.quantization.overlays.channels import ALONE, channel_worth, rank
from bytecap.quantization.overlays.protect import Amount
from bytecap.types import Curve, Point, Unit
from bytecap_lab.rd_curves.choose import bundled, members, spend
from bytecap_lab.rd_curves.trial import OverlayCandidate
from conftest import SMALL, build, save

pytestmark = pytest.mark.numeric

WEAK = {"feedback": False, "waterfill": False, "row_power": 0.0, "row_class": 0}


class Parallel(nn.Module):
    """Attention and MLP side by side, added to one stream."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 20)

    def forward(self, ids):
        x = self.embed(ids)
        y = self.norm(x)
        attention = torch.softmax(y @ y.transpose(1, 2), -1)
        return self.head(x + self.out(attention @ self.value(y)) + self.down(self.up(y).tanh()))


class TestStreams:
    def test_of_a_parallel_block(self):
        torch.manual_seed(0)
        module = Parallel()
        names = {f"{n}.weight": f"{n}.weight" for n in ("embed", "value", "out", "up", "down", "head")}
        ids = torch.randint(0, 20, (1, 12))
        before = module(ids)
        residual, *others = find_streams(module, names, ids)
        assert residual.width == 16
        assert dict(residual.sides) == {
            "embed.weight": COLUMNS, "value.weight": COLUMNS, "up.weight": COLUMNS, "out.weight": ROWS,
            "down.weight": ROWS, "head.weight": COLUMNS,
        }  # fmt: skip
        assert sorted((s.width, tuple(sorted(s.sides.items()))) for s in others) == [
            (16, (("out.weight", COLUMNS), ("value.weight", ROWS))),
            (24, (("down.weight", COLUMNS), ("up.weight", ROWS))),
        ]
        assert torch.equal(module(ids), before)  # no hook is left behind
        assert not any(p.grad is not None for p in module.parameters())

    def test_a_square_map_in_a_residual_loop_is_on_it_with_both_sides(self):
        class Loop(nn.Module):
            def __init__(self):
                super().__init__()
                self.map = nn.Linear(12, 12)

            def forward(self, x):
                for _ in range(2):
                    x = x + self.map(x).tanh()
                return x

        torch.manual_seed(0)
        (stream,) = find_streams(Loop(), {"map.weight": "map.weight"}, torch.randn(1, 5, 12))
        assert stream == ResidualStream(12, {"map.weight": BOTH})

    def test_of_a_checkpoint(self):
        model = load_checkpoint("demo")
        windows = [Window(tuple(np.random.default_rng(0).integers(0, 2048, 200).tolist()), 400)]
        residual, *inner = streams_of(model.module, model.units, windows)
        config = model.config()
        assert residual.width == config["hidden_size"]
        assert len(residual.sides) == 7 * config["num_hidden_layers"] + 1  # every matrix is on it
        assert residual.sides["model.embed_tokens.weight"] == COLUMNS  # tied: a table's rows are outputs, too
        assert residual.sides["model.layers.3.self_attn.o_proj.weight"] == ROWS
        assert [s.width for s in inner] == [config["intermediate_size"]] * config["num_hidden_layers"]
        assert dict(inner[2].sides) == {
            "model.layers.2.mlp.gate_proj.weight": ROWS, "model.layers.2.mlp.up_proj.weight": ROWS,
            "model.layers.2.mlp.down_proj.weight": COLUMNS,
        }  # fmt: skip


def problem(name, rows, cols, seed, loud=()):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * cols, cols, generator=g, dtype=torch.float64)
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(cols, dtype=torch.float64)
    weight = torch.randn(rows, cols, generator=g)
    weight[list(loud)] *= 20
    return UnitProblem(Unit(name, (rows, cols), "F32"), weight, hessian, torch.ones(rows, dtype=torch.float64))


class TestRanking:
    streams = (
        ResidualStream(32, {"read": COLUMNS, "written": ROWS, "square": BOTH}),
        ResidualStream(48, {"read": ROWS}),
    )

    def ranked(self, factors=None):
        problems = [
            problem("read", 48, 32, 0),
            problem("written", 32, 16, 1, loud=(3, 9)),
            problem("square", 32, 32, 2),
        ]
        found = rank(self.streams, [(p, None) for p in problems], factors or {})
        return {p.unit.name: replace(p, rankings=found[p.unit.name]) for p in problems}

    def test_the_order_is_that_of_the_summed_worth_and_the_same_everywhere(self):
        problems = self.ranked()
        total = sum(channel_worth(p, None, self.streams[0].sides[n]) for n, p in problems.items())
        orders = [p.rankings[0].order for p in problems.values()]
        assert all(o is orders[0] for o in orders)
        assert orders[0].tolist() == total.argsort(descending=True, stable=True).tolist()
        assert set(orders[0][:2]) == {3, 9}  # loud in one of three matrices, protected in all
        own = channel_worth(problems["read"], None, COLUMNS).argsort(descending=True, stable=True)
        assert own.tolist() != orders[0].tolist()

    def test_factors_weigh_matrices(self):
        only = self.ranked({"read": 1.0, "written": 1e-9, "square": 1e-9})
        own = channel_worth(only["read"], None, COLUMNS).argsort(descending=True, stable=True)
        assert only["written"].rankings[0].order.tolist() == own.tolist()

    def test_settings_agree_over_the_stream(self):
        problems = self.ranked()
        ladders = {n: overlays()["channels"].settings(p) for n, p in problems.items()}
        amounts = {n: [(a.count, a.bits) for a in mine if a.stream == 0] for n, mine in ladders.items()}
        assert len(set(map(tuple, amounts.values()))) == 1
        assert {(a.stream, a.mode) for a in ladders["read"]} == {(0, COLUMNS), (1, ROWS)}
        for a, b in zip(ladders["written"], ladders["square"], strict=True):
            assert a.index.tolist() == b.index.tolist()

    @pytest.mark.parametrize("name", ["read", "written", "square"])
    def test_protecting_helps_on_every_side(self, name):
        p, path = self.ranked()[name], overlays()["channels"]
        for setting in path.settings(p):
            base = (path.before(p, setting).weight * 1.5).round() / 1.5
            found = path.after(p, base, setting)
            assert p.distortion(found.values) < p.distortion(base)
            if setting.mode & ROWS and setting.bits == 16:
                assert float((found.values - p.weight)[setting.index].abs().max()) < 0.1

    def test_a_matrix_nobody_looked_at_is_alone_if_it_is_square(self):
        path = overlays()["channels"]
        assert {(a.stream, a.mode) for a in path.settings(problem("a", 32, 32, 0))} == {(ALONE, BOTH)}
        assert path.settings(problem("a", 48, 32, 0)) == []
        assert path.settings(replace(problem("a", 32, 32, 0), rankings=())) == []


class TestOneList:
    order = np.arange(64) * 5 % 64

    def choice(self, rate, distortion, count, stream=0):
        return Choice(rate, distortion, 0.0, "channels", Amount(count, 8, 1, self.order, stream))

    def test_the_amount_that_gains_most_over_all_matrices_is_left(self):
        a = Curve("a", (Point(10, 10.0, 0), self.choice(11, 5.0, 1), self.choice(12, 1.0, 2)))
        b = Curve("b", (Point(10, 10.0, 0), self.choice(11, 2.0, 1), self.choice(12, 9.5, 2)))
        found = one_list([a, b], 1.0)
        assert [[p.amount.count for p in c.points if isinstance(p, Choice)] for c in found] == [[1], [1]]

    def test_a_matrix_may_stay_out_and_a_stream_that_never_pays_goes(self):
        a = Curve("a", (Point(10, 10.0, 0), self.choice(11, 5.0, 1), self.choice(12, 10.0, 1, stream=1)))
        b = Curve("b", (Point(10, 1.0, 0), self.choice(30, 0.9, 1)))
        found = one_list([a, b], 1.0)
        assert [p.amount.stream for p in found[0].points if isinstance(p, Choice)] == [0]
        assert len(found[1].points) == 2  # the allocator sees that the point is not worth it

    def test_what_sharing_spares(self):
        amount = Amount(4, 8, 1, self.order, 0)
        assert saved(amount, 1) == 0
        assert (
            saved(amount, 100) - saved(amount, 99) == 5 - 3
        )  # count, kind and three bytes of numbers; what names them


class TestBundles:
    def candidate(self, unit, size, gain, stream=0, listed="0 1 8", index=0):
        return OverlayCandidate("channels", unit, index, "", size, gain, 0.0, gain, 1, 0.1, stream, listed)

    def test_a_stream_is_chosen_as_one(self):
        candidates = {
            "a": [self.candidate("a", 10, 5.0), self.candidate("a", 20, 8.0, listed="0 4 8", index=1)],
            "b": [self.candidate("b", 10, 1.0), self.candidate("b", 20, 9.0, listed="0 4 8", index=1)],
            "c": [self.candidate("c", 10, -1.0)],
        }
        chosen = bundled(candidates)
        assert [(b.bytes, b.gain) for b in chosen["stream 0"]] == [(20, 6.0), (40, 17.0)]
        assert members(spend(chosen, 39)) == {}  # the hull has one corner, and the stream is not cut
        assert {n: o.list for n, o in members(spend(chosen, 40)).items()} == {"a": "0 4 8", "b": "0 4 8"}

    def test_other_paths_are_left_alone(self):
        candidates = {"a": [self.candidate("a", 10, 5.0, stream=-1, listed="")], "b": []}
        assert bundled(candidates) == {"a": candidates["a"]}


LOUD = list(range(3, 128, 17))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tokenizer_json, texts):
    """A small model, eight of whose channels are loud, on a weak base, fitted with `channels` alone."""
    module = build("rotary", hidden_size=128)
    with torch.no_grad():
        for layer in module.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[LOUD] *= 30
    directory = save(module, tmp_path_factory.mktemp("loud"), tokenizer_json)
    files = {"calibration": texts["calib"], "evaluation": texts["val"]}
    return bytecap.fit(directory, "80kB", **files, paths=["channels"], options=WEAK, **SMALL)


@pytest.mark.slow
def test_matrices_of_a_stream_name_one_list_that_the_ledger_counts_once(fitted):
    model = fitted.contents
    objects = Objects(tuple(read_object(o) for o in model.objects))
    found: dict[int, set[tuple[int, ...]]] = {}
    named = 0
    for u in (u for u in model.units if u.tag == STACK.tag):
        (_, _, part), = STACK.parts(u.data)[1:]  # fmt: skip
        width = places(part[0], u.unit.matrix_shape)
        index, _ = read_positions(part, 1, width, objects)
        found.setdefault(width, set()).add(tuple(index.tolist()))
        named += part[2] == LISTED
        assert u.unit.matrix_shape[0 if part[0] == ROWS else 1] == width
    assert len(found[128]) == 1, "all matrices on the residual stream protect the same channels"
    (channels,) = (set(c) for c in found[128])
    common = len(channels & set(LOUD))  # how many channels pay is close, and so are the last places among them
    assert 2 * common >= min(len(channels), len(LOUD)), "hardly any loud channel is protected"
    assert named >= 2, "no list is named, so nothing is shared"
    assert 1 <= len(model.objects) <= sum(map(len, found.values()))
    entries = container.ledger(model)
    for i, stored in enumerate(model.objects):
        once = {e.kind: e.bytes for e in entries if e.unit == f"(shared) list {i}"}
        assert once == {"header": 1, "index": len(stored) - 1}
    inside = {e.unit: e.bytes for e in entries if e.kind == "channels index"}
    assert len(inside) == fitted.report["paths"]["channels"]["units"]
    assert sorted(inside.values())[:named] == [REFERENCE] * named
    for name, values in reference.decode_file(fitted.data).items():
        np.testing.assert_array_equal(values, fitted.tensors()[name])
