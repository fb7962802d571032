"""Decide whether a checkpoint is read whole or streamed, and what a streamed one may keep in memory.

The need of a fit is known before anything is loaded: it grows with the number of parameters, which the files' headers
say. `--memory` limits it; by default it is what is free on the device.

>>> needs_streaming(8_000_000_000, "cpu", 24_000_000_000), needs_streaming(8_000_000, "cpu", 24_000_000_000)
(True, False)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from bytecap.errors import BytecapError, ShortageError
from bytecap.format.contents import Contents
from bytecap.format.decoder import side_files
from bytecap.format.updates import units_of
from bytecap.job.config import FitConfig
from bytecap.model import gguf_file
from bytecap.model.checkpoint import Model, load_checkpoint, resolve
from bytecap.model.fileset import Header, read_config, read_headers
from bytecap.model.predicted import WAITING
from bytecap.model.quantized_checkpoint import roughly_dense
from bytecap.model.streamed_artifact import streamed_module
from bytecap.model.streamed_checkpoint import Unstreamable, open_streamed
from bytecap.pipeline import several
from bytecap.pipeline.formats import OURS, format_of
from bytecap.progress import Reporter
from bytecap.runtimes import hub
from bytecap.sizes import parse_size
from bytecap.system import allocator
from bytecap.system.device_memory import bounded
from bytecap.system.scratch import Scratch

_A_PARAMETER = {"cpu": 16, "cuda": 20}  # bytes that a fit in memory takes of the device, measured
_HOST = 8  # bytes a parameter that a fit on a GPU takes of the machine besides
_BASE = {"cpu": 700_000_000, "cuda": 3_000_000_000}
_A_VALUE = 4  # bytes a parameter that a model takes to be scored
_SPARE = 8  # of a GPU's memory, one part for what is reserved and not in use
_NO = "the driver or this torch has no segments that grow"
_BLOCKS = 8  # times the largest block and what is outside the chain, in float32, that a streamed fit takes


def needs_streaming(parameters: int, device: str, memory: int) -> bool:
    """Return whether a fit in memory would need more than `memory` bytes of the device."""
    return _A_PARAMETER[device] * parameters + _BASE[device] > memory


def limit_of(memory: int | str | None, device: str) -> int | None:
    """Return the memory that is given, or what is free; None where the system does not say."""
    return free(device) if memory is None else parse_size(memory)


def open_to_score(
    model: Path | str,
    contents: Contents | None,
    memory: int | str | None,
    device: str,
    reporter: Reporter,
    allow_unused: Sequence[str] = (),
) -> Model | None:
    """Open a directory or an artifact to be streamed, if its values alone would not fit into memory.

    Args:
        model: directory, hub id or `.bcap` file.
        contents: of the file, whose units' bytes are read when they are asked for; None for a directory.
        memory: as an option; what is free if None.
        device: torch device of the passes.
        reporter: told that the model is streamed, or why it is not.
        allow_unused: see `bytecap.model.checkpoint.load_checkpoint`.

    Returns:
        The streamed model; None for one that is to be opened whole.
    """
    limit = limit_of(memory, device)
    directory = resolve(model) if contents is None else Path(model)
    if limit is None or directory.suffix == gguf_file.SUFFIX or hub.is_hub(directory):
        return None
    if contents is None:
        parameters = _parameters(_headers(directory, allow_unused))
    else:
        parameters = sum(u.unit.parameters for u in contents.units)
    if _A_VALUE * parameters + _BASE[device] <= limit:
        return None
    try:
        if contents is None:
            opened: Model = open_streamed(model, Scratch(), device=device, allow_unused=allow_unused)
        else:
            module = streamed_module(contents, str(model), device)
            opened = Model(module, tuple(units_of(contents)), side_files(contents), str(model))
    except Unstreamable as exc:
        reporter.note(f"{model} is not streamed: {exc}")
        return None
    reporter.note(f"its values would take more than {limit / 1e9:.1f} GB: the model is streamed")
    return opened


@contextmanager
def opened(
    model: Model | Path | str,
    config: FitConfig,
    device: str,
    reporter: Reporter,
    begin: Callable[[dict[str, bytes]], None] | None,
) -> Iterator[Model]:
    """Open a checkpoint for a job, streamed where a fit of it would not fit into memory.

    Args:
        model: directory, file or hub id; one that is loaded is given as it is.
        config: options.
        device: torch device of the fit.
        reporter: told why a model that should be streamed is not.
        begin: given the side files before the model is built.
    """
    if isinstance(model, Model):
        yield model
        return
    limit = limit_of(config.memory, device)
    found, most = _open(model, config, device, limit, reporter, begin)
    with bounded(most) as holds:
        if most is not None:
            says = f"torch reserves at most {most / 1e9:.1f} GB of the GPU"
            says += ", the least that this model needs, which is more than --memory" if most > (limit or most) else ""
            reporter.note(says if holds else f"torch may reserve more of the GPU than --memory says: {_NO}")
        try:
            yield found
        except ShortageError as exc:
            if not holds or most is None or not _of_gpu(exc.__cause__):
                raise
            raise ShortageError(
                f"out of memory within the {most / 1e9:.1f} GB of the GPU that a job may reserve: "
                "give it a larger --memory, or shorter passes by a smaller --window"
            ) from exc


def _of_gpu(exc: BaseException | None) -> bool:
    return isinstance(exc, torch.OutOfMemoryError) or "device's memory" in str(exc)


def _open(
    model: Path | str,
    config: FitConfig,
    device: str,
    limit: int | None,
    reporter: Reporter,
    begin: Callable[[dict[str, bytes]], None] | None,
) -> tuple[Model, int | None]:
    """Open a checkpoint; returns also what the job may reserve of a GPU, if that is bounded."""
    allow = config.allow_unused or ()
    ranks = several.ranks_of(config)
    if limit is not None and config.memory is None and device == "cpu":
        limit //= ranks.on_host
    directory, most = resolve(model), None
    if limit is not None and directory.suffix != gguf_file.SUFFIX:
        headers, bounds = _headers(directory, allow), config.memory is not None and device == "cuda"
        wanted = needs_streaming(_parameters(headers), device, limit) or (
            config.memory is None
            and device == "cuda"
            and _HOST * _parameters(headers) > (free("cpu") or math.inf) / ranks.on_host
        )
        wanted = ranks.from_first(partial(bool, wanted))  # hosts may differ in what is free
        reason = _reason(config) if wanted or bounds else None
        if bounds and reason is None and format_of(config) == OURS:
            most = max(limit, _need(headers, device)) if wanted else limit
        if wanted and reason is None:
            kept = Scratch(_beside(config), *_room(headers, device, limit, ranks.on_host))
            ranks.at_end(kept.close)
            try:
                found = open_streamed(model, kept, device=device, begin=begin, allow_unused=allow)
            except Unstreamable as exc:
                reason, most = str(exc), None
            except BaseException:
                kept.close()  # who holds the error would hold its frames, and with them the work files
                raise
            else:
                reporter.note(f"a fit in memory would need more than {limit / 1e9:.1f} GB: the model is streamed")
                return found, most
        if wanted:
            reporter.note(f"{model} is not streamed: {reason}")
    return load_checkpoint(model, begin=begin, allow_unused=allow), most


def _reason(config: FitConfig) -> str | None:
    """Why options ask for a model in memory."""
    if config.method != "bytecap":
        return f"method {config.method} needs it in memory"
    if config.paths or config.given:
        return "overlays and given sections need it in memory"
    return "an update of a base needs it in memory" if config.base else None


def _headers(directory: Path, allow: object) -> dict[Path, Header]:
    try:
        headers = read_headers(directory, allow)[0]  # type: ignore[arg-type]
        return roughly_dense(read_config(directory), headers, directory)
    except (BytecapError, OSError):
        return {}  # which opening it says again, in its own order


def _parameters(headers: dict[Path, Header]) -> int:
    return sum(math.prod(e["shape"]) for header in headers.values() for e in header.values())


def _beside(config: FitConfig) -> Path | None:
    """Where work files go: beside the output, whose disk has to have room anyway, else where the system says."""
    return None if config.output is None else Path(config.output).absolute().parent


def _need(headers: dict[Path, Header], device: str) -> int:
    """Bytes that a streamed fit takes of a device, beside its work files."""
    shapes = [tuple(e["shape"]) for header in headers.values() for e in header.values()]
    largest = max(shapes, key=math.prod, default=(0,))
    need: int = _BASE[device] + 4 * _BLOCKS * math.prod(largest)
    if device == "cpu":
        need += 4 * WAITING["cpu"] * min(largest, default=0)  # an embedding's width
    return need


def _room(headers: dict[Path, Header], device: str, limit: int, on_host: int) -> tuple[int, int]:
    """Bytes of the machine, which some ranks share, and of the device that may hold work files' tensors."""
    need = _need(headers, device)
    if device == "cpu":
        return max(0, (limit - need) // 2), 0
    return (free("cpu") or 0) // 2 // on_host, max(0, (limit - limit // _SPARE - need) * 4 // 5)


def free(device: str) -> int | None:
    """Bytes that are free on a device; None where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return allocator.available()
