"""Pass a model over token windows: batches of similar length, their dtype, and logits from any output.

Every pass goes through here: calibration, gradients, recovery, evaluation.

>>> from bytecap.model.texts import Window
>>> [tuple(ids.shape) for ids, mask in batches([Window((1, 2, 3), 3), Window((4, 5), 2)], tokens=256)]
[(2, 3)]
"""

from __future__ import annotations

import contextlib
import copy
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bytecap.errors import BytecapError, CheckpointError
from bytecap.model.texts import Window
from bytecap.system.allocator import is_shortage, release

GPU_BATCHES = 8  # times the tokens of a processor's batch: a GPU has the room, and is filled only so
_ROUND_LENGTH = 64
_RELEASE_EVERY = 4  # batches; freed blocks would pile up between those that stay

_FOREIGN = re.compile(r"(?:transformers|torch\.autograd)(?:\.|$)")

Progress = Callable[[int], None]
_Found = TypeVar("_Found")


class Counted:
    """Progress of work that may have to begin anew, after which no token counts twice.

    >>> seen = []
    >>> progress = Counted(seen.append)
    >>> progress(3); progress.restart(); progress(4)
    >>> seen
    [3, -3, 4]
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._done = progress, 0

    def __call__(self, tokens: int) -> None:
        """Report so many tokens more."""
        self._done += tokens
        if self._progress is not None:
            self._progress(tokens)

    def restart(self) -> None:
        """Take back all that was reported."""
        if self._done:
            self(-self._done)


def longest_first(windows: Sequence[Window]) -> list[Window]:
    """Return windows in the order in which `batches` holds them."""
    return sorted(windows, key=lambda w: -len(w.tokens))


def batches(windows: Sequence[Window], tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch windows of similar length; yields ids (batch, longest) and a mask (batch, longest - 1) of predictions.

    Lengths are rounded up to multiples of 64 predictions: every new shape costs kernels and buffers that stay.
    """
    order = longest_first(windows)
    longest = len(order[0].tokens) if order else 0
    at = number = 0
    while at < len(order):
        length = min(longest, -(-(len(order[at].tokens) - 1) // _ROUND_LENGTH) * _ROUND_LENGTH + 1)
        group = order[at : at + max(1, tokens // length)]
        ids = torch.zeros(len(group), length, dtype=torch.long)
        mask = torch.zeros(len(group), length - 1, dtype=torch.bool)
        for row, w in enumerate(group):
            ids[row, : len(w.tokens)] = torch.tensor(w.tokens)
            mask[row, : len(w.tokens) - 1] = True
        yield ids, mask
        at += len(group)
        number += 1
        if number % _RELEASE_EVERY == 0:
            release()


@contextlib.contextmanager
def rough_products(device: torch.device | str, *, wanted: bool = True) -> Iterator[None]:
    """Let a GPU multiply float32 matrices with factors of 11 bits (TF32) inside a `with` block, four times as fast.

    For passes that compare plans, whose differences are far larger. A processor is left as it is.
    """
    if not wanted or torch.device(device).type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the processor multiplies it natively, else float32, since emulation is 80 times slower."""
    if device.type == "cuda":  # torch calls it supported where it is emulated, too
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def is_far_faster(device: torch.device) -> bool:
    """Return whether products are far faster in bfloat16: on a GPU that has it, where attention is fused then too."""
    return device.type == "cuda" and fast_dtype(device) == torch.bfloat16


def in_fast_dtype(
    module: nn.Module,
    device: torch.device,
    work: Callable[[torch.dtype], _Found],
    note: Callable[[str], None] = lambda _: None,
    progress: Counted | None = None,
) -> _Found:
    """Run `work`, which differentiates a model, in `fast_dtype`, and once more in float32 where that fails.

    Some classes compute a part in float32 whatever their weights are in, and then multiply both.

    Args:
        module: the model, of transformers.
        device: of the passes.
        work: given the dtype. An error of ours and a lack of memory are no reason to run it again.
        note: told of the second run.
        progress: of the work, which the second run takes back.

    Raises:
        CheckpointError: the model's own code, or torch's backward pass, fails in float32 too.
    """
    first, reason = fast_dtype(device), None
    for dtype in dict.fromkeys((first, torch.float32)):
        if reason is not None:
            note(f"statistics are computed in float32: {_failure(module, reason)} in {str(first)[6:]}")
            if progress is not None:
                progress.restart()
            traceback.clear_frames(reason.__traceback__)  # they hold a copy of the model, and what it has computed
            reason.with_traceback(None)
        try:
            return work(dtype)
        except Exception as exc:
            if isinstance(exc, BytecapError) or is_shortage(exc) or not _foreign(exc):
                raise
            reason = exc
    assert reason is not None  # noqa: S101 (there is a dtype to try)
    raise CheckpointError(
        f"{_failure(module, reason)}, and statistics are gradients: use --method uniform, which needs none"
    ) from reason


def _foreign(exc: BaseException) -> bool:
    """Return whether an error was raised in code of transformers, or on torch's way backward, and not by our own."""
    names = [frame.f_globals.get("__name__") or "" for frame, _ in traceback.walk_tb(exc.__traceback__)]
    return not names[-1].startswith("bytecap.") and any(map(_FOREIGN.match, names))


def _failure(module: nn.Module, exc: BaseException) -> str:
    first = next((line for line in str(exc).splitlines() if line.strip()), "no reason given")
    return f"{type(module).__name__} cannot be differentiated by its own code ({type(exc).__name__}: {first})"


def fast_copy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a model on a device, in a dtype but for what its class asks to keep in float32.

    transformers names such tensors in `_keep_in_fp32_modules_strict`, by parts of their names: their own code computes
    with them in float32 and fails, or routes tokens elsewhere, if they are rounded.
    """
    found = copy.deepcopy(module).to(device, dtype)
    kept = kept_exact(module)
    tensors = dict(module.state_dict(keep_vars=True))
    for name, tensor in found.state_dict(keep_vars=True).items():
        if kept(name) and tensor.is_floating_point():
            tensor.data = tensors[name].data.to(device, torch.float32)
    return found


def kept_exact(module: nn.Module) -> Callable[[str], bool]:
    """Return what says by a tensor's name whether the module's class asks to keep it in float32."""
    kept = getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    if not kept:
        return lambda _: False
    pattern = re.compile("|".join(rf"(?:^|\.){part}(?:$|\.)" for part in sorted(kept)))
    return lambda name: pattern.search(name) is not None


def batch_tokens(vocabulary: int) -> int:
    """Return the tokens a batch may hold for float32 logits near 16 MB; larger ones are not faster on a processor."""
    return max(256, min(1024, 2**22 // max(1, vocabulary)))


def pass_tokens(module: nn.Module, device: torch.device) -> int:
    """Return the tokens a batch may hold in passes without statistics, by the vocabulary in the module's config."""
    return many_tokens(int(getattr(getattr(module, "config", None), "vocab_size", 4096)), device)


def many_tokens(vocabulary: int, device: torch.device | str, windows: Sequence[Window] = ()) -> int:
    """Return the tokens a batch may hold in passes without statistics; of few windows a GPU makes several batches."""
    one, many = batch_tokens(vocabulary), GPU_BATCHES if torch.device(device).type == "cuda" else 1
    return max(one, min(many * one, sum(w.predicted for w in windows) // GPU_BATCHES)) if windows else many * one


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: the tensor itself, or its `.logits`."""
    result: Tensor = output if isinstance(output, Tensor) else output.logits
    return result


def predictions(output: Any, mask: Tensor) -> Tensor:
    """Return the logits (n, vocabulary) of the n predictions in a mask (batch, length), copied only if n is not all."""
    logits = logits_of(output)
    return logits.flatten(0, 1) if bool(mask.all()) else logits[mask]
