"""What a job keeps in its store, so that a run that was killed goes on from where it was.

Kept are, each as soon as it is known: the statistics, the correction factors, the chosen plan, the drift targets.
Arrays are kept bit by bit and numbers as text that reads back exactly, so a run that goes on gives the same bytes as
one that was never disturbed. Names are hashes of all that a value depends on: tensors, tokens, options, budget, seed,
device, thread count, and the versions of this library, of its source and of those that do the arithmetic.

Omitted: plans over exception paths are made anew (from the kept statistics and factors), and jobs whose loss or forward
pass is the user's own code keep nothing, since code cannot be hashed for all that it calls.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.coders import Shared
from bytecap.frequencies import Table, Tables
from bytecap.methods import Job
from bytecap.model.probe import Statistics, Use
from bytecap.rounding import Shrink
from bytecap.store import digest, library

if TYPE_CHECKING:
    from bytecap.model.checkpoint import Model
    from bytecap.model.text import Window
    from bytecap.sweep import Options

Rules = tuple[Shared, Shrink]
_ARITHMETIC = ("torch", "numpy", "numba", "transformers")


def environment(device: str) -> list[str]:
    """Versions and hardware that numbers may depend on."""
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
    """Hash of token windows."""
    return digest([[list(w.tokens), w.bytes] for w in windows])


def model_key(model: Model) -> str:
    """Hash of a model's tensors and side files."""
    tensors = (model.tensor(u).detach().cpu().numpy() for u in model.units)
    return digest([[u.name, u.dtype, list(u.aliases)] for u in model.units], *tensors, *model.files.values())


def statistics_key(job: Job, options: Options) -> str:
    """Name of the statistics: they depend on no budget."""
    return digest(
        environment(job.device), torch.get_num_threads(), model_key(job.model), windows_key(job.sets.statistics),
        job.seed, options.groups, options.guided, "statistics",
    )  # fmt: skip


def keep_statistics(job: Job, key: str, found: Statistics) -> None:
    """Put statistics into the job's store."""
    arrays: dict[str, npt.NDArray[Any]] = {"tokens": np.array(found.tokens)}
    for name, uses in found.uses.items():
        for i, use in enumerate(uses):
            arrays |= {f"{kind} {i} {name}": t.cpu().numpy() for kind, t in use.__dict__.items()}
    job.store.put_arrays(key, arrays | {f"diagonal {n}": a for n, a in found.diagonal.items()})


def kept_statistics(job: Job, key: str) -> Statistics | None:
    """Statistics from the job's store, on the job's device."""
    kept = job.store.arrays(key)
    if kept is None:
        return None
    found = Statistics({}, {}, int(kept.pop("tokens")))
    for name in list(kept):
        kind, _, rest = name.partition(" ")
        if kind == "diagonal":
            found.diagonal[rest] = kept.pop(name)
        elif kind == "moment":
            parts = [torch.from_numpy(kept.pop(f"{k} {rest}")).to(job.device) for k in ("moment", "rows", "weight")]
            found.uses.setdefault(rest.partition(" ")[2], []).append(Use(*parts))
    return found


class Kept:
    """The later stages of one job in its store."""

    def __init__(self, job: Job, options: Options, capacity: float) -> None:
        """`capacity`, the bytes left for planned units, stands for side files and code."""
        self._job = job
        self._key = "" if job.store.directory is None else digest(
            statistics_key(job, options), asdict(options), capacity, job.budget, list(job.paths),
            windows_key(job.sets.correction),
        )  # fmt: skip

    def get(self, stage: str) -> Any:
        """The JSON value of a stage, or None."""
        return self._job.store.get(digest(self._key, stage)) if self._key else None

    def put(self, stage: str, value: Any) -> None:
        """Keep a stage's JSON value."""
        if self._key:
            self._job.store.put(digest(self._key, stage), value)

    def tensors(self, stage: str) -> dict[str, Tensor] | None:
        """Tensors of a stage by unit name, on the job's device, or None."""
        kept = self._job.store.arrays(digest(self._key, stage)) if self._key else None
        if kept is None:
            return None
        return {n.partition(" ")[2]: torch.from_numpy(kept.pop(n)).to(self._job.device) for n in list(kept)}

    def put_tensors(self, stage: str, values: Mapping[str, Tensor]) -> None:
        """Keep a stage's tensors."""
        if self._key:
            arrays = {f"unit {n}": t.contiguous().cpu().numpy() for n, t in values.items()}
            self._job.store.put_arrays(digest(self._key, stage), arrays)


def rules_to_json(rules: Rules) -> dict[str, Any]:
    """Tables, offsets and rounding rules as JSON can hold them; classes that share a table go on sharing it."""
    shared, shrink = rules
    distinct = shared.tables.distinct()
    place = {id(t): i for i, (_, t) in enumerate(distinct)}
    return {
        "tables": [[t.low, t.freq.tolist()] for _, t in distinct],
        "classes": [[c, place[id(t)]] for c, t in shared.tables.table.items()],
        "offset": shared.offset.tolist(), "shrink": shrink.offset.tolist(), "dead": shrink.dead_zone.tolist(),
    }  # fmt: skip


def rules_from_json(value: Mapping[str, Any]) -> Rules:
    """What `rules_to_json` was given."""
    tables = [Table(low, np.array(freq)) for low, freq in value["tables"]]
    offset, shrink, dead = (np.array(value[k], np.float32) for k in ("offset", "shrink", "dead"))
    return Shared(Tables({c: tables[i] for c, i in value["classes"]}), offset), Shrink(shrink, dead)
