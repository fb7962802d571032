"""Tuning what finished sections hold of continuous values: every coder that has some, and a whole fit."""

import numpy as np
import pytest
import torch

import bytecap
from bytecap.format.coders import Shared, coder, overlay_coder, registry, run
from bytecap.format.coders import overlay_coders as all_layers
from bytecap.format.coders.codebook import CODER as CODEBOOK
from bytecap.format.coders.codebook import Codebook
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.coders.latent import CODER as LATENT
from bytecap.format.coders.latent import Decoder, Latent, Link
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.coders.vector import CODER as VECTOR
from bytecap.format.entropy.frequencies import Tables
from bytecap.format.overlays.channels import BOTH
from bytecap.format.overlays.channels import CODER as CHANNELS
from bytecap.format.overlays.channels import COLUMNS as READ
from bytecap.format.overlays.channels import ROWS as WRITTEN
from bytecap.format.overlays.columns import CODER as COLUMNS
from bytecap.format.overlays.groups import CODER as GROUPS
from bytecap.format.overlays.lowrank import CODER as LOW_RANK
from bytecap.format.overlays.order import CODER as ORDER
from bytecap.format.overlays.outliers import CODER as OUTLIERS
from bytecap.format.overlays.rows import CODER as ROWS
from bytecap.format.wire.shared_objects import load_objects, write_codebook, write_shared_decoder
from bytecap.methods.baselines import shared_codewords
from bytecap.progress import Silent
from conftest import SMALL

pytestmark = [pytest.mark.coverage, pytest.mark.numeric]

SHAPE = (6, 10)
RNG = np.random.default_rng(3)


def _values(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def _book():
    return Codebook(_values(4, 2), RNG.permutation(np.arange(30) % 4).reshape(6, 5))


def _latent():
    decoder = Decoder(_values(5, 2), _values(3, 2), _values(3), _values(5, 3))
    return Latent(_values(4, 2), np.arange(12) % 4, decoder, _values(6, 2), _values(10, 2))


def _codes(*shape):
    return RNG.integers(-7, 8, shape)


WORDS, DECODER = _values(4, 2), Decoder(_values(5, 2), _values(3, 2), _values(3), _values(5, 3))
OBJECTS = load_objects([write_codebook(WORDS, byte=False), write_shared_decoder(DECODER, 8)])
TABLES = Tables.from_counts({20: {z: 100.0 / (1 + abs(z)) for z in range(-40, 41)}})
SHARED = Shared(TABLES, objects=OBJECTS)
ONE, TWO = Link(0, 1.5), Link(1, 0.75)  # shared codewords, a shared decoder

OVERLAYS = {
    "columns": COLUMNS.encode(np.array([2, 7]), _values(2, 6).astype(np.float16), 10),
    "columns i8": COLUMNS.encode(np.array([2, 7]), _codes(2, 6).astype(np.int8), 10, np.ones(2, np.float16)),
    "rows": ROWS.encode(np.array([0, 5]), _values(2, 10).astype(np.float16), 6),
    "outliers": OUTLIERS.encode(np.array([3, 44]), np.array([50, -127], np.int8), 60, np.ones(1, np.float16)),
    "channels": CHANNELS.encode(BOTH, np.array([1, 3]), _values(2 * 4 + 2 * 10).astype(np.float16), SHAPE),
    "channels read": CHANNELS.encode(READ, np.array([1, 3]), _values(2 * 6).astype(np.float16), SHAPE),
    "channels written": CHANNELS.encode(WRITTEN, np.array([1, 3]), _values(2 * 10).astype(np.float16), SHAPE),
    "lowrank": LOW_RANK.encode(_codes(2, 6), _codes(2, 10), np.array([0.1, 0.05], np.float32), 4),
    "groups": GROUPS.encode(_codes(6, 3).astype(np.int8), 4),
    "groups f16": GROUPS.encode(_values(6, 3).astype(np.float16), 4),
}  # fmt: skip
BASES = {
    "codebook": CODEBOOK.encode(_book(), SHAPE),
    "codebook i8": CODEBOOK.encode(_book(), SHAPE, byte=True),
    "codebook shared": CODEBOOK.encode_shared(np.arange(30) % 4, (4, 2), 0, 1.5),
    "latent": LATENT.encode(_latent(), SHAPE),
    "latent plain": LATENT.encode(Latent(_values(4, 2), np.arange(30) % 4), SHAPE),
    "latent shared": LATENT.encode(Latent(WORDS, np.arange(12) % 4, DECODER), SHAPE, words=ONE, decoder=TWO),
    "vector": VECTOR.encode(_values(*SHAPE), 0.1, SHARED).data,
}  # fmt: skip


def _apply(name, data, base):
    """Decoded values of a section or layer."""
    if name in OVERLAYS:
        return run([_owner(name).apply(data, base.copy(), SHARED)])[0]
    return run([_owner(name).decode(data, SHAPE, "F32", SHARED)])[0]


def _owner(name):
    every = {c.id: c for c in (*registry().values(), *all_layers().values())}
    return every[name.split()[0]]


@pytest.mark.parametrize("name", [*OVERLAYS, *BASES])
class TestEveryCoder:
    def found(self, name):
        data = (OVERLAYS | BASES)[name]
        return data, _owner(name).continuous(data, SHAPE, SHARED)

    def test_its_matrix_is_what_a_reader_decodes(self, name):
        data, found = self.found(name)
        base = _values(*SHAPE)
        arrays = {n: torch.from_numpy(a.copy()) for n, a in found.arrays.items()}
        matrix = found.matrix(arrays, torch.from_numpy(base)).numpy()
        assert np.allclose(matrix, _apply(name, data, base), atol=1e-5)
        assert np.allclose(found.matrix(found.arrays, base), matrix, atol=1e-5)

    def test_unchanged_it_is_the_same_section(self, name):
        data, found = self.found(name)
        base = _values(*SHAPE)
        again = found.encode(found.arrays)
        assert len(again) == len(data)
        assert np.allclose(_apply(name, again, base), _apply(name, data, base), rtol=0.02, atol=0.02)

    def test_every_array_has_a_gradient_and_is_written(self, name):
        data, found = self.found(name)
        base = _values(*SHAPE)
        leaves = {n: torch.from_numpy(a.copy()).requires_grad_() for n, a in found.arrays.items()}
        found.matrix(leaves, torch.from_numpy(base)).square().sum().backward()
        for n, t in leaves.items():
            assert t.grad is not None
            assert t.grad.abs().max() > 0, n
        grown = {n: (1.3 * a).astype(np.float32) for n, a in found.arrays.items()}
        expected = found.matrix(grown, base)
        written = _apply(name, found.encode(grown), base)
        assert np.abs(written - expected).max() < 0.06 * np.abs(expected).max()
        assert np.abs(written - _apply(name, data, base)).max() > 0.1


class TestStack:
    def test_base_and_layers_together(self):
        parts = (
            (CODEBOOK.tag, BASES["codebook"]),
            [(COLUMNS.tag, OVERLAYS["columns"]), (GROUPS.tag, OVERLAYS["groups"])],
        )
        data = STACK.encode(*parts)
        found = STACK.continuous(data, SHAPE, SHARED)
        assert set(found.arrays) == {"0 words", "1 values", "2 scales"}
        decoded = run([STACK.decode(data, SHAPE, "F32", SHARED)])[0]
        assert np.allclose(found.matrix(found.arrays, None), decoded, atol=1e-5)
        assert found.encode(found.arrays) == data

    def test_a_frozen_base_stays(self):
        data = STACK.encode((9, b""), [(COLUMNS.tag, OVERLAYS["columns"])])
        assert coder(9).id == "trellis"
        assert not hasattr(coder(9), "continuous")
        assert overlay_coder(COLUMNS.tag) is COLUMNS
        with pytest.raises(bytecap.errors.CorruptError):  # an empty base is refused, not skipped
            STACK.continuous(data, SHAPE, SHARED)

    def test_a_base_with_nothing_continuous_is_decoded_once(self):
        data = STACK.encode((EXACT.tag, EXACT.encode(_values(*SHAPE), "F32")), [(COLUMNS.tag, OVERLAYS["columns"])])
        found = STACK.continuous(data, SHAPE, SHARED)
        assert set(found.arrays) == {"1 values"}
        decoded = run([STACK.decode(data, SHAPE, "F32", SHARED)])[0]
        assert np.allclose(found.matrix(found.arrays, None), decoded)
        assert found.encode(found.arrays) == data

    def test_over_a_layer_with_nothing_continuous_nothing_moves(self):
        data = STACK.encode((CODEBOOK.tag, BASES["codebook"]), [(ORDER.tag, ORDER.encode(np.arange(6)[::-1]))])
        found = STACK.continuous(data, SHAPE, SHARED)
        assert not found.arrays
        with pytest.raises(TypeError, match=r"layer order of .* nothing continuous"):
            found.matrix({"0 words": _values(4, 2)}, None)


class TestWholeFits:
    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["cluscomp", pytest.param("reallm", marks=pytest.mark.nightly)])
    def test_other_methods_are_tuned_within_the_cap(self, model_directory, texts, method, monkeypatch):
        monkeypatch.setattr(shared_codewords, "_EPOCHS", 10)
        monkeypatch.setattr(shared_codewords, "_MOST", 128)
        said = Silent()
        found = bytecap.fit(
            model_directory("rotary"), 14_000, calibration=texts["calib"], evaluation=texts["val"], method=method,
            options={"recover": 0}, recover="12", reporter=said, **SMALL,
        )  # fmt: skip
        assert len(found.data) <= 14_000
        stage = found.report["recovery"]["stages"][-1]
        assert stage["moves"] == 12
        assert stage["kl"] < found.report["recovery"]["kl_before"]
        assert found.report["without_recovery"]["kl_nats"] > found.report["kl_nats"]
        assert any("continuous values" in n for n in said.notes)
