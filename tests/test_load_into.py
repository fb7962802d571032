"""Values of a file go into a module: all of them or none."""

import numpy as np
import pytest
import torch
from torch import nn

import bytecap
from test_modules import VOCABULARY, Looped, ids


class TestLoadInto:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "looped.bcap"
        bytecap.fit(Looped(2), 6600, calibration=[ids()], output=path)
        return path

    @pytest.mark.slow
    def test_values(self, path):
        module = Looped(2)
        bytecap.load_into(path, module)
        values = bytecap.load(path)
        assert all(np.array_equal(t.numpy(), values[n]) for n, t in module.state_dict().items())

    @pytest.mark.slow
    def test_every_misfit_is_named_and_nothing_changes(self, path):
        module = Looped(2)
        module.head = nn.Linear(63, VOCABULARY, bias=False)
        module.extra, module.shared = nn.Linear(2, 2), None
        before = module.once.weight.clone()
        with pytest.raises(bytecap.ArtifactError) as caught:
            bytecap.load_into(path, module)
        for part in ("lacks extra.weight", "lacks extra.bias", "module lacks shared.weight",
                     "head.weight is [64, 63] in the module and [64, 64]"):  # fmt: skip
            assert part in str(caught.value)
        assert torch.equal(module.once.weight, before)

    @pytest.mark.slow
    def test_tied_where_the_artifact_is_not(self, path):
        module = Looped(2)
        module.once.weight = module.shared.weight
        with pytest.raises(bytecap.ArtifactError, match=r"once\.weight and shared\.weight are one tensor"):
            bytecap.load_into(path, module)
