"""Models that stay coded in memory, and files that are loaded unit by unit."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import bytecap
from bytecap.errors import CorruptError, UsageError
from bytecap.format import container
from bytecap.model import resident
from bytecap.model.from_artifact import module_of

IDS = torch.tensor([[1, 5, 9, 2, 7, 7, 3]])
pytestmark = pytest.mark.coverage
SHAPES = ({}, {"tie_word_embeddings": False})


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Tensors of tiny models count as large."""
    monkeypatch.setattr(resident, "_SMALL", 100)


@pytest.fixture
def fitted(fitted):
    """Function: path of a fitted tiny model; nothing behind it takes gradients."""

    def get(*args, **changes):
        with torch.enable_grad():
            return fitted(*args, **changes)

    with torch.no_grad():
        yield get


def held(module):
    """Values in memory, by name."""
    return {n: p.untyped_storage().nbytes() // p.element_size() for n, p in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
@pytest.mark.parametrize("changes", SHAPES, ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["rotary", "transposed"])
def test_logits_are_those_of_the_decoded_model(kind, changes, dtype, fitted):
    path = fitted(kind, **changes)[1]
    decoded = bytecap.load_model(path, dtype=dtype)
    coded = bytecap.load_model(path, dtype=dtype, resident="coded")
    for ids in (IDS, IDS[:, :2]):
        assert torch.equal(coded(ids).logits, decoded(ids).logits)
    first = decoded(IDS, use_cache=True)
    second = coded(IDS, use_cache=True)
    more = torch.tensor([[4]])
    wanted = decoded(more, past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.equal(coded(more, past_key_values=second.past_key_values, use_cache=True).logits, wanted)
    assert [n for n, _ in coded.named_parameters()] == [n for n, _ in decoded.named_parameters()]
    assert {n: p.shape for n, p in coded.named_parameters()} == {n: p.shape for n, p in decoded.named_parameters()}
    assert {p.dtype for p in coded.parameters()} == {next(decoded.parameters()).dtype}


@pytest.mark.slow
def test_coded_bytes_stay_in_memory_whatever_becomes_of_the_file(fitted, tmp_path):
    path = tmp_path / "m.bcap"
    path.write_bytes(fitted()[1].read_bytes())
    wanted, module = bytecap.load_model(path), bytecap.load_model(path, resident="coded")
    path.write_bytes(b"")
    assert torch.equal(module(IDS).logits, wanted(IDS).logits)


def test_at_most_one_block_has_values(fitted):
    module = bytecap.load_model(fitted("rotary", num_hidden_layers=4)[1], resident="coded")
    large = {n for n, p in module.named_parameters() if p.numel() > 100}
    assert all(held(module)[n] == 1 for n in large)
    seen = []
    for block in module.model.layers:
        block.register_forward_hook(
            lambda *_: seen.append([all(held(b)[n] == 1 for n, p in b.named_parameters() if p.numel() > 100)
                                       for b in module.model.layers])
        )  # fmt: skip
    module(IDS)
    assert len(seen) == 4
    assert all(row.count(False) <= 1 for row in seen)
    assert all(held(module)[n] == 1 for n in large)


@pytest.mark.slow
def test_the_next_block_is_decoded_meanwhile_and_no_other(fitted, monkeypatch):
    """At no moment are more than two parts decoded, whatever the order of calls."""
    waiting = []
    take = resident._Decoder.take

    def watched(self, part):
        found = take(self, part)
        waiting.append(len(self.waiting))
        return found

    monkeypatch.setattr(resident._Decoder, "take", watched)
    module = bytecap.load_model(fitted("rotary", num_hidden_layers=4)[1], resident="coded")
    wanted = bytecap.load_model(fitted("rotary", num_hidden_layers=4)[1])
    layers = module.model.layers
    for _ in range(2):
        module(IDS)
    module.model.layers = nn.ModuleList([layers[i] for i in (2, 0, 3, 1)])
    wanted.model.layers = nn.ModuleList([wanted.model.layers[i] for i in (2, 0, 3, 1)])
    assert torch.equal(module(IDS).logits, wanted(IDS).logits)
    assert set(waiting) <= {0, 1}
    assert sum(waiting) > len(waiting) / 2


def test_a_pass_that_fails_leaves_no_values(fitted):
    module = bytecap.load_model(fitted()[1], resident="coded")

    def fail(*_):
        raise RuntimeError("of the user's")

    handle = module.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="of the user's"), torch.no_grad():
        module(IDS)
    handle.remove()
    assert all(n == 1 for name, n in held(module.model.layers[0]).items() if "proj" in name)
    with torch.no_grad():
        assert torch.equal(module(IDS).logits, bytecap.load_model(fitted()[1])(IDS).logits)


@pytest.mark.slow
def test_a_model_that_reads_weights_by_itself_is_refused(fitted, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        return nn.functional.linear(x, self.down_proj.weight.T).sum(-1, keepdim=True) + 0 * x

    path = fitted("rotary")[1]
    module = bytecap.load_model(path)
    assert isinstance(module.model.layers[0].mlp, LlamaMLP)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    bytecap.load_model(path, resident="coded")  # inside of a block anything goes
    kind = type(module)
    sound = kind.forward

    def peeking(self, *args, **kwargs):
        found = sound(self, *args, **kwargs)
        found.logits = found.logits + self.model.layers[0].mlp.down_proj.weight.sum()
        return found

    monkeypatch.setattr(kind, "forward", peeking)
    with pytest.raises(UsageError, match="cannot be kept coded: its model reads weights"):
        bytecap.load_model(path, resident="coded")

    def failing(*_, **__):
        raise TypeError("no such\nthing")

    monkeypatch.setattr(kind, "forward", failing)
    with pytest.raises(UsageError, match=r"of their modules \(no such\); load it decoded"):
        bytecap.load_model(path, resident="coded")


def test_a_damaged_section_is_named_before_anything_runs(fitted):
    contents = container.read(fitted()[1])
    unit = max(contents.units, key=lambda u: u.unit.parameters)
    broken = tuple(replace(u, data=u.data[:9]) if u is unit else u for u in contents.units)
    for how in ("coded", "decoded"):
        with pytest.raises(CorruptError, match=unit.unit.name.replace(".", r"\.")):
            module_of(replace(contents, units=broken), "x", resident=how)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"resident": "packed"}, "neither decoded nor coded"), ({"dtype": "int8"}, "no floating-point type"),
     ({"dtype": "float33"}, "no floating-point type"), ({"dtype": 3}, "no floating-point type")],
)  # fmt: skip
def test_options_that_do_not_exist(options, words, fitted):
    with pytest.raises(UsageError, match=words):
        bytecap.load_model(fitted()[1], **options)


def test_an_artifact_in_memory_takes_the_same_options(fitted):
    result, path = fitted()
    with torch.no_grad():
        one = result.load_model(resident="coded", dtype="bfloat16")(IDS).logits
        assert torch.equal(one, bytecap.load_model(path, dtype="bfloat16")(IDS).logits)


@pytest.mark.slow
def test_commands_take_it(fitted, run, model_directory, texts):
    path = fitted()[1]
    asked = ("generate", path, "the ", "-n", "5", "--device", "cpu")
    assert run(*asked, "--resident", "coded") == run(*asked)
    score = ("eval", path, "--text", texts["val"], "--tokens", "300", "--device", "cpu", "--json")
    (_, one, _), (_, two, _) = run(*score, "--resident", "coded"), run(*score)
    assert json.loads(one) == json.loads(two)
    code, _, err = run("generate", model_directory(), "the ", "--resident", "coded")
    assert code == 2
    assert "only weights in a .bcap file can stay coded" in err
    code, _, err = run("eval", path, "--factory", "x.py:y", "--resident", "coded")
    assert code == 2
    assert "--resident coded is for artifacts" in err


def test_every_tensor_goes_to_the_device(fitted):
    """The `meta` device stands for a GPU: nothing of the module may stay behind."""
    module = module_of(container.read(fitted()[1]), "x", device="meta", dtype="bfloat16")
    tensors = [*module.parameters(), *module.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
