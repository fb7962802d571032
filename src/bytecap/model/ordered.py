"""The same sums in the same order every time, on a GPU too.

Kernels that add in whatever order threads arrive differ in the last bits from run to run, and a file with them. PyTorch
has others for most, some of which it takes only where everything else that knows no order is an error: the backward
pass of fused attention is one (a file differed by 15 bytes from fit to fit of one process before).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # strict mode wants it to be set


@contextlib.contextmanager
def same_sums(device: torch.device | str, *, strict: bool = False) -> Iterator[None]:
    """The same sums in the same order every time.

    Args:
        device: of the work.
        strict: let fused attention in, and make whatever knows no order an error.
    """
    if torch.device(device).type == "cpu":
        yield
        return
    switches: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    named = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    switches.fill_uninitialized_memory = False  # which costs time, and hides nothing here
    attention = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION] if strict else [SDPBackend.MATH]
    try:
        with warnings.catch_warnings(), sdpa_kernel(attention):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filled
        if named is None:
            del os.environ[_WORKSPACE]


def can_be_strict(device: torch.device | str, run: Callable[[], None]) -> bool:
    """Whether a piece of the work holds nothing that `same_sums` calls an error when it is strict.

    Args:
        device: of the work.
        run: the piece.
    """
    if torch.device(device).type == "cpu":
        return False
    try:
        with same_sums(device, strict=True):
            run()
    except RuntimeError as exc:
        if "deterministic" not in str(exc):
            raise
        return False
    return True
