"""Programs for a GPU are held against the processor: here by torch on the processor, and by triton's interpreter."""

import importlib.util
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecap.allocation import planner as waterfill
from bytecap.allocation.correction import unit_values
from bytecap.allocation.decoded import decode_grid
from bytecap.allocation.planner import Planner
from bytecap.allocation.vector_unit import VectorUnit
from bytecap.calibration import triangle
from bytecap.calibration.metric import Metric
from bytecap.calibration.triangle import Triangle
from bytecap.format.coders import Shared
from bytecap.format.coders.classes import CENTRES, CLASSES
from bytecap.format.coders.grid import GridCode
from bytecap.format.entropy.frequencies import Tables
from bytecap.model.quantized_copy import load_values
from bytecap.quantization import RoundingProblem, gaussian_shrink, row_classes, trial_values
from bytecap.quantization.counted import counted, counted_there
from bytecap.quantization.options import Options
from bytecap.quantization.quantizer import FIRST_DEPENDENT, prepare
from bytecap.quantization.rules import initial_rules
from bytecap.quantization.symbols_there import GridCodeThere, symbols_anywhere
from bytecap.quantization.trellis import round_trellis
from bytecap.types import Unit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TestStored:
    @settings(max_examples=40)
    @given(
        st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 90, 200, 5000, 70_000]), st.integers(0, 99),
    )  # fmt: skip
    def test_symbols_and_counts(self, rows, cols, size, seed):
        rng = np.random.default_rng(seed)
        symbols = rng.integers(-size, size + 1, (cols, rows)).astype(np.int32)
        columns = rng.integers(1, 64, cols).astype(np.int32)
        row_class = rng.integers(-40, 41, rows).astype(np.int32)
        first = int(rng.integers(1, 65))
        one = counted(symbols, columns, row_class, first)
        two = counted_there(torch.from_numpy(symbols).to(DEVICE), columns, row_class, first)
        there = two[0].cpu().numpy()
        assert one[0].dtype == there.dtype
        assert (one[0] == there).all()
        assert (one[1] == two[1]).all()

    def test_symbols_that_stay_are_read_or_replaced(self):
        there = torch.arange(6, dtype=torch.int8, device=DEVICE).reshape(2, 3)
        sides = {n: np.zeros((1, 3), np.int32) for n in ("column_step", "column_class")}
        sides |= {n: np.zeros(2, np.int32) for n in ("row_step", "row_class")}
        code = GridCodeThere(there, step=0.5, first=64, memory=3, **sides)
        assert (code.symbols == there.cpu().numpy()).all()
        assert symbols_anywhere(code) is there
        finer = replace(code, step=0.25)
        assert finer.step == 0.25
        assert (finer.symbols == code.symbols).all()
        assert (symbols_anywhere(finer).cpu().numpy() == code.symbols).all()


@pytest.mark.parametrize("together", [1, 7, 2**20])
@pytest.mark.parametrize("size", [1, 5])
def test_a_triangle_is_unpacked_some_rows_at_a_time(size, together, monkeypatch):
    monkeypatch.setattr(triangle, "_TOGETHER", together)
    whole = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).tril()
    packed = Triangle.of(whole)
    assert torch.equal(packed._by_rows(torch.zeros(size, size)), whole)
    assert torch.equal(packed.whole(), whole)


class TestTrialValues:
    @settings(max_examples=40)
    @given(
        st.integers(1, 9), st.integers(1, 9), st.sampled_from(["int8", "int16", "int32"]), st.integers(1, 30),
        st.integers(0, 99),
    )  # fmt: skip
    def test_are_the_reader_s_to_the_last_bit(self, rows, cols, kind, together, seed):
        rng = np.random.default_rng(seed)
        code = GridCode(
            step=float(np.float32(rng.uniform(1e-4, 2))), symbols=rng.integers(-120, 121, (rows, cols)).astype(kind),
            column_step=rng.integers(-60, 61, (1, cols)), column_class=rng.integers(1, 64, (1, cols)),
            row_step=rng.integers(-60, 61, rows), row_class=rng.integers(-40, 41, rows), first=int(rng.integers(1, 65)),
        )  # fmt: skip
        offset = (rng.integers(-128, 128, (CLASSES, CENTRES)) / 256).astype(np.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial_values, "_TOGETHER", together)
            found = trial_values.values_there(code, offset, torch.device(DEVICE)).cpu().numpy()
        assert found.tobytes() == decode_grid(code, Shared(Tables({}), offset)).tobytes()

    def test_take_the_place_of_arrays_in_the_model_that_is_tried(self, monkeypatch):
        rng = np.random.default_rng(0)
        x = torch.from_numpy(rng.normal(size=(64, 12)))
        metric = Metric(x.T @ x / 64, torch.ones(20, dtype=torch.float64))
        unit = Unit("a", (12, 20), "F32", transposed=True)
        item = prepare(unit, torch.from_numpy(rng.normal(size=(20, 12))), metric, Options())
        vector = VectorUnit(Unit("b", (7,), "F32"), rng.normal(size=7).astype(np.float32), np.ones(7))
        planner = Planner.of([item], [vector], Options())
        state = planner.settle({"a": 0.3, "b": 0.3}, initial_rules(planner.options))
        before = dict(unit_values(planner, state))
        assert planner.decode_there(state, "a") is None  # a processor needs no trial values
        monkeypatch.setattr(waterfill, "_elsewhere", lambda _: True)
        after = dict(unit_values(planner, state))
        assert isinstance(after["a"], torch.Tensor)
        assert isinstance(after["b"], np.ndarray)
        modules = [torch.nn.ParameterDict({n: torch.zeros(v.shape) for n, v in before.items()}) for _ in range(2)]
        for module, values in zip(modules, (before, after), strict=True):
            load_values(module, values)
        assert all(torch.equal(modules[0][n], modules[1][n]) for n in before)


def problem(batch, cols, rows, step):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(batch, cols, rows, generator=g) * (0.2 + torch.rand(batch, cols, 1, generator=g))
    x = torch.randn(batch, 3 * cols, cols, generator=g)
    lower = torch.linalg.cholesky(x.transpose(1, 2) @ x / (3 * cols) + 0.01 * torch.eye(cols))
    order = torch.stack([torch.randperm(cols, generator=g) for _ in range(batch)])
    row_weight = 0.3 + torch.rand(batch, rows, generator=g)
    return RoundingProblem(weight, lower, order, row_weight, row_classes(weight, lower, step, 1))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("batch", "cols", "rows", "step", "memory"),
    [
        (2, 9, 5, 0.3, 3),
        (1, 7, 70, 0.2, 3),
        (1, 9, 20, 3.0, 3),
        (2, 3, 5, 0.3, 4),
        (1, 2, 190, 0.2, 5),
        (1, 2, 70, 0.2, 8),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of triton's interpreter
def test_programs_round_as_the_processor_does(monkeypatch, batch, cols, rows, step, memory):
    if DEVICE == "cpu":
        monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    from bytecap.quantization import cuda as device

    steps = torch.full((batch,), step)
    given_problem, shrink = problem(batch, cols, rows, steps), gaussian_shrink()
    names = ("weight", "lower", "order", "rows", "row_class")
    there = RoundingProblem(*(getattr(given_problem, n).to(DEVICE, copy=True) for n in names))
    one = round_trellis(given_problem, steps, shrink, FIRST_DEPENDENT, memory)
    two = device.begin_trellis(there, steps.to(DEVICE), shrink, FIRST_DEPENDENT, memory)()
    assert (one.symbols == two.symbols.cpu().numpy()).mean() > 0.999  # sums in another order may round otherwise
    assert (one.column_class == two.column_class).all()
    assert (one.column_step == two.column_step).all()
    assert two.distortion == pytest.approx(one.distortion, rel=1e-5)
    assert two.centres == pytest.approx(one.centres, abs=1e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="programs that wait for one another need a GPU")
@pytest.mark.parametrize(("memory", "few"), [(5, 8), (7, 24), (8, 24)])
def test_programs_that_share_a_tall_matrix_round_as_the_processor_does(monkeypatch, memory, few):
    from bytecap.quantization import cuda as device

    steps = torch.full((3,), 0.3)
    given_problem, shrink = problem(3, 5, 2100, steps), gaussian_shrink()
    names = ("weight", "lower", "order", "rows", "row_class")
    found = []
    for least in (10_000, few):
        monkeypatch.setattr(device, "_LEAST", least)
        there = RoundingProblem(*(getattr(given_problem, n).to(DEVICE, copy=True) for n in names))
        found.append(device.begin_trellis(there, steps.to(DEVICE), shrink, FIRST_DEPENDENT, memory)())
    assert device._parts(3, 2100, memory, torch.device(DEVICE)) > 1
    one = round_trellis(given_problem, steps, shrink, FIRST_DEPENDENT, memory)
    for two in found:
        assert (one.column_class == two.column_class).all()
        assert two.distortion == pytest.approx(one.distortion, rel=0.02)  # borders of short segments
        assert two.centres[0].sum() == one.centres[0].sum()
