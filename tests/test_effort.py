"""Effort: what it chooses, what the files of each level are, and what is refused."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from bytecap.allocation.planner import Planner
from bytecap.calibration.metric import Metric
from bytecap.errors import UsageError
from bytecap.format import container
from bytecap.format.container import Contents, UnitSection
from bytecap.format.decoder import decode_units
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.job.config import FitConfig
from bytecap.pipeline import stages
from bytecap.quantization.options import EFFORTS, STATES, Options
from bytecap.quantization.quantizer import prepare
from bytecap.quantization.rules import initial_rules
from bytecap.types import Unit


@pytest.fixture(scope="module")
def settled():
    """One matrix rounded at the same step at every effort: (planner, state) by effort."""
    rng = np.random.default_rng(0)
    weight, x = torch.from_numpy(rng.normal(size=(512, 24))), torch.from_numpy(rng.normal(size=(64, 24)))
    metric, unit = Metric(x.T @ x / 64, torch.ones(512, dtype=torch.float64)), Unit("a", (512, 24), "F32", linear=True)
    found = []
    for effort in range(len(EFFORTS)):
        options = Options.of({}, effort=effort)
        planner = Planner.of([prepare(unit, weight, metric, options)], [], options)
        found.append((planner, planner.settle({"a": 0.35}, initial_rules(options))))
    return found


def test_more_effort_distorts_less(settled):
    distortion = [state.coded["a"].distortion for _, state in settled]
    assert all(after < before for before, after in pairwise(distortion))
    assert distortion[0] / distortion[3] == pytest.approx(2 ** (2 * (0.0741 - 0.0319)), rel=0.03)


@pytest.mark.parametrize(("effort", "tag", "minor"), [(0, 9, 1), (1, 15, 3), (2, 15, 3), (3, 15, 3)])
def test_files_of_an_effort(settled, effort, tag, minor):
    planner, state = settled[effort]
    ((_, (found, data)),) = planner.encode(state).items()
    assert found == tag
    unit = Unit("a", (512, 24), "F32", linear=True)
    file = container.serialize(Contents((UnitSection(unit, found, data),), dump_shared(state.shared), (), {}))
    assert file[8:10] == bytes([1, minor])
    decoded = decode_units(container.parse(file))["a"]
    assert decoded.tobytes() == planner.decode(state, "a").tobytes()


def test_options_go_before_effort():
    assert [Options.of({}, effort=e).states for e in range(4)] == [8, 32, 128, 256]
    assert Options.of({"states": 16}, effort=3).states == 16
    assert set(EFFORTS) <= set(STATES) == {8, 16, 32, 64, 128, 256}
    for states in (0, 4, 9, 512):
        with pytest.raises(UsageError, match=f"no trellis of {states} states"):
            Options.of({"states": states})


@pytest.mark.parametrize("effort", [-1, 4, 10])
def test_efforts_that_there_are_not(effort):
    with pytest.raises(UsageError, match=f"no effort {effort}: it goes from 0 .fast. to 3"):
        stages.check(FitConfig("1MB", effort=effort))
