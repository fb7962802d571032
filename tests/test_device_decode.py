"""Matrices decoded by a GPU's programs, or by triton's interpreter of them: the processor's bits and refusals."""

import importlib.util
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import bytecap
import golden_parts
import golden_updates
from bytecap.errors import CorruptError
from bytecap.format import container
from bytecap.format.coders.grid import CODER as GRID
from bytecap.format.coders.grid import GridCode
from bytecap.format.coders.trellis import CODER as TRELLIS
from bytecap.format.decoder import decode_units
from bytecap.format.entropy import rans
from bytecap.model import device_decode, resident
from bytecap.model.device_decode import DeviceUnits
from conftest import BUDGET

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NEEDS = "a CUDA device with triton, or triton's interpreter, which cannot read scalars of numpy 2.4 and later"
needing_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (CUDA or np.lib.NumpyVersion(np.__version__) < "2.4.0"),
    reason=NEEDS,
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of triton's interpreter
GOLDENS = sorted(
    p.stem for p in golden_parts.DIRECTORY.glob("*.bcap") if not p.stem.startswith("bad_") and p.stem != "newer_minor"
)
OWN = BUDGET + 1  # files of short streams, which other tests must not find
SHAPES = [(3, 1), (9, 37), (14, 11)]


@pytest.fixture
def _programs(monkeypatch):
    """Programs that need several goes, of few values each."""
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(device_decode, "_LANES", 16)
    monkeypatch.setattr(device_decode, "_SIZES", {"ROWS": 8, "COLS": 32, "ABOVE": 8})


@pytest.fixture
def _small(_programs, monkeypatch):
    """Short streams of many lanes, which the interpreter has patience for."""
    monkeypatch.setattr(rans, "LANE_SYMBOLS", 16)


def bits(tensor):
    """Type, shape and bytes of a tensor."""
    array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return tensor.dtype, tensor.shape, array.tobytes()


def same(contents, dtype=torch.float32, times=1):
    """Hold a batch of all units against the processor; returns how many units the device decoded."""
    values = {n: torch.from_numpy(np.array(v)) for n, v in decode_units(contents, aliases=False).items()}
    wanted = {n: bits(v.to(dtype) if v.is_floating_point() else v) for n, v in values.items()}
    decoder = DeviceUnits(contents, DEVICE)
    batch = decoder.batch(decoder.units.sections, dict.fromkeys(wanted, dtype))
    for _ in range(times):
        assert {n: bits(v) for n, v in batch.decode().items()} == wanted
    return batch.served


def file_of(*sections, transposed=False):
    """Contents of matrices from (shape, tag, bytes)."""
    units = [golden_parts.unit(f"m{i}", shape, tag, data) for i, (shape, tag, data) in enumerate(sections)]
    contents = container.parse(golden_parts.pack(*units))
    if not transposed:
        return contents
    turned = (replace(u, unit=replace(u.unit, transposed=True, shape=u.unit.shape[::-1])) for u in contents.units)
    return replace(contents, units=tuple(turned))


def trellises(memory, **options):
    return [
        (shape, 9 if memory == 3 else 15, golden_parts.trellis(shape, seed=i, memory=memory, **options))
        for i, shape in enumerate(SHAPES)
    ]


@needing_triton
@pytest.mark.slow
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("memory", [3, 4, 5, 6, 7, 8])
def test_trellises_have_the_processors_bits(memory, groups):
    dtype = torch.bfloat16 if (memory + groups) % 2 else torch.float32
    assert same(file_of(*trellises(memory, groups=groups)), dtype) == len(SHAPES)


@needing_triton
@pytest.mark.slow
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_layouts_and_columns(dtype):
    """All columns dependent, none, and the plain grid with escapes; transposed units."""
    sections = [*trellises(7, first=1)[1:2], *trellises(8, first=64)[1:2]]
    grid = golden_parts.grid((10, 7), groups=2, wide=(70_000, -70_000, 17, 2**31 - 1))
    assert same(file_of(*sections, ((10, 7), 1, grid)), dtype, times=2) == 3
    assert same(file_of(*sections, ((10, 7), 1, grid), transposed=True), dtype) == 3


@needing_triton
@pytest.mark.slow
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("lanes", [16, 32])
def test_states_in_registers_and_in_memory(lanes, monkeypatch):
    """More lanes than a program holds, just as many, and one fewer."""
    monkeypatch.setattr(device_decode, "_LANES", lanes)
    shapes = [(1, 16 * n) for n in (1, 15, 16, 17)]
    assert same(file_of(*((s, 9, golden_parts.trellis(s, first=1)) for s in shapes))) == len(shapes)


@needing_triton
@pytest.mark.slow
@pytest.mark.usefixtures("_programs")
@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name):
    contents = container.read(golden_parts.DIRECTORY / f"{name}.bcap")
    steps = sum(min(u.unit.parameters, rans.LANE_SYMBOLS) for u in contents.units if u.tag in device_decode._TAGS)
    if not CUDA and steps > 5000:
        pytest.skip("takes the interpreter a minute")
    same(contents)


def on_gpu(contents):
    """Decode with the device alone."""
    decoder = DeviceUnits(contents, DEVICE)
    names = [s.unit.name for s in decoder.units.sections]
    return decoder.batch(decoder.units.sections, dict.fromkeys(names, torch.float32)).decode()


def refusals(contents):
    """Outcomes on the processor and on the device."""
    said = []
    for decode in (decode_units, on_gpu):
        with pytest.raises(CorruptError) as caught:
            decode(contents)
        said.append(str(caught.value))
    return said


@needing_triton
@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_damage_is_refused_as_on_the_processor():
    shape = (12, 20)
    data = golden_parts.trellis(shape, memory=4)
    refused = sound = 0
    for at in range(0, len(data) - 1, 17):
        for change in (data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :], data[:at]):
            contents = file_of((shape, 15, change))
            try:
                decode_units(contents)
            except CorruptError:
                processor, device = refusals(contents)
                assert processor == device
                refused += 1
            else:
                same(contents)  # a bit of the path leads to another sound matrix
                sound += 1
    assert refused > 10
    assert sound


def code_of(symbols, step=0.5):
    zero = np.zeros((1, symbols.shape[1]), int)
    row = np.zeros(len(symbols), int)
    return GridCode(step, symbols, zero, zero + 18, row, row)


@needing_triton
@pytest.mark.usefixtures("_small")
def test_values_out_of_range():
    symbols = np.zeros((2, 3), int)
    symbols[1, 1] = 2**24 + 1
    large = TRELLIS.encode(code_of(symbols), golden_parts.SHARED).data
    symbols[1, 1] = 5
    infinite = GRID.encode(code_of(symbols, 1e38), golden_parts.SHARED).data
    for data, tag, words in ((large, 9, "symbol out of range"), (infinite, 1, "value out of range")):
        assert all(re.search(words, said) for said in refusals(file_of(((2, 3), tag, data))))
    near = GRID.encode(code_of(symbols, 6e37), golden_parts.SHARED).data
    assert same(file_of(((2, 3), 1, near))) == 0  # left to the processor
    assert same(file_of(((2, 3), 1, GRID.encode(code_of(symbols, 1e30), golden_parts.SHARED).data))) == 1


@needing_triton
@pytest.mark.usefixtures("_small")
def test_one_damaged_matrix_does_not_hide_among_others():
    good = trellises(5)
    shape, tag, data = good[1]
    contents = file_of(good[0], (shape, tag, data[:300] + bytes([data[300] ^ 1]) + data[301:]), good[2])
    assert re.fullmatch(r"units m1: .* does not end in its initial state: damaged", refusals(contents)[1])


def test_updates_are_left_to_the_processor():
    """Both that of a matrix and what stays as it is."""
    all_of, base = ((golden_parts.DIRECTORY / "updates" / f"{n}.bcap").read_bytes() for n in ("all", "base"))
    assert same(golden_updates.with_bases(all_of, [base]), torch.bfloat16) == 0


@pytest.fixture
def on_device(monkeypatch):
    """Whatever device a model is loaded for, it decodes by programs."""
    monkeypatch.setattr(device_decode, "usable", lambda _: True)
    monkeypatch.setattr(resident, "usable", lambda _: True)
    monkeypatch.setattr(resident, "_SMALL", 100)
    served = device_decode.Batch.on_device
    counts = []

    def counted(self):
        found = served(self)
        counts.append(self.served)
        return found

    monkeypatch.setattr(device_decode.Batch, "on_device", counted)
    return counts


@needing_triton
@pytest.mark.slow
@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "changes"), [("rotary", {}), ("rotary", {"tie_word_embeddings": False}),
                                               ("transposed", {})], ids=["tied", "untied", "transposed"])  # fmt: skip
def test_fitted_models(kind, changes, dtype, fitted, on_device, monkeypatch):
    path = fitted(kind, budget=OWN, **changes)[1]
    with monkeypatch.context() as patch:
        patch.setattr(device_decode, "usable", lambda _: False)
        wanted = bytecap.load_model(path, dtype=dtype).state_dict()
    found = bytecap.load_model(path, device=DEVICE, dtype=dtype).state_dict()
    assert sum(on_device) > 0
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name].cpu(), value), name


@needing_triton
@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_models_that_stay_coded(fitted, on_device):
    path, ids = fitted("rotary", budget=OWN)[1], torch.tensor([[1, 5, 9, 2]], device=DEVICE)
    decoded = bytecap.load_model(path, device=DEVICE, dtype="bfloat16")
    del on_device[:]
    coded = bytecap.load_model(path, device=DEVICE, dtype="bfloat16", resident="coded")
    with torch.no_grad():
        assert torch.equal(coded(ids).logits, decoded(ids).logits)
    assert sum(on_device) > 0


def test_the_processor_keeps_its_decoder(monkeypatch):
    assert not device_decode.usable(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not device_decode.usable(torch.device("cuda"))
    contents = file_of(*trellises(3))
    for unit, value in device_decode.decode_each(contents, torch.device("cpu"), torch.bfloat16):
        assert value.tobytes() == decode_units(contents)[unit.name].tobytes()
