"""Arrays sent to a device through buffers: every byte arrives, however pieces and buffers meet."""

import numpy as np
import pytest
import torch

from bytecap.model import staging
from bytecap.model.staging import Parts, sent
from bytecap.system.transfers import Transfers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("stage", [1, 7, 16, 64, 2**20])
def test_every_byte_arrives(stage, monkeypatch):
    monkeypatch.setattr(staging, "_LARGE", 50)
    rng = np.random.default_rng(stage)
    raw = rng.bytes(200)
    kinds = {
        np.uint8: [np.frombuffer(raw, np.uint8, 50, 3), np.zeros(0, np.uint8)], np.int64: [np.arange(5) - 2],
        np.int16: [np.frombuffer(raw, np.int16, 30, 1), rng.integers(0, 99, (3, 4))], np.float32: [],
        np.int32: [np.arange(3)[::-1]],
    }  # fmt: skip
    parts = []
    for kind, arrays in kinds.items():
        parts.append(Parts(kind))
        places = [parts[-1].add(a) for a in arrays]
        assert places == [sum(a.size for a in arrays[:i]) for i in range(len(arrays))]
    for (kind, arrays), tensor in zip(kinds.items(), sent(parts, DEVICE, Transfers(DEVICE, stage)), strict=True):
        wanted = np.concatenate([np.zeros(0, kind), *(a.reshape(-1).astype(kind) for a in arrays)])
        assert tensor.dtype == torch.from_numpy(wanted).dtype
        assert len(tensor) == len(wanted) + 1
        assert tensor[:-1].cpu().numpy().tobytes() == wanted.tobytes()
