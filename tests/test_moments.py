"""Second moments kept by their lower half."""

import pytest
import torch

from bytecap.calibration.moments import Moment

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("cols", [1, 5, 255, 256, 301, 512])
def test_the_sum_is_that_of_whole_products(cols):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, cols, generator=generator) for n in (1, 7, 40)]
    sums = Moment(cols, torch.device("cpu"))
    for x in batches:
        sums.add(x)
    found = sums.whole()
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found, sum(x.double().T @ x.double() for x in batches), rtol=1e-5, atol=1e-4)


def test_wide_sums_keep_little_more_than_half():
    kept = sum(p.numel() for p in Moment(1024, torch.device("cpu"))._panels)
    assert kept == 1024 * 1024 * 10 // 16


def test_a_sum_that_is_handed_over_is_held_by_nobody_else():
    sums = Moment(512, torch.device("cpu"))
    sums.add(torch.ones(1, 512))
    found = sums.handed_over()
    assert not sums.parts
    assert torch.equal(found.whole(), torch.ones(512, 512).double())
    assert torch.equal(found.whole(), torch.ones(512, 512).double())  # it stays
