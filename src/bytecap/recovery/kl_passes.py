"""Run the passes of tuning: the windows of every iteration, the KL on them with its gradient, and validations.

Tokens that are tuned on are the recovery text, else the statistics tokens; the correction tokens are for checks only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from bytecap.calibration.kl_gradient import gradient
from bytecap.job import Job
from bytecap.model import streaming
from bytecap.model.determinism import same_sums
from bytecap.model.evaluation import kl_to
from bytecap.model.forward import is_far_faster, logits_of, pass_tokens, rough_products
from bytecap.model.oom_retry import halving
from bytecap.model.texts import Window, iteration_windows, leading
from bytecap.system.allocator import is_shortage

_TOKENS = {"cpu": 2048, "cuda": 16_384}  # of one iteration
_A_BATCH = 20 * 2**30  # bytes of a GPU's memory for every batch of `pass_tokens` in one pass
_CHECK_TOKENS = 8192
_REMEMBERED = {"cpu": 2**27, "cuda": 2**31}  # bytes of the original's logits on them


def tokens_of_iteration(device: str) -> int:
    """Return the number of tokens of one iteration.

    >>> tokens_of_iteration("cpu"), tokens_of_iteration("cuda:0")
    (2048, 16384)
    """
    return _TOKENS[torch.device(device).type]


def _many(device: torch.device) -> int:
    """Return by how much passes are larger on a GPU of much memory, which spends small ones on starting kernels."""
    if device.type != "cuda":
        return 1
    return min(8, max(1, torch.cuda.get_device_properties(device).total_memory // _A_BATCH))


@contextlib.contextmanager
def same_again(device: str) -> Iterator[None]:
    """Compute the same sums in the same order every time, with TF32 on a GPU, since gradients are noisier than it."""
    with rough_products(device), same_sums(device):
        yield


class _Remembered(nn.Module):
    """The original as checks read it: logits of the same tokens are computed once, as far as memory allows."""

    def __init__(self, module: nn.Module, most: int) -> None:
        """Remember up to `most` bytes of logits."""
        super().__init__()
        self.module, self.config = module, getattr(module, "config", None)
        self._kept: dict[bytes, Tensor] = {}
        self._left = most

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of a batch of tokens."""
        key = ids.cpu().numpy().tobytes() + bytes(str(ids.shape), "ascii")
        if key not in self._kept:
            found = logits_of(self.module(ids))
            size = found.numel() * found.element_size()
            if size > self._left:
                return found
            self._left -= size
            self._kept[key] = found
        return self._kept[key]


class Passes:
    """The passes over one job's tokens.

    Attributes:
        read: tokens that were tuned on so far.
        iterations: gradients that were taken so far.
        curve: (seconds, iterations, KL on the correction tokens) of every check, the progress of a recovery.
    """

    def __init__(self, job: Job, quantized_copy: nn.Module) -> None:
        self._job, self._quantized_copy = job, quantized_copy
        device = torch.device(job.device)
        self._batch = pass_tokens(job.model.module, device) * _many(device)
        self._pool = list(job.sets.recovery or job.sets.statistics)
        self._source = iteration_windows(self._pool, tokens_of_iteration(job.device), job.seed)
        self.read, self.iterations = 0, 0
        original = job.model.module
        remembered = streaming.of(original) is None  # a streamed model gives no logits of a batch
        most = _REMEMBERED[device.type]
        self._checked = _Remembered(original, most) if remembered else original
        self._fast = is_far_faster(device) and remembered
        self.curve: list[tuple[float, int, float]] = []
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the passes were made, with those of a run that was killed."""
        return time.monotonic() - self._started

    def skip(self, iterations: int, seconds: float = 0.0) -> None:
        """Skip the windows of iterations that were made before, in so many seconds."""
        self._started -= seconds
        self.iterations += iterations
        for _ in range(iterations):
            self.read += sum(w.predicted for w in next(self._source))

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Put values in stored layout into the quantized copy."""
        parameters = dict(self._quantized_copy.state_dict(keep_vars=True))
        for name, found in values.items():
            parameters[name].data = found.to(parameters[name].dtype).contiguous()

    def windows(self) -> list[Window]:
        """Return the windows of the next iteration."""
        found = next(self._source)
        self.read += sum(w.predicted for w in found)
        self.iterations += 1
        return found

    def gradients(self, names: Sequence[str]) -> tuple[float, dict[str, Tensor]]:
        """Return KL and gradients on the next windows; batches are halved where the device's memory ends."""
        windows = self.windows()
        model, device = self._job.model.module, self._job.device

        def work(batch: int) -> tuple[float, dict[str, Tensor]]:
            with same_sums(device, strict=True) if self._fast else contextlib.nullcontext():
                return gradient(
                    model, self._quantized_copy, names, windows, device=device, batch=batch, fast=self._fast
                )  # fmt: skip

        why = ""
        try:
            found, self._batch = halving(work, windows, self._batch, "recovery", self._job.reporter.note)
        except RuntimeError as exc:
            if not self._fast or is_shortage(exc):
                raise
            why = str(exc).partition("\n")[0]
        if why:  # behind the handler, which would hold what the first try has computed
            self._fast = False
            self._job.reporter.note(f"recovery multiplies in float32: {why}")
            found, self._batch = halving(work, windows, self._batch, "recovery", self._job.reporter.note)
        return found

    def backward(self, values: Mapping[str, Tensor]) -> float:
        """Return the KL of values in stored layout on the next windows, and go back from it through their graphs."""
        self.load({n: v.detach() for n, v in values.items()})
        kl, found = self.gradients(list(values))
        torch.autograd.backward(list(values.values()), [found[n].to(v.dtype) for n, v in values.items()])
        return kl

    def check(self) -> float:
        """Return the KL of the quantized copy on the correction tokens."""
        windows = leading(self._job.sets.correction, _CHECK_TOKENS)
        kl = kl_to(self._checked, self._quantized_copy, windows, device=self._job.device)[0]
        self.curve.append((round(self.seconds, 2), self.iterations, kl))
        return kl

    def say_short(self) -> None:
        """Note that the text was shorter than the effort."""
        held = sum(w.predicted for w in self._pool)
        if self.read > held:
            self._job.reporter.note(
                f"recovery: the text of {held:,} tokens was read {self.read / held:.1f} times; more text "
                "(--recover-text) would be of use"
            )
