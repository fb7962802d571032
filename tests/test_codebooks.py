"""Coders codebook, latent and binary: arithmetic, published sizes, malformed sections; both decoders agree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_codebooks
import golden_parts
from bytecap import reference
from bytecap.errors import CorruptError
from bytecap.format import container
from bytecap.format.coders import Objects, Shared, coder, leb, run
from bytecap.format.coders.binary import CODER as BINARY
from bytecap.format.coders.binary import binarize, packed_bytes
from bytecap.format.coders.codebook import CODER as CODEBOOK
from bytecap.format.coders.codebook import Codebook, published_bits
from bytecap.format.coders.latent import CODER as LATENT
from bytecap.format.coders.latent import Latent, add_low_rank
from bytecap.format.decoder import decode_units
from bytecap.format.wire.bits import pack_bits, unpack_bits
from bytecap.format.wire.indices import indices_size, write_indices
from bytecap.format.wire.indices import read_indices as read
from bytecap.methods.baselines import kmeans
from bytecap.model.checkpoint import load_checkpoint

pytestmark = pytest.mark.coverage

SHAPES = [(1, 1), (1, 17), (17, 1), (13, 24), (40, 23)]


@pytest.fixture(scope="module")
def weights():
    """Some matrices of the embedded model."""
    model = load_checkpoint("demo")
    chosen = [u for u in model.units if u.linear][1:9]
    return {u.name: model.tensor(u).detach().float() for u in chosen}


def decode(tag, data, shape):
    """A section as both decoders read it."""
    file = golden_parts.pack(golden_parts.unit("w", shape, tag, data), tables=False)
    ours, theirs = decode_units(container.parse(file))["w"], reference.decode_file(file)["w"]
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape == shape
    assert ours.tobytes() == theirs.tobytes()
    kinds = coder(tag).kinds(data, shape, "F32")
    assert sum(n for _, n in kinds) == len(data)
    return ours


def test_are_registered():
    assert [coder(t).id for t in (6, 7, 8)] == ["codebook", "latent", "binary"]


@given(st.lists(st.integers(0, 2**13 - 1), max_size=60), st.integers(13, 16))
def test_bits_come_back(values, width):
    data = pack_bits(np.array(values, int), width)
    assert unpack_bits(data, len(values), width).tolist() == values


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 400), st.booleans(), st.integers(0, 10**6))
def test_indices_come_back(n, count, coded, seed):
    values = np.minimum(*np.random.default_rng(seed).integers(0, n, (2, count)))
    data = write_indices(values, n, coded=coded)
    assert run([read(data, count, n, Objects())])[0].tolist() == values.tolist()
    assert abs(indices_size(values, n, coded=coded) - len(data)) <= 12


def test_skewed_indices_are_shorter_coded_and_even_ones_are_packed():
    rng = np.random.default_rng(0)
    skewed = np.minimum(rng.geometric(0.2, 20_000) - 1, 63)
    assert len(write_indices(skewed, 64)) < 0.7 * len(write_indices(skewed, 64, coded=False))
    assert write_indices(rng.integers(0, 64, 20_000), 64)[0] == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "g"), [(1, 1), (2, 1), (5, 3), (64, 2), (300, 16)])
@pytest.mark.parametrize("byte", [False, True])
def test_codebook_round_trip(shape, n, g, byte):
    g = min(g, shape[1])
    book = golden_codebooks.book(shape, n, g)
    found = decode(6, CODEBOOK.encode(book, shape, byte=byte), shape)
    expected = book.words[book.indices].reshape(shape[0], -1)[:, : shape[1]]
    np.testing.assert_allclose(found, expected, atol=0.51 * np.abs(book.words).max() / 127 if byte else 0)
    again = CODEBOOK.with_words(CODEBOOK.encode(book, shape, byte=byte), book, 2 * book.words)
    np.testing.assert_array_equal(decode(6, again, shape), 2 * found)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "g"), [(16, 1), (256, 2), (64, 4)])
def test_published_packing_has_the_published_size(weights, n, g):
    for w in weights.values():
        words, index = kmeans.quantize(kmeans.vectors_of(w, g), n, torch.Generator().manual_seed(0))
        book = Codebook(words.numpy(), index.numpy())
        data = CODEBOOK.encode(book, tuple(w.shape), coded=False)
        assert 0 <= len(data) - published_bits(tuple(w.shape), n, g) / 8 <= 8
        assert len(CODEBOOK.encode(book, tuple(w.shape), byte=True)) < len(data)
        np.testing.assert_array_equal(decode(6, data, tuple(w.shape)), half(book.words)[index].reshape(w.shape))


def half(values):
    return np.asarray(values).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_distortion_falls_with_the_number_of_codewords(weights, g, weighted):
    w = next(iter(weights.values()))
    vectors = kmeans.vectors_of(w, g)
    pull = vectors.square().sum(1) if weighted else None
    errors = []
    for n in (2, 8, 32, 128):
        words, index = kmeans.quantize(vectors, n, torch.Generator().manual_seed(1), pull)
        error = (vectors - words[index]).square().sum(1)
        errors.append(float((error * pull).sum() if weighted else error.sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


def test_kmeans_of_few_vectors_and_of_equal_ones():
    few = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    words, index = kmeans.quantize(few, 5, torch.Generator().manual_seed(0))
    assert torch.equal(words[index], few)
    words, index = kmeans.quantize(torch.ones(50, 1), 4, torch.Generator().manual_seed(0))
    assert torch.equal(words[index], torch.ones(50, 1))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_without_decoder_it_is_vector_quantization_plus_low_rank(weights, rank):
    for w in weights.values():
        shape = tuple(w.shape)
        u, s, v = torch.linalg.svd(w)
        left, right = (u[:, :rank] * s[:rank]).numpy(), v[:rank].T.numpy().copy()
        rest = w - torch.from_numpy(left @ right.T)
        words, index = kmeans.quantize(kmeans.vectors_of(rest, 2), 32, torch.Generator().manual_seed(0))
        plain = decode(6, CODEBOOK.encode(Codebook(words.numpy(), index.numpy()), shape), shape)
        matrix = Latent(words.numpy(), index.numpy(), None, *((left, right) if rank else (None, None)))
        found = decode(7, LATENT.encode(matrix, shape), shape)
        np.testing.assert_array_equal(found, add_low_rank(plain.copy(), half(left), half(right)))


@pytest.mark.parametrize("shape", [(5, 8), (13, 24), (40, 23), (1, 64)])
@pytest.mark.parametrize(("d", "patch", "hidden"), [(1, 8, 0), (2, 8, 3), (4, 8, 64), (3, 7, 5)])
@pytest.mark.parametrize("rank", [0, 1])
def test_decoders_agree_on_latents(shape, d, patch, hidden, rank):
    matrix = golden_codebooks.latent(shape, 9, d, patch, rank, hidden=hidden)
    data = LATENT.encode(matrix, shape, byte_words=hidden > 3, byte_factors=rank > 0, bits=6 + d % 3)
    found = decode(7, data, shape)
    if rank:
        zero = LATENT.with_factors(data, shape, 0 * matrix.left, matrix.right)
        stored = [np.abs(matrix.left).max() / 127, np.abs(matrix.right).max() / 127]
        low = matrix.left @ matrix.right.T
        np.testing.assert_allclose(found - decode(7, zero, shape), low, atol=sum(stored) + 1e-3)


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("form", [0, 1, 2])
def test_binary_is_sign_times_scale(weights, levels, form):
    for w in list(weights.values())[:1]:
        matrix = binarize(w.numpy(), levels, form)
        data = BINARY.encode(matrix)
        found = decode(8, data, tuple(w.shape))
        signs = (2 * matrix.codes - 1 if levels == 2 else matrix.codes - 1).astype(np.float32)
        expected = signs * matrix.scales.astype(np.float32)[:, None]
        if form:
            expected = expected + matrix.means.astype(np.float32)[:, None]
        np.testing.assert_array_equal(found, expected)
        assert len(data) <= 3 + 2 * (len(w) + len(matrix.means)) + packed_bytes(tuple(w.shape), levels)
        assert ((w.numpy() - found) ** 2).sum() < (w.numpy() ** 2).sum()


def test_rare_signs_are_entropy_coded():
    codes = (np.random.default_rng(0).random((64, 64)) < 0.02).astype(np.int64)
    matrix = binarize(np.ones((64, 64), np.float32))
    rare = type(matrix)(codes, 2, matrix.scales, matrix.means, 0)
    assert len(BINARY.encode(rare)) < 0.5 * packed_bytes((64, 64), 2)
    decode(8, BINARY.encode(rare), (64, 64))


SECTIONS = {
    "packed": (6, (9, 11), CODEBOOK.encode(golden_codebooks.book((9, 11), 16, 2), (9, 11), coded=False)),
    "coded": (6, (40, 40), CODEBOOK.encode(golden_codebooks.book((40, 40), 24, 1), (40, 40), byte=True)),
    "plain": (7, (9, 11), LATENT.encode(golden_codebooks.latent((9, 11), rank=2), (9, 11), byte_factors=True)),
    "patch": (7, (9, 23), LATENT.encode(golden_codebooks.latent((9, 23), 7, 2, 8, 1), (9, 23), byte_words=True)),
    "signs": (8, (9, 11), BINARY.encode(golden_codebooks.signs((9, 11), 2, 2))),
    "trits": (8, (40, 40), BINARY.encode(golden_codebooks.signs((40, 40), 3, 1, rare=9))),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_truncation_is_noticed(name):
    tag, shape, data = SECTIONS[name]
    decode(tag, data, shape)
    for length in {*range(0, len(data), 1 + len(data) // 60), len(data) - 1}:
        with pytest.raises(CorruptError):
            run([coder(tag).decode(data[:length], shape, "F32", Shared())])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SECTIONS)), st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_is_refused_by_both_decoders_or_by_none(name, position, value):
    tag, shape, data = SECTIONS[name]
    damaged = bytearray(data)
    damaged[position % (40 if position % 2 else len(data)) % len(data)] = value
    file = golden_parts.pack(golden_parts.unit("w", shape, tag, bytes(damaged)), tables=False)
    found = []
    for decoder in (lambda f: decode_units(container.parse(f)), reference.decode_file):
        try:
            found.append(decoder(file)["w"].tobytes())
        except CorruptError:
            found.append(None)
    assert found[0] == found[1]


@pytest.mark.parametrize("tag", [6, 7])
def test_huge_declarations_are_refused_before_memory_is_taken(tag):
    head = b"\x01\x00" if tag == 6 else b"\x00\x01"
    for n in (2**16, 2**40):
        with pytest.raises(CorruptError):
            run([coder(tag).decode(head + leb(n) + bytes(9), (4, 4), "F32", Shared())])
    wide = b"\x01\x01" + leb(4097) + bytes(2 + 4097) + b"\x01"
    with pytest.raises(CorruptError):
        run([CODEBOOK.decode(wide, (1, 3), "F32", Shared())])


def test_encoders_refuse_what_cannot_be_stored():
    with pytest.raises(ValueError, match="codewords"):
        CODEBOOK.encode(golden_codebooks.book((2, 3), 4, 4), (2, 3))
    with pytest.raises(ValueError, match="f16"):
        CODEBOOK.encode(Codebook(np.full((1, 1), 1e6, np.float32), np.zeros(2, int)), (1, 2))
    with pytest.raises(ValueError, match="rank"):
        LATENT.encode(golden_codebooks.latent((2, 3), rank=3), (2, 3))
    matrix = binarize(np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="finite scale"):
        BINARY.encode(type(matrix)(matrix.codes, 2, np.array([1, np.inf], np.float16), matrix.means, 0))
