"""Large tables in slabs of rows: the same integers, bytes and values as whole, in little more memory than once."""

import importlib.util
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from bytecap import quantization
from bytecap.allocation.decoded import decode_grid
from bytecap.allocation.planner import Planner, finest_step
from bytecap.calibration.metric import Metric
from bytecap.format.entropy import jit, rans
from bytecap.quantization import quantizer
from bytecap.quantization.options import Options
from bytecap.quantization.quantizer import prepare
from bytecap.quantization.rules import initial_rules
from bytecap.quantization.stored import StoredPrepared, keeper, kept_rows
from bytecap.system import slabs
from bytecap.system.scratch import Scratch
from bytecap.types import Unit
from forks import child

ROWS, COLS = 200, 23
OPTIONS = {"trellis": Options(states=16), "short": Options(), "scalar": Options(trellis=False)}


def table(rows=ROWS, cols=COLS, seed=0, options=OPTIONS["short"]):
    """A matrix whose rows differ as those of an embedding do."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * cols, cols, generator=g).double()
    weight = torch.randn(rows, cols, generator=g) * (0.2 + torch.rand(rows, 1, generator=g))
    metric = Metric(x.T @ x / (3 * cols), 0.1 + torch.rand(rows, generator=g).double())
    return prepare(Unit("table", (rows, cols), "F32"), weight, metric, options)


def stored(item, scratch):
    """The same in work files."""
    weight = kept_rows(scratch.put(item.weight), item.device)
    return StoredPrepared(replace(item, weight=torch.zeros(0)), scratch, weight)


@pytest.fixture
def small(monkeypatch):
    """Slabs of 64 rows from now on, and eight lanes' symbols coded together."""

    def begin():
        monkeypatch.setattr(slabs, "_VALUES", 64 * COLS)
        monkeypatch.setattr(quantization, "_LARGE", 1)
        monkeypatch.setattr(rans, "_TOGETHER", 2**10)

    return begin


def outcome(item, options, **more):
    """Everything that is made of a unit."""
    planner = Planner.of([item], [], options)
    state = planner.settle({"table": 0.4}, initial_rules(options))
    code, (tag, data) = state.coded["table"].code, planner.encode(state)["table"]
    planner = replace(planner, **more)
    again = planner.settle({"table": 0.3}, state.rules, refit=False)
    return [
        planner.finest["table"], round(planner.first_step(600), 12), tag, data, planner.encode(again)["table"][1],
        code.symbols.tobytes(), code.column_class.tobytes(), code.row_class.tobytes(), state.coded["table"].distortion,
        state.coded["table"].counts.tobytes(), decode_grid(again.coded["table"].code, again.shared).tobytes(),
    ]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_slabs_change_nothing(name, small, monkeypatch):
    monkeypatch.setattr(jit, "_WORTH", 1)
    options = OPTIONS[name]
    item = table(options=options)
    whole = outcome(item, options)
    assert len(list(slabs.slabs(*item.shape))) == 1
    small()
    assert len(list(slabs.slabs(*item.shape))) == 4
    assert outcome(item, options) == whole
    scratch = Scratch()
    kept = stored(item, scratch)
    assert outcome(kept, options, keep=keeper(scratch)) == whole
    assert finest_step(kept) == finest_step(item)
    moved = item.moved(torch.full(item.shape, 0.01))
    assert outcome(kept.moved(torch.full(item.shape, 0.01)), options) == outcome(moved, options)


def test_columns_of_what_is_stored_turned_are_read_at_once(small):
    item = table()
    turned = replace(item, unit=Unit("table", (COLS, ROWS), "F32", transposed=True))
    small()
    kept = stored(turned, Scratch())
    assert [part for part, _ in kept.slabs()] == list(slabs.slabs(ROWS, COLS))
    assert torch.equal(torch.cat([w for _, w in kept.slabs()]), item.weight)


def test_symbols_of_coarse_steps_take_two_bytes_while_they_are_rounded(small):
    item, shrink = table(), initial_rules(Options()).shrink
    small()
    for step, kind in ((0.4, np.int16), (1e-6, np.int32)):
        assert quantizer._begin_batch([item], {"table": step}, shrink, Options())().symbols.dtype == kind


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of triton's interpreter
@pytest.mark.parametrize("name", ["short", "trellis"])
def test_programs_of_a_gpu_round_the_same_in_slabs(name, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    from bytecap.quantization import cuda

    monkeypatch.setattr(quantizer, "_trellis", lambda _: cuda.begin_trellis)
    options, shrink = OPTIONS[name], initial_rules(OPTIONS[name]).shrink
    item = table(130, 5, options=options)
    item = replace(item, **{n: getattr(item, n).to(device) for n in ("weight", "rows", "row_step", "order")})
    item = replace(item, lower=replace(item.lower, values=item.lower.values.to(device)))
    whole = quantizer.round_units([item], {"table": 0.4}, shrink, options)
    monkeypatch.setattr(slabs, "_VALUES", 64 * 5)
    monkeypatch.setattr(quantization, "_LARGE", 1)
    parts = quantizer.round_units([item], {"table": 0.4}, shrink, options)
    for one, other in ((whole[0]["table"], parts[0]["table"]),):
        assert (one.code.symbols == other.code.symbols).all()
        assert (one.counts == other.counts).all()
        assert one.distortion == other.distortion
    assert (whole[1] == parts[1]).all()


def peak():
    """The largest resident memory so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
def test_rounding_a_table_takes_its_memory_once_and_little_more(tmp_path):
    rows, cols = 2**15, 512  # 67 MB, of which 64 columns are an eighth

    def work():
        options, scratch = Options(), Scratch(tmp_path)
        small = table(512, cols)
        planner = replace(Planner.of([small], [], options), keep=keeper(scratch))
        state = planner.settle({"table": 0.4}, initial_rules(options))  # compiled, and imported
        planner.encode(state)
        item = table(rows, cols)
        kept = stored(item, scratch)
        del item
        before = peak()
        held = torch.ones(rows, cols)  # so much is free then
        assert peak() - before < 1.1 * held.nbytes
        del held
        planner = replace(Planner.of([kept], [], options), keep=keeper(scratch))
        state = planner.settle({"table": 0.4}, state.rules, refit=False)
        planner.encode(state)
        planner.decode(state, "table")
        grown = peak() - before
        assert grown < 2 * 4 * rows * cols, grown

    assert child(work) == 0
