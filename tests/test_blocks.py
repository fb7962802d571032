"""Block formats: bytes against gguf-py, rounding against its own definition, extreme blocks."""

from __future__ import annotations

import importlib.util
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytecap.calibration.metric import Metric
from bytecap.errors import UsageError
from bytecap.runtimes.blocks import Codes
from bytecap.runtimes.blocks.code_search import CodeSearch, search_of, span
from bytecap.runtimes.blocks.encode import (
    Shrinkage,
    _tables,
    encode,
    encode_all,
    factor,
    prepare,
    shrunk,
)
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.blocks.kernel import feed
from bytecap.runtimes.blocks.layout import pack, unpack
from bytecap.runtimes.blocks.search import LANES
from bytecap.runtimes.directory import family
from bytecap.runtimes.gguf import rounding
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.places import Place
from bytecap.runtimes.gguf.rounding import Coding

gguf = pytest.importorskip("gguf")
NAMES = sorted(FORMATS)


def there(name: str, data: np.ndarray) -> np.ndarray:
    """Values by gguf-py."""
    with np.errstate(all="ignore"):
        return np.asarray(gguf.dequantize(data, getattr(gguf.GGMLQuantizationType, name)), np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    sound = ~np.isnan(a) & ~np.isnan(b)
    return bool((np.isnan(a) == np.isnan(b)).all() and (a.view(np.uint32)[sound] == b.view(np.uint32)[sound]).all())


@cache
def hessian(cols: int, seed: int = 0) -> torch.Tensor:
    """Second moments (cols, cols), the same at every call; nobody changes them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * cols, cols, generator=draw, dtype=torch.float64)
    x = x @ (torch.eye(cols, dtype=torch.float64) + 0.1 * torch.randn(cols, cols, generator=draw, dtype=torch.float64))
    return x.T @ x / len(x)


def weights(rows: int, cols: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def loss(found: Codes, weight: np.ndarray, h: torch.Tensor) -> float:
    error = torch.from_numpy(found.values() - weight).double()
    return float(((error @ h) * error).sum())


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_gguf(name: str) -> None:
    form = FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, name)] == (form.block, form.size)


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_decode_as_gguf_does_and_come_back(name: str) -> None:
    form = FORMATS[name]
    data = np.random.default_rng(0).integers(0, 256, (7, 3 * form.size), dtype=np.uint8)
    codes = unpack(form, data)
    with np.errstate(all="ignore"):
        assert same_bits(codes.values(), there(name, data))
    again = pack(codes)
    if name not in {"TQ1_0", "MXFP4"}:  # several bytes say the same there
        assert np.array_equal(again, data)
    with np.errstate(all="ignore"):
        assert same_bits(unpack(form, again).values(), codes.values())


@pytest.mark.slow
@pytest.mark.usefixtures("block_code")
@pytest.mark.parametrize("name", NAMES)
def test_a_rounded_matrix_decodes_as_gguf_does(name: str) -> None:
    weight = weights(40, 512)
    fed = encode(weight, prepare(hessian(512)), FORMATS[name])
    assert same_bits(fed.values(), there(name, pack(fed)))
    found = encode(weight, prepare(torch.eye(512)), FORMATS[name])
    error = np.abs(found.values() - weight).mean()
    assert error < (0.55 if name[:2] == "TQ" else 2.0 ** (2 - FORMATS[name].bits)), error


@pytest.mark.parametrize(
    "name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "Q4_1", "Q8_0", "IQ1_S", "IQ2_S", "IQ3_XXS", "MXFP4"]
)
def test_threads_and_company_change_nothing(name: str) -> None:
    form, weight = prepare(hessian(256)), weights(75, 256)
    one, many = (encode(weight, form, FORMATS[name], threads=n) for n in (1, 3))
    part = encode(weight[:9], form, FORMATS[name])
    assert np.array_equal(pack(one), pack(many))
    scaled = np.abs(weight[:9]).max(), np.abs(weight).max()
    if np.ceil(np.log2(scaled[0])) == np.ceil(np.log2(scaled[1])):
        assert np.array_equal(pack(one)[:9], pack(part))


def test_products_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    matrix, error = (rng.standard_normal((100, n)).astype(np.float32) for n in (104, LANES))
    error = np.concatenate([error, error[:4]])
    out = rng.standard_normal((6, LANES)).astype(np.float32)
    right = out.astype(np.float64)
    right += matrix[8:14, 16:96].astype(np.float64) @ error[16:96].astype(np.float64)
    feed(out, matrix, 8, 16, 96, error)
    assert np.abs(out - right).max() < 1e-5 * np.abs(right).max()


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0"])
def test_several_matrices_are_coded_as_each_by_itself(name: str) -> None:
    matrices, factors = [weights(20, 256, i) for i in range(2)], [factor(hessian(256, i)) for i in range(2)]
    found = encode_all(matrices, factors, FORMATS[name])
    for weight, f, (codes, values) in zip(matrices, factors, found, strict=True):
        assert np.array_equal(pack(codes), pack(encode(weight, f.form(), FORMATS[name])))
        assert same_bits(values.numpy(), codes.values())


def test_columns_of_wide_spans_may_be_coded_in_another_order() -> None:
    layout = family("compressed-tensors").layout("w4c", 256, "BF16")
    assert layout is not None
    assert (span(layout), span(FORMATS["Q4_K"]), span(FORMATS["IQ1_S"])) == (256, 0, 0)
    h, weight = hessian(256), weights(40, 256)
    for within in (64, 256):
        found = factor(h, within)
        assert found.order is not None
        assert (found.order.reshape(-1, within).sort().values.flatten() == torch.arange(256)).all()
        codes, values = encode_all([weight], [found], layout)[0]
        assert same_bits(values.numpy(), codes.values())
        moved = encode(np.ascontiguousarray(weight[:, found.order.numpy()]), found.form(), layout)
        assert np.array_equal(moved.codes, codes.codes[:, found.order.numpy()])


def test_matrices_side_by_side_may_differ_in_whether_their_columns_are_sorted() -> None:
    """Roles decide that, and matrices of one shape have several; a GPU takes them together."""
    layout = family("compressed-tensors").layout("w4c", 256, "BF16")
    assert layout is not None
    matrices = [weights(8, 256, i) for i in range(3)]
    for sorted_ones in ((False, True, False), (True, False, True)):
        factors = [factor(hessian(256), 256 if s else 0) for s in sorted_ones]
        for weight, own, (codes, values) in zip(matrices, factors, encode_all(matrices, factors, layout), strict=True):
            ((alone, there),) = encode_all([weight], [own], layout)
            assert np.array_equal(codes.codes, alone.codes)
            assert same_bits(values.numpy(), there.numpy())
            assert same_bits(values.numpy(), codes.values())


def test_items_are_rounded_side_by_side_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes all items of one shape at a time, sorted or not; the same is asked of the processor here."""
    layouts = {n: family("compressed-tensors").layout(n, 256, "BF16") for n in ("w4c", "w4g128", "w4g32")}
    coding = Coding(tuple(layouts), lambda name, _: layouts[name], lambda _, w: w, lambda item, _: item.shape[0], 2**15)
    h, rows = hessian(256), torch.ones(8, dtype=torch.float64)
    items = [
        Item(Place(n, n, (8, 256)), weights(8, 256, at), Metric(h, rows), Metric(h, rows), tuple(layouts), spans=spans)
        for at, (n, spans) in enumerate({"a": (), "b": (256,), "c": (128, 256)}.items())
    ]
    found = []
    for together in (1, 3):
        monkeypatch.setattr(rounding, "_at_a_time", lambda _, together=together: together)
        measured = rounding.curves(coding, items, lambda _: None)
        coded = rounding.round_all(coding, items, dict.fromkeys("abc", 0.0), lambda _: None)
        assert [c.name for c in measured] == list(coded) == list("abc")
        found.append((measured, [r.values.tobytes() for r in coded.values()]))
    assert found[0] == found[1]


@pytest.mark.parametrize("light", [1.0, 1e-3])
def test_sorted_columns_are_taken_where_held_windows_say_so(light: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = {n: family("compressed-tensors").layout(n, 256, "BF16") for n in ("w4c", "w4g128", "w4g32")}
    coding = Coding(tuple(layouts), lambda name, _: layouts[name], lambda _, w: w, lambda *_: 0, 2**15)
    h, rows = hessian(256), torch.ones(8, dtype=torch.float64)
    item = Item(Place("a", "a", (8, 256)), weights(8, 256), Metric(h, rows), Metric(h, rows), tuple(layouts))
    lost = {0: 1.0, 256: light, 128: 2 - light}
    monkeypatch.setattr(rounding, "_lost", lambda *args: lost[args[2]])
    (found,) = rounding.choose_spans(coding, [item])
    assert found.spans == (() if light == 1 else (256,))
    codes = rounding.round_all(coding, [found], {"a": 0.0}, lambda _: None)["a"].codes
    assert codes is not None
    plain = encode(
        item.weight, found.factors().form(), layouts["w4c"], **search_of(layouts["w4c"], thorough=True)._asdict()
    )
    same = np.array_equal(codes.codes, plain.codes)
    assert same == (light == 1)


NEEDS = "a CUDA device with triton, or triton's interpreter, which cannot read scalars of numpy 2.4 and later"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or np.__version__ < "2.4"),
    reason=NEEDS,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of triton's interpreter
@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q8_0"])
def test_a_device_rounds_as_well_as_the_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    from bytecap.runtimes.blocks.cuda import encode_on_device

    form, cols = FORMATS[name], 2 * FORMATS[name].block
    matrices, hessians = [weights(30, cols, i) for i in range(2)], [hessian(cols, i) for i in range(2)]
    factors = [factor(h) for h in hessians]
    parts = [torch.stack([getattr(f, k) for f in factors]).to(device) for k in ("hessian", "fed", "weight")]
    stacked = torch.from_numpy(np.stack(matrices)).to(device)
    search = CodeSearch(2, 4, (1.0, 0.97))
    one, two = (encode_on_device(stacked, parts, form, _tables(form), search) for _ in range(2))
    for weight, h, f, (codes, values), (again, _) in zip(matrices, hessians, factors, one, two, strict=True):
        assert same_bits(values.cpu().numpy(), codes.values())
        assert np.array_equal(pack(codes), pack(again))
        own = encode(weight, f.form(), form, **search._asdict())
        assert loss(codes, weight, h) < 1.02 * loss(own, weight, h)
        assert (codes.codes == own.codes).mean() > 0.9  # sums in another order may round otherwise


@pytest.mark.parametrize("name", NAMES)
def test_feedback_and_descent_pay(name: str) -> None:
    h, weight = hessian(512), weights(64, 512)
    plain = loss(encode(weight, prepare(torch.diag(h.diagonal())), FORMATS[name], sweeps=0), weight, h)
    fed, swept = (loss(encode(weight, prepare(h), FORMATS[name], sweeps=n), weight, h) for n in (0, 2))
    assert fed < 0.9 * plain
    assert swept < 0.98 * fed


def test_rounding_is_not_worse_than_a_search_without_the_hessian() -> None:
    """gguf-py's own rounding of the formats it can write, under the metric."""
    h, weight = hessian(256), weights(64, 256)
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        data = gguf.quantize(weight, getattr(gguf.GGMLQuantizationType, name))
        theirs = torch.from_numpy(there(name, data) - weight).double()
        ours = loss(encode(weight, prepare(h), FORMATS[name]), weight, h)
        assert ours < 0.6 * float(((theirs @ h) * theirs).sum()), name


def extreme(cols: int) -> st.SearchStrategy[np.ndarray]:
    """Blocks that break encoders: constant, zero, one outlier, tiny, huge, one-sided."""

    def make(kind: str, scale: float, seed: int) -> np.ndarray:
        x = np.random.default_rng(seed).standard_normal((3, cols))
        if kind == "zero":
            x[:] = 0
        elif kind == "equal":
            x[:] = 1
        elif kind == "outlier":
            x *= 1e-6
            x[:, seed % cols] = 1
        elif kind == "positive":
            x = np.abs(x) + 5
        elif kind == "negative":
            x = -np.abs(x) - 5
        elif kind == "mixed":
            x[:, : cols // 2] *= 1e-12
        return (x * scale).astype(np.float32)

    kinds = st.sampled_from(["zero", "equal", "outlier", "positive", "negative", "mixed", "normal"])
    scales = st.sampled_from([1.0, -1.0, 1e-3, 1e-7, 1e-30, 1e-42, 1e4, 60000.0, 1e9])
    return st.builds(make, kinds, scales, st.integers(0, 2**16))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), weight=extreme(256), fed=st.booleans())
def test_extreme_blocks(name: str, weight: np.ndarray, fed: bool) -> None:
    h = hessian(256) if fed else torch.eye(256)
    found = encode(weight, prepare(h), FORMATS[name])
    values = found.values()
    assert np.isfinite(values).all()
    assert same_bits(values, there(name, pack(found)))
    back = unpack(FORMATS[name], pack(found))
    assert all(np.array_equal(getattr(back, k), getattr(found, k)) for k in ("codes", "sub_scales", "scale"))
    peak = float(np.abs(weight).max())
    if not fed and 1e-3 <= peak <= 60000:  # no further off than a plain search comes
        assert np.abs(values - weight).max() <= peak


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(UsageError, match="Q4_K holds rows of a multiple of 256 columns, not 96"):
        encode(weights(2, 96), prepare(torch.eye(96)), FORMATS["Q4_K"])
    with pytest.raises(UsageError, match="no whole blocks of Q8_0"):
        unpack(FORMATS["Q8_0"], np.zeros((1, 33), np.uint8))


def test_values_that_are_not_finite_are_refused() -> None:
    weight = weights(2, 32)
    weight[1, 3] = np.nan
    with pytest.raises(UsageError, match="not finite"):
        encode(weight, prepare(torch.eye(32)), FORMATS["Q8_0"])


def test_hessians_that_do_not_factor() -> None:
    weight = weights(4, 256)
    x = torch.randn(3, 256, dtype=torch.float64)
    for h in (torch.zeros(256, 256), x.T @ x):
        for name in ("Q5_0", "IQ2_XS", "IQ3_S", "MXFP4"):
            assert np.isfinite(encode(weight, prepare(h), FORMATS[name]).values()).all()


def test_shrinking_keeps_the_diagonal() -> None:
    h = hessian(8)
    off = h - torch.diag(h.diagonal())
    for by in (Shrinkage(diagonal=1.0), Shrinkage(mean=1.0)):
        found = shrunk(h, by)
        assert torch.allclose(found - torch.diag(found.diagonal()), off / 2)
        assert found.trace() == pytest.approx(float(h.trace()))
    assert torch.equal(shrunk(h, Shrinkage(diagonal=1.0)).diagonal(), h.diagonal())
    assert found.diagonal().std() == pytest.approx(float(h.diagonal().std()) / 2)


def test_windows_that_differ_in_size_alone_are_told_from_a_fit_to_one_of_them() -> None:
    h, rows = hessian(64), torch.ones(8, dtype=torch.float64)
    seen, held = Metric(h, rows), Metric(2 * torch.diag(h.diagonal()), rows)  # nothing of what was fitted holds
    item = Item(Place("a", "a", (8, 64)), weights(8, 64), seen, held, ("Q4_0",))
    coding = Coding(("Q4_0",), lambda name, _: FORMATS[name], lambda _, w: w, lambda *_: 0, 2**15)
    found = rounding.round_all(coding, [item], {"a": 0.0}, lambda _: None)["a"]
    assert found.alone[1] == pytest.approx(2 * found.alone[0])
    assert found.held == pytest.approx(found.alone[1])
    assert found.held / found.seen > 1.2 * 2
