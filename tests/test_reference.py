"""The reference decoder, the goldens, and the document agree with the decoder everyone uses."""

import ast
import base64
import hashlib
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import golden_parts
import make_goldens
from bytecap import errors, reference
from bytecap.format import container
from bytecap.format.coders import Shared
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.coders.exact import WIDTH, from_bytes
from bytecap.format.coders.grid import CODER as GRID
from bytecap.format.coders.grid import GridCode, weight_classes
from bytecap.format.coders.packed import CODER as PACKED
from bytecap.format.coders.packed import Quantized
from bytecap.format.container import Contents
from bytecap.format.decoder import decode_units
from bytecap.format.entropy.frequencies import Table, Tables, integer_frequencies
from bytecap.format.entropy.rans import encode
from bytecap.format.entropy.shared_tables import dump_shared, load_shared
from bytecap.format.sidefiles import dictionary

pytestmark = pytest.mark.coverage

DIRECTORY = golden_parts.DIRECTORY
EXPECTED = json.loads((DIRECTORY / "expected.json").read_text())
DOCUMENT = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
MODEST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def main_decoder(data):
    return decode_units(container.parse(data))


def outcome(decoder, data):
    """Outcome of a decoder on a file: a digest, or the class of its error."""
    try:
        return make_goldens.digest(decoder(data))
    except errors.ArtifactError as error:
        return type(error)


def assert_same(data):
    ours, theirs = main_decoder(data), reference.decode_file(data)
    assert list(ours) == list(theirs)
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype, name
        assert values.shape == theirs[name].shape, name
        assert values.tobytes() == theirs[name].tobytes(), name
    return ours


# ------------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("name", EXPECTED["valid"])
def test_both_decoders_read_a_valid_golden_as_expected(name):
    data = (DIRECTORY / name).read_bytes()
    assert len(data) < 4096
    assert make_goldens.digest(assert_same(data)) == EXPECTED["valid"][name]


@pytest.mark.parametrize("name", EXPECTED["invalid"])
@pytest.mark.parametrize("decoder", [main_decoder, reference.decode_file])
def test_both_decoders_refuse_an_invalid_golden(name, decoder):
    data = (DIRECTORY / name).read_bytes()
    assert len(data) < 4096
    assert outcome(decoder, data) is getattr(errors, EXPECTED["invalid"][name])


@pytest.mark.slow
def test_the_generator_writes_these_very_goldens(tmp_path):
    make_goldens.main(tmp_path)
    made = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert made == {p.name: p.read_bytes() for p in DIRECTORY.iterdir() if p.is_file()}
    assert {f for kind in EXPECTED.values() for f in kind} == set(made) - {"expected.json"}
    updates = {p.name: p.read_bytes() for p in (tmp_path / "updates").iterdir()}
    assert updates == {p.name: p.read_bytes() for p in (DIRECTORY / "updates").iterdir()}


@pytest.mark.parametrize("decoder", [main_decoder, reference.decode_file])
@pytest.mark.parametrize("name", ["tiny.bcap", "no_units.bcap"])
def test_every_flipped_bit_is_noticed(name, decoder):
    data = (DIRECTORY / name).read_bytes()
    unread = {8 * 9 + bit for bit in range(8)}  # a newer minor version is read all the same: the checksum notices
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(errors.ArtifactError):
            decoder(bytes(flipped))
        if place in unread:
            assert outcome(decoder, golden_parts.sealed(bytes(flipped))) == outcome(decoder, data)


@pytest.mark.parametrize("decoder", [main_decoder, reference.decode_file])
def test_every_truncation_is_noticed(decoder):
    data = golden_parts.tiny()
    for length in range(len(data)):
        assert outcome(decoder, data[:length]) is (errors.NotAnArtifact if length < 8 else errors.CorruptError)


# ------------------------------------------------------------------------------------------------------- document


def test_the_documents_example_is_the_golden():
    block = re.search(r"```hex\n(.*?)```", DOCUMENT, re.DOTALL)[1]
    shown = bytes.fromhex("".join(re.match(r"([0-9a-f]{2} )*[0-9a-f]{2}", line)[0] for line in block.splitlines()))
    assert shown == (DIRECTORY / "tiny.bcap").read_bytes()
    assert reference.decode_file(shown)["w"].tolist() == [[0.0, 0.9375, -0.46875], [0.0, 0.0, -1.734375]]
    table = [
        [int(c) for c in re.findall(r"-?\d+", row)] for row in re.findall(r"^\| \d \| \d.*\|$", DOCUMENT, re.MULTILINE)
    ]
    chain = [row for row in table if len(row) >= 5 and row[1] > 2**16]
    assert [row[1] for row in chain[1:]] == [row[-1] for row in chain[:-1]]
    assert chain[-1][-1] == 2**16


def test_the_documents_appendices_are_what_side_files_use():
    template = zlib.decompress(base64.b64decode(re.search(r"```base64\n(.*?)```", DOCUMENT, re.DOTALL)[1]))
    assert template == dictionary.TEMPLATE
    assert f"{len(template)} bytes, SHA-256 `{hashlib.sha256(template).hexdigest()}`" in DOCUMENT
    assert tuple(re.search(r"```words\n(.*?)```", DOCUMENT, re.DOTALL)[1].split()) == dictionary.WORDS


def test_the_reference_shares_nothing_but_errors():
    files = sorted(Path(reference.__file__).parent.glob("*.py"))
    tree = [node for f in files for node in ast.walk(ast.parse(f.read_text(encoding="utf-8")))]
    modules = {
        n.module if isinstance(n, ast.ImportFrom) else a.name
        for n in tree
        if isinstance(n, ast.Import | ast.ImportFrom)
        for a in n.names
    }
    allowed = ("bytecap.errors", "bytecap.reference")
    roots = {m.partition(".")[0] for m in modules if not m.startswith(allowed)}
    assert roots - set(sys.stdlib_module_names) == {"numpy", "brotli"}


# --------------------------------------------------------------------------------------------- random artifacts


@st.composite
def shareds(draw):
    """Tables of any shape for the classes from 1 on, and any offsets."""
    table, offset, first = {}, np.zeros((64, 17), np.float32), 1
    while first < 64:
        last = draw(st.integers(first, 63))
        half = draw(st.sampled_from([0, 1, 2, 5, 15, 16, 17, 40]))
        weights = draw(st.lists(st.integers(1, 1000), min_size=half + 1, max_size=half + 1))
        dense = np.array([*weights[:0:-1], *weights, draw(st.integers(1, 50))], float)
        one = Table(-half, integer_frequencies(dense, symmetric=True))
        stored = (
            np.array(draw(st.lists(st.integers(-128, 127), min_size=min(half, 16), max_size=min(half, 16))), int) / 256
        )
        for k in range(first, last + 1):
            table[k] = one
            offset[k, 1 : len(stored) + 1] = stored
            offset[k, len(stored) + 1 :] = stored[-1] if half else 0
        first = last + 1
    shared = Shared(Tables(table), offset)
    again = load_shared(dump_shared(shared))
    np.testing.assert_array_equal(again.offset, offset)
    return shared


def random_symbols(rng, count, wide):
    symbols = np.rint(rng.standard_normal(count) * rng.choice([0.2, 2.0, 9.0])).astype(np.int64)
    where = rng.integers(0, max(count, 1), min(wide, count))
    symbols[where] = rng.integers(-(2**31) + 1, 2**31, len(where))
    return symbols


def random_grid(rng, shape, shared, wide):
    rows, cols = shape
    groups = int(rng.integers(1, min(4, max(rows, 1)) + 1))
    column_class = rng.integers(1, 64, (groups, cols))
    row_class = rng.integers(-30, 31, rows) * int(rng.integers(0, 2))
    column_step = rng.integers(-40, 40, (groups, cols)) * int(rng.integers(0, 2))
    row_step = rng.integers(-20, 20, rows) * int(rng.integers(0, 2))
    symbols = random_symbols(rng, rows * cols, wide).reshape(shape)
    code = GridCode(float(np.float32(rng.uniform(1e-4, 2))), symbols, column_step, column_class, row_step, row_class)
    assert weight_classes(column_class, row_class).shape == shape
    return GRID.encode(code, shared).data


def random_section(rng, shape, dtype, tag, shared, wide):
    """Any section of a coder, not only what the pipeline would write."""
    rows, cols = shape
    count = rows * cols
    if tag == 1:
        return random_grid(rng, shape, shared, wide)
    if tag == 2:
        cls = int(rng.integers(0, 64))
        symbols = random_symbols(rng, count, wide)
        stream = encode(symbols, np.full(count, cls, np.uint8), shared.tables) if cls else b""
        return struct.pack("<ffB", rng.standard_normal(), rng.uniform(-1, 1), cls) + stream
    if tag == 3:
        top = int(rng.integers(1, 257)) if dtype != "BOOL" else 2
        raw = (rng.integers(0, 256, (count, WIDTH[dtype])) % top).astype(np.uint8)
        return EXACT.encode(from_bytes(raw, dtype).reshape(shape), dtype)
    codes = rng.integers(-130, 131, shape) * int(rng.choice([1, 200]))
    return PACKED.encode(Quantized(codes, rng.standard_normal(rows).astype(np.float16)), int(rng.integers(0, 2)))


@st.composite
def artifacts(draw):
    shared = draw(shareds())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    units = []
    for i in range(draw(st.integers(0, 5))):
        shape = tuple(draw(st.lists(st.integers(0, 13), max_size=3)))
        dtype = draw(st.sampled_from(["BF16", "F16", "F32", "I32", "I64", "BOOL"]))
        tag = draw(st.integers(1, 4))
        plain = golden_parts.unit(
            f"u{i}", shape, tag, b"", dtype, [f"u{i}'"] * draw(st.booleans()), transposed=draw(st.booleans())
        )
        section = random_section(rng, plain.unit.matrix_shape, dtype, tag, shared, draw(st.sampled_from([0, 0, 3])))
        units.append(container.UnitSection(plain.unit, tag, section))
    return container.serialize(Contents(tuple(units), dump_shared(shared), (), {}, draw(st.integers(0, 3))))


@pytest.mark.slow
@MODEST
@given(artifacts())
def test_both_decoders_agree_on_random_artifacts(data):
    assert_same(data)


def test_both_decoders_agree_on_streams_of_many_lanes():
    rng = np.random.default_rng(3)
    shared = golden_parts.SHARED
    shapes = [(130, 127), (64, 128), (1, 8193), (257, 64)]
    units = [
        golden_parts.unit(f"u{i}", s, 1, random_grid(rng, s, shared, 5), linear=True) for i, s in enumerate(shapes)
    ]
    units += [
        golden_parts.unit(f"v{i}", (9000 * i,), 2, golden_parts.vector(rng.standard_normal(9000 * i))) for i in range(3)
    ]
    assert_same(golden_parts.pack(*units))


# ------------------------------------------------------------------------------------------------------- damage

DAMAGED = [
    "tiny",
    "grid_groups",
    "grid_escapes",
    "transposed",
    "exact",
    "packed",
    "one_element",
    "empty_tensors",
    "tied",
    "stack",
    "layer_columns",
    "layer_lowrank",
    "layer_groups",
    "layer_channels",
    "code_and_files",
]


def sections(data):
    """(kind, bytes) of every section."""
    return [(s.kind, data[s.start : s.start + s.length]) for s in container._directory(data, "")]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(DAMAGED), st.data())
def test_damage_behind_right_checksums_is_refused_by_both_or_by_none(name, data):
    parts = sections((DIRECTORY / f"{name}.bcap").read_bytes())
    which = data.draw(st.integers(0, len(parts) - 1))
    kind, content = parts[which]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        action = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if action == "set" and at < len(damaged):
            damaged[at] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
        elif action == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif action == "delete":
            del damaged[at : at + 1]
        else:
            del damaged[at:]
    parts[which] = (kind, bytes(damaged))
    file = golden_parts.build(parts)
    assert outcome(main_decoder, file) == outcome(reference.decode_file, file)
