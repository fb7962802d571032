"""Compute the same sums in the same order every time, on a GPU too.

Kernels that add in whatever order threads arrive differ in the last bits from run to run, and a file with them. PyTorch
has others for most, some of which it takes only where everything else that knows no order is an error: the backward
pass of fused attention is one (a file differed by 15 bytes from fit to fit of one process before).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_Found = TypeVar("_Found")


def ask_for_order() -> None:
    """Set what strict mode asks of cuBLAS before a GPU is first used; a setting of the user's own stays."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextlib.contextmanager
def same_sums(device: torch.device | str, *, strict: bool = False) -> Iterator[None]:
    """Compute the same sums in the same order every time, inside a `with` block.

    Args:
        device: of the work.
        strict: let fused attention in, and make whatever knows no order an error.
    """
    if torch.device(device).type == "cpu":
        yield
        return
    switches: Any = torch.utils.deterministic
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    switches.fill_uninitialized_memory = False  # which costs time, and hides nothing here
    attention = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION] if strict else [SDPBackend.MATH]
    try:
        with warnings.catch_warnings(), sdpa_kernel(attention):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        switches.fill_uninitialized_memory = filled


def in_order(device: torch.device | str, work: Callable[[], _Found]) -> _Found:
    """Return the result of `work` with sums in one order, without fused attention where something else has no order.

    Args:
        device: of the work.
        work: may be done twice.
    """
    try:
        with same_sums(device, strict=True):
            return work()
    except RuntimeError as exc:
        if "deterministic" not in str(exc):
            raise
    with same_sums(device):
        return work()
