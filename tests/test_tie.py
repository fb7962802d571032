"""Tied blocks: what is shared, how it starts, what the file holds, what is refused."""

import argparse
import copy
import importlib
import json
import lzma
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bytecap
from bytecap import artifact, reference
from bytecap.decode import decode_units
from bytecap.errors import CheckpointError, UsageError
from bytecap.model.checkpoint import find_units, load_model
from bytecap.model.evaluate import kl_to
from bytecap.model.probe import probe
from bytecap.model.tying import Tying, find_blocks, layers, matrices, parse, tie
from bytecap.model.uses import count_uses
from bytecap.progress import Silent
from bytecap.recover import Effort
from bytecap.sensitivity import metrics
from bytecap.share import dlt, greedy, read, split
from bytecap.share import tie as convert
from bytecap.share.start import loop, ranks_for, tied
from bytecap.share.uptrain import Trainer, uptrain
from bytecap.sources import load_sets
from bytecap.unpack import unpack
from conftest import BUDGET, KINDS, SMALL, build

DEPTHS = {"transposed": {"n_layer": 4}}
IDS = torch.arange(48).reshape(2, 24)


def deep(kind, **changes):
    return build(kind, **DEPTHS.get(kind, {"num_hidden_layers": 4}), **changes)


def plain(module, blocks=2, ranks=None):
    path, layers = find_blocks(module)
    return Tying(path, loop(len(layers), blocks), ranks or {})


@pytest.fixture(scope="module")
def four(model_directory):
    return model_directory("rotary", num_hidden_layers=4)


@pytest.fixture(scope="module")
def made(four, texts, tmp_path_factory):
    """Directory of a tied model, its report, and what was said."""
    said, target = Silent(), tmp_path_factory.mktemp("tied")
    report = convert(four, 2, target, rank=2, train=texts["calib"], steps="4", reporter=said)
    return target, report, said.notes


@pytest.fixture(scope="module")
def fitted_tied(made, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("fitted") / "tied.bcap"
    found = bytecap.fit(made[0], BUDGET, calibration=texts["calib"], evaluation=texts["val"], output=path, **SMALL)
    return found, path


@pytest.fixture(scope="module")
def twins(texts, four):
    """A model whose layers 1 and 3 are the same; training and held-out windows."""
    model = load_model(four)
    blocks = find_blocks(model.module)[1]
    blocks[3].load_state_dict(blocks[1].state_dict())
    pool = read(model, texts["calib"], window=64, seed=0, reporter=Silent())
    windows, held = split(pool, 1, "cpu", "text")
    return model.module, windows, held


class TestStart:
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


class TestDirectory:
    def test_stored_once_and_the_same_after_reading(self, made, four):
        directory, report, notes = made
        stored = bytecap.model.checkpoint.check_safetensors(directory / "model.safetensors")
        assert "model.layers.0.mlp.up_proj.weight" in stored
        assert "model.layers.2.mlp.up_proj.weight" not in stored
        assert "model.layers.2.mlp.up_proj.down.weight" in stored
        assert {e["dtype"] for e in stored.values()} == {"BF16"}
        model = load_model(directory)
        assert model.parameters == report["parameters"] < 0.75 * load_model(four).parameters
        assert count_uses(model.module, lambda m: m(IDS))["model.layers.1.mlp.up_proj.weight"] == 2
        assert report["kl_written"] == pytest.approx(report["uptraining"]["kl"], rel=0.05)
        assert any("4 moves" in n for n in notes)

    def test_uptraining_helps_and_repeats(self, made, four, texts, tmp_path):
        found = made[1]["uptraining"]
        assert found["kl"] < found["kl_start"]
        convert(four, 2, tmp_path, rank=2, train=texts["calib"], steps="4")
        assert (tmp_path / "model.safetensors").read_bytes() == (made[0] / "model.safetensors").read_bytes()

    def test_through_a_file_and_back(self, made, fitted_tied, tmp_path):
        found, path = fitted_tied
        assert len(found.data) <= BUDGET
        unpack(path, tmp_path)
        one, other = bytecap.load_model(path), load_model(tmp_path).module
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
        assert run("unpack", path, "-o", tmp_path)[0] == 0
        scores = [json.loads(run("eval", x, "--text", texts["val"], "--json")[1]) for x in (path, tmp_path)]
        assert scores[0] == scores[1]
        assert run("generate", path, "--prompt", "SELECT", "--tokens", "3")[0] == 0
        assert run("check", path)[0] == 0

    def test_a_tied_model_is_not_tied_again(self, made, refused, texts, tmp_path):
        line = refused("tie", made[0], "--blocks", "1", "--train", texts["calib"], "-o", tmp_path)
        assert "is tied already" in line


class TestAllocation:
    def test_statistics_of_all_uses_add_up(self, four, texts):
        """A shared matrix's Hessian is the sum of those of the same values, stored once for each use."""
        model = load_model(four)
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

    def test_three_uses_buy_finer_steps(self, four, texts):
        """Against the same values stored three times, and against a layer of its own: half a bit for a doubling."""
        model = load_model(four)
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
    def test_greedy_merges_what_costs_nothing(self, twins):
        module, windows, held = twins
        start = Tying("model.layers", (0, 1, 2, 3))
        found, merges = greedy.Search(module, start, "average", windows, held[:4], "cpu").run(
            3, Effort(steps=0), lambda _: None
        )
        assert found.sources == (0, 1, 2, 1)
        assert merges[0].kl == pytest.approx(0, abs=1e-5)
        assert merges[0].freed == sum(p.numel() for p in matrices(find_blocks(module)[1][0]).values())

    def test_low_rank_parts_count_against_what_a_merge_frees(self, twins):
        module, windows, held = twins
        start = Tying("model.layers", (0, 1, 2, 3), ranks_for(module, 2))
        _, merges = greedy.Search(module, start, "lower", windows, held[:1], "cpu").run(
            3, Effort(steps=0), lambda _: None
        )
        parts = 2 * sum(2 * sum(matrices(find_blocks(module)[1][0])[f"{n}.weight"].shape) for n in start.ranks)
        whole = sum(p.numel() for p in matrices(find_blocks(module)[1][0]).values())
        assert merges[0].freed == whole - parts

    def test_learning_finds_it_too(self, twins, monkeypatch):
        monkeypatch.setattr(dlt, "tokens_of_move", lambda _: 256)
        module, windows, _ = twins
        search = dlt.Search(module, Tying("model.layers", (0, 1, 2, 3)), windows, "cpu", rate=1e-5)
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

    @pytest.mark.parametrize("search", ["greedy", "dlt"])
    def test_on_the_command_line(self, four, texts, run, tmp_path, search):
        code, out, err = run(
            "tie", four, "--blocks", "3", "--search", search, "--search-steps", "6", "--steps", "1", "--lora-rank", "1",
            "--train", texts["calib"], "-o", tmp_path / "t", "--json",
        )  # fmt: skip
        assert code == 0, err
        found = json.loads(out)
        assert found["unique"] <= 3
        assert load_model(tmp_path / "t").parameters == found["parameters"]


class TestBadInput:
    def call(self, model, texts, tmp_path, *more, blocks=2):
        return ("tie", model, "--blocks", blocks, "--train", texts["calib"], "-o", tmp_path / "t", *more)

    def test_a_number_that_does_not_divide_the_depth(self, four, texts, refused, tmp_path):
        line = refused(*self.call(four, texts, tmp_path, blocks=3))
        assert "--blocks 3 does not divide the 4 layers of model.layers: use one of 1, 2" in line
        assert "has 4 layers, so 1 to 3" in refused(*self.call(four, texts, tmp_path, blocks=4))
        assert not (tmp_path / "t").exists()

    def test_blocks_of_different_shapes_are_both_named(self, tokenizer_json, texts, refused, tmp_path):
        import transformers

        config = transformers.Qwen2MoeConfig(
            vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2,
            num_experts_per_tok=1, mlp_only_layers=[1], max_position_embeddings=256,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
        (tmp_path / "m" / "tokenizer.json").write_text(tokenizer_json, "utf-8")
        line = refused(*self.call(tmp_path / "m", texts, tmp_path))
        assert "blocks of different shapes cannot be tied" in line
        assert "model.layers.0." in line
        assert "model.layers.1." in line

    def test_a_module_without_blocks(self):
        with pytest.raises(CheckpointError, match="no list of blocks"):
            find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))

    def test_a_text_that_is_too_short(self, four, refused, tmp_path):
        (tmp_path / "short.txt").write_text("SELECT a FROM b;", "utf-8")
        line = refused("tie", four, "--blocks", 2, "--train", tmp_path / "short.txt", "-o", tmp_path / "t")
        assert "short.txt" in line
        assert "tokens are too few to train on: one move takes 2,048" in line

    @pytest.mark.parametrize(
        ("option", "value", "said"),
        [
            ("--init", "middle", "unknown --init 'middle'"),
            ("--search", "best", "unknown --search 'best'"),
            ("--steps", "many", "--steps 'many' is neither"),
            ("--lora-rank", "-1", "--lora-rank -1 is below 0"),
            ("--labels", "2", "--labels 2.0 is no share"),
            ("--rate", "0", "--rate 0"),
        ],
    )
    def test_options(self, four, texts, refused, tmp_path, option, value, said):
        assert said in refused(*self.call(four, texts, tmp_path, option, value))

    def test_divergence_is_stopped_and_the_best_is_kept(self, four, texts):
        model, said = load_model(four), Silent()
        pool = read(model, texts["calib"], window=64, seed=0, reporter=said)
        windows, held = split(pool, 1, "cpu", "text")
        student = tied(model.module, plain(model.module))
        before = kl_to(model.module, student, held)[0]
        found = uptrain(model.module, student, windows, held, Effort(steps=30), device="cpu", rate=30.0, reporter=said)
        assert found.diverged
        assert found.moves < 30
        assert any("diverges" in n for n in said.notes)
        assert kl_to(model.module, student, held)[0] == pytest.approx(found.kl)
        assert found.kl <= before

    def test_interrupted(self, four, texts, run, tmp_path, monkeypatch):
        def interrupt(*_args, **_options):
            raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "move", interrupt)
        code, out, err = run(*self.call(four, texts, tmp_path))
        assert code == 130
        assert not out
        assert "interrupted; no partial file is left behind" in err
        assert list((tmp_path / "t").iterdir()) == []

    @pytest.mark.parametrize(
        ("edit", "said"),
        [
            ({"sources": [0, 1, 0]}, "ties 3 blocks"),
            ({"sources": [0, 0, 1, 0]}, "layer 2 cannot read the block of layer 1"),
            ({"sources": [0, 2, 2, 0]}, "layer 1 cannot read the block of layer 2"),
            ({"blocks": "model"}, "ties 4 blocks of 'model'"),
            ({"blocks": 3}, "blocks is a name"),
            ({"ranks": {"mlp.up_proj": 10**9}}, "cannot have rank 1000000000"),
            ({"ranks": {"mlp.no": 1}}, "has no linear map mlp.no"),
            ({"ranks": {"mlp.up_proj": True}}, "cannot have rank True"),
            ({"sources": [0, 1, 2, 3]}, "mlp.down_proj.down.weight, which the tied model has not"),
            ({"ranks": {"mlp.up_proj": 2}}, "which the tied model has not"),
        ],
    )
    def test_a_spoiled_description(self, made, refused, texts, tmp_path, edit, said):
        spoiled = shutil.copytree(made[0], tmp_path / "spoiled")
        file = spoiled / "tying.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | edit))
        assert said in refused("eval", spoiled, "--text", texts["val"])

    def test_missing_and_misshapen_tensors(self, made, refused, texts, tmp_path):
        from safetensors.torch import load_file, save_file

        spoiled = shutil.copytree(made[0], tmp_path / "spoiled")
        tensors = load_file(spoiled / "model.safetensors")
        name = "model.layers.2.mlp.up_proj.up.weight"
        save_file({n: t for n, t in tensors.items() if n != name}, spoiled / "model.safetensors")
        assert f"lacks tensor {name} (1 missing in all)" in refused("eval", spoiled, "--text", texts["val"])
        save_file(tensors | {name: torch.zeros(3, 2)}, spoiled / "model.safetensors")
        assert f"{name} has shape [3, 2]" in refused("eval", spoiled, "--text", texts["val"])

    def test_a_file_with_a_spoiled_description(self, fitted_tied, refused, texts, tmp_path):
        found, _ = fitted_tied
        files = tuple(
            artifact.FileSection(f.name, bytecap.sidefiles.pack(f.name, b"[]")) if f.name == "tying.json" else f
            for f in found.contents.files
        )
        path = tmp_path / "spoiled.bcap"
        path.write_bytes(artifact.serialize(replace(found.contents, files=files)))
        assert "tying.json must be an object" in refused("eval", path, "--text", texts["val"])

    def test_a_description_twice_applied_names_the_rank(self):
        module = deep("rotary")
        with pytest.raises(CheckpointError, match="cannot have rank"):
            tie(module, plain(module, 2, {"mlp.up_proj": 33}))


FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


class TestComposition:
    """The experiment of docs/sharing.md, small."""

    @pytest.fixture
    def composition(self, monkeypatch):
        monkeypatch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("composition")
        for name in ("common", "composition"):
            sys.modules.pop(name, None)

    def test_from_training_to_paired_differences(self, composition, four, texts, tmp_path, capsys):
        for name in ("literature", "technical", "general"):
            for kind in ("calib", "val"):
                shutil.copy(texts[kind], tmp_path / f"{name}.{kind}.txt")
        packed = tmp_path / "train.txt.xz"
        packed.write_bytes(lzma.compress(texts["calib"].read_bytes().replace(b"\f", b"\0")))
        args = argparse.Namespace(
            models=four.parent, model=[four.name], texts=tmp_path, train=[packed], blocks=2, lora_rank=2, steps="2",
            rate=1e-3, full_rate=1e-4, labels=0.5, tokens=1000, eval_tokens=1500, device="cpu", seed=0,
            work=tmp_path / "work", output=tmp_path / "out.jsonl",
        )  # fmt: skip
        facts = [composition.train(args, 0, kind) for kind in ("b", "d")]
        assert [f["moves"] for f in facts] == [2, 2]
        students = {"a": four, "b-reinvested": args.work / "b-0", "c": args.work / "d-0", "d": args.work / "d-0"}
        rows = [composition.one(args, "21kB", arm, 0, str(x)) | {"seed": 0} for arm, x in students.items()]
        by_arm = {r["arm"]: r for r in rows}
        assert all(20_900 < by_arm[x]["file_bytes"] <= 21_000 for x in ("a", "b-reinvested", "d"))
        assert by_arm["c"]["file_bytes"] < 14_500
        assert by_arm["d"]["bits_by_uses"]["used 2 times"] > by_arm["c"]["bits_by_uses"]["used 2 times"]
        assert load_model(args.work / "b-0").config()["num_hidden_layers"] == 2
        composition.summarise(args, rows)
        lines = [json.loads(x) for x in args.output.read_text().splitlines()]
        found = next(x for x in lines if x.get("against") == "a")
        assert found["kl"]["mean"] == pytest.approx(by_arm["d"]["kl_nats"] - by_arm["a"]["kl_nats"], abs=1e-6)
        assert "d - b-reinvested" in capsys.readouterr().out

    @pytest.mark.nightly
    def test_on_the_embedded_model(self, tmp_path):
        command = [
            sys.executable, str(FOLDER / "composition.py"), "--model", "demo", "--sizes", "450kB", "--blocks", "3",
            "--seeds", "1", "--steps", "40", "--tokens", "8192", "--eval-tokens", "4096", "--device", "cpu",
            "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.jsonl"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own code)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
        rows = {x["arm"]: x for x in lines if x["benchmark"] == "composition"}
        assert len(rows) == 7
        assert all(x["file_bytes"] <= x["budget_bytes"] <= 450_000 for x in rows.values())
        assert all(rows[x]["training"]["kl"] < rows[x]["training"]["kl_start"] for x in ("b", "d", "e"))
        assert rows["d"]["bits_per_parameter"] > 1.3 * rows["a"]["bits_per_parameter"]
        assert sum(x["benchmark"] == "composition-summary" for x in lines) == 7 + 8
