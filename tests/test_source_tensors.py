"""The side file that says how a checkpoint's own tensors lie in units."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_parts
from bytecap import ArtifactError
from bytecap.errors import CorruptError, UsageError
from bytecap.format import container
from bytecap.format.container import FileSection
from bytecap.format.sidefiles import source_tensors
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.conversion import describe
from bytecap.pipeline.export import directory_files, open_directory
from stored import contents_of

pytestmark = pytest.mark.coverage
UNITS = {"w": np.arange(24.0).reshape(4, 6), "v": np.arange(3.0)}


class TestDescription:
    @given(st.permutations(range(3)), st.data())
    def test_any_view_is_described(self, axes, data):
        whole = np.arange(2 * 3 * 4).reshape(2, 3, 4)
        part = whole.transpose(axes)[tuple(slice(0, data.draw(st.integers(1, n))) for n in np.take((2, 3, 4), axes))]
        entry = describe(part + 10, [("z", 0, 10), ("w", 10, 34)])
        found = source_tensors.tensors(json.dumps({"a": entry}).encode(), {"w": whole, "z": np.zeros(10)})
        np.testing.assert_array_equal(found["a"][0], part)

    @pytest.mark.parametrize("axis", [0, 1])
    def test_joined_views(self, axis):
        one, two = np.arange(12).reshape(3, 4), np.arange(12, 24).reshape(3, 4)
        entry = describe(np.concatenate([one, two], axis), [("a", 0, 12), ("b", 12, 24)])
        found = source_tensors.tensors(json.dumps({"c": entry}).encode(), {"a": one, "b": two - 12})
        np.testing.assert_array_equal(found["c"][0], np.concatenate([one, two - 12], axis))

    def test_what_is_no_view_is_not_described(self):
        assert describe(np.random.default_rng(0).permutation(300), [("a", 0, 300)]) is None

    @pytest.mark.parametrize(
        "entry",
        [
            "none", [], {}, {"parts": []}, {"axis": 0, "parts": 3}, ["none"], [3], ["w", -1], ["w", 0.5], ["w", 0, 3],
            ["w", 0, [25]], ["w", 20, [6]], ["w", 0, [2], [24]], ["w", 0, [2, 2], [1]], ["w", 0, [-1]],
            ["w", 0, [2], [-1]], ["w", 0, [2], [1], 3], ["w", 0, [1] * 33], ["w", 0, [2], [1], "F32", 1],
            ["w", 24, [1]],
            {"axis": 9, "parts": ["w", "w"]}, {"axis": None, "parts": ["w", "v"]}, {"axis": 0, "parts": ["w", "v"]},
            None, 3, True, ["w", 0, [4, 6], [0, 2**60]],
        ],
    )  # fmt: skip
    def test_damage(self, entry):
        with pytest.raises(CorruptError, match=source_tensors.FILE):
            source_tensors.tensors(json.dumps({"a": entry}).encode(), UNITS)

    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b'"w"', b"[" * 100_000])
    def test_no_object(self, content):
        with pytest.raises(CorruptError, match=source_tensors.FILE):
            source_tensors.tensors(content, UNITS)

    def test_a_bomb(self):
        many = {f"t{i}": "w" for i in range(20)}
        with pytest.raises(CorruptError, match="more than 4 times"):
            source_tensors.tensors(source_tensors.dump(many), UNITS)

    def test_two_tensors_of_one_name(self):
        with pytest.raises(CorruptError, match="also the name of a unit"):
            source_tensors.tensors(b'{"v": "w"}', UNITS)

    def test_units_that_nobody_speaks_of_stay(self):
        entries = {"a": ["v", 1, [0]], "b": ["v", None, None, None, "F16"]}
        found = source_tensors.tensors(source_tensors.dump(entries), UNITS)
        assert {n: (u, d) for n, (_, u, d) in found.items()} == {
            "a": ("v", None), "b": ("v", "F16"), "w": ("w", None)
        }  # fmt: skip
        assert found["a"][0].shape == (0,)

    def test_a_damaged_description_in_a_file(self, model_directory):
        model = load_checkpoint(model_directory("rotary"))
        model.files[source_tensors.FILE] = b"{}}"
        with pytest.raises(ArtifactError, match=source_tensors.FILE):
            directory_files(contents_of(model))

    def test_a_sound_description_in_a_file(self, model_directory):
        """Tensors come back under the checkpoint's names, in dtypes of their own."""
        model = load_checkpoint(model_directory("rotary"))
        first, second = model.units[0].name, model.units[1].name
        model.files[source_tensors.FILE] = source_tensors.dump(
            {"renamed": first, "half": [second, None, None, None, "F16"]}
        )
        files, _ = directory_files(contents_of(model))
        found = safetensors.torch.load(files["model.safetensors"])
        assert torch.equal(found["renamed"].float(), model.module.state_dict()[first])
        assert found["half"].dtype == torch.float16
        assert {first, second}.isdisjoint(found)


class TestDtypes:
    """Values that the source's dtype does not hold."""

    def described(self, values, kind):
        unit = golden_parts.unit("u", values.shape, 3, golden_parts.exact(values, "F32"), "F32")
        layout = source_tensors.dump({"t": ["u", None, None, None, kind]})
        return container.parse(golden_parts.pack(unit, files=[FileSection(source_tensors.FILE, b"\0" + layout)]))

    def written(self, values, kind, **options):
        files, dtype = directory_files(self.described(values, kind), **options)
        return safetensors.torch.load(files["model.safetensors"])["t"], dtype

    @pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
    def test_values_are_rounded_to_the_nearest(self, kind, dtype):
        values = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
        found, said = self.written(values, kind)
        assert torch.equal(found, torch.from_numpy(values).to(dtype))
        assert said == str(dtype).removeprefix("torch.")

    def test_what_needs_more_bits_is_named(self):
        values = np.array([[1.0, 1.0 + 2**-20]], np.float32)
        assert open_directory(self.described(values, "BF16")).rounded == ("t",)
        assert open_directory(self.described(values, "BF16"), "float32").rounded == ()
        assert open_directory(self.described(values[:, :1], "BF16")).rounded == ()

    @pytest.mark.parametrize(("kind", "value"), [("F16", 65520.0), ("F16", -1e30), ("BF16", 3.4e38)])
    def test_a_value_beyond_the_dtype_keeps_float32(self, kind, value):
        values = np.array([[1.0, value]], np.float32)
        found, said = self.written(values, kind)
        assert found.dtype == torch.float32
        assert found.tolist() == values.tolist()
        assert said == "float32"
        with pytest.raises(UsageError, match="tensor t holds values beyond"):
            self.written(values, "F32", dtype={"F16": "float16", "BF16": "bfloat16"}[kind])

    @pytest.mark.parametrize("kind", ["I8", "BOOL", "U8", "I64", "F8_E4M3", "x"])
    def test_no_float_is_written_as_something_else(self, kind):
        values = np.array([[1.5, 300.0]], np.float32)
        found, _ = self.written(values, kind)
        assert found.tolist() == values.tolist()

    def test_what_is_not_a_number_stays_so(self):
        bits = np.array([[0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000]], np.uint32)
        found, _ = self.written(bits.view(np.float32), "BF16")
        assert found.dtype == torch.bfloat16
        assert found.isnan().tolist() == [[True, True, True, False, False]]
        assert found[0, 3:].tolist() == [np.inf, -np.inf]

    def test_all_bits_on_request(self):
        values = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
        for dtype in ("auto", "float32"):
            found, said = self.written(values, "BF16", dtype=dtype)
            assert said == "float32"
            assert found.tolist() == values.tolist()
