"""Collect the statistics of `bytecap.calibration.probe` block by block, in memory that does not grow with depth.

Forward: what goes into every block is kept in work files, in the dtype it was computed in. Backward: from the end,
every block is loaded once more, run again with a graph of its own and gone back through, batch after batch. Its sums
are finished, handed on and dropped before the next block's begin. The operations and the order of all sums are those of
the unstreamed pass, so statistics are the same to the last bit, at two passes forward instead of one.

Logits of large vocabularies exist for a few hundred tokens at a time; signs are then other samples of the same
distribution than those of the unstreamed pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.calibration.embedding_gradients import Lookup
from bytecap.calibration.probe import Statistics, Use, _Collector, fisher_loss_of
from bytecap.model.chain import first_of
from bytecap.model.checkpoint import as_matrix
from bytecap.model.determinism import in_order
from bytecap.model.forward import GPU_BATCHES, Progress, batch_tokens, batches, fast_dtype, predictions
from bytecap.model.head import head_pieces
from bytecap.model.hook_coverage import is_matrix, shrunk_moment
from bytecap.model.linears import linear_weights
from bytecap.model.oom_retry import halving
from bytecap.model.streaming import Pass, Streamed
from bytecap.model.texts import Window
from bytecap.system.allocator import release
from bytecap.system.scratch import KeptTensor, Scratch
from bytecap.types import Unit

Sink = Callable[[str, list[Use]], None]


@dataclass
class _Frame:
    """What goes into one block for one batch, beside the tensor that is handed on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    handed: KeptTensor


def probe_streamed(
    streamed: Streamed,
    units: Sequence[Unit],
    windows: Sequence[Window],
    *,
    sink: Sink,
    scratch: Scratch,
    seed: int = 0,
    guided: bool = True,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
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

    Returns:
        What is no `Use`: diagonals and the number of tokens.
    """
    device = streamed.device
    copied = streamed.copy(fast_dtype(device))

    def work(batch: int) -> Statistics:
        job = _Job(copied, units, list(batches(windows, batch)), scratch, guided, progress)
        return in_order(device, lambda: job.run(sink, torch.Generator(device).manual_seed(seed)))

    found = halving(work, windows, _batch_tokens(copied, units), "statistics", note)[0]
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
        progress: Progress | None,
    ) -> None:
        self.streamed, self.units, self.scratch, self.guided = streamed, units, scratch, guided
        self.data, self.progress = data, progress
        self.tokens = sum(int(mask.sum()) for _, mask in data)
        names = {n: u for u in units for n in (u.name, *u.aliases)}
        self.looked = _looked_up(streamed, _tables(streamed, names))
        self.frames: list[list[_Frame]] = []
        self.diagonal: dict[str, Tensor] = {}
        self.ends: list[Any] = []

    def run(self, sink: Sink, generator: torch.Generator) -> Statistics:
        """Forward, then backward from the end."""
        self.diagonal = {}
        chain = self.streamed.chain
        passes = self._forward()
        outside = self._sums(lambda name: not chain.holds(name))
        with outside.watching():
            gradients = self._suffix(passes, outside, generator)
            for number in reversed(range(chain.count)):
                self._block(number, gradients, sink)
            self._prefix(gradients, outside)
        self._finish(outside, sink)
        return Statistics({}, {n: (d / self.tokens).cpu().numpy() for n, d in self.diagonal.items()}, self.tokens)

    def _run(self, ids: Tensor, module: nn.Module) -> Any:
        return module(ids[:, :-1].to(self.streamed.device))

    def _forward(self) -> list[Pass]:
        """Every batch up to the end of the last block; what goes into each block is kept."""
        streamed = self.streamed
        passes = [Pass(streamed, partial(self._run, ids)) for ids, _ in self.data]
        self.frames = []
        with torch.no_grad():
            with streamed.outside():
                stops = [p.advance() for p in passes]
            for number in range(streamed.chain.count):
                self.frames.append([self._frame(*stop) for stop in stops])
                with streamed.block(number):
                    for i, p in enumerate(passes):
                        stops[i] = p.advance()
                release()
        self.ends = stops
        return passes

    def _frame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Frame:
        chain = self.streamed.chain
        kept = self.scratch.put(chain.taken(args, kwargs))
        return _Frame(*chain.given(args, kwargs, None), kept)

    def _suffix(self, passes: list[Pass], sums: _Sums, generator: torch.Generator) -> list[Tensor]:
        """From the last block's output to the loss and back; returns that output's gradient for every batch."""
        gradients = []
        try:
            with self.streamed.outside(), torch.enable_grad():
                for i, p in enumerate(passes):
                    leaf = self.ends[i].detach().requires_grad_()
                    self.ends[i] = None
                    mask = self.data[i][1].to(self.streamed.device)
                    with head_pieces(self.streamed, int(mask.sum())) as pieces:
                        found = predictions(p.advance(leaf), mask)
                    pieces.backward(found, lambda logits: fisher_loss_of(logits, generator))
                    gradients.append(_gradient(leaf))
                    del found, leaf
                    sums.harvest(self.diagonal)
        finally:
            for p in passes:
                p.cancel()
        return gradients

    def _block(self, number: int, gradients: list[Tensor], sink: Sink) -> None:
        """Through one block again, and back; gradients become those of its input."""
        streamed = self.streamed
        prefix = f"{streamed.chain.path}.{number}."
        sums = self._sums(lambda name: name.startswith(prefix))
        frames = self.frames.pop()
        with sums.watching(), streamed.block(number) as block, torch.enable_grad():
            for i, frame in enumerate(frames):
                leaf = frame.handed.load(streamed.device).detach().requires_grad_()
                args, kwargs = streamed.chain.given(frame.args, frame.kwargs, leaf)
                torch.autograd.backward(first_of(block(*args, **kwargs)), gradients[i])
                gradients[i] = _gradient(leaf)
                sums.harvest(self.diagonal)
                if self.progress is not None:
                    self.progress(0)
        del frames
        release()
        self._finish(sums, sink)

    def _prefix(self, gradients: list[Tensor], sums: _Sums) -> None:
        """From the ids to the first block's input, and back."""
        streamed = self.streamed
        with streamed.outside(), torch.enable_grad():
            for i, (ids, mask) in enumerate(self.data):
                p = Pass(streamed, partial(self._run, ids))
                try:
                    handed = streamed.chain.taken(*p.advance())
                    if handed.requires_grad:
                        torch.autograd.backward(handed, gradients[i])
                finally:
                    p.cancel()
                sums.harvest(self.diagonal)
                if self.progress is not None:
                    self.progress(int(mask.sum()))

    def _sums(self, inside: Callable[[str], bool]) -> _Sums:
        return _Sums(self.streamed, self.units, inside, self.looked, self.guided)

    def _finish(self, sums: _Sums, sink: Sink) -> None:
        for name, uses in sums.uses(len(self.data)):
            sink(name, uses)
            release()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class _Sums:
    """The sums of the units in one part of a module: a block, or what is outside of them."""

    def __init__(
        self, streamed: Streamed, units: Sequence[Unit], inside: Callable[[str], bool], looked: set[str], guided: bool
    ) -> None:
        names = {n: u for u in units for n in (u.name, *u.aliases)}
        module, device = streamed.module, streamed.device
        self._module, self._device = module, device
        self._linear: list[tuple[str, nn.Module, _Collector]] = []
        self._table: dict[str, tuple[str, nn.Module, _Collector]] = {}
        for n, (m, kind) in linear_weights(module).items():
            if n not in names or not inside(n):
                continue
            weight: Tensor = m.weight  # type: ignore[assignment]
            rows, cols = weight.shape[::-1] if kind == "conv1d" else weight.shape
            collector = _Collector(rows, cols, guided, device)
            if kind == "embedding":
                self._table[names[n].name] = n, m, collector
            else:
                self._linear.append((names[n].name, m, collector))
        self._lookup = looked & self._table.keys()
        chosen = {
            n: names[n] for n, p in module.named_parameters()
            if n in names and inside(n) and not names[n].linear and p.is_floating_point()
        }  # fmt: skip
        self._matrix = {n: (u, _Collector(*u.matrix_shape, guided, device)) for n, u in chosen.items() if is_matrix(u)}
        self._other = {n: u.name for n, u in chosen.items() if not is_matrix(u)}
        streamed.trained |= {n for name, (n, _, _) in self._table.items() if name not in looked} | chosen.keys()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect, inside a `with` block."""
        handles = [m.register_forward_hook(c.forward_hook) for _, m, c in self._linear]
        for name in self._lookup:
            _, m, c = self._table[name]
            handles.append(m.register_forward_hook(Lookup(c.moment, c.rows, c.weight).forward_hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def harvest(self, diagonal: dict[str, Tensor]) -> None:
        """Add this batch's squared gradients to the sums, and clear them."""
        for name, (at, _, c) in self._table.items():
            p = self._module.get_parameter(at)
            if name not in self._lookup and p.grad is not None:
                g = p.grad.float()
                square = g.square().sum(1)
                c.add_gradient(square, g[square.nonzero()[:, 0]])
            p.grad = None
        for at, (unit, c) in self._matrix.items():
            p = self._module.get_parameter(at)
            if p.grad is not None:
                g = as_matrix(unit, p.grad.float())
                c.add_gradient(g.square().sum(1), g)
            p.grad = None
        for at, name in self._other.items():
            p = self._module.get_parameter(at)
            if name not in diagonal:
                diagonal[name] = torch.zeros(p.shape, dtype=torch.float64, device=self._device)
            if p.grad is not None:
                diagonal[name] += p.grad.double().square()
            p.grad = None

    def uses(self, passes: int) -> Iterator[tuple[str, list[Use]]]:
        """Yield every unit with its finished uses, whose sums are dropped; to be called once.

        Args:
            passes: batches that were gone through.
        """
        found: dict[str, list[_Collector]] = {}
        for name, _, c in self._linear:
            found.setdefault(name, []).append(c)
        for name, (_, _, c) in self._table.items():
            found.setdefault(name, []).append(c)
        self._linear.clear()
        self._table.clear()
        for name in list(found):
            yield name, [c.use() for c in found.pop(name)]
        for unit, c in self._matrix.values():
            use = c.use()
            use.moment = shrunk_moment(use.moment, passes * len(use.rows))
            yield unit.name, [use]
        self._matrix.clear()
