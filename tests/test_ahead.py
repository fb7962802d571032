"""Batches that are under way on a GPU together; streams of a GPU are stood in for."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bytecap.quantization import ahead
from bytecap.quantization.ahead import Ahead

CUDA = torch.device("cuda")


class Stream:
    """Notes what is awaited."""

    made = 0

    def __init__(self, device):
        del device
        Stream.made += 1
        self.awaited = 0

    def wait_stream(self, other):
        del other

    def synchronize(self):
        self.awaited += 1


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    monkeypatch.setattr(ahead, "_STREAMS", {})
    monkeypatch.setattr(Stream, "made", 0)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    properties = SimpleNamespace(total_memory=30 * ahead._SHARE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(ahead, "allowed", lambda _: properties.total_memory)


def begun(numbers, sizes, scarce=(), most=1):
    """Take batches in order; returns what was under way whenever one was taken."""
    under_way, seen = [], []

    def begin(i):
        if i in scarce and len(under_way) >= most:
            raise torch.OutOfMemoryError
        under_way.append(i)
        return lambda: 10 * i

    batches = Ahead(begin, numbers, sizes, CUDA)
    for i in numbers:
        with batches.taken(i) as found:
            assert found == 10 * i
            seen.append(list(under_way))
        under_way.remove(i)
    return seen


def test_batches_are_begun_as_far_as_there_is_room():
    assert begun([0, 1, 2, 3], [10, 15, 10, 30]) == [[0, 1], [1, 2], [2], [3]]
    assert Stream.made == 2  # which others take over


def test_one_that_is_larger_than_the_room_is_alone():
    assert begun([0, 1], [100, 100]) == [[0], [1]]


def test_only_numbers_that_are_asked_for_are_begun():
    assert begun([0, 2], [1, 1, 1]) == [[0, 2], [2]]


def test_where_memory_ends_they_go_one_by_one():
    assert begun([0, 1, 2], [1, 1, 1], scarce=(1,)) == [[0], [1], [2]]


def test_where_memory_ends_half_of_what_was_under_way_goes_on():
    assert begun(range(6), [4] * 6, scarce=range(6), most=4) == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3, 4], [4, 5], [5]]


def test_a_bounded_process_has_less_under_way(monkeypatch):
    monkeypatch.setattr(ahead, "allowed", lambda _: 20 * ahead._BOUNDED_SHARE)
    assert begun([0, 1, 2], [10, 10, 10]) == [[0, 1], [1, 2], [2]]


def test_memory_that_does_not_do_for_one_is_an_error():
    def begin(i):
        raise torch.OutOfMemoryError(str(i))

    with pytest.raises(torch.OutOfMemoryError), Ahead(begin, [0], [1], CUDA).taken(0):
        pass
