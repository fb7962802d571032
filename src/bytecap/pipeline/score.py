"""Score a directory, a hub id, `demo` or an artifact in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bytecap.errors import UsageError
from bytecap.format import container, updates
from bytecap.format.contents import Contents
from bytecap.format.decoder import side_files
from bytecap.model.checkpoint import Model, demo_directory, freeze, load_checkpoint, resolve
from bytecap.model.from_artifact import module_of
from bytecap.model.inputs import vocabulary_of
from bytecap.model.sources import Paths, as_paths, check_model, encoder, window_limit
from bytecap.model.texts import load_text
from bytecap.pipeline.memory import open_to_score
from bytecap.progress import Reporter, reporter_for, warn
from bytecap.runtimes import hub
from bytecap.types import Score

_FOREIGN = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".gguf"}  # files that are no artifacts


def open_model(
    model: Path | str,
    allow_unused: Sequence[str] = (),
    base: updates.Bases = None,
    *,
    device: str = "cpu",
    resident: str = "decoded",
    contents: Contents | None = None,
) -> Model:
    """Open a model from a directory, hub id, `demo`, `.gguf` or artifact file.

    Args:
        model: which.
        allow_unused: tensors and files of a checkpoint that are meant to be left out.
        base: the file that an artifact is an update of.
        device: torch device.
        resident: see `bytecap.load_model`; artifacts alone can stay coded.
        contents: of an artifact that has been opened already.

    Raises:
        UsageError: a model that is no artifact has a base or is to stay coded.
    """
    path = Path(model)
    if not is_artifact(path):
        if base:
            raise UsageError(f"{model} is no .bcap file: it has no base")
        found = resolve(model)
        if hub.is_hub(found):
            inside, files = hub.read(found)
            module = freeze(module_of(inside, str(model), device=device, resident=resident, beside=files))
            return Model(module, tuple(updates.units_of(inside)), files, str(model))
        if resident != "decoded":
            raise UsageError(f"{model} is no artifact: only weights in a .bcap file can stay coded")
        opened = replace(load_checkpoint(found, allow_unused=allow_unused), name=str(model))
        opened.module.to(device)
        return opened
    contents = contents or updates.read(path, base)
    module = freeze(module_of(contents, str(path), device=device, resident=resident))
    return Model(module, tuple(updates.units_of(contents)), side_files(contents), str(model))


def is_artifact(path: Path) -> bool:
    """Return whether a path is a file that is read as an artifact."""
    return path.is_file() and path.suffix not in _FOREIGN


def _contents(path: Path, base: updates.Bases, *, streamed: bool) -> Contents:
    """Open an artifact; where it may be streamed, the bytes of its units stay in the file."""
    return updates.attached(container.open_file(path), {}, str(path)) if streamed else updates.read(path, base)


def score(
    model: Path | str,
    texts: Paths = None,
    *,
    window: int = 512,
    tokens: int | None = None,
    device: str = "auto",
    allow_unused: Sequence[str] = (),
    base: updates.Bases = None,
    resident: str = "decoded",
    memory: int | str | None = None,
    reporter: Reporter | None = None,
) -> list[Score]:
    """Score a model on every text.

    Args:
        model: directory, hub id, `demo` or artifact file.
        texts: text files; the embedded evaluation text if None.
        window: predicted tokens in a window.
        tokens: most tokens per text.
        device: `auto`, `cpu` or `cuda`.
        allow_unused: tensors and files of a checkpoint that are meant to be left out.
        base: the file that an artifact is an update of.
        resident: `decoded`, or `coded`: an artifact's blocks are decoded whenever they run.
        memory: most memory that its values may take (`24GB`), of the GPU where it runs on one; by default what is free.
            A model that needs more is streamed, one block in memory at a time.
        reporter: told about progress.
    """
    from bytecap.model.evaluation import evaluate
    from bytecap.pipeline.stages import choose_device

    reporter = reporter_for(reporter)
    target = choose_device(device)
    path, opened, streamed = Path(model), None, not base and resident == "decoded"
    contents = _contents(path, base, streamed=streamed) if is_artifact(path) else None
    if streamed and path.suffix not in _FOREIGN:
        opened = open_to_score(model, contents, memory, target, reporter, allow_unused)
    if opened is None:
        opened = open_model(model, allow_unused, base, device=target, resident=resident, contents=contents)
    encode = encoder(opened.files)
    paths = as_paths(texts)
    if not paths:
        warn(reporter, "no --text given: the embedded SQLite documentation is scored")
        paths = [demo_directory() / "val.txt"]
    check_model(opened)
    known, length = vocabulary_of(opened.module), window_limit(opened, window)
    read = [load_text(path, encode, window=length, limit=tokens, vocabulary=known) for path in paths]
    for note in opened.notes:
        reporter.note(note)
    scores = []
    for text in read:
        with reporter.step(text.name, text.tokens) as advance:
            scores.append(evaluate(opened.module, text, device=target, progress=advance))
    return scores
