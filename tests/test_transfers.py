"""Copies through two buffers, with pieces far smaller than what is copied."""

import threading

import pytest
import torch

from bytecap.system import transfers
from bytecap.system.transfers import Transfers, to_device, to_memory

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.bool]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def numbers(count, dtype):
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).mul(50).to(dtype)


@pytest.fixture(params=[16, 2**22], autouse=True)
def part(request, monkeypatch):
    monkeypatch.setattr(transfers, "_PART", request.param)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
class TestTransfers:
    def test_up(self, dtype, count, device):
        values, through = numbers(count, dtype), Transfers(torch.device(device), 64)
        raw = values.view(torch.uint8)
        for wanted in {dtype, torch.float32, torch.bfloat16}:
            out = torch.empty(count, dtype=wanted, device=device)
            through.up(lambda buffer, at: buffer.copy_(raw[at : at + len(buffer)]), dtype, out)
            expected = values.float() if dtype == torch.float64 and wanted != dtype else values
            assert torch.equal(out.cpu(), expected.to(wanted))

    def test_fill(self, dtype, count, device, monkeypatch):
        monkeypatch.setattr(transfers, "_HERE", 64)
        values = numbers(count, dtype)
        raw, written = values.view(torch.uint8), []

        def copy(buffer, at):
            buffer.copy_(raw[at : at + len(buffer)])
            written.append(len(buffer))

        for wanted in {dtype, torch.float32, torch.bfloat16}:
            out = torch.empty(count, dtype=wanted, device=device)
            transfers.fill(out, dtype, copy)
            expected = values.float() if dtype == torch.float64 and wanted != dtype else values
            assert torch.equal(out.cpu(), expected.to(wanted))
            if device == "cpu" and wanted == dtype:
                assert written[-1] == len(raw)  # at once, without a buffer

    def test_down(self, dtype, count, device):
        values, through = numbers(count, dtype), Transfers(torch.device(device), 64)
        found = through.down(values.to(device))
        assert found.device.type == "cpu"
        assert torch.equal(found, values)


def test_a_fill_that_fails_leaves_the_buffers_in_order():
    through, out = Transfers(torch.device("cpu"), 64), torch.empty(40)

    def failing(buffer, at):
        if at:
            raise OSError("no more")
        buffer.zero_()

    with pytest.raises(OSError, match="no more"):
        through.up(failing, torch.float32, out)
    assert torch.equal(through.down(torch.arange(100)), torch.arange(100))


def test_no_part_is_written_once_another_has_failed_and_been_told_of(monkeypatch):
    monkeypatch.setattr(transfers, "_PART", 16)
    through, other = Transfers(torch.device("cpu"), 64), threading.Event()

    def failing(buffer, at):
        if at:
            raise OSError("no more")
        other.wait(0.2)
        written.append(len(buffer))

    written = []
    with pytest.raises(OSError, match="no more"):
        through.up(failing, torch.uint8, torch.empty(32, dtype=torch.uint8))
    assert written == [16]


@pytest.mark.parametrize("device", DEVICES)
def test_large_and_strided_tensors(device, monkeypatch):
    values = torch.arange(9 * 2**20, dtype=torch.float32).reshape(3, -1)
    monkeypatch.setattr(transfers, "_PART", 2**22)  # a thread for every 16 bytes of these takes long
    for one in (values, values.T, values[:, ::2], values[0, :5]):
        there = to_device(one, device)
        assert there.device.type == device
        assert torch.equal(there.cpu(), one)
        back = to_memory(there)
        assert back.device.type == "cpu"
        assert torch.equal(back, one)
