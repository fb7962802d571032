"""Tied blocks: what is refused, stopped, or interrupted."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import bytecap
from bytecap.errors import CheckpointError
from bytecap.format import container
from bytecap.job.effort import Effort
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.evaluation import kl_to
from bytecap.model.tying import Tying, find_blocks, tie
from bytecap.progress import Silent
from bytecap_lab.layer_tying import read, split
from bytecap_lab.layer_tying.start import tied
from bytecap_lab.layer_tying.uptrain import Trainer, uptrain
from conftest import build

LOOP = (0, 1, 0, 1)


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
        assert "tokens are too few to train on: an iteration takes 2,048" in line

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

    @pytest.mark.slow
    @pytest.mark.numeric
    def test_divergence_is_stopped_and_the_best_is_kept(self, four, texts):
        model, said = load_checkpoint(four), Silent()
        pool = read(model, texts["calib"], window=64, seed=0, reporter=said)
        windows, held = split(pool, 1, "cpu", "text")
        student = tied(model.module, Tying("model.layers", LOOP))
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

        monkeypatch.setattr(Trainer, "iterate", interrupt)
        code, out, err = run(*self.call(four, texts, tmp_path))
        assert code == 130
        assert not out
        assert "interrupted; no partial file is left behind" in err
        assert list((tmp_path / "t").iterdir()) == []

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_missing_and_misshapen_tensors(self, made, refused, texts, tmp_path):
        from safetensors.torch import load_file, save_file

        spoiled = shutil.copytree(made[0], tmp_path / "spoiled")
        tensors = load_file(spoiled / "model.safetensors")
        name = "model.layers.2.mlp.up_proj.up.weight"
        save_file({n: t for n, t in tensors.items() if n != name}, spoiled / "model.safetensors")
        assert f"lacks tensor {name} (1 missing in all)" in refused("eval", spoiled, "--text", texts["val"])
        save_file(tensors | {name: torch.zeros(3, 2)}, spoiled / "model.safetensors")
        assert f"{name} has shape [3, 2]" in refused("eval", spoiled, "--text", texts["val"])

    @pytest.mark.slow
    def test_a_file_with_a_spoiled_description(self, fitted_tied, refused, texts, tmp_path):
        found, _ = fitted_tied
        files = tuple(
            container.FileSection(f.name, bytecap.format.sidefiles.packing.pack(f.name, b"[]"))
            if f.name == "tying.json"
            else f
            for f in found.contents.files
        )
        path = tmp_path / "spoiled.bcap"
        path.write_bytes(container.serialize(replace(found.contents, files=files)))
        assert "tying.json must be an object" in refused("eval", path, "--text", texts["val"])

    def test_a_description_twice_applied_names_the_rank(self):
        module = build("rotary", num_hidden_layers=4)
        with pytest.raises(CheckpointError, match="cannot have rank"):
            tie(module, Tying("model.layers", LOOP, {"mlp.up_proj": 33}))
