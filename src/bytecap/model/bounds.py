"""Bounds on what a config may ask for while its module is built: counts, tensors, modules, values and time.

A config of 400 bytes may ask for terabytes, for a million layers, or for a list that its constructor fills for an hour.
Modules are built on torch's `meta` device first, which holds no values, inside `bounded`; only what belongs to
the stored tensors is then built in earnest.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bytecap.errors import ArtifactError, BytecapError, CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]

_COUNTS = re.compile(
    r"layer|block|head|expert|depth|stage|group|level|ngram|codebook|quantizer|iter|inputs|kernel|^pretraining_tp$"
    r"|^(?:num|n)_(?!positions|ctx|embd|embed|inner|words|.*(?:vocab|token|param|sample|step|example|doc|epoch))"
)
_NO_COUNT = ("_id", "_ids", "_dim", "_size", "_token", "_index", "_length", "_embeddings", "_positions")
_MOST_COUNT, _MOST_NUMBER = 1 << 16, 1 << 48
_SPARE_TENSORS, _SPARE_MODULES, _MODULES_PER_TENSOR = 256, 4096, 64
_SPARE_HIDDEN = 1 << 26  # values of buffers that no file stores, beside as many as the file holds
_SPARE_VALUES = 1 << 20  # values that may be asked for beside a multiple of those that are stored
_SECONDS = 120.0  # of the processor, for a module without values
_POLL = 0.25


def check_counts(entries: Iterator[tuple[str, Any]], name: str) -> None:
    """Refuse numbers of a config that no model has.

    Raises:
        CheckpointError: the message names the key.
    """
    for key, value in entries:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not isinstance(number, bool):
                most = _MOST_COUNT if _COUNTS.search(key) and not key.endswith(_NO_COUNT) else _MOST_NUMBER
                if abs(number) > most:
                    raise CheckpointError(
                        f"{name}: {key} is {str(number)[:40]}, more than {most:,}; no model is that large"
                    )


def check_values(
    module: nn.Module, tensors: Mapping[str, Tensor], held: int, name: str, error: type[BytecapError], readers: int
) -> None:
    """Refuse a module on `meta` that would hold far more values than are stored.

    Args:
        module: as its config gives it.
        tensors: its state dict, before tensors were tied that the files tie.
        held: number of values that are stored.
        name: of what holds them, for messages.
        error: to raise.
        readers: times that a stored value may be read under different names.
    """
    asked = sum({id(t): t.numel() for t in tensors.values()}.values())
    if asked > readers * held + _SPARE_VALUES:
        raise error(f"{name}: its config.json asks for {asked:,} values, and {held:,} are stored: correct config.json")
    hidden = sum(b.numel() for n, b in module.named_buffers() if n not in tensors)
    if hidden > _SPARE_HIDDEN + asked:
        raise error(f"{name}: its config.json asks for {hidden:,} values besides the weights, far more than fit")


@contextlib.contextmanager
def bounded(tensors: int, name: str, error: type[BytecapError] = ArtifactError) -> Iterator[None]:
    """End the construction of a module that registers far more than is stored, or that takes minutes.

    Args:
        tensors: number of those that are stored.
        name: of what holds them, for messages.
        error: to raise, out of the constructor.
    """
    from torch.nn.modules import module as hooks

    left = {"tensors": tensors + _SPARE_TENSORS, "modules": _SPARE_MODULES + _MODULES_PER_TENSOR * tensors}

    def count(kind: str) -> None:
        left[kind] -= 1
        if left[kind] < 0:
            raise error(f"{name}: its config.json asks for more {kind} than belong to {tensors:,} stored tensors")

    def tensor(*_: Any) -> None:
        count("tensors")

    def module(*_: Any) -> None:
        count("modules")

    handles = [
        hooks.register_module_parameter_registration_hook(tensor),
        hooks.register_module_buffer_registration_hook(tensor),
        hooks.register_module_module_registration_hook(module),
    ]
    try:
        with hurried(error(f"{name}: a model is not built from its config.json within {_SECONDS:g} seconds")):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _TooLong(BaseException):
    """Raised inside a constructor that takes too long; no `Exception`, which a constructor might catch."""


@contextlib.contextmanager
def hurried(error: BytecapError) -> Iterator[None]:
    """Raise an error out of the block when this thread has used the processor for too long in it.

    The processor's time is counted, not the clock's, so that a busy machine changes nothing. Loops of Python are ended
    wherever they are; a single call of compiled code is not.
    """
    clock = getattr(time, "pthread_getcpuclockid", None)
    me, done = threading.get_ident(), threading.Event()
    if clock is None:  # pragma: no cover (Windows)
        yield
        return
    number = clock(me)
    until = time.clock_gettime(number) + _SECONDS

    def watch() -> None:
        while not done.wait(_POLL):
            if time.clock_gettime(number) > until:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), ctypes.py_object(_TooLong))
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            done.set()
            watcher.join()
            for _ in range(2):  # one that comes late arrives here; cleared, it would leave the interpreter on the watch
                pass
    except _TooLong:
        raise error from None
