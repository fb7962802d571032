"""Open a checkpoint of which one block at a time will be in memory.

The files are held to the same account as those of a model that is read whole (`bytecap.model.accounting`), from what
their headers say. One forward pass of a few tokens then finds the chain of blocks and looks at every weight, which are
read and dropped module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.errors import CheckpointError
from bytecap.model import streaming, tying
from bytecap.model.accounting import account
from bytecap.model.building import causal_lm, plain_config, without_values
from bytecap.model.chain import Chain, find_chain, hands_on_alone
from bytecap.model.checkpoint import Model, check_size, find_units, freeze, resolve
from bytecap.model.conversion import Conversion, convert
from bytecap.model.fileset import Header
from bytecap.model.finite import check
from bytecap.model.forward import logits_of
from bytecap.model.head import head_of
from bytecap.model.opening import opened
from bytecap.model.quantized_copy import Lazy
from bytecap.model.streaming import Streamed
from bytecap.model.tensor_files import Tensors
from bytecap.system.allocator import is_shortage
from bytecap.system.scratch import Scratch
from bytecap.types import Unit, as_matrix

_TRIAL = 4  # tokens of the pass that finds the chain


class Unstreamable(Exception):  # noqa: N818 (a reason, which is told and not raised to users)
    """Why a model has to be in memory whole."""


@dataclass
class StreamedModel(Model):
    """A model whose tensors are read when they are asked for.

    Attributes:
        scratch: for what a job keeps of it.
    """

    scratch: Scratch = field(default_factory=Scratch)

    def tensor(self, unit: Unit) -> Tensor:
        """A unit's value, read from its file; a buffer as it is."""
        if unit.name in self.streamed.tensors:
            return self.streamed.value(unit.name, torch.float32)
        return self.module.get_buffer(unit.name)

    def matrix(self, unit: Unit, rows: slice | None = None) -> Tensor:
        """A unit as coders see it, float32 (rows, cols), or consecutive rows of it, which alone are read."""
        streamed = self.streamed
        if rows is None or unit.transposed or unit.name not in streamed.tensors or len(unit.shape) != 2:
            whole = as_matrix(unit, self.tensor(unit)).float()
            return whole if rows is None else whole[rows]
        return streamed.tensors.read(unit.name, streamed.device, torch.float32, rows)

    @property
    def streamed(self) -> Streamed:
        """The module with its source."""
        found = streaming.of(self.module)
        assert found is not None  # noqa: S101 (`open_streamed` attaches one)
        return found


def open_streamed(
    model: Path | str,
    scratch: Scratch,
    *,
    device: str = "cpu",
    begin: Callable[[dict[str, bytes]], None] | None = None,
    allow_unused: Sequence[str] = (),
) -> StreamedModel:
    """Open a checkpoint to be streamed; see `bytecap.model.checkpoint.load_checkpoint`.

    Args:
        model: Hugging Face directory or hub id.
        scratch: for what a job keeps.
        device: torch device that passes run on.
        begin: given the side files before the model is built.
        allow_unused: names or patterns of what is meant to be left out.

    Raises:
        Unstreamable: its values cannot be read tensor by tensor, or it has no chain.
        CheckpointError: as for any checkpoint.
    """
    directory = resolve(model)
    if not directory.is_dir() or (directory / tying.FILE).is_file():
        raise Unstreamable("its tensors are not those of a module one by one")
    source = opened(directory, str(model), begin, allow_unused)
    headers = source.headers
    check_size(directory, source.shapes, tied=False)
    module = _skeleton(directory)
    conversion = _plain(module, headers)
    reader = source.dense.values if source.dense else None
    found = account(module, headers, allow_unused, conversion, reader)
    units = find_units(module, found.dtypes)
    names = {target: name for name, target in conversion.entries.items()}
    first = {n: u.name for u in units for n in (u.name, *u.aliases)}
    tensors = Tensors(headers, {first[n]: s for n, s in names.items()} | names, source.dense)
    _check_shapes(module, headers, conversion, directory)
    _fill_buffers(module, tensors)
    trial = Streamed(module, Chain("", 0, 0), tensors, first)
    trial.to(device)
    chain, head = observe(trial, units)
    if chain is None:
        raise Unstreamable("it has no chain of blocks that are called one after the other")
    alone = _hands_on_alone(trial, chain)
    streaming.attach(Streamed(module, chain, tensors, first, trial.device, head=head, alone=alone))
    return StreamedModel(
        module, units, source.files | found.files, str(model), notes=(*source.notes, *found.notes),
        rounded=found.rounded, rebuilt=True, scratch=scratch, dequantized=source.dense.method if source.dense else "",
    )  # fmt: skip


def _skeleton(directory: Path) -> nn.Module:
    """The module of a directory's config, its parameters without values and its buffers with them."""
    config = plain_config(directory)
    with without_values():
        module = causal_lm(config)
    return freeze(module)


def _plain(module: nn.Module, headers: dict[Path, Header]) -> Conversion:
    """Where the files' tensors go, each of which is one of the model's."""
    found = convert(module, {n: tuple(e["shape"]) for header in headers.values() for n, e in header.items()})
    odd = next((n for n, entry in found.entries.items() if not isinstance(entry, str)), None)
    if odd is not None:
        raise Unstreamable(f"the library makes something else of tensor {odd} as it reads it")
    return found


def _check_shapes(module: nn.Module, headers: dict[Path, Header], found: Conversion, directory: Path) -> None:
    """Refuse tensors of other shapes than the config's."""
    tensors = module.state_dict(keep_vars=True)
    entries = {n: e for header in headers.values() for n, e in header.items()}
    for name, target in sorted(found.entries.items()):
        stored, wanted = list(entries[name]["shape"]), list(tensors[target].shape)
        if stored != wanted:
            raise CheckpointError(
                f"{directory}: tensor {target} has shape {stored}, the model of config.json wants {wanted}"
            )


def _fill_buffers(module: nn.Module, tensors: Tensors) -> None:
    for name, buffer in module.named_buffers():
        if name in tensors:
            buffer.copy_(tensors.read(name))


def _few(streamed: Streamed) -> Tensor:
    """Return the logits of a few tokens."""
    return logits_of(streamed.module(torch.zeros(1, _TRIAL, dtype=torch.long, device=streamed.device)))


def observe(streamed: Streamed, units: Sequence[Unit]) -> tuple[Chain | None, str | None]:
    """Find the chain and the head of a module on a few tokens, and refuse weights that are not finite.

    Args:
        streamed: the module, whose chain is not known yet.
        units: its units.

    Returns:
        The chain, and the head's path.
    """
    module, seen = streamed.module, set[str]()
    heads = list[str | None]()

    def look(name: str, value: Tensor) -> None:
        check(name, value)
        seen.add(name)

    with _one_by_one(streamed, look):
        chain = find_chain(module, lambda: heads.append(head_of(module, partial(_few, streamed))))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    for unit in units:
        if unit.name not in buffers and not seen.intersection((unit.name, *unit.aliases)):
            check(unit.name, streamed.value(unit.name))
    return chain, heads[0]


def _hands_on_alone(streamed: Streamed, chain: Chain) -> bool:
    """Return whether nobody but a block reads what it is given, which is a matter of code: no file is read for it.

    Rows that stand in for those of the weights are all the same one, which takes no memory.
    """
    shapes = {n: t.shape for n, t in streamed.module.named_parameters(remove_duplicate=False)}
    device = streamed.device

    def stand_in(name: str) -> Tensor:
        shape = shapes[name]
        row = torch.arange(shape[-1] if shape else 1, device=device, dtype=streamed.dtype).sin()
        values = row / len(row) ** 0.5 if len(shape) > 1 else 1 + row / 2
        return values.expand(shape) if shape else values[0]

    other = streamed.variant(Lazy([n for n in shapes if streamed.first.get(n) == n], stand_in))
    with torch.no_grad(), _one_by_one(other, lambda *_: None):
        try:
            wanted = _few(other)
        except Exception as exc:
            if is_shortage(exc):
                raise
            return False
        return hands_on_alone(other.module, partial(_few, other), chain, wanted)


@contextmanager
def _one_by_one(streamed: Streamed, look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Load every module's own weights in front of each call, show them to somebody, and drop them behind it."""
    module = streamed.module
    stacks: dict[str, ExitStack] = {}

    def before(path: str) -> Callable[..., None]:
        def hook(m: nn.Module, *_: Any) -> None:
            stacks[path] = ExitStack()
            streamed.fill(m, path, stacks[path], {}, deep=False)
            for leaf, value in m.named_parameters(recurse=False):
                look(f"{path}.{leaf}" if path else leaf, value)

        return hook

    def behind(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stacks.pop(path).close()

        return hook

    with ExitStack() as hooks:
        for path, m in module.named_modules():
            if any(True for _ in m.parameters(recurse=False)):
                hooks.callback(m.register_forward_pre_hook(before(path)).remove)
                hooks.callback(m.register_forward_hook(behind(path)).remove)
        yield
