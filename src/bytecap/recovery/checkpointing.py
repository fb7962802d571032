"""Keep a job's stages in the cache, so that a run that was killed goes on from where it was.

Kept are, each as soon as it is known: the statistics, the correction factors, the chosen plan, the drift targets; and
at most once a minute the progress of long runs of iterations (recovery, uptraining, a search for layers to share).
Arrays are kept bit by bit and numbers as text that reads back exactly, so a run that goes on gives the same bytes as
one that was never disturbed. Names are hashes of all that a value depends on: tensors, tokens, options, budget, seed,
device, thread count, and the versions of this library, of its source and of those that do the arithmetic.

Omitted: plans over overlays are made anew (from the kept statistics and factors), and jobs whose loss or forward
pass is the user's own code keep nothing, since code cannot be hashed for all that it calls.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bytecap.calibration.statistics import job_key, windows_key
from bytecap.job import Job
from bytecap.model import streaming
from bytecap.system.cache import Store, digest

if TYPE_CHECKING:
    from bytecap.quantization.options import Options

SECONDS = 60.0  # between two times that a course is kept, at least
_ABOUT = "about"  # entry of what JSON holds


class StageCheckpoints:
    """The later stages of one job in its cache."""

    def __init__(self, job: Job, options: Options, capacity: float) -> None:
        """`capacity`, the bytes left for planned units, stands for side files and code.

        A streamed fit may search on samples of rows, so its plan is not that of a fit in memory.
        """
        self._job = job
        streamed = ["streamed"] if streaming.of(job.model.module) is not None else []
        self._key = "" if job.store.directory is None else digest(
            job_key(job), asdict(options), capacity, job.budget, list(job.paths),
            windows_key(job.sets.correction), job.base.sha256 if job.base else "", *streamed,
        )  # fmt: skip

    @property
    def active(self) -> bool:
        """Whether anything is kept."""
        return bool(self._key)

    def get(self, stage: str) -> Any:
        """Return the JSON value of a stage, or None."""
        return self._job.store.get(digest(self._key, stage)) if self._key else None

    def put(self, stage: str, value: Any) -> None:
        """Keep a stage's JSON value."""
        if self._key:
            self._job.store.put(digest(self._key, stage), value)

    def tensors(self, stage: str) -> dict[str, Tensor] | None:
        """Return the tensors of a stage by unit name, on the job's device, or None."""
        kept = self._job.store.arrays(digest(self._key, stage)) if self._key else None
        if kept is None:
            return None
        return {n.partition(" ")[2]: torch.from_numpy(kept.pop(n)).to(self._job.device) for n in list(kept)}

    def put_tensors(self, stage: str, values: Mapping[str, Tensor]) -> None:
        """Keep a stage's tensors."""
        if self._key:
            arrays = {f"unit {n}": t.contiguous().cpu().numpy() for n, t in values.items()}
            self._job.store.put_arrays(digest(self._key, stage), arrays)


class ProgressCheckpoint:
    """A run of iterations whose state is kept from time to time under one key, replacing the one before."""

    def __init__(self, store: Store, *parts: Any) -> None:
        """`parts` are all that the iterations depend on, see `bytecap.system.cache.digest`."""
        self._store, self._parts = store, parts
        self._last = time.monotonic()

    def under(self, *parts: Any) -> ProgressCheckpoint:
        """Return the course of one stage, which depends on more values."""
        return ProgressCheckpoint(self._store, *self._parts, *parts)

    def put(self, state: Callable[[], tuple[Mapping[str, Tensor], Any]], *, now: bool = False) -> None:
        """Keep tensors and JSON values if the last time is long enough ago, or `now`."""
        if self._store.directory is None or (not now and time.monotonic() - self._last < SECONDS):
            return
        tensors, about = state()
        arrays = {n: t.detach().cpu().contiguous().numpy() for n, t in tensors.items()}
        arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        self._store.put_arrays(digest(*self._parts), arrays)
        self._last = time.monotonic()

    def get(self) -> tuple[dict[str, Tensor], Any] | None:
        """Return the state kept last, with tensors on the CPU, or None."""
        arrays = None if self._store.directory is None else self._store.arrays(digest(*self._parts))
        if arrays is None:
            return None
        about = json.loads(arrays.pop(_ABOUT).tobytes())
        return {n: torch.from_numpy(a) for n, a in arrays.items()}, about
