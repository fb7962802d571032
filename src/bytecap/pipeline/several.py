"""Say what several ranks can do together, and hold them to being the same.

Divided are the method `bytecap` on checkpoints in memory, with steps, tables and evaluation. All else is refused in one
line rather than done by one rank while the others wait: it would take as long as one process, and more memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from bytecap.calibration.statistics import environment, windows_key
from bytecap.errors import UsageError
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.texts import TokenSets
from bytecap.progress import Recorder, Reporter, Silent, reporter_for
from bytecap.system.cache import Store, digest
from bytecap.system.ranks import ALONE, Ranks
from bytecap.system.shared_store import SharedStore

_LONGEST = 200  # characters of an option that are shown
_SAMPLED = 64  # values of a tensor, and tensors of a streamed model, that say which checkpoint it is
_OWN = {"ranks", "reporter", "progress", "store"}  # options that ranks may have different ones of
_ONE = "fit it with one process"


def ranks_of(config: FitConfig) -> Ranks:
    """Return the processes that share a job."""
    return config.ranks or ALONE


def named(model: Any) -> str:
    """Return what a model is called."""
    return model.name if isinstance(model, Model) else str(model)


def check_options(model: Any, configs: Sequence[FitConfig]) -> None:
    """Refuse what is not divided, and ranks that were given other options.

    Raises:
        UsageError: the option is named, or two ranks and what they were given.
    """
    config = configs[0]
    ranks = ranks_of(config)
    if ranks.size == 1:
        return
    words = {f"the option {f.name}": _shown(getattr(config, f.name)) for f in fields(config) if f.name not in _OWN}
    ranks.agree({"the model": named(model), "the budgets": [str(c.budget) for c in configs], **words})
    ours = config.method == "bytecap"
    for wrong, what in (
        (not ours, f"method {config.method}"), (config.recover is not None, "recovery"), (config.paths, "overlays"),
        (config.base, "an update of a base"), (config.given, "a model with sections that are given"),
    ):  # fmt: skip
        if wrong:
            raise UsageError(f"{what} is not divided among ranks: {_ONE}")


def _shown(value: Any) -> str:
    """Return an option's value, or a hash of a long one, such as packed code."""
    text = repr(value)
    return text if len(text) <= _LONGEST else digest(text)


def refuse(config: FitConfig, what: str) -> None:
    """Refuse what is not divided.

    Raises:
        UsageError: there are several ranks.
    """
    if ranks_of(config).size > 1:
        raise UsageError(f"{what} is not divided among ranks: {_ONE}")


def store_of(config: FitConfig) -> Store:
    """Return the store of a job, which ranks share."""
    if isinstance(config.store, Store):
        return config.store
    ranks = ranks_of(config)
    return Store(config.store) if ranks.size == 1 else SharedStore(config.store, ranks)


def check_model(model: Model, ranks: Ranks, device: str) -> None:
    """Refuse ranks with another checkpoint, other packages or another device.

    Raises:
        UsageError: two ranks, and what differs.
    """
    if ranks.size == 1:
        return
    about: dict[str, Any] = {"the device": device}
    about |= {f"line {i} of the environment": line for i, line in enumerate(environment(device)[1:])}
    shapes = [[u.name, u.dtype, list(u.shape), list(u.aliases)] for u in model.units]
    about["the checkpoint (tensors)"] = digest(shapes)
    about["the checkpoint (config and tokenizer)"] = digest(*(x for n, d in model.files.items() for x in (n, d)))
    step = max(1, len(model.units) // _SAMPLED) if isinstance(model, StreamedModel) else 1  # each is read whole
    about["the checkpoint (weights)"] = digest(*(_some(model, u) for u in model.units[::step]))
    ranks.agree(about)


def _some(model: Model, unit: Any) -> Any:
    """Return values spread over a tensor."""
    flat = model.tensor(unit).detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _SAMPLED)].cpu()
    return np.asarray(some.double() if some.is_floating_point() else some)


class Unheard(Silent):
    """A reporter of a rank that does not speak."""

    def warn(self, text: str) -> None:
        """Say nothing: rank 0 is told of it in the end."""


def reporter_of(config: FitConfig) -> Reporter:
    """Return the reporter of a job on this rank."""
    return reporter_for(config.reporter, config.progress) if ranks_of(config).first else Unheard()


def pass_on(ranks: Ranks, reporter: Recorder) -> None:
    """Warn of what only other ranks have met."""
    for theirs in ranks.all(list(reporter.warnings)):
        for text in theirs:
            if text not in reporter.warnings:
                reporter.warn(text)


def check_sets(sets: TokenSets, ranks: Ranks) -> None:
    """Refuse ranks that read other texts.

    Raises:
        UsageError: two ranks, and what differs.
    """
    if ranks.size > 1:
        groups = {"calibration": sets.statistics, "correction": sets.correction}
        groups |= {f"evaluation text {i}": t.windows for i, t in enumerate(sets.evaluation)}
        ranks.agree({f"the tokens of {n}": windows_key(w) for n, w in groups.items()})
