"""Tied blocks: what is shared, how it starts, what the file holds, what is refused."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import bytecap
from bytecap import reference
from bytecap.calibration.metric import metrics
from bytecap.calibration.probe import probe
from bytecap.errors import UsageError
from bytecap.format.decoder import decode_units
from bytecap.job.effort import Effort
from bytecap.model.checkpoint import find_units, load_checkpoint
from bytecap.model.sources import load_sets
from bytecap.model.tying import Tying, find_blocks, layers, matrices, parse
from bytecap.model.weight_reads import count_uses
from bytecap.pipeline.export import unpack
from bytecap.progress import Silent
from bytecap_lab.layer_tying import dlt, greedy, read, split
from bytecap_lab.layer_tying import tie as convert
from bytecap_lab.layer_tying.start import loop, ranks_for, tied
from conftest import BUDGET, KINDS, SMALL, build

DEPTHS = {"transposed": {"n_layer": 4}}
IDS = torch.arange(48).reshape(2, 24)


def deep(kind, **changes):
    return build(kind, **DEPTHS.get(kind, {"num_hidden_layers": 4}), **changes)


def plain(module, blocks=2, ranks=None):
    path, layers = find_blocks(module)
    return Tying(path, loop(len(layers), blocks), ranks or {})


@pytest.fixture(scope="module")
def twins(texts, four):
    """A model whose layers 1 and 3 are the same; training and held-out windows."""
    model = load_checkpoint(four)
    blocks = find_blocks(model.module)[1]
    blocks[3].load_state_dict(blocks[1].state_dict())
    pool = read(model, texts["calib"], window=64, seed=0, reporter=Silent())
    windows, held = split(pool, 1, "cpu", "text")
    return model.module, windows, held


class TestStart:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_parts_of_full_rank_give_the_original(self, kind):
        module = deep(kind)
        path, layers = find_blocks(module)
        names = {n.removesuffix(".weight"): min(p.shape) for n, p in matrices(layers[0]).items()}
        for init in ("average", "lower", "stepwise"):
            found = tied(module, Tying(path, (0, 1, 0, 1), names), init)
            assert torch.allclose(found(IDS).logits, module(IDS).logits, atol=2e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_left_out_is_the_tail_of_the_spectrum(self, kind):
        module = deep(kind)
        name = next(iter(matrices(find_blocks(module)[1][0])))
        found = tied(module, plain(module, 2, {name.removesuffix(".weight"): 3}))
        for i in range(4):
            first = matrices(find_blocks(module)[1][i])[name]
            now = matrices(find_blocks(found)[1][i])
            shared = now[name]
            stem = name.removesuffix("weight")
            low = (now[f"{stem}up.weight"] @ now[f"{stem}down.weight"]).detach()
            missing = (first - shared).detach()
            left = missing - (low.T if kind == "transposed" else low)
            tail = torch.linalg.svdvals(missing)[3:]
            assert float(left.norm()) == pytest.approx(float(tail.norm()), rel=1e-4)

    def test_where_blocks_come_from(self):
        module = deep("rotary")
        own = [matrices(b) for b in find_blocks(module)[1]]
        for init, wanted in (("average", (0, 2)), ("lower", (0,)), ("stepwise", (0,))):
            found = matrices(find_blocks(tied(module, plain(module), init))[1][2])
            for name, p in found.items():
                assert torch.allclose(p, torch.stack([own[i][name] for i in wanted]).mean(0), atol=1e-6)
        last = matrices(find_blocks(tied(module, plain(module), "stepwise"))[1][1])
        assert all(torch.equal(p, own[3][n]) for n, p in last.items())
        with pytest.raises(UsageError, match="stepwise is for loops"):
            tied(module, Tying("model.layers", (0, 1, 1, 0)), "stepwise")

    def test_the_original_is_left_alone_and_vectors_stay(self):
        module = deep("biased")
        before = copy.deepcopy(module.state_dict())
        found = tied(module, plain(module, 2, ranks_for(module, 2)))
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        assert not hasattr(find_blocks(module)[1][0].mlp.up_proj, "down")
        for one, other in zip(find_blocks(found)[1], find_blocks(module)[1], strict=True):
            vectors = {n: p for n, p in one.named_parameters() if p.ndim < 2}
            assert vectors
            assert all(torch.equal(p, other.get_parameter(n)) for n, p in vectors.items())


@pytest.mark.slow
class TestDirectory:
    def test_stored_once_and_the_same_after_reading(self, made, four):
        directory, report, notes = made
        stored = bytecap.model.fileset.check_safetensors(directory / "model.safetensors")
        assert "model.layers.0.mlp.up_proj.weight" in stored
        assert "model.layers.2.mlp.up_proj.weight" not in stored
        assert "model.layers.2.mlp.up_proj.down.weight" in stored
        assert {e["dtype"] for e in stored.values()} == {"BF16"}
        model = load_checkpoint(directory)
        assert model.parameters == report["parameters"] < 0.75 * load_checkpoint(four).parameters
        assert count_uses(model.module, lambda m: m(IDS))["model.layers.1.mlp.up_proj.weight"] == 2
        assert report["kl_written"] == pytest.approx(report["uptraining"]["kl"], rel=0.05)
        assert any("4 iterations" in n for n in notes)

    def test_uptraining_helps_and_repeats(self, made, four, texts, tmp_path):
        found = made[1]["uptraining"]
        assert found["kl"] < found["kl_start"]
        convert(four, 2, tmp_path, rank=2, train=texts["calib"], steps="4")
        assert (tmp_path / "model.safetensors").read_bytes() == (made[0] / "model.safetensors").read_bytes()

    def test_through_a_file_and_back(self, made, fitted_tied, tmp_path):
        found, path = fitted_tied
        assert len(found.data) <= BUDGET
        unpack(path, tmp_path, dtype="float32")
        one, other = bytecap.load_model(path), load_checkpoint(tmp_path).module
        assert torch.equal(one(IDS).logits, other(IDS).logits)
        assert (tmp_path / "tying.json").read_bytes() == (made[0] / "tying.json").read_bytes()
        values = decode_units(found.contents)
        low = values["model.layers.3.mlp.up_proj.up.weight"] @ values["model.layers.3.mlp.up_proj.down.weight"]
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        whole = torch.from_numpy(values["model.layers.1.mlp.up_proj.weight"] + low)
        layer = find_blocks(one)[1][3].mlp.up_proj
        assert torch.allclose(layer(x), x @ whole.T, atol=1e-5)

    def test_both_decoders_agree(self, fitted_tied):
        found, path = fitted_tied
        second = reference.decode_file(path.read_bytes())
        for name, value in decode_units(found.contents).items():
            assert np.array_equal(second[name], value), name

    def test_scores_on_the_command_line(self, fitted_tied, texts, run, tmp_path):
        _, path = fitted_tied
        assert run("unpack", path, "-o", tmp_path, "--dtype", "float32")[0] == 0
        scores = [json.loads(run("eval", x, "--text", texts["val"], "--json")[1]) for x in (path, tmp_path)]
        assert scores[0] == scores[1]
        assert run("generate", path, "--prompt", "SELECT", "--tokens", "3")[0] == 0
        assert run("check", path)[0] == 0

    def test_a_tied_model_is_not_tied_again(self, made, refused, texts, tmp_path):
        line = refused("tie", made[0], "--blocks", "1", "--train", texts["calib"], "-o", tmp_path)
        assert "is tied already" in line


class TestAllocation:
    @pytest.mark.slow
    @pytest.mark.numeric
    def test_statistics_of_all_uses_add_up(self, four, texts):
        """A shared matrix's Hessian is the sum of those of the same values, stored once for each use."""
        model = load_checkpoint(four)
        sets = load_sets(model, texts["calib"], texts["val"], tokens=1000, window=128, reporter=Silent())
        looped = tied(model.module, plain(model.module))
        apart = copy.deepcopy(model.module)
        apart.load_state_dict(looped.state_dict())
        found = {}
        for key, module in (("looped", looped), ("apart", apart)):
            units = find_units(module)
            found[key] = metrics(units, probe(module, units, sets.statistics))
        name = "model.layers.{}.mlp.down_proj.weight"
        one, *both = (found[k][name.format(i)].hessian for k, i in (("looped", 0), ("apart", 0), ("apart", 2)))
        assert torch.allclose(one, both[0] + both[1], rtol=1e-4)
        assert name.format(2) not in found["looped"]

    @pytest.mark.numeric
    @pytest.mark.slow
    def test_three_uses_buy_finer_steps(self, four, texts):
        """Against the same values stored three times, and against a layer of its own: half a bit for a doubling."""
        model = load_checkpoint(four)
        looped = tied(model.module, Tying("model.layers", (0, 0, 0, 3)))
        apart = copy.deepcopy(model.module)
        apart.load_state_dict(looped.state_dict())
        bits = []
        for module, budget in ((looped, 17_000), (apart, 21_000)):
            loaded = replace(model, module=module, units=find_units(module))
            found = bytecap.fit(loaded, budget, calibration=texts["calib"], evaluation=texts["val"], **SMALL)
            sizes = {u.unit.name: 8 * len(u.data) / u.unit.parameters for u in found.contents.units}
            names = [f"model.layers.{{}}.{n}" for n in matrices(layers(module, "model.layers")[0])]
            stored = [i for i in range(3) if names[0].format(i) in sizes]
            bits.append(np.mean([sizes[n.format(i)] - sizes[n.format(3)] for n in names for i in stored]))
        assert bits[0] - bits[1] == pytest.approx(0.5 * np.log2(3), abs=0.35), bits

    @pytest.mark.slow
    def test_low_rank_parts_are_units_of_their_own(self, fitted_tied):
        units = {u.unit.name: u for u in fitted_tied[0].contents.units}
        assert units["model.layers.1.mlp.up_proj.weight"].unit.aliases == ("model.layers.3.mlp.up_proj.weight",)
        for layer in range(4):
            for part, shape in (("down", (2, 32)), ("up", (64, 2))):
                unit = units[f"model.layers.{layer}.mlp.up_proj.{part}.weight"]
                assert unit.unit.shape == shape
                assert unit.unit.linear
                assert len(unit.data) > 0


class TestSearch:
    @pytest.mark.numeric
    def test_greedy_merges_what_costs_nothing(self, twins):
        module, windows, held = twins
        start = Tying("model.layers", (0, 1, 2, 3))
        found, merges = greedy.GreedySearch(module, start, "average", windows, held[:4], "cpu").run(
            3, Effort(steps=0), lambda _: None
        )
        assert found.sources == (0, 1, 2, 1)
        assert merges[0].kl == pytest.approx(0, abs=1e-5)
        assert merges[0].freed == sum(p.numel() for p in matrices(find_blocks(module)[1][0]).values())

    def test_low_rank_parts_count_against_what_a_merge_frees(self, twins):
        module, windows, held = twins
        start = Tying("model.layers", (0, 1, 2, 3), ranks_for(module, 2))
        _, merges = greedy.GreedySearch(module, start, "lower", windows, held[:1], "cpu").run(
            3, Effort(steps=0), lambda _: None
        )
        parts = 2 * sum(2 * sum(matrices(find_blocks(module)[1][0])[f"{n}.weight"].shape) for n in start.ranks)
        whole = sum(p.numel() for p in matrices(find_blocks(module)[1][0]).values())
        assert merges[0].freed == whole - parts

    @pytest.mark.numeric
    @pytest.mark.slow
    def test_learning_finds_it_too(self, twins, monkeypatch):
        monkeypatch.setattr(dlt, "tokens_of_iteration", lambda _: 256)
        module, windows, _ = twins
        search = dlt.QLearningSearch(module, Tying("model.layers", (0, 1, 2, 3)), windows, "cpu", rate=1e-5)
        found = search.run(3, Effort(steps=100), lambda _: None)
        assert found.sources == (0, 1, 2, 1)
        assert all(len(set(s)) <= 3 for s in search.visited)
        assert len(search.visited) > 3

    def test_actions_keep_sources_flat_and_under_the_cap(self):
        rng = np.random.default_rng(0)
        sources = loop(6, 3)
        for _ in range(300):
            layer = int(rng.integers(1, 6))
            mask = dlt.allowed(sources, layer, 3)
            sources = dlt.resolved(sources, layer, int(rng.choice(np.flatnonzero(mask))))
            parse(Tying("x", sources).dump(), "flat")  # refuses chains and later layers
            assert len(set(sources)) <= 3

    @pytest.mark.slow
    @pytest.mark.parametrize("search", ["greedy", "dlt"])
    def test_on_the_command_line(self, four, texts, run, tmp_path, search):
        code, out, err = run(
            "tie", four, "--blocks", "3", "--search", search, "--search-steps", "6", "--steps", "1", "--lora-rank", "1",
            "--train", texts["calib"], "-o", tmp_path / "t", "--json",
        )  # fmt: skip
        assert code == 0, err
        found = json.loads(out)
        assert found["unique"] <= 3
        assert load_checkpoint(tmp_path / "t").parameters == found["parameters"]
