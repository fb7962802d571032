"""`fit --layout hub`: a directory for transformers and hubs, all of whose files together meet the cap.

Config, tokenizer, the licence of the source and a card lie beside `model.bcap`; their bytes are taken off the budget
before the fit. The card states figures that are known only afterwards, so the place for it is that of a card with the
longest figures; a few hundred bytes of the budget stay unused for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecap.errors import BudgetError, UsageError
from bytecap.format import container
from bytecap.format.container import FileSection
from bytecap.format.ledger import KINDS, Entry, total
from bytecap.format.sidefiles import packing, source_tensors
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model
from bytecap.pipeline.artifact import Artifact
from bytecap.pipeline.cards import source_of
from bytecap.pipeline.formats import HUB
from bytecap.report.card import Source, card
from bytecap.runtimes import hub
from bytecap.sizes import format_size, parse_budget

if TYPE_CHECKING:
    from collections.abc import Iterator

_INDEX_ENTRY = 64  # most bytes that one more file takes in the index, beside its content
_WIDEST = 99.9999  # figure of a card, in nats or bits


@dataclass(frozen=True)
class DividedBudget:
    """A directory before its weights are fitted.

    Attributes:
        asked: the options as given.
        cap: bytes of all files together.
        config: options of the fit of the weights.
        inside: side files that stay inside the artifact.
        beside: those beside it, without the card.
        source: for the card.
        reserve: bytes kept for the card.
    """

    asked: FitConfig
    cap: int
    config: FitConfig
    inside: tuple[FileSection, ...]
    beside: dict[str, bytes]
    source: Source
    reserve: int

    @contextmanager
    def floor(self) -> Iterator[None]:
        """Say of a budget that is too small what the other files take of it."""
        try:
            yield
        except BudgetError as exc:
            taken = self.cap - int(self.config.budget)
            raise BudgetError(f"{_taken(taken, self.cap)}, and for {hub.FILE} {exc}", exc.floor + taken) from exc

    def finished(self, fitted: Artifact) -> Artifact:
        """Put the other files beside fitted weights and write the directory.

        Raises:
            OutputError: it cannot be written.
        """
        if self.asked.dry_run or not fitted.data:
            fitted.report |= {"budget_bytes": self.cap, "layout": HUB}
            return fitted
        contents = replace(fitted.contents, files=(*self.inside, *fitted.contents.files))
        data = container.serialize(contents)
        beside = dict(self.beside)
        entries = hub.ledger(contents, beside)
        report = fitted.report | {"budget_bytes": self.cap}
        for brief in (False, True):
            beside[hub.CARD] = card(entries, report, self.source, whole=True, brief=brief).encode()
            size = len(data) + sum(map(len, beside.values()))
            if size <= self.cap:
                break
        if size > self.cap:
            raise BudgetError(f"the directory takes {size:,} bytes, the budget is {self.cap:,}: give it more", size)
        found = Artifact(contents, data, report, fitted.windows, fitted.before, beside)
        found.report |= {
            "layout": HUB, "file_bytes": size, "slack_bytes": self.cap - size, "weights_bytes": len(data),
            "floor_bytes": fitted.report["floor_bytes"] + self.cap - int(self.config.budget),
            "bits_per_parameter": 8 * size / max(1, int(report["parameters"])),
        }  # fmt: skip
        assert total(found.ledger()) == size  # noqa: S101 (every byte has an owner)
        if self.asked.output is not None:
            found.save(self.asked.output)
        return found


def check_options(config: FitConfig) -> None:
    """Refuse options that a directory cannot have.

    Raises:
        UsageError: config or tokenizer are to be left out, without which nobody loads it, or it is an update.
    """
    if config.base:
        raise UsageError(f"the option base is for single files: --layout {HUB} holds a whole model")
    for name in ("tokenizer", "config"):
        if not getattr(config, name):
            raise UsageError(f"--no-{name} is not for --layout {HUB}: transformers needs the file")


def divide(model: Model, config: FitConfig) -> DividedBudget:
    """Divide a budget among the weights and the other files.

    Raises:
        BudgetError: the other files alone take it. ArtifactError: transformers could not make the model of them.
    """
    cap = parse_budget(config.budget, model.parameters)
    inside = {n: d for n, d in model.files.items() if n == source_tensors.FILE}
    sections = tuple(FileSection(n, packing.pack(n, d)) for n, d in inside.items())
    files = {n: d for n, d in model.files.items() if n not in inside}
    hub.check_files(files)
    dtypes = {u.dtype for u in model.units}
    newest = ".".join(map(str, container.VERSION))
    beside = hub.beside_weights(files, newest, hub.dtype_named(dtypes))
    source, licence = source_of(model.name)
    beside |= licence
    reserve = len(_widest_card(model, config, beside, source, cap).encode())
    taken = reserve + sum(map(len, beside.values())) + sum(len(s.data) + _INDEX_ENTRY for s in sections)
    if taken >= cap:
        raise BudgetError(f"{_taken(taken, cap)}: nothing is left for {hub.FILE}", taken)
    inner = replace(config, layout="file", budget=cap - taken, tokenizer=False, config=False, output=None)
    return DividedBudget(config, cap, inner, sections, beside, source, reserve)


def _taken(taken: int, cap: int) -> str:
    return f"of a budget of {format_size(cap)} config, tokenizer, card and licence take {taken:,} bytes"


def _widest_card(
    model: Model, config: FitConfig, beside: Mapping[str, bytes], source: Source, cap: int
) -> str:  # fmt: skip
    """Return a card with figures as long as they can be."""
    names = [*beside, *(u.name for u in model.units)]
    longest = sorted(names, key=lambda n: -len(n))[:5]
    entries = [Entry(n, kind, cap, model.parameters) for n in longest for kind in KINDS]
    figures = dict.fromkeys(("kl_nats", "kl_stderr", "bpb_original", "bpb_artifact", "bpb_stderr"), _WIDEST)
    texts = _named(config.evaluation) or ["self", "general"]
    report = figures | {
        "same_top1": 1.0, "budget_bytes": cap, "parameters": model.parameters, "statistics_tokens": 10**7,
        "seed": config.seed, "method": config.method.rpartition(":")[2],
        "texts": [{"name": n} | figures | {"same_top1": 1.0} for n in texts],
        "calibration_texts": [{"name": n} for n in _named(config.calibration) or ["self", "general"]],
    }  # fmt: skip
    return card(entries, report, source, whole=True)


def _named(texts: Any) -> list[str]:
    """Return the names of texts."""
    if texts is None:
        return []
    each: Sequence[Any] = [texts] if isinstance(texts, str | Path) else list(texts)
    return [Path(str(t)).name for t in each]
