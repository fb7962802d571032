"""Tables that a directory keeps in 16 bits, as numbers that recovery may move."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bytecap.model.checkpoint import load_checkpoint
from bytecap.runtimes.directory import family
from bytecap.runtimes.directory.contents import contents_of
from bytecap.runtimes.gguf import numbers
from bytecap.runtimes.gguf.solve import Found


@pytest.mark.parametrize("name", ["mlx", "compressed-tensors"])
def test_tables_that_stay_in_16_bits_are_tuned(name, model_directory) -> None:
    model = load_checkpoint(model_directory("rotary"))
    contents, _ = contents_of(model, family(name), None, pure=False)
    table = "model.embed_tokens.weight"
    assert contents.tables() == ({table} if name == "compressed-tensors" else set())
    job, found = SimpleNamespace(model=model, device="cpu"), Found(None, {}, {}, {}, 0.0, 0)
    parts = (job, contents.tuned(), [], found, "BF16")
    owners = {o.unit.name: o for o in numbers.owners_of(*parts, contents.tables())}
    others = {o.unit.name for o in numbers.owners_of(*parts, ())}
    assert owners.keys() - others == contents.tables()
    if name == "mlx":
        return
    own = model.module.state_dict()[table].float()
    with torch.no_grad():
        owners[table].parts[0].leaves[0].fill_(0.5)
        values = owners[table].values()
    assert torch.equal(values, (own + 0.5 * own.abs().mean()).bfloat16().float())
    written = numbers.written([], found, owners.values(), lambda rounded: rounded).vectors
    tensors = {t.name: t for t in contents.tensors({}, {}, written)}
    assert np.array_equal(tensors[table].array(), values.numpy())
