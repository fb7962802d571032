"""Run the passes of tuning: windows of one move after the other, the KL on them with its gradient, and checks.

Tokens that are tuned on are the recovery text, else the statistics tokens; the correction tokens are for checks only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from bytecap.calibration.kl_gradient import gradient
from bytecap.job import Job
from bytecap.model.determinism import same_sums
from bytecap.model.evaluation import kl_to
from bytecap.model.forward import pass_tokens
from bytecap.model.oom_retry import halving
from bytecap.model.texts import leading, moves

_TOKENS = {"cpu": 2048, "cuda": 16_384}  # of one move
_CHECK_TOKENS = 8192


def tokens_of_move(device: str) -> int:
    """Return the number of tokens of one move.

    >>> tokens_of_move("cpu"), tokens_of_move("cuda:0")
    (2048, 16384)
    """
    return _TOKENS[torch.device(device).type]


@contextlib.contextmanager
def same_again(device: str) -> Iterator[None]:
    """Compute the same sums in the same order every time, with TF32 on a GPU, since gradients are noisier than it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with same_sums(device):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Passes:
    """The passes over one job's tokens.

    Attributes:
        read: tokens that were tuned on so far.
    """

    def __init__(self, job: Job, twin: nn.Module) -> None:
        self._job, self._twin = job, twin
        self._batch = pass_tokens(job.model.module, torch.device(job.device))
        self._pool = list(job.sets.recovery or job.sets.statistics)
        self._source = moves(self._pool, tokens_of_move(job.device), job.seed)
        self.read = 0

    def skip(self, moves: int) -> None:
        """Skip the windows of moves that were made before."""
        for _ in range(moves):
            self.read += sum(w.predicted for w in next(self._source))

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Put values in stored layout into the quantized copy."""
        live = dict(self._twin.state_dict(keep_vars=True))
        for name, found in values.items():
            live[name].data = found.to(live[name].dtype).contiguous()

    def gradients(self, names: Sequence[str]) -> tuple[float, dict[str, Tensor]]:
        """Return KL and gradients on the next windows; batches are halved where the device's memory ends."""
        windows = next(self._source)
        self.read += sum(w.predicted for w in windows)
        model, device = self._job.model.module, self._job.device
        found, self._batch = halving(
            lambda batch: gradient(model, self._twin, names, windows, device=device, batch=batch), windows,
            self._batch, "recovery", self._job.reporter.note,
        )  # fmt: skip
        return found

    def check(self) -> float:
        """Return the KL of the quantized copy on the correction tokens."""
        windows = leading(self._job.sets.correction, _CHECK_TOKENS)
        return kl_to(self._job.model.module, self._twin, windows, device=self._job.device)[0]

    def say_short(self) -> None:
        """Note that the text was shorter than the effort."""
        held = sum(w.predicted for w in self._pool)
        if self.read > held:
            self._job.reporter.note(
                f"recovery: the text of {held:,} tokens was read {self.read / held:.1f} times; more text "
                "(--recover-text) would be of use"
            )
