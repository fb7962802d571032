"""Hold forward passes that wait in front of modules, and calls that are begun as often as they are needed.

A pass is a coroutine, so a stage's weights can be replaced while many passes wait in front of it, and every pass is run
only once. (Threads instead would each keep a pool of workers and buffers of their own.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from bytecap.allocation.shared_inputs import LostError
from bytecap.model.chain import Chain, let_go

Run = Callable[[nn.Module], Any]  # one forward pass over one batch


class WaitingPass:
    """One forward pass that stops at every point until it is asked for the next one.

    Args:
        model: to run.
        run: the pass.
        stops: points, in calling order.
        spent: the model's chain, if the input of its first block is to be let go of; see `is_spent`.
    """

    def __init__(self, model: nn.Module, run: Run, stops: Sequence[nn.Module], spent: Chain | None = None) -> None:
        self._pass, self._spent, self._first = greenlet(self._run), spent, list[Tensor]()
        self._entrance = None if spent is None else spent.blocks(model)[0]
        self._arguments: tuple[Any, ...] | None = (model, run, stops)
        self._stops = iter(stops)

    def _run(self, model: nn.Module, run: Run, stops: Sequence[nn.Module]) -> None:
        handles = [m.register_forward_pre_hook(self._stop, with_kwargs=True) for m in stops]
        try:
            run(model)
        finally:
            for handle in handles:
                handle.remove()

    def _stop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getcurrent() is self._pass and self._pass.parent is not None:  # else another pass over the same model
            self._pass.parent.switch((module, args, kwargs))

    def advance(self) -> WaitingCall:
        """Return the call of the next point's module.

        Raises:
            LostError: the pass is somewhere else.
        """
        arguments, self._arguments = self._arguments or (), None
        found = self._pass.switch(*arguments)
        while self._first:  # its block has run
            let_go(self._first.pop())
        if not found or found[0] is not next(self._stops):
            raise LostError
        call = WaitingCall(*found)
        if self._spent is not None and call.module is self._entrance:
            self._first.append(self._spent.taken(call.args, call.kwargs))
        return call

    def cancel(self) -> None:
        """Abandon the pass and remove its hooks."""
        self._pass.throw()


def is_spent(model: nn.Module, run: Run, chain: Chain) -> bool:
    """Return whether nobody reads the input of the first block again once that has run.

    The code around the blocks often keeps it, as long as a pass waits: as much as what waits itself. It is tried on a
    pass that has nothing left of its input, and on one behind it, for what outlives a pass (a buffer of the model, a
    batch of the user's). Every value is put back.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        x = chain.taken(args, kwargs)
        kept.append((x, x.data))
        let_go(x)

    wanted = list(_tensors_in(run(model)))
    handle = chain.blocks(model)[0].register_forward_hook(hook, with_kwargs=True)
    try:
        try:
            found = list(_tensors_in(run(model)))
        finally:
            handle.remove()
        later = list(_tensors_in(run(model)))
    except Exception:  # noqa: BLE001 (a model's own code may refuse what is no number in any way)
        return False
    finally:
        for x, values in kept:
            x.data = values
    return bool(wanted) and all(
        len(wanted) == len(other) and all(map(torch.equal, wanted, other)) for other in (found, later)
    )


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a pass's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors_in(part)


class _Reached(Exception):  # noqa: N818 (no error)
    """A call has come to a module, with this input."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@dataclass(frozen=True)
class WaitingCall:
    """A call of a module that has not begun."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def begun(self, chain: Chain) -> Any:
        """Begin the call on a clone of its input, which it may change in place, so that it can be begun again."""
        args, kwargs = chain.given(self.args, self.kwargs, chain.taken(self.args, self.kwargs).clone())
        return self.module(*args, **kwargs)

    def inputs_of(self, inner: nn.Module, chain: Chain | None, stream: str | None = None) -> list[Tensor]:
        """Return the input of the module itself, or of one inside it, which the call is begun for.

        Behind it comes the residual stream that the inner module's output is added to: the input of the module at the
        path `stream` inside this one, which is called before.
        """
        if inner is self.module or chain is None:
            return [self.args[0]]
        streams: list[Tensor] = []

        def passed(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            streams.append(args[0].clone())

        def reached(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Reached(args[0])

        handles = [inner.register_forward_pre_hook(reached)]
        if stream == "":
            streams.append(chain.taken(self.args, self.kwargs))
        elif stream is not None:
            handles.append(self.module.get_submodule(stream).register_forward_pre_hook(passed))
        try:
            self.begun(chain)
        except _Reached as found_there:
            return [found_there.x, *streams]
        finally:
            for handle in handles:
                handle.remove()
        raise LostError
