"""Compute the statistics of calibration once for every model, token set, seed and kind.

Every method asks here: `moments` is the probe's pass, guided or plain, `gradients` the pass of squared gradients. With
a store in the job, what one method has asked for is there for all others and for every other budget; a lock keeps
two processes from computing the same thing at the same time.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bytecap.calibration import finite
from bytecap.calibration.probe import probe
from bytecap.calibration.shared_statistics import flat, shared, whole
from bytecap.calibration.sums import Statistics
from bytecap.calibration.weight_gradients import Gradients, mean_squared_gradients
from bytecap.job import Job
from bytecap.model.checkpoint import Model
from bytecap.model.texts import Window
from bytecap.system import allocator
from bytecap.system.cache import digest, digest_each, library

Array = npt.NDArray[Any]
_ARITHMETIC = ("torch", "numpy", "numba", "transformers")


def environment(device: str) -> list[str]:
    """Return the versions and the hardware that numbers may depend on."""
    found = [library(), *(f"{p} {metadata.version(p)}" for p in _ARITHMETIC if _installed(p)), platform.machine()]
    gpu = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else ""
    return [*found, torch.backends.cpu.get_cpu_capability(), device, gpu]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def windows_key(windows: Sequence[Window]) -> str:
    """Hash token windows."""
    return digest([[list(w.tokens), w.bytes] for w in windows])


def model_key(model: Model) -> str:
    """Hash a model's tensors and side files."""
    about = [[u.name, u.dtype, list(u.aliases)] for u in model.units]
    tensors = (model.tensor(u).detach().cpu().numpy() for u in model.units)
    return digest_each(chain([about], tensors, model.files.values()))


def job_key(job: Job) -> str:
    """Hash everything that statistics depend on."""
    return digest(
        environment(job.device), torch.get_num_threads(), model_key(job.model), windows_key(job.sets.statistics),
        job.seed,
    )  # fmt: skip


def moments(job: Job, *, guided: bool = True) -> Statistics:
    """Probe the model on the statistics tokens, once; the caller may use the result up."""

    def make() -> Statistics:
        return _probed(job, guided)

    if job.store.directory is None:
        return make()
    if job.ranks.size > 1:
        return shared(job, lambda: digest(job_key(job), "moments", guided), make)
    return whole(dict(_once(job, ["moments", guided], lambda: flat(make()))), job.device)


def gradients(job: Job, kind: str) -> Gradients:
    """Return mean squared gradients of the original model on the statistics tokens; see `weight_gradients`."""

    def make() -> dict[str, Array]:
        with job.reporter.step("gradients", sum(w.predicted for w in job.sets.statistics)) as advance:
            found = mean_squared_gradients(
                job.model.module, job.model.units, job.sets.statistics, kind=kind, seed=job.seed,
                device=job.device, progress=advance, note=job.reporter.note,
            )  # fmt: skip
        finite.check_arrays(found.square, job.model)
        arrays: dict[str, Array] = {"tokens": np.array(found.tokens)}
        arrays |= {f"square {n}": t.numpy() for n, t in found.square.items()}
        return arrays | {f"inputs {n}": t.numpy() for n, t in found.inputs.items()}

    kept = _once(job, ["gradients", kind], make)
    parts: dict[str, dict[str, torch.Tensor]] = {"square": {}, "inputs": {}}
    for name, array in kept.items():
        kind, _, unit = name.partition(" ")
        if kind in parts:
            parts[kind][unit] = torch.from_numpy(array)
    return Gradients(parts["square"], parts["inputs"], int(kept["tokens"]))


def _probed(job: Job, guided: bool) -> Statistics:
    def of(windows: Sequence[Window], **more: Any) -> Statistics:
        return probe(
            job.model.module, job.model.units, windows, seed=job.seed, guided=guided, device=job.device, **more
        )  # fmt: skip

    with job.reporter.step("statistics", sum(w.predicted for w in job.sets.statistics)) as advance:
        found = of(job.sets.statistics, progress=advance, note=job.reporter.note, ranks=job.ranks)
    finite.check(found, job.model, job.sets.statistics, of, job.ranks)
    allocator.release()
    return found


def _once(job: Job, kind: list[Any], make: Callable[[], dict[str, Array]]) -> Mapping[str, Array]:
    """Return the arrays of a kind from the cache, or make and keep them."""
    return job.store.once(lambda: digest(job_key(job), *kind), make)
