"""Splits of items by their sizes: order stays, nothing is lost, parts are as even as items allow."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bytecap.sizes import in_groups, in_parts

pytestmark = pytest.mark.coverage
SIZES = st.lists(st.integers(0, 2**40), max_size=40)


def joined(parts):
    return [item for part in parts for item in part]


@example([1, 0], 1, False)
@example([0, 1], 1, True)
@given(SIZES, st.integers(1, 50), st.booleans())
def test_parts_keep_order_and_are_no_more_than_wanted(sizes, most, fill):
    parts = in_parts(list(enumerate(sizes)), lambda item: item[1], most, fill=fill)
    assert joined(parts) == list(enumerate(sizes))
    assert len(parts) <= most
    assert all(parts)


@given(SIZES, st.integers(1, 50))
def test_no_part_exceeds_its_share_by_more_than_halves_of_its_ends(sizes, most):
    for part in in_parts(sizes, int, most):
        assert (sum(part) - part[0] / 2 - part[-1] / 2) * most <= sum(sizes) * (1 + 1e-9)


@given(SIZES, st.integers(0, 2**40), st.integers(1, 10))
def test_groups_stay_below_the_most_unless_an_item_stands_alone(sizes, most, count):
    groups = list(in_groups(sizes, int, most, count))
    assert joined(groups) == sizes
    assert all(len(g) == 1 or (len(g) <= count and sum(g) <= most) for g in groups)
