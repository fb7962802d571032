"""Collect the statistics of `bytecap.calibration.probe` block by block, in memory that does not grow with depth.

Forward: what goes into every block is kept in work files, in the dtype it was computed in. Backward: from the end,
every block is loaded once more, run again with a graph of its own and gone back through, batch after batch. Its sums
are finished, handed on and dropped before the next block's begin. The operations and the order of all sums are those of
the unstreamed pass, so statistics are the same to the last bit, at two passes forward instead of one.

Logits of large vocabularies exist for a few hundred tokens at a time; signs are then other samples of the same
distribution than those of the unstreamed pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bytecap.calibration import divided
from bytecap.calibration.collectors import Use
from bytecap.calibration.probe import fisher_loss_of
from bytecap.calibration.streamed_sums import PartSums
from bytecap.calibration.sums import Statistics
from bytecap.errors import UsageError
from bytecap.model.chain import first_of
from bytecap.model.determinism import in_order
from bytecap.model.forward import GPU_BATCHES, Counted, Progress, batch_tokens, batches, in_fast_dtype, predictions
from bytecap.model.head import head_pieces
from bytecap.model.hook_coverage import is_matrix
from bytecap.model.linears import linear_weights
from bytecap.model.oom_retry import halving
from bytecap.model.streaming import Pass, Streamed
from bytecap.model.texts import Window
from bytecap.system.allocator import release
from bytecap.system.ranks import ALONE, Ranks
from bytecap.system.scratch import KeptTensor, Scratch
from bytecap.types import Unit

Take = Callable[[str, list[Use]], None]


@dataclass
class _Frame:
    """The arguments of one block for one batch, beside the tensor that is handed on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    handed: KeptTensor


def probe_streamed(
    streamed: Streamed,
    units: Sequence[Unit],
    windows: Sequence[Window],
    *,
    sink: Take,
    scratch: Scratch,
    seed: int = 0,
    guided: bool = True,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
    ranks: Ranks = ALONE,
    share: Callable[[Mapping[str, int]], None] = lambda _: None,
) -> Statistics:
    """Collect the statistics of all units of a streamed model.

    Args:
        streamed: the model; left as it is.
        units: its units.
        windows: calibration windows.
        sink: given every unit with its uses as soon as they are complete; may be given a unit again after a retry.
        scratch: for work files.
        seed: of the signs that predictions are summed with.
        guided: see `bytecap.calibration.probe.probe`.
        progress: called with the number of tokens finished.
        note: told where the device's memory asks for smaller batches.
        ranks: processes that share the windows; each unit's uses are given to one rank's sink.
        share: called on all ranks behind the sink, block by block, with the rank that was given each unit.

    Returns:
        What is no `Use`: diagonals and the number of tokens.
    """
    device, counted = streamed.device, Counted(progress)

    def passes(dtype: torch.dtype) -> Statistics:
        copied = streamed.copy(dtype)

        def work(batch: int) -> Statistics:
            job = _Job(copied, units, list(batches(windows, batch)), scratch, guided, counted, ranks)
            return in_order(device, lambda: job.run(sink, share, torch.Generator(device).manual_seed(seed)))

        return halving(work, windows, _batch_tokens(copied, units), "statistics", note, counted)[0]

    found = in_fast_dtype(streamed.module, device, passes, note, counted)
    release()
    return found


def _batch_tokens(streamed: Streamed, units: Sequence[Unit]) -> int:
    """Tokens of a batch, as the unstreamed pass chooses them."""
    names = {n: u for u in units for n in (u.name, *u.aliases)}
    parameters = [(n, p) for n, p in streamed.module.named_parameters() if n in names and not names[n].linear]
    if any(is_matrix(names[n]) for n, p in parameters if p.is_floating_point()):
        return 1
    tables = _tables(streamed, names)
    looked = _looked_up(streamed, tables)
    many = GPU_BATCHES if streamed.device.type == "cuda" and looked == set(tables) else 1
    return many * batch_tokens(max((len(m.weight) for m in tables.values()), default=4096)) // 2  # type: ignore[arg-type]


def _tables(streamed: Streamed, names: dict[str, Unit]) -> dict[str, nn.Module]:
    """Embedding modules by the name of their weight's unit."""
    found = linear_weights(streamed.module).items()
    return {names[n].name: m for n, (m, kind) in found if kind == "embedding" and n in names}


def _looked_up(streamed: Streamed, tables: dict[str, nn.Module]) -> set[str]:
    """Names of tables in which a pass looks up its own ids, once; a table read raw would have no values here."""
    ids = torch.tensor([[0, 1, 2], [2, 1, 0]], device=streamed.device)
    calls: dict[str, list[bool]] = {n: [] for n in tables}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            calls[name].append(len(args) == 1 and isinstance(args[0], Tensor) and torch.equal(args[0], ids))

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in tables.items()]
    trial = Pass(streamed, lambda module: module(ids))
    try:
        with torch.no_grad(), streamed.outside():
            trial.advance()
    finally:
        trial.cancel()
        for handle in handles:
            handle.remove()
    return {n for n, found in calls.items() if found == [True]}


class _Job:
    """One pass forward and backward with one size of batches."""

    def __init__(
        self,
        streamed: Streamed,
        units: Sequence[Unit],
        data: list[tuple[Tensor, Tensor]],
        scratch: Scratch,
        guided: bool,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self.streamed, self.units, self.scratch, self.guided = streamed, units, scratch, guided
        self.data, self.progress, self.ranks = data, progress, ranks
        self.own = range(ranks.rank, len(data), ranks.size)  # batches of this rank
        self.tokens = sum(int(mask.sum()) for _, mask in data)
        names = {n: u for u in units for n in (u.name, *u.aliases)}
        self.looked = _looked_up(streamed, _tables(streamed, names))
        self.frames: list[dict[int, _Frame]] = []
        self.diagonal: dict[str, npt.NDArray[np.float64]] = {}
        self.ends: dict[int, Any] = {}

    def run(self, sink: Take, share: Callable[[Mapping[str, int]], None], generator: torch.Generator) -> Statistics:
        """Forward, then backward from the end."""
        self.diagonal = {}
        chain = self.streamed.chain
        passes = {i: Pass(self.streamed, partial(self._run, self.data[i][0])) for i in self.own}
        try:
            self._forward(passes)
            outside = self._sums(lambda name: not chain.holds(name))
            with outside.watching():
                gradients = self._suffix(passes, outside, generator)
                for number in reversed(range(chain.count)):
                    self._block(number, gradients, sink, share)
                self._prefix(gradients, outside)
        finally:
            for p in passes.values():  # where memory or the disk has ended, nothing may hold what waits
                p.cancel()
            self.frames, self.ends = [], {}
        self._finish(outside, sink, share)
        diagonal: dict[str, npt.NDArray[np.float64]] = {}
        for part in self.ranks.all(self.diagonal):
            diagonal |= part
        return Statistics({}, diagonal, self.tokens)

    def _through(
        self, sums: PartSums, run: Callable[[int], None], skip: Callable[[int], None], done: Callable[[int], None]
    ) -> None:
        """Have all batches passed, each by its rank, and what they say taken up."""
        if self.ranks.size > 1:
            sinks, owner, device = sums.sinks(), sums.owner, self.streamed.device
            divided.passes(
                [s for _, s in sinks], [owner[n] for n, _ in sinks], len(self.data), self.ranks, device, run, skip, done
            )  # fmt: skip
            return
        for i in self.own:
            run(i)
            done(i)

    def _run(self, ids: Tensor, module: nn.Module) -> Any:
        return module(ids[:, :-1].to(self.streamed.device))

    def _forward(self, passes: dict[int, Pass]) -> None:
        """Every batch up to the end of the last block; what goes into each block is kept."""
        streamed = self.streamed
        self.frames = []
        with torch.no_grad():
            with streamed.outside():
                stops = {i: p.advance() for i, p in passes.items()}
            for number in range(streamed.chain.count):
                self.frames.append({i: self._frame(*stop) for i, stop in stops.items()})
                with streamed.block(number):
                    for i, p in passes.items():
                        stops[i] = p.advance()
                release()
        self.ends = stops

    def _frame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Frame:
        chain = self.streamed.chain
        kept = self.scratch.put(chain.taken(args, kwargs))
        return _Frame(*chain.given(args, kwargs, None), kept)

    def _suffix(self, passes: dict[int, Pass], sums: PartSums, generator: torch.Generator) -> dict[int, Tensor]:
        """From the last block's output to the loss and back; returns that output's gradient for every batch."""
        gradients: dict[int, Tensor] = {}

        def run(i: int) -> None:
            leaf = self.ends.pop(i).detach().requires_grad_()
            mask = self.data[i][1].to(self.streamed.device)
            with head_pieces(self.streamed, int(mask.sum())) as pieces:
                found = predictions(passes[i].advance(leaf), mask)
            pieces.backward(found, lambda logits: fisher_loss_of(logits, generator))
            gradients[i] = _gradient(leaf)
            del found, leaf
            sums.harvest()

        with self.streamed.outside(), torch.enable_grad():
            self._through(sums, run, partial(self._skip, generator), lambda _: None)
        return gradients

    def _skip(self, generator: torch.Generator, i: int) -> None:
        """Draw the noise of a batch that another rank passes."""
        path, tokens = self.streamed.head, int(self.data[i][1].sum())
        if path is None:
            raise UsageError("logits are not the output of a linear map, so passes cannot be divided: use one process")
        head: Any = self.streamed.module.get_submodule(path)
        with head_pieces(self.streamed, tokens) as pieces:
            rows = pieces.rows
        for at in range(0, tokens, rows):
            noise = torch.empty(min(rows, tokens - at), head.out_features, device=self.streamed.device)
            noise.bernoulli_(0.5, generator=generator)

    def _block(
        self, number: int, gradients: dict[int, Tensor], sink: Take, share: Callable[[Mapping[str, int]], None]
    ) -> None:
        """Through one block again, and back; gradients become those of its input."""
        streamed = self.streamed
        prefix = f"{streamed.chain.path}.{number}."
        sums = self._sums(lambda name: name.startswith(prefix))
        frames = self.frames.pop()

        def run(i: int) -> None:
            leaf = frames[i].handed.load(streamed.device).detach().requires_grad_()
            args, kwargs = streamed.chain.given(frames[i].args, frames[i].kwargs, leaf)
            torch.autograd.backward(first_of(block(*args, **kwargs)), gradients[i])
            gradients[i] = _gradient(leaf)
            sums.harvest()

        with sums.watching(), streamed.block(number) as block, torch.enable_grad():
            self._through(sums, run, lambda _: None, lambda _: self.progress(0))
        frames.clear()
        release()
        self._finish(sums, sink, share)

    def _prefix(self, gradients: dict[int, Tensor], sums: PartSums) -> None:
        """From the ids to the first block's input, and back."""
        streamed = self.streamed

        def run(i: int) -> None:
            p = Pass(streamed, partial(self._run, self.data[i][0]))
            try:
                handed = streamed.chain.taken(*p.advance())
                if handed.requires_grad:
                    torch.autograd.backward(handed, gradients[i])
            finally:
                p.cancel()
            sums.harvest()

        with streamed.outside(), torch.enable_grad():
            self._through(sums, run, lambda _: None, lambda i: self.progress(int(self.data[i][1].sum())))

    def _sums(self, inside: Callable[[str], bool]) -> PartSums:
        return PartSums(self.streamed, self.units, inside, self.looked, self.guided, self.ranks)

    def _finish(self, sums: PartSums, sink: Take, share: Callable[[Mapping[str, int]], None]) -> None:
        self.diagonal |= {n: (d / self.tokens).cpu().numpy() for n, d in sums.diagonals().items()}
        shared = sums.used()
        for name, uses in sums.uses(len(self.data)):
            sink(name, uses)
            release()
        if self.ranks.size > 1:
            share(shared)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
