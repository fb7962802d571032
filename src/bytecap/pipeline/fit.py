"""Put a model into one file under a hard byte cap, read it back and measure it: the whole job on one screen.

Read the calls of `_fit` from top to bottom: options are checked before the model is loaded, the floor of every
budget before any text is read, and the stages (`bytecap.pipeline.stages`) do the rest.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bytecap.errors import UsageError
from bytecap.format.codefiles import Code
from bytecap.job.base import Installed
from bytecap.job.config import FitConfig, configured
from bytecap.model import streaming
from bytecap.model.checkpoint import Model
from bytecap.model.sources import as_paths
from bytecap.model.texts import TokenSets
from bytecap.pipeline import background, hub_directory, memory, several
from bytecap.pipeline.artifact import Artifact
from bytecap.pipeline.fit_module import fit_module
from bytecap.pipeline.formats import FILE, FORMATS, HUB, format_of
from bytecap.pipeline.stages import Asked, Opened, check, finish, open_model
from bytecap.pipeline.token_sets import token_sets
from bytecap.sizes import split_budgets
from bytecap.system import allocator
from bytecap.system.cache import blamed
from bytecap.system.collisions import refuse_collisions
from bytecap.system.directories import check_directory

_FOR_MODULES = ("loss", "evaluate", "predictions", "given")


@configured
def fit(model: Model | nn.Module | Path | str, config: FitConfig) -> Artifact:
    """Put a model into one file of at most `budget` bytes; raises a `BytecapError`, and writes nothing then.

    Args:
        model: Hugging Face directory, hub id, `demo`, a loaded `bytecap.model.checkpoint.Model`, or any torch module,
            which needs batches for `calibration` and perhaps a `loss` (docs/modules.md). A module is left as it is.
        config: the options, documented below.
    """
    if isinstance(model, nn.Module):
        several.refuse(config, "a torch module")
        return fit_module(model, config)
    found: Artifact = _fit(model, [config])[0]
    return found


@configured
def fit_budgets(model: Model | Path | str, config: FitConfig) -> list[Artifact]:
    """Put a model into one file for each of several budgets, all from one set of statistics.

    The options are those of `fit`; `budget` lists budgets by comma (`"3MB,4MB"`), and `{budget}` in `output` stands
    for each of them as it was written.

    Args:
        model: Hugging Face directory, hub id, `demo`, or a loaded `bytecap.model.checkpoint.Model`.
        config: the options, documented below.
    """
    return fit_config(model, config)


def _jobs() -> dict[str, Callable[..., list[Any]]]:
    """The jobs that write other programs' formats, by name."""
    from bytecap.pipeline.fit_directory import fit_directory_configs
    from bytecap.pipeline.fit_gguf import fit_gguf_configs

    found: dict[str, Callable[..., list[Any]]] = {
        "gguf": fit_gguf_configs,
        "mlx": fit_directory_configs,
        "compressed-tensors": fit_directory_configs,
    }
    assert found.keys() == FORMATS.keys()  # noqa: S101 (two tables of ours)
    return found


def fit_config(model: Model | Path | str, config: FitConfig) -> list[Any]:
    """Fit a checkpoint once for each budget of the config."""
    return _fit(model, each_budget(config))


def _fit(model: Model | Path | str, configs: Sequence[FitConfig]) -> list[Any]:
    """Fit a checkpoint under configs that differ in their budgets."""
    started = time.perf_counter()
    _refuse_collisions(model, configs)
    several.check_options(model, configs)
    kind = format_of(configs[0])
    if kind in FORMATS:
        several.refuse(configs[0], f"the format {kind}")
    if kind in FORMATS and configs[0].base:
        raise UsageError(f"the option base is for .bcap files: there are no updates in the format {kind}")
    if kind in FORMATS:
        return _jobs()[kind](model, configs)
    for option in _FOR_MODULES:
        if getattr(configs[0], option):
            name = model.name if isinstance(model, Model) else model
            raise UsageError(f"the option {option} is for torch modules, and {name} is a checkpoint")
    if configs[0].layout == HUB:
        several.refuse(configs[0], "the layout hub")
        hub_directory.check_options(configs[0])
    base = Installed.read(configs[0].base)
    configs = [replace(c, base=base) for c in configs]  # read once for all of them
    with blamed(configs[0].store if isinstance(configs[0].store, Path | str) else None):
        return (_fit_hub if configs[0].layout == HUB else _fit_all)(model, configs, started)


def _refuse_collisions(model: Model | Path | str, configs: Sequence[FitConfig]) -> None:
    """Refuse outputs that are an input, or one another."""
    first = configs[0]
    refuse_collisions(
        outputs_of(configs),
        {
            "the template": first.template,
            "the model": model if isinstance(model, Path | str) else None,
            "a calibration text": as_paths(first.calibration), "an evaluation text": as_paths(first.evaluation),
            "a text of recovery": as_paths(first.recover_text),
            "code": () if isinstance(first.code, Code) else first.code,
            "the base": None if isinstance(first.base, Installed) else as_paths(first.base),
        },
    )  # fmt: skip


def outputs_of(configs: Sequence[FitConfig], pages: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the paths that fits write, by the options that name them, with the budget where there are several."""
    found: dict[str, Any] = {}
    for i, config in enumerate(configs):
        behind = f" ({config.budget})" if len(configs) > 1 else ""
        found |= {f"-o{behind}": config.output, f"--emit{behind}": config.emit}
        found |= {f"--report{behind}": pages[i]} if pages else {}
    store = configs[0].store
    return found | {"--store": store if isinstance(store, Path | str) else None}


def _fit_all(model: Model | Path | str, configs: Sequence[FitConfig], started: float) -> list[Artifact]:
    """Fit once for each config, after the cheap checks."""
    asked = [check(config) for config in configs]
    with _opened(model, asked[0]) as loaded:
        return _fit_opened(loaded, asked, started)


def _fit_opened(loaded: Model, asked: Sequence[Asked], started: float) -> list[Artifact]:
    """Fit a model once for each of several options."""
    ranks = several.ranks_of(asked[0].config)
    several.check_model(loaded, ranks, asked[0].device)
    opened = [open_model(a, loaded) for a in asked]
    with allocator.stated(loaded.parameters, streamed=streaming.of(loaded.module) is not None):
        sets = text_sets(loaded, asked[0])
    several.check_sets(sets, ranks)
    return finish_all(opened, sets, started)


def _fit_hub(model: Model | Path | str, configs: Sequence[FitConfig], started: float) -> list[Artifact]:
    """Fit the weights of one directory for each config to what its other files leave of the budget."""
    asked = check(replace(configs[0], layout=FILE, tokenizer=False))
    for config in configs:
        if config.output is not None:
            check_directory(Path(config.output))
    with _opened(model, asked) as loaded:
        plans = [hub_directory.divide(loaded, config) for config in configs]
        with plans[0].floor():
            found = _fit_all(loaded, [p.config for p in plans], started)
    return [p.finished(a) for p, a in zip(plans, found, strict=True)]


def text_sets(model: Model, asked: Asked) -> TokenSets:
    """Load the token sets of a checkpoint, from text files or the embedded texts."""
    return token_sets(model, asked.config, asked.device, asked.store, asked.reporter)


def finish_all(opened: Sequence[Opened], sets: TokenSets, started: float) -> list[Artifact]:
    """Finish one fit, or several that share their statistics."""
    found = []
    with _shared_store(opened) as ready:
        for o in ready:
            found.append(finish(o, sets, started))
            started = time.perf_counter()
    return found


@contextmanager
def _shared_store(opened: Sequence[Opened]) -> Iterator[Sequence[Opened]]:
    """Give several fits without a store a temporary one, so that statistics are computed once."""
    if len(opened) == 1 or opened[0].asked.store.directory is not None:
        yield opened
        return
    with tempfile.TemporaryDirectory(prefix="bytecap-") as directory:
        store = several.store_of(replace(opened[0].asked.config, store=directory))
        yield [replace(o, asked=replace(o.asked, store=store)) for o in opened]


def each_budget(config: FitConfig) -> list[FitConfig]:
    """Return one config for each of the budgets that are listed by comma.

    >>> [(c.budget, c.output) for c in each_budget(FitConfig("3MB,4MB", output="m-{budget}.bcap"))]
    [('3MB', 'm-3MB.bcap'), ('4MB', 'm-4MB.bcap')]

    Raises:
        UsageError: none or the same budget twice, or all would be written to one file.
    """
    budgets = [str(config.budget)] if isinstance(config.budget, int) else split_budgets(config.budget)
    if not budgets or len(set(budgets)) < len(budgets):
        raise UsageError(f"give every budget once, not {config.budget!r}")
    for path in (config.output, config.emit):
        if len(budgets) > 1 and path is not None and "{budget}" not in str(path):
            raise UsageError(f"{len(budgets)} budgets need names of their own: write {{budget}} into the name {path}")
    return [replace(config, budget=b, output=_named(config.output, b), emit=_named(config.emit, b)) for b in budgets]


def _named(path: Path | str | None, budget: str) -> str | None:
    return None if path is None else str(path).replace("{budget}", budget)


def _opened(model: Model | Path | str, asked: Asked) -> AbstractContextManager[Model]:
    """Read a checkpoint, or open it to be streamed."""
    begin = _pack if asked.config.tokenizer and not asked.config.base else None
    return memory.opened(model, asked.config, asked.device, asked.reporter, begin)


def _pack(files: dict[str, Any]) -> None:
    """Begin to pack large side files while the model is built."""
    background.start(files)
