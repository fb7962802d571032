"""Encoders ask the decode path's modules for prices of symbols, estimated sizes, packed code."""

import numpy as np
import pytest

import golden_parts
from bytecap.errors import BudgetError, CodeError, UsageError
from bytecap.format import codefiles
from bytecap.format.codefiles import Code
from bytecap.format.coders import coder
from bytecap.format.coders.grid import GridCode, side_bits
from bytecap.format.entropy.frequencies import MAX_HALF, TOTAL
from bytecap.format.entropy.shared_tables import count_symbols, fit_shared, sum_counts
from bytecap.format.overlays.order import by_likeness
from bytecap.pipeline import pack_code

pytestmark = pytest.mark.coverage

TABLES = golden_parts.SHARED.tables


@pytest.mark.parametrize("cls", [1, 13, 25, 63])
def test_prices_by_size_are_logarithms_of_frequencies(cls):
    table = TABLES.table[cls]
    bits = -np.log2(table.freq / TOTAL)
    price = TABLES.cost_by_size[cls]
    assert price.shape == (MAX_HALF + 2,)
    np.testing.assert_allclose(price[: table.high + 1], bits[table.high : -1])
    assert set(price[table.high + 1 :]) == {bits[-1] + 16}
    assert np.isinf(TABLES.cost_by_size[0]).all()


@pytest.mark.parametrize("cls", [1, 13, 25])
def test_prices_of_split_values_are_a_bit_and_a_place(cls):
    price = TABLES.split_cost[cls]
    for size in range(TABLES.table[cls].high + 1):
        d = min(size % 4, -size % 4)  # value and sign are chosen so that the value is d modulo 4
        value = size if size % 4 == d else -size
        part = TABLES.split.table[64 * (d + 1) + cls]
        assert price[size] == pytest.approx(1 - np.log2(part.freq[(value - d) // 4 - part.low] / TOTAL))
    assert np.isfinite(price).all()
    assert np.isinf(TABLES.split_cost[0]).all()


def test_side_information_is_estimated_to_some_bytes():
    r = golden_parts.Numbers(3)
    sides = r.around(3, 1, 40), 18 + r.around(6, 1, 40), r.around(2, 60), r.around(2, 60)
    code = GridCode(0.1, r.around(5, 60, 40), *sides)
    kinds = dict(coder(1).kinds(coder(1).encode(code, golden_parts.SHARED).data, (60, 40), "F32"))
    assert kinds["header"] + kinds["side"] == pytest.approx(side_bits(code, TABLES) / 8, abs=24)
    constant = GridCode(0.1, np.zeros((2, 2), int), *(np.zeros(s, int) for s in ((1, 2), (1, 2), 2, 2)))
    assert side_bits(constant, TABLES) < side_bits(code, TABLES) / 4


def test_the_price_of_a_vector_is_near_its_size():
    values = np.random.default_rng(0).normal(0, 1, 900).astype(np.float32)
    size = len(golden_parts.vector(values, 0.25))
    assert coder(2).rate(values, 0.25, golden_parts.SHARED) == pytest.approx(size, rel=0.02, abs=4)


def test_rows_in_a_chain_of_likeness():
    codes = np.array([[9, 9], [0, 1], [8, 8], [1, 1], [0, 0]])
    assert by_likeness(codes).tolist() == [4, 1, 3, 2, 0]
    assert by_likeness(np.zeros((0, 3), int)).tolist() == []


def test_histograms():
    symbols, classes = np.array([0, -2, 2, 5000]), np.array([1, 1, 3, 3])
    counts = count_symbols(symbols, classes)
    assert counts.shape == (64, MAX_HALF + 2)
    assert (counts[1, 0], counts[1, 2], counts[3, 2], counts[3, -1], counts.sum()) == (1, 1, 1, 1, 4)
    inside = count_symbols(symbols[:3], classes[:3], np.array([True, False, True]))
    assert inside.shape == (2, 64, 3)
    assert (inside[0, 1, 2], inside[1, 1, 0], inside[1, 3, 2], inside.sum()) == (1, 1, 1, 3)
    both = sum_counts([counts, inside[0], inside[1]])
    assert both.sum() == 7
    assert both[1, 2] == 2


def test_rare_symbols_are_left_to_the_escape():
    counts = np.zeros((64, 41))
    counts[20, :3], counts[20, 40] = (900_000, 90_000, 9_000), 1
    fitted = fit_shared(counts, np.zeros((2, 64, 17)), None)
    assert fitted.tables.table[20].high < 40


class TestCode:
    def test_counted_packed_or_raw(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("word " * 500)
        packed, raw = pack_code.pack([path]), pack_code.pack([path], "raw")
        assert packed.raw == raw.raw == 2500
        assert packed.packed < 100
        assert (packed.reserve, raw.reserve) == (0, 2500 - raw.packed)
        assert Code().report(9) == {}
        assert raw.report(9) == {
            "budget_bytes": 9, "code_raw_bytes": 2500, "code_packed_bytes": raw.packed, "code_accounting": "raw",
            "code_files": ["notes.txt"],
        }  # fmt: skip
        with (
            pytest.raises(BudgetError, match=r"below code \(2,500 bytes, counted raw\) plus .* \(70 bytes\)") as caught,
            raw.floor(9),
        ):
            raise BudgetError("", 70 + raw.packed)
        assert caught.value.floor == 2570

    def test_refusals(self, tmp_path):
        with pytest.raises(CodeError, match="cannot read the code file"):
            pack_code.pack([tmp_path / "none.py"])
        with pytest.raises(UsageError, match="unknown code accounting"):
            pack_code.pack([], "half")
        (tmp_path / ".hidden").write_bytes(b"")
        with pytest.raises(UsageError, match="hidden or given twice"):
            pack_code.pack([tmp_path / ".hidden"])

    def test_python_is_minified(self, tmp_path):
        path = tmp_path / "a.py"
        path.write_text("def f():\n    return 1  # one\n")
        (section,) = pack_code.pack([path]).sections
        assert b"#" not in codefiles.unpack("a.py", section.data)
