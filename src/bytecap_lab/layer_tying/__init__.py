"""Turn a trained model into one whose layers share fewer stored blocks, written as an ordinary directory.

`tie` decides which layers share a block (a loop, or a search), starts the shared blocks and their low-rank parts from
the original, uptrains by distillation, and writes a directory that `fit`, `eval` and `load_model` take as it is
(`bytecap.model.tying` says what is in it).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bytecap.calibration.statistics import environment, model_key, windows_key
from bytecap.errors import UsageError
from bytecap.job.effort import Effort
from bytecap.model.checkpoint import Model, demo_directory, find_units, load_checkpoint
from bytecap.model.defaults import WINDOW
from bytecap.model.evaluation import kl_to
from bytecap.model.sources import Paths, as_paths, encoder, window_limit
from bytecap.model.texts import Window, load_text
from bytecap.model.tying import FILE, Tying, find_blocks
from bytecap.pipeline.stages import choose_device
from bytecap.progress import Reporter, reporter_for, warn
from bytecap.recovery.checkpointing import ProgressCheckpoint
from bytecap.system.atomic import make_directory, write_atomically
from bytecap.system.cache import Store
from bytecap.system.collisions import refuse_collisions
from bytecap_lab.layer_tying import dlt, greedy
from bytecap_lab.layer_tying.start import INITS, divisors, loop, ranks_for, tied
from bytecap_lab.layer_tying.uptrain import RATE, Uptraining, split, uptrain

SEARCHES = ("greedy", "dlt")
TOKENS = 2**23  # most of the training tokens that are read
STEPS = "600"
RANK = 8


@dataclass(frozen=True)
class TyingPlan:
    """A plan of sharing that was checked against the model.

    Attributes:
        start: the model with nothing shared; its ranks are those of low-rank parts.
        blocks: how many are to be left.
        init: how shared blocks start.
        search: `greedy`, `dlt`, or None for a loop.
    """

    start: Tying
    blocks: int
    init: str
    search: str | None

    @staticmethod
    def of(model: Model, blocks: int, init: str, rank: int, search: str | None) -> TyingPlan:
        """Check options against a model.

        Raises:
            UsageError: an option is unknown, or the number of blocks does not fit the depth.
            CheckpointError: the model has no blocks that can be tied.
        """
        if init not in INITS:
            raise UsageError(f"unknown --init {init!r}: use {', '.join(INITS)}")
        if search is not None and search not in SEARCHES:
            raise UsageError(f"unknown --search {search!r}: use {', '.join(SEARCHES)}")
        if rank < 0:
            raise UsageError(f"--lora-rank {rank} is below 0")
        if search is not None and init == "stepwise":
            raise UsageError("--init stepwise is for loops: layers found by --search need average or lower")
        if FILE in model.files:
            raise UsageError(f"{model.name} is tied already: start from the original")
        path, layers = find_blocks(model.module, model.name)
        depth = len(layers)
        if not 1 <= blocks < depth:
            raise UsageError(f"--blocks {blocks}: {path} has {depth} layers, so 1 to {depth - 1} can be left")
        if search is None and depth % blocks:
            fits = ", ".join(map(str, divisors(depth)))
            raise UsageError(
                f"--blocks {blocks} does not divide the {depth} layers of {path}: use one of {fits} (or --search)"
            )
        return TyingPlan(Tying(path, tuple(range(depth)), ranks_for(model.module, rank)), blocks, init, search)


def tie(
    model: Model | Path | str,
    blocks: int,
    output: Path | str,
    *,
    init: str = "average",
    rank: int = RANK,
    train: Paths = None,
    steps: str = STEPS,
    search: str | None = None,
    search_steps: str | None = None,
    labels: float = 0.0,
    rate: float = RATE,
    window: int = WINDOW,
    seed: int = 0,
    device: str = "auto",
    store: Path | str | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Convert a trained model into one with fewer stored blocks; returns the report. Writes nothing before the end.

    Args:
        model: Hugging Face directory, hub id, `demo`, or a loaded `Model`.
        blocks: stored blocks that are left.
        output: directory to write.
        init: `stepwise`, `average` or `lower`, see `bytecap_lab.layer_tying.start`.
        rank: of every layer's own low-rank parts, 0 for none.
        train: text files to uptrain on; the embedded text if None.
        steps: iterations (`600`) or time (`10m`) of uptraining.
        search: `greedy`, `dlt`, or None for a loop.
        search_steps: iterations or time of the search; as `steps` if None.
        labels: share of the text's own next tokens in the loss, the rest is the KL to the original.
        rate: first learning rate.
        window: predicted tokens in a window.
        seed: of every random choice.
        device: `auto`, `cpu` or `cuda`.
        store: directory in which the search and the uptraining are kept from time to time, so that a killed run can be
            started again and goes on from there; nothing is kept if None.
        progress: show progress bars; by default on a terminal and in a notebook.
        reporter: told about progress in place of the bars.

    Raises:
        BytecapError: an option does not fit the model, the model cannot be tied, the text is too short.
    """
    path = None if isinstance(model, Model) else model
    refuse_collisions({"-o": output, "--store": store}, {"the model": path, "a training text": train})
    reporter, target = reporter_for(reporter, progress), choose_device(device)
    efforts = _effort(steps, "--steps"), _effort(search_steps or steps, "--search-steps")
    _check(rate, labels)
    loaded = model if isinstance(model, Model) else load_checkpoint(model)
    plan = TyingPlan.of(loaded, blocks, init, rank, search)
    directory, kept = make_directory(output), Store(store)
    pool = read(loaded, train, window=window, seed=seed, reporter=reporter)
    sets = split(pool, 2, target, str(next(iter(as_paths(train)), "the embedded text")))
    loaded.module.to(target)
    checkpoint = _checkpoint(kept, loaded, target, windows_key(pool), seed, rate, init, rank)
    run = _Run(loaded, plan, target, seed, rate, labels, reporter, checkpoint)
    return run.converted(sets, efforts, directory) | {"seed": seed, "init": init, "rank": rank}


def _checkpoint(store: Store, model: Model, device: str, *named_by: Any) -> ProgressCheckpoint:
    """Return where progress is kept, under the name of all that it depends on."""
    if store.directory is None:  # nothing is kept, and hashing the model would take time
        return ProgressCheckpoint(store)
    return ProgressCheckpoint(store, environment(device), torch.get_num_threads(), model_key(model), *named_by)


@dataclass(frozen=True)
class _Run:
    """One conversion: the model, its plan of sharing, and how it is trained."""

    model: Model
    plan: TyingPlan
    device: str
    seed: int
    rate: float
    labels: float
    reporter: Reporter
    checkpoint: ProgressCheckpoint

    def converted(
        self, sets: Iterable[Sequence[Window]], efforts: tuple[Effort, Effort], directory: Path
    ) -> dict[str, Any]:
        """Decide, uptrain, write and report.

        Args:
            sets: windows to train on, to watch the uptraining by, and to measure on.
            efforts: of the uptraining and of the search.
            directory: to write.
        """
        (windows, held, measured), (effort, searching) = sets, efforts
        tying, trace = decide(
            self.plan, self.model, windows, measured, searching, self.device, self.seed, self.rate, self.reporter,
            self.checkpoint,
        )  # fmt: skip
        student = tied(self.model.module, tying, self.plan.init)
        found = uptrain(
            self.model.module, student, windows, held, effort, device=self.device, seed=self.seed, rate=self.rate,
            labels=self.labels, reporter=self.reporter,
            checkpoint=self.checkpoint.under("uptraining", tying.sources, astuple(effort), self.labels),
        )  # fmt: skip
        _say(found, windows, self.reporter)
        write(student, {**self.model.files, FILE: tying.dump()}, self.model, directory)
        return report(self.model, tying, found, directory, held, self.device) | trace


def _check(rate: float, labels: float) -> None:
    if not 0 < rate < math.inf:
        raise UsageError(f"--rate {rate:g} is no learning rate")
    if not 0 <= labels <= 1:
        raise UsageError(f"--labels {labels} is no share: use 0 to 1")


def _effort(text: str, option: str) -> Effort:
    try:
        return Effort.parse(text)
    except UsageError as exc:
        raise UsageError(str(exc).replace("--recover", option)) from None


def read(model: Model, texts: Paths, *, window: int, seed: int, reporter: Reporter) -> list[Window]:
    """Read windows of the training texts in a random order, none twice."""
    paths = as_paths(texts)
    if not paths:
        warn(reporter, "no --train given: the embedded SQLite documentation stands in")
        paths = [demo_directory() / "calib.txt"]
    return shuffled(windows_of(model, paths, window), seed)


def windows_of(model: Model, paths: Sequence[Path], window: int) -> list[Window]:
    """Cut texts into windows, none twice."""
    encode, length = encoder(model.files), window_limit(model, window)
    return list(
        {w.tokens: w for p in paths for w in load_text(p, encode, window=length, limit=TOKENS).windows}.values()
    )


def shuffled(windows: Sequence[Window], seed: int) -> list[Window]:
    """Return as many windows as will be used, in a random order."""
    pool = list(windows)
    random.Random(seed).shuffle(pool)  # noqa: S311 (sampling, not cryptography)
    ends = accumulate(w.predicted for w in pool)
    return [w for w, end in zip(pool, ends, strict=True) if end <= TOKENS]


def decide(
    plan: TyingPlan,
    model: Model,
    train: Sequence[Window],
    held: Sequence[Window],
    effort: Effort,
    device: str,
    seed: int,
    rate: float,
    reporter: Reporter,
    checkpoint: ProgressCheckpoint | None = None,
) -> tuple[Tying, dict[str, Any]]:
    """Decide which layers share a block; a search goes on from the state that `checkpoint` kept."""
    if plan.search is None:
        return Tying(plan.start.blocks, loop(len(plan.start.sources), plan.blocks), plan.start.ranks), {}
    checkpoint = (checkpoint or ProgressCheckpoint(Store())).under(plan.search, plan.blocks, astuple(effort))
    with reporter.step(f"search ({plan.search})", 1) as advance:
        if plan.search == "greedy":
            looking = greedy.GreedySearch(
                model.module, plan.start, plan.init, train, held, device, seed, rate, checkpoint
            )
            tying, merges = looking.run(plan.blocks, effort, advance)
            trace: dict[str, Any] = {"merges": greedy.as_dicts(merges)}
        else:
            learning = dlt.QLearningSearch(model.module, plan.start, train, device, seed, rate, checkpoint)
            tying = learning.run(plan.blocks, effort, advance)
            trace = {"visited": len(learning.visited), "actions": sum(map(len, learning.visited.values()))}
    reporter.note(f"search ({plan.search}): layers read blocks {list(tying.sources)}")
    return tying, {"search": plan.search, **trace}


def _say(found: Uptraining, train: Sequence[Window], reporter: Reporter) -> None:
    times = found.tokens / sum(w.predicted for w in train)
    again = f", the text {times:.1f} times" if times > 1 else ""
    reporter.note(
        f"uptraining: {found.moves} iterations over {found.tokens:,} tokens{again} in {found.seconds:.0f} s, KL on "
        f"held-out tokens {found.kl_start:.4f} before, {found.kl:.4f} after"
    )


def write(student: nn.Module, files: dict[str, bytes], model: Model, directory: Path) -> None:
    """Write a directory with every shared tensor once, in the original's dtypes, and `files` beside the weights."""
    from safetensors.torch import save

    dtypes = _dtypes(model)
    trained = student.state_dict()
    tensors = {
        u.name: trained[u.name].detach().cpu().to(_dtype_of(u.name, dtypes, trained)).contiguous()
        for u in find_units(student)
    }
    for name, content in files.items():
        write_atomically(content, directory / name)
    write_atomically(save(tensors, metadata={"format": "pt"}), directory / "model.safetensors")


def _dtypes(model: Model) -> dict[str, torch.dtype]:
    known = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
    return {n: known.get(u.dtype, torch.float32) for u in model.units for n in (u.name, *u.aliases)}


def _dtype_of(name: str, dtypes: dict[str, torch.dtype], tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the original's dtype; a low-rank part has that of its linear map."""
    if not tensors[name].is_floating_point():
        return tensors[name].dtype
    return dtypes.get(name) or dtypes[name.rpartition(".")[0].rpartition(".")[0] + ".weight"]


def report(
    model: Model, tying: Tying, found: Uptraining, directory: Path, held: Sequence[Window], device: str
) -> dict[str, Any]:
    """Return the figures of a conversion, with the KL of the weights as written."""
    back = load_checkpoint(directory)
    return {
        "model": model.name, "directory": str(directory), "blocks": tying.blocks, "depth": len(tying.sources),
        "unique": tying.unique, "sources": list(tying.sources), "ranks": tying.ranks,
        "parameters_before": model.parameters, "parameters": back.parameters,
        "kl_written": kl_to(model.module, back.module.to(device), held, device=device)[0],
        "uptraining": dict(found.__dict__),
    }  # fmt: skip
