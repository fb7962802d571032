"""The KL's expansion at a coded model: what one unit recovers, and curvatures that are measured."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bytecap.model.evaluation import kl_each
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.texts import Window
from bytecap.progress import Silent
from bytecap.quantization.overlays import UnitProblem
from bytecap.system.cache import Store
from bytecap.types import Unit
from bytecap_lab.rd_curves.expansion import Expansion
from bytecap_lab.rd_curves.slopes import measure_slopes

pytestmark = pytest.mark.numeric


class Squared(torch.nn.Module):
    """96 outputs for a token number, read from a table through one map."""

    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Embedding.from_pretrained(torch.randn(40, 16, generator=g))
        self.map = torch.nn.Linear(16, 96, bias=False)
        self.map.weight.data = 0.2 * torch.randn(96, 16, generator=g)

    def forward(self, ids):
        return self.map(self.table(ids))


class TestExpansion:
    def operating_point(self):
        """A map with an error, its exact metric at the original, and windows."""
        module = Squared(0)
        rng = np.random.default_rng(0)
        windows = tuple(Window(tuple(rng.integers(0, 40, 65).tolist()), 65) for _ in range(8))
        unit = Unit("map.weight", (96, 16), "F32", linear=True)
        seen = module.table(torch.tensor([w.tokens[:-1] for w in windows])).reshape(-1, 16).double()
        problem = UnitProblem(
            unit, module.map.weight.detach().clone(), seen.T @ seen / len(seen), torch.ones(96).double()
        )
        g = torch.Generator().manual_seed(1)
        values = problem.weight + 0.05 * torch.randn(96, 16, generator=g)
        base = SimpleNamespace(
            problems={unit.name: problem}, units={unit.name: SimpleNamespace(values=values)}, kappa={unit.name: 1.0}
        )
        job = SimpleNamespace(
            model=SimpleNamespace(module=module), sets=SimpleNamespace(statistics=windows), device="cpu", seed=0,
            reporter=Silent(),
        )  # fmt: skip
        quantized_copy = copy_of(module)
        load_values(quantized_copy, {unit.name: values.numpy()})
        return job, base, quantized_copy, g

    def test_it_predicts_what_one_unit_recovers(self):
        job, base, quantized_copy, g = self.operating_point()
        (problem,), (rounded,) = base.problems.values(), base.units.values()
        found = measure_slopes(job, base, quantized_copy, Store(None), "")
        name = problem.unit.name
        for size in (0.0, 0.03, 0.05):  # from an error removed to another of the same size
            values = problem.weight + size * torch.randn(96, 16, generator=g)
            _, slope, curved = Expansion.at(problem, rounded.values, found.gradients[name]).of(values)
            curved *= found.factors[name]
            variants = {"": {}, "new": {name: values.numpy()}}
            kl = kl_each(job.model.module, quantized_copy, variants, job.sets.statistics)
            gain = kl[""][0] - kl["new"][0]
            assert slope - curved == pytest.approx(gain, abs=0.2 * curved)
            assert curved > 0.4 * slope

    def test_factors_are_measured_where_the_metric_is_wrong(self):
        job, base, quantized_copy, _ = self.operating_point()
        right = measure_slopes(job, base, quantized_copy, Store(None), "").factors["map.weight"]
        base.problems = {n: replace(p, hessian=4 * p.hessian) for n, p in base.problems.items()}
        assert measure_slopes(job, base, quantized_copy, Store(None), "").factors["map.weight"] == pytest.approx(
            right / 4
        )

    def test_it_is_kept(self, tmp_path, monkeypatch):
        job, base, quantized_copy, _ = self.operating_point()
        first = measure_slopes(job, base, quantized_copy, Store(tmp_path), "a")
        monkeypatch.setattr("bytecap_lab.rd_curves.slopes.gradient", None)
        again = measure_slopes(job, base, quantized_copy, Store(tmp_path), "a")
        assert again.factors == first.factors
        assert torch.equal(again.gradients["map.weight"], first.gradients["map.weight"])


def test_an_expansion_is_the_metric_and_the_slope_of_one_change():
    g = torch.Generator().manual_seed(3)
    weight, half = torch.randn(50, 8, generator=g), torch.randn(8, 8, generator=g, dtype=torch.float64)
    rows = torch.rand(50, generator=g, dtype=torch.float64)
    problem = UnitProblem(Unit("a", (50, 8), "F32"), weight, half @ half.T, rows)
    before, after, slope = (weight + 0.1 * torch.randn(50, 8, generator=g) for _ in range(3))
    found = Expansion.at(problem, before, slope).of(after)
    assert found.metric == pytest.approx(problem.distortion(before) - problem.distortion(after), rel=1e-4)
    assert found.slope == pytest.approx(-float((slope.double() * (after - before).double()).sum()), rel=1e-5)
    assert found.curved == pytest.approx(problem.distortion(weight + (after - before)), rel=1e-5)
