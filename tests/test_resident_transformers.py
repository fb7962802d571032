"""Directories that transformers loads with weights that stay coded: the same logits, in the memory of the file."""

import json
import warnings

import pytest
import torch
import transformers

import bytecap
from bytecap.errors import UsageError, VersionError
from bytecap.format import container
from bytecap.format.decoder import side_files
from bytecap.model import resident
from bytecap.model.checkpoint import load_checkpoint
from bytecap.runtimes import hub
from bytecap.runtimes.transformers import BytecapConfig
from stored import contents_of

IDS = torch.arange(1, 60).reshape(1, -1)
CODED = {"quantization_config": BytecapConfig(resident="coded")}
# transformers says of every quantizer that it takes such an option from the caller
pytestmark = pytest.mark.filterwarnings("ignore:You passed .quantization_config:UserWarning")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Tensors of tiny models count as large."""
    monkeypatch.setattr(resident, "_SMALL", 100)


def written(directory, made, change=None):
    """Files of a directory in the hub's layout, made of a model without any loss."""
    contents = contents_of(load_checkpoint(made))
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in hub.layout(contents, side_files(contents)).items():
        (directory / name).write_bytes(data if change is None else change(name, data))
    return directory


def config_with(**changed):
    """Change of a directory's config."""

    def change(name, data):
        return json.dumps(json.loads(data) | changed).encode() if name == "config.json" else data

    return change


def loaded(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, **options)


def absent(model):
    """Names of parameters whose memory is one value."""
    return {n for n, p in model.named_parameters() if p.untyped_storage().nbytes() == p.element_size() < p.nbytes}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rotary", "biased", "transposed", "offset"])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_logits_are_those_of_the_decoded_model(model_directory, tmp_path, kind, dtype):
    directory = written(tmp_path / "hub", model_directory(kind))
    decoded, coded = loaded(directory, dtype=dtype), loaded(directory, dtype=dtype, **CODED)
    assert not absent(decoded)
    large = {n for n, p in coded.named_parameters() if p.numel() > 100}
    assert absent(coded) == large
    assert {n: (p.shape, p.dtype) for n, p in coded.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in decoded.named_parameters()
    }
    with torch.no_grad():
        assert torch.equal(coded(IDS).logits, decoded(IDS).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(coded.generate(IDS[:, :9], **options), decoded.generate(IDS[:, :9], **options))
    assert absent(coded) == large


def test_devices_dtypes_and_saving(model_directory, tmp_path):
    directory = written(tmp_path / "hub", model_directory())
    model = loaded(directory, device_map="auto", dtype=torch.float16, **CODED)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.to("cpu") is model
    assert model.to(torch.float16) is model
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(UsageError, match="load it again for another device or dtype"):
        model.to("meta")
    with pytest.raises(UsageError, match="load it again for another device or dtype"):
        model.bfloat16()
    with pytest.raises(UsageError, match="copy its directory, or load it decoded"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert json.loads(model.config.to_json_string())["quantization_config"]["resident"] == "coded"
    with pytest.raises(UsageError, match="on one device"):
        loaded(directory, device_map={"model": "cpu", "lm_head": "meta"}, **CODED)


@pytest.mark.slow
def test_a_pipeline_generates(model_directory, tmp_path):
    directory = written(tmp_path / "hub", model_directory())
    texts = []
    for options in ({}, CODED):
        run = transformers.pipeline("text-generation", str(directory), model_kwargs=dict(options))
        assert bool(absent(run.model)) == bool(options)
        texts.append(run("The table", max_new_tokens=8, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]
    assert texts[0].startswith("The table")


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_says_what_is_tied(model_directory, tmp_path, tied):
    change = config_with(tie_word_embeddings=not tied)
    directory = written(tmp_path / "hub", model_directory(tie_word_embeddings=tied), change)
    with torch.no_grad():
        assert torch.equal(loaded(directory, **CODED)(IDS).logits, loaded(directory)(IDS).logits)


def test_a_model_without_its_head(model_directory, tmp_path):
    directory = written(tmp_path / "hub", model_directory())
    one, other = (transformers.AutoModel.from_pretrained(directory, **options) for options in ({}, CODED))
    with torch.no_grad():
        assert torch.equal(other(IDS).last_hidden_state, one(IDS).last_hidden_state)


@pytest.mark.slow
def test_experts_that_the_checkpoint_keeps_apart(model_directory, tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, initializer_range=0.15,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "made")
    (tmp_path / "made" / "tokenizer.json").write_bytes((model_directory() / "tokenizer.json").read_bytes())
    directory = written(tmp_path / "hub", tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(loaded(directory, **CODED)(IDS).logits, loaded(directory)(IDS).logits)


@pytest.mark.slow
def test_a_directory_may_say_so_itself_and_the_caller_has_the_last_word(model_directory, tmp_path):
    asked = {"quant_method": "bytecap", "format": ".".join(map(str, container.VERSION)), "resident": "coded"}
    directory = written(tmp_path / "hub", model_directory(), config_with(quantization_config=asked))
    assert absent(loaded(directory))
    assert not absent(loaded(directory, quantization_config=BytecapConfig()))


def test_options_that_do_not_exist(model_directory, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="neither decoded nor coded"):
        BytecapConfig(resident="packed")
    with pytest.raises(UsageError, match=r"loads directories that hold model\.bcap"):
        loaded(model_directory(), **CODED)
    newer = config_with(quantization_config={"quant_method": "bytecap", "format": "1.99"})
    with pytest.raises(VersionError, match="pip install -U bytecap"):
        loaded(written(tmp_path / "newer", model_directory(), newer), **CODED)
    monkeypatch.delattr("transformers.quantizers.auto.LOADING_ATTRIBUTES_CONFIG_TYPES")
    with pytest.raises(UsageError, match="passes no options to plug-ins"):
        BytecapConfig(resident="coded")


def test_a_module_of_our_own_stays_where_it_is(model_directory, tmp_path):
    container.write(contents_of(load_checkpoint(model_directory())), tmp_path / "a.bcap")
    module = bytecap.load_model(tmp_path / "a.bcap", resident="coded")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.float() is module
    with pytest.raises(UsageError, match=r"a\.bcap is coded for cpu"):
        module.half()
