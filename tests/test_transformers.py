"""Directories that transformers loads: equal to the unpacked ones, and refused where they would be something else."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

import bytecap
import bytecap.runtimes.transformers
from bytecap.errors import ArtifactError, BytecapError, CheckpointError, VersionError
from bytecap.format import container
from bytecap.format.decoder import side_files
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.export import unpack
from bytecap.runtimes import hub
from stored import contents_of

IDS = torch.arange(1, 60).reshape(1, -1)


def written(directory, made, change=None):
    """Files of a directory in the hub's layout, made of a model without any loss."""
    contents = contents_of(load_checkpoint(made))
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in hub.layout(contents, side_files(contents)).items():
        (directory / name).write_bytes(data if change is None else change(name, data))
    container.write(contents, directory.parent / f"{directory.name}.bcap")
    return directory


def loaded(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rotary", "biased", "transposed", "offset"])
@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_a_directory_is_the_unpacked_one(model_directory, tmp_path, kind, dtype):
    directory = written(tmp_path / "hub", model_directory(kind))
    unpack(tmp_path / "hub.bcap", tmp_path / "plain")
    ours, theirs = loaded(directory, dtype=dtype), loaded(tmp_path / "plain", dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()}
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_device_maps_and_saving(model_directory, tmp_path):
    directory = written(tmp_path / "hub", model_directory())
    model = loaded(directory, device_map="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "transformers_weights" not in config
    again = loaded(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(BytecapError, match="offloaded"):
        loaded(directory, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.slow
def test_a_pipeline_generates(model_directory, tmp_path):
    directory = written(tmp_path / "hub", model_directory())
    unpack(tmp_path / "hub.bcap", tmp_path / "plain")
    texts = []
    for each in (directory, tmp_path / "plain"):
        run = transformers.pipeline("text-generation", str(each))
        texts.append(run("The table", max_new_tokens=8, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]
    assert texts[0].startswith("The table")


@pytest.mark.slow
@pytest.mark.coverage
def test_our_own_commands_take_the_directory(model_directory, tmp_path, run, texts):
    directory = written(tmp_path / "hub", model_directory())
    unpack(tmp_path / "hub.bcap", tmp_path / "plain")
    code, out, err = run("check", directory, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["file_bytes"] == sum(p.stat().st_size for p in directory.iterdir())
    code, _, err = run("unpack", directory, "-o", tmp_path / "again")
    assert code == 0, err
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("again", "plain")]
    assert configs[0] == configs[1]
    scored = ("eval", directory, "--text", texts["val"], "--tokens", "300", "--json")
    assert json.loads(run(*scored)[1]) == json.loads(run(*scored, "--resident", "coded")[1])
    code, _, err = run("unpack", directory, "-o", tmp_path / "x", "--base", tmp_path / "hub.bcap")
    assert code == 2
    assert "has no base" in err


def test_a_finished_directory_is_no_source(model_directory, tmp_path, run, texts):
    directory = written(tmp_path / "hub", model_directory())
    asked = ("--budget", "30kB", "-o", tmp_path / "x.bcap", "--calib", texts["calib"], "--eval", texts["val"])
    code, _, err = run("fit", directory, *asked)
    assert code == 2
    assert "is a finished model: start from what it was made of, or unpack it" in err
    (directory / "model.bcap").unlink()
    code, _, err = run("eval", directory, "--text", texts["val"])
    assert code == 2
    assert "holds no model.bcap, which its config.json names" in err


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(directory)
    except Exception as exc:
        print("refused:", " ".join(str(exc).split()))
    else:
        print("loaded")
"""


@pytest.mark.slow
def test_without_the_plugin_nothing_is_loaded(model_directory, tmp_path):
    def without(name, data):
        config = json.loads(data) if name == "config.json" else {}
        return json.dumps({k: v for k, v in config.items() if k != "transformers_weights"}).encode() if config else data

    whole = written(tmp_path / "whole", model_directory())
    changed = written(tmp_path / "changed", model_directory(), without)
    command = [sys.executable, "-c", WITHOUT, whole, changed]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 (our own script)
    one, other = done.stdout.splitlines()
    assert one.startswith("refused")
    assert "pip install 'bytecap[hf]' and import bytecap.runtimes.transformers" in one
    assert other.startswith("refused")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_two_files_of_weights_are_refused(model_directory, tmp_path, name):
    directory = written(tmp_path / "hub", model_directory())
    (directory / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=f"both model.bcap and {name}"):
        loaded(directory)
    with pytest.raises(CheckpointError, match=f"both model.bcap and {name}"):
        hub.read(directory)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "said"), [("1.99", "pip install -U bytecap"), ("2.0", "-U"), ("x", "no format")])
def test_a_plugin_older_than_the_file(model_directory, tmp_path, version, said):
    def change(name, data):
        if name != "config.json":
            return data
        config = json.loads(data)
        config["quantization_config"]["format"] = version
        return json.dumps(config).encode()

    directory = written(tmp_path / "hub", model_directory(), change)
    with pytest.raises(VersionError, match=said):
        loaded(directory)
    with pytest.raises(VersionError, match=said):
        hub.read(directory)


def test_a_truncated_file(model_directory, tmp_path):
    directory = written(tmp_path / "hub", model_directory())
    data = (directory / "model.bcap").read_bytes()
    (directory / "model.bcap").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=r"model\.bcap"):
        loaded(directory)
    (directory / "model.bcap").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.bcap"):
        loaded(directory)


@pytest.mark.parametrize("changed", [{"hidden_size": 64}, {"num_hidden_layers": 3}])
def test_a_config_of_another_model(model_directory, tmp_path, changed):
    def change(name, data):
        return json.dumps(json.loads(data) | changed).encode() if name == "config.json" else data

    directory = written(tmp_path / "hub", model_directory(), change)
    with pytest.raises(ArtifactError, match=r"holds no tensor|asks for"):
        loaded(directory)


def test_another_head_is_refused(model_directory, tmp_path):
    directory = written(tmp_path / "hub", model_directory())
    with pytest.raises(ArtifactError, match=r"holds no tensor score\.weight"):
        transformers.AutoModelForSequenceClassification.from_pretrained(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_says_what_is_tied(model_directory, tmp_path, tied):
    """A config that says otherwise than the file changes nothing: every name gets the file's values."""

    def change(name, data):
        if name != "config.json":
            return data
        return json.dumps(json.loads(data) | {"tie_word_embeddings": not tied}).encode()

    directory = written(tmp_path / "hub", model_directory(tie_word_embeddings=tied), change)
    wanted = bytecap.load(tmp_path / "hub.bcap")
    found = loaded(directory, dtype=torch.float32).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], torch.from_numpy(v)) for n, v in wanted.items())


@pytest.mark.slow
def test_a_model_without_its_head(model_directory, tmp_path):
    directory = written(tmp_path / "hub", model_directory())
    whole = loaded(directory).model.state_dict()
    base = transformers.AutoModel.from_pretrained(directory).state_dict()
    assert base.keys() == whole.keys()
    assert all(torch.equal(base[n], whole[n]) for n in whole)


def test_more_tensors_than_the_model_has(model_directory, tmp_path):
    def change(name, data):
        return json.dumps(json.loads(data) | {"num_hidden_layers": 1}).encode() if name == "config.json" else data

    directory = written(tmp_path / "hub", model_directory(), change)
    with pytest.raises(ArtifactError, match=r"holds tensor .*, which LlamaForCausalLM lacks"):
        loaded(directory)


def test_shared_blocks_are_not_laid_out(model_directory):
    contents = contents_of(load_checkpoint(model_directory()))
    with pytest.raises(ArtifactError, match="layers share blocks"):
        hub.layout(contents, side_files(contents) | {"tying.json": b"{}"})
