"""Reading checkpoints: shards, ties, layouts, and every kind of damage."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bytecap import CheckpointError
from bytecap.format.decoder import from_matrix
from bytecap.model.checkpoint import (
    demo_directory,
    find_units,
    load_checkpoint,
    resolve,
)
from bytecap.model.fileset import check_safetensors, weight_files
from bytecap.types import Unit, as_matrix
from conftest import KINDS, build, save


@pytest.fixture
def spoiled(model_directory, tmp_path):
    return shutil.copytree(model_directory("rotary"), tmp_path / "spoiled")


class TestReading:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_family(self, model_directory, kind):
        model = load_checkpoint(model_directory(kind))
        names = [n for u in model.units for n in (u.name, *u.aliases)]
        assert sorted(names) == sorted(model.module.state_dict())
        assert model.parameters == sum(p.numel() for p in model.module.parameters())
        assert {u.dtype for u in model.units} == {"BF16"}
        assert "tokenizer.json" in model.files
        assert not model.module.training
        assert not any(p.requires_grad for p in model.module.parameters())

    @pytest.mark.parametrize(
        ("dtype", "spelled"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")]
    )
    def test_source_dtypes_are_kept_and_values_widened_exactly(self, model_directory, dtype, spelled):
        from safetensors.torch import load_file

        directory = model_directory("biased", dtype=dtype)
        model = load_checkpoint(directory)
        assert {u.dtype for u in model.units} == {spelled}
        stored = load_file(directory / "model.safetensors")
        for u in model.units:
            assert torch.equal(model.tensor(u), stored[u.name].float())

    def test_shards_give_the_same_as_one_file(self, tmp_path, tokenizer_json):
        module = build("rotary", dtype=torch.bfloat16)
        one = save(module, tmp_path / "one", tokenizer_json)
        many = save(module, tmp_path / "many", tokenizer_json, max_shard_size="20KB")
        assert len(weight_files(many)) > 2
        left, right = load_checkpoint(one), load_checkpoint(many)
        assert left.units == right.units
        for u in left.units:
            assert torch.equal(left.tensor(u), right.tensor(u))

    def test_tied_tensors_are_one_unit_with_an_alias(self):
        (tied,) = [u for u in find_units(build("rotary")) if u.aliases]
        assert (tied.name, tied.aliases) == ("model.embed_tokens.weight", ("lm_head.weight",))
        assert not any(u.aliases for u in find_units(build("rotary", tie_word_embeddings=False)))

    def test_transposed_layouts_are_seen_as_outputs_by_inputs(self):
        units = {u.name: u for u in find_units(build("transposed"))}
        inner = units["transformer.h.0.mlp.c_fc.weight"]
        assert inner.transposed
        assert (inner.shape, inner.matrix_shape) == ((32, 128), (128, 32))
        assert not units["transformer.wte.weight"].transposed

    def test_shared_blocks_are_stored_once(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(4, 4)
                self.second = self.first
                self.register_buffer("table", torch.arange(6))

        units = find_units(Twice())
        assert [(u.name, u.aliases, u.linear) for u in units] == [
            ("table", (), False), ("first.weight", ("second.weight",), True), ("first.bias", ("second.bias",), False),
        ]  # fmt: skip

    def test_views_of_one_storage_with_other_shapes_stay_apart(self):
        class Views(nn.Module):
            def __init__(self):
                super().__init__()
                base = torch.zeros(12)
                self.register_buffer("flat", base)
                self.register_buffer("square", base.view(3, 4))

        assert len(find_units(Views())) == 2

    @given(st.lists(st.integers(0, 5), min_size=0, max_size=3), st.booleans())
    def test_matrices_return_to_their_layout(self, shape, transposed):
        unit = Unit("w", tuple(shape), "F32", transposed=transposed and len(shape) == 2)
        values = np.arange(unit.parameters, dtype=np.float32).reshape(shape)
        matrix = as_matrix(unit, values)
        if unit.parameters:
            assert matrix.shape == unit.matrix_shape
        np.testing.assert_array_equal(from_matrix(unit, matrix), values)

    def test_the_embedded_model(self):
        model = load_checkpoint("demo")
        assert model.parameters == 1_369_728
        assert resolve("demo") == demo_directory()


class TestDamage:
    @given(data=st.data())
    def test_any_cut_or_flip_of_a_weight_file_is_noticed_or_harmless(self, data, tmp_path_factory):
        """Structure is always checked; a flipped weight is just another weight, a flipped name an unknown tensor."""
        from safetensors.numpy import save as dump

        raw = bytearray(dump({"a": np.ones((3, 2), np.float32), "b": np.zeros(5, np.float16)}))
        if data.draw(st.booleans()):
            raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
            harmless = False
        else:
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            harmless = True
        path = tmp_path_factory.mktemp("flip") / "model.safetensors"
        path.write_bytes(raw)
        try:
            check_safetensors(path)
        except CheckpointError as exc:
            assert str(path) in str(exc)  # noqa: PT017 (either outcome is fine)
        else:
            assert harmless

    def test_overlapping_tensors_are_refused(self, tmp_path):
        header = {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
        text = json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
        with pytest.raises(CheckpointError, match="tensor b begins at byte 4"):
            check_safetensors(path)

    def test_bytes_behind_the_tensors_are_refused(self, spoiled):
        path = spoiled / "model.safetensors"
        path.write_bytes(path.read_bytes() + b"xyz")
        with pytest.raises(CheckpointError, match="3 bytes are left over"):
            load_checkpoint(spoiled)

    @pytest.mark.parametrize(("value", "said"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
    def test_values_that_are_not_finite_are_named_with_their_index(self, tmp_path, tokenizer_json, value, said, name):
        module = build("rotary")
        tensor = dict(module.named_parameters())[name]
        index = tuple(n - 2 for n in tensor.shape)
        with torch.no_grad():
            tensor[index] = value
        directory = save(module, tmp_path / "model", tokenizer_json)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(directory)
        assert str(caught.value) == f"tensor {name} holds {said} at index {list(index)}"

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
    def test_pickles_are_refused_with_advice(self, spoiled, suffix):
        (spoiled / "model.safetensors").rename(spoiled / f"weights{suffix}")
        with pytest.raises(CheckpointError, match="pickle") as caught:
            load_checkpoint(spoiled)
        assert f"weights{suffix}" in str(caught.value)
        assert "safe_serialization" in str(caught.value)
        with pytest.raises(CheckpointError, match="pickle"):
            load_checkpoint(spoiled / f"weights{suffix}")

    def test_missing_things_are_named(self, spoiled, tmp_path):
        with pytest.raises(CheckpointError, match="none"):
            load_checkpoint(tmp_path / "none")
        (spoiled / "model.safetensors").rename(spoiled / "model.st")
        with pytest.raises(CheckpointError, match="safetensors"):
            load_checkpoint(spoiled)
        (spoiled / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_checkpoint(spoiled)

    def test_a_file_is_not_a_model(self, model_directory):
        with pytest.raises(CheckpointError, match="give the directory"):
            load_checkpoint(model_directory("rotary") / "model.safetensors")

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
    def test_damaged_shard_indices(self, spoiled, content):
        (spoiled / "model.safetensors.index.json").write_text(content, "utf-8")
        with pytest.raises(CheckpointError, match=r"index\.json"):
            load_checkpoint(spoiled)

    def test_a_missing_shard_is_named(self, tmp_path, tokenizer_json):
        directory = save(build("rotary"), tmp_path / "many", tokenizer_json, max_shard_size="40KB")
        lost = weight_files(directory)[1]
        lost.unlink()
        with pytest.raises(CheckpointError, match=lost.name):
            load_checkpoint(directory)

    def test_a_truncated_shard_is_named(self, tmp_path, tokenizer_json):
        directory = save(build("rotary"), tmp_path / "many", tokenizer_json, max_shard_size="40KB")
        cut = weight_files(directory)[1]
        cut.write_bytes(cut.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=f"{cut.name} is truncated: tensor "):
            load_checkpoint(directory)


class TestHeaders:
    """A header says a type, a shape and bytes of every tensor; anything else is one line."""

    GOOD = '{"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}'

    def written(self, tmp_path, entry):
        head = f'{{"__metadata__": {{}}, "a.weight": {entry}}}'.encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(16))
        return tmp_path / "a.safetensors"

    def test_a_sound_one(self, tmp_path):
        assert check_safetensors(self.written(tmp_path, self.GOOD))["a.weight"]["shape"] == [2, 2]

    @pytest.mark.parametrize(("old", "new"), [
        ('"F32"', "[]"), ('"F32"', "{}"), ('"F32"', "3"), ("[2, 2]", "[null]"), ("[2, 2]", '"22"'),
        ("[2, 2]", "[2, true]"), ("[2, 2]", "[2, 2.0]"), ("[2, 2]", "[-2, -2]"), ("[2, 2]", "{}"),
        ("[0, 16]", "[Infinity, 16]"),
        ("[0, 16]", "[NaN, 16]"), ("[0, 16]", '["0", "16"]'), ("[0, 16]", "[0, 16, 0]"), ("[0, 16]", "[0]"),
        ("[0, 16]", "[0, 1e1]"), ("[0, 16]", "16"), ('"dtype"', '"type"'), ('"shape"', '"Shape"'),
        (GOOD, "null"), (GOOD, "[1]"),
        ("[2, 2]", f"[{10**40}, 0]"), ("[2, 2]", str([1] * 65)),
    ])  # fmt: skip
    def test_entries_that_describe_no_tensor(self, tmp_path, old, new):
        path = self.written(tmp_path, self.GOOD.replace(old, new, 1))
        with pytest.raises(
            CheckpointError, match=r"a\.safetensors has a corrupt safetensors header: a\.weight is "
        ) as e:
            check_safetensors(path)
        assert len(str(e.value)) < 600
