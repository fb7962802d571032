"""Corners of what becomes of a decoded file: a directory, a module."""

import json
import struct

import numpy as np
import pytest
import torch

import bytecap
import golden_parts
from bytecap.errors import ArtifactError, OutputError, UsageError
from bytecap.pipeline import export

pytestmark = pytest.mark.coverage


def test_unpacking(tmp_path):
    path = golden_parts.DIRECTORY / "files.bcap"
    assert export.unpack(path, tmp_path / "out") in export.DTYPES
    assert export.unpack(path, tmp_path / "out", dtype="float16") == "float16"
    assert export.unpack(path, tmp_path / "out", dtype="bfloat16") == "bfloat16"
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert {v["dtype"] for k, v in header.items() if k != "__metadata__"} <= {"BF16", "I64", "I32", "U8", "BOOL"}
    with pytest.raises(UsageError, match="unknown dtype 'float8'"):
        export.unpack(path, tmp_path / "out", dtype="float8")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot create"):
        export.unpack(path, tmp_path / "file" / "out")


def test_into_a_module(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    section = golden_parts.unit("weight", (2, 3), 3, golden_parts.exact(values, "F32"), "F32")
    path = tmp_path / "a.bcap"
    path.write_bytes(golden_parts.pack(section))
    module = torch.nn.Linear(3, 2, bias=False)
    bytecap.load_into(path, module)
    assert module.weight.tolist() == values.tolist()
    with pytest.raises(ArtifactError, match="the artifact lacks bias"):
        bytecap.load_into(path, torch.nn.Linear(3, 2))
    with pytest.raises(ArtifactError, match=r"weight is \[2, 4\] in the module and \[2, 3\]"):
        bytecap.load_into(path, torch.nn.Linear(4, 2, bias=False))
    two = [golden_parts.unit(n, (2, 3), 3, golden_parts.exact(values + i, "F32"), "F32")
           for i, n in enumerate(("0.weight", "1.weight"))]  # fmt: skip
    path.write_bytes(golden_parts.pack(*two))
    with pytest.raises(ArtifactError, match="one tensor in the module and two in the artifact"):
        bytecap.load_into(path, torch.nn.Sequential(module, module))
    with pytest.raises(ArtifactError, match=r"holds no config\.json"):
        bytecap.load_model(path)
