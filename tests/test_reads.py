"""How often the weights of a streamed model are read."""

import pytest
import torch

from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.evaluation import compare_texts
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.streamed_checkpoint import open_streamed
from bytecap.model.tensor_files import Tensors
from bytecap.model.texts import Text
from bytecap.system.scratch import Scratch
from conftest import KINDS
from test_probe import windows_of

WINDOWS = windows_of(5) + windows_of(2, 65, seed=1) + windows_of(1, 13, seed=2)


@pytest.fixture
def read(monkeypatch):
    """Names of the tensors that have been read."""
    found, inner = [], Tensors.read
    monkeypatch.setattr(Tensors, "read", lambda self, name, *args: found.append(name) or inner(self, name, *args))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_opening_reads_every_weight_once(kind, model_directory, read):
    opened = open_streamed(model_directory(kind), Scratch())
    buffers = {n for n, _ in opened.module.named_buffers()}
    wanted = [u.name for u in opened.units for _ in ("", *u.aliases) if u.name not in buffers]  # by every module of it
    assert sorted(n for n in read if n not in buffers) == sorted(wanted)
    assert opened.streamed.alone


@pytest.mark.parametrize("streamed", [False, True])
def test_texts_are_compared_in_one_pass_over_the_weights(streamed, model_directory, read):
    directory = model_directory("rotary", dtype=torch.float32)
    model = open_streamed(directory, Scratch()) if streamed else load_checkpoint(directory)
    values = {u.name: (1.01 * model.tensor(u)).numpy() for u in model.units}
    coded = copy_of(model.module)
    load_values(coded, values)
    texts = [Text(str(i), tuple(WINDOWS[i::2])) for i in range(2)]
    read.clear()
    found = compare_texts(model.module, coded, texts)
    if streamed:
        assert max(read.count(n) for n in read if ".layers." in n) == 1
    assert [f.as_dict() for f in found] == [compare_texts(model.module, coded, [t])[0].as_dict() for t in texts]
    assert [f.name for f in found] == ["0", "1"]
