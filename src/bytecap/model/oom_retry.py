"""Retry with smaller batches where a device's memory ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from bytecap.model.forward import Counted
from bytecap.model.texts import Window

_Found = TypeVar("_Found")


def halving(
    work: Callable[[int], _Found], windows: Sequence[Window], batch: int, what: str,
    note: Callable[[str], None] = lambda _: None, progress: Counted | None = None,
) -> tuple[_Found, int]:  # fmt: skip
    """Run `work` with `batch` tokens a batch, halved while memory does not suffice; returns its result and the batch.

    Args:
        work: given the tokens of a batch.
        windows: that it works on.
        batch: to begin with.
        what: the job, for messages.
        note: told about every halving.
        progress: of the work, which is taken back where it begins anew.

    Raises:
        MemoryError: not even one window fits.
    """
    while True:
        try:
            return work(batch), batch
        except torch.OutOfMemoryError:
            if batch < 2 * max(w.predicted for w in windows):
                raise MemoryError(f"{what}: the device's memory does not hold one window") from None
            batch //= 2
            torch.cuda.empty_cache()
            if progress is not None:
                progress.restart()
            note(f"{what}: out of device memory, {batch:,} tokens a batch from now on")
