"""Stacks of matrices: the experts of a mixture, one tensor of three dimensions."""

import pytest
import torch
from torch import nn

import bytecap
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.coders.vector import CODER as VECTOR
from bytecap.methods import METHODS
from bytecap.methods.baselines import shared_codewords
from bytecap.model.checkpoint import find_units
from bytecap.types import Unit, as_matrix


class Experts(nn.Module):
    """Token by token one of three maps, and a convolution along the text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(32, 24)
        self.maps = nn.Parameter(torch.randn(3, 40, 24) / 5)
        self.back = nn.Parameter(torch.randn(3, 24, 40) / 6)
        self.mix = nn.Conv1d(24, 24, 3)
        self.head = nn.Linear(24, 32)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.mix(nn.functional.pad(x.mT, (2, 0))).mT
        chosen = ids % 3
        hidden = torch.einsum("...c,...rc->...r", x, self.maps[chosen]).relu()
        return self.head(x + torch.einsum("...c,...rc->...r", hidden, self.back[chosen]))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (2, 33), generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    ("shape", "transposed", "stacked", "expected"),
    [
        ((3, 40, 24), False, True, (120, 24)), ((3, 40, 24), True, True, (24, 120)),
        ((3, 40, 24), False, False, (3, 960)), ((3, 40, 24), True, False, (960, 3)),
        ((5,), False, True, (1, 5)), ((6, 4), False, True, (6, 4)), ((3, 4, 0), False, True, (0, 0)),
    ],
)  # fmt: skip
def test_rows_and_columns(shape, transposed, stacked, expected):
    unit = Unit("w", shape, "F32", transposed=transposed, stacked=stacked)
    assert unit.matrix_shape == expected
    values = torch.arange(unit.parameters).reshape(shape)
    if unit.parameters:
        matrix = as_matrix(unit, values)
        assert tuple(matrix.shape) == expected
        back = matrix.T if transposed and len(shape) > 1 else matrix
        assert torch.equal(back.reshape(shape), values)


def test_experts_are_stacks_and_kernels_are_not():
    stacked = {u.name: u.stacked for u in find_units(Experts())}
    assert {n for n, s in stacked.items() if s} == {"maps", "back"}


@pytest.mark.numeric
@pytest.mark.slow
def test_experts_are_coded_as_matrices_and_come_back():
    model = Experts()
    budget = 4 * sum(p.numel() for p in model.parameters()) // 8
    result = bytecap.fit(model, budget=budget, calibration=batches(6), evaluation=batches(2))
    tags = {u.unit.name: u.tag for u in result.contents.units}
    assert VECTOR.tag not in {tags["maps"], tags["back"]}
    assert len(result.data) <= budget
    found = result.tensors()
    for name in ("maps", "back"):
        original = getattr(model, name).detach()
        assert found[name].shape == original.shape
        assert float((torch.from_numpy(found[name].copy()) - original).norm() / original.norm()) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.numeric] * (m in {"owq", "cluscomp"})) for m in METHODS if m != "bytecap"],
)
def test_every_baseline_takes_experts_for_matrices(method, monkeypatch):
    monkeypatch.setattr(shared_codewords, "_EPOCHS", 10)
    model = Experts()
    budget = sum(p.numel() for p in model.parameters()) + 2000  # a byte a weight; exact ones take some three
    result = bytecap.fit(model, budget=budget, calibration=batches(6), evaluation=batches(2), method=method)
    assert len(result.data) <= budget
    tags = {u.unit.name: u.tag for u in result.contents.units}
    assert not {VECTOR.tag, EXACT.tag} & {tags["maps"], tags["back"]}
    for name in ("maps", "back"):
        original = getattr(model, name).detach()
        found = torch.from_numpy(result.tensors()[name].copy())
        assert float((found - original).norm() / original.norm()) < 0.9


@pytest.mark.slow
def test_wide_buffers_come_back_as_they_were():
    model = Experts()
    model.register_buffer("floats", torch.randn(4, 8, 1100))
    model.register_buffer("integers", torch.arange(2 * 3 * 4100).reshape(2, 3, 4100))
    exact = sum(
        len(EXACT.encode(b.numpy().reshape(1, -1), d)) for b, d in ((model.floats, "F32"), (model.integers, "I64"))
    )
    budget = exact + 4 * sum(p.numel() for p in model.parameters()) // 8
    result = bytecap.fit(model, budget=budget, calibration=batches(6), evaluation=batches(2))
    assert not result.report["lossless"]
    found = result.tensors()
    for name in ("floats", "integers"):
        assert torch.equal(torch.from_numpy(found[name].copy()), getattr(model, name))
