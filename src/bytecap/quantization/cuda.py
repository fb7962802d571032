"""Round along the trellis on a CUDA device, with the programs of `bytecap.quantization.triton_programs`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bytecap.format.coders.classes import CENTRES, CLASSES, OCTAVE, UNIT_CLASS
from bytecap.format.coders.trellis import SHORT
from bytecap.quantization import SAMPLE, Rounded, RoundingProblem, Shrink, column_steps, narrow
from bytecap.quantization.triton_programs import round_columns
from bytecap.quantization.triton_search import plan

_BLOCK = 32  # columns of which a program feeds back errors itself
_THREADS = 128  # of a program with more than eight states
_LEAST = 128  # rows of a segment of 64 states and more: fewer would lose more at borders, and walk mostly others' rows
_FEW = 5  # bits of a state up to which half of them will do
_EARLY = 96  # rows that a segment's search begins early
_MOST = 64  # programs that share a matrix
_WARP = 32  # threads
_FIXED = 2**16  # parts of a step in sums for centroids


def begin_trellis(
    problem: RoundingProblem, step: Tensor, shrink: Shrink, first: int, memory: int = SHORT, *, waterfill: bool = True
) -> Callable[[], Rounded]:
    """Begin what `bytecap.quantization.trellis.round_trellis` does, on the device's stream in use.

    Returns:
        A function that waits for the result. Its symbols stay on the device, int16 or int32 (B, cols, rows).
    """
    weight, lower = problem.weight, problem.lower.contiguous()
    batch, cols, rows = weight.shape
    device = weight.device
    diag = lower.diagonal(dim1=1, dim2=2)
    exponent, scale = column_steps(problem, step, waterfill=waterfill)
    parts = _parts(batch, rows, memory, device)
    length = _cut(-(-rows // parts), memory)[1]
    constants = _constants(rows, memory, parts)
    error = weight  # a column's errors take the place of its weights
    kind = torch.int16 if narrow(weight, scale) else torch.int32
    symbols = torch.empty(batch, cols, rows, dtype=kind, device=device)
    column_class = torch.empty(batch, cols, dtype=torch.int32, device=device)
    cost = torch.empty(batch, parts, cols, device=device)
    centres = torch.zeros(batch, 2, CLASSES * CENTRES, dtype=torch.int64, device=device)
    row_class = problem.row_class.to(torch.int32).contiguous()
    whiten = torch.exp2(-row_class.float() / 4)
    offset = torch.from_numpy(shrink.offset).to(device)
    scratch = *_scratch(batch, rows, memory, parts, device), *_meetings(batch, parts, device)
    order, row_weight = problem.order.to(torch.int64).contiguous(), problem.rows.float().contiguous()
    for hi in range(cols, 0, -_BLOCK):
        lo = max(0, hi - _BLOCK)
        if hi < cols:  # two starts a block: a host that fills a GPU's queue waits there, and begins nothing else
            fed = torch.bmm(lower[:, hi:, lo:hi].transpose(1, 2), error[:, hi:])
        else:
            fed = torch.zeros(batch, hi - lo, rows, device=device)
        round_columns[(batch * parts,)](
            lower, fed, weight, error, scale, row_class, whiten, row_weight, offset, symbols, order, column_class,
            cost, centres, *scratch, lo, hi, cols, rows, first, length,
            min(length, _warm(memory)), parts, **constants,
        )  # fmt: skip
    distortion = (cost.double().sum(1) * diag.double().square()).sum(1)
    exponent = exponent.gather(1, torch.argsort(order, dim=1))

    def finish() -> Rounded:
        found = centres.sum(0).double()
        found[1] /= _FIXED
        return Rounded(
            symbols, exponent.cpu().numpy(), column_class.cpu().numpy(), row_class.cpu().numpy(),
            (distortion / 2).cpu().numpy(), found.reshape(2, CLASSES, CENTRES).cpu().numpy(),
        )  # fmt: skip

    return finish


def compile_ahead(memory: int, device: torch.device) -> None:
    """Begin to compile the programs of a search, on a thread of its own, while a GPU is busy with something else."""

    def work() -> None:
        with contextlib.suppress(Exception), torch.cuda.device(device):  # where they are needed is said what is wrong
            for parts in (1, 2):
                _compile(memory, parts)

    if memory > SHORT:
        threading.Thread(target=work).start()  # a process that ends waits for it: none may end inside a compiler


def _compile(memory: int, parts: int) -> None:
    """Compile the program of matrices whose rows and columns are multiples of 16."""
    kinds = {"f": torch.float32, "i": torch.int32, "h": torch.int16, "l": torch.int64}
    length = _cut(2048, memory)[1]
    round_columns.warmup(
        *(kinds[k] for k in "fffffifffhliflffiiiifi"), 0, _BLOCK, 2048, 2048, 0, length, length, parts,
        **_constants(2048, memory, parts), grid=(parts,),
    )  # fmt: skip


def _constants(rows: int, memory: int, parts: int) -> dict[str, Any]:
    """Return what a program is compiled for."""
    found = {"MEMORY": memory, "BITS": 0, "LEADS": 0, "LANE_LEADS": 0, "LOW": 0, "HIGH": 0}
    if memory > SHORT:
        found = plan(memory)
    together = {"launch_cooperative_grid": True} if parts > 1 else {}  # so that all of a matrix's programs run at once
    segments = _cut(-(-rows // parts), memory)[0]
    return {"SEGMENTS": segments, "WARM": _warm(memory), **found, **_SIZES, **_shape_of(memory), **together}


def _scratch(batch: int, rows: int, memory: int, parts: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return room for a column, costs between all states, their predecessors, borders, predecessors, and a path.

    Predecessors are a byte a row with eight states, else a bit a row and state.
    """
    segments, length = _cut(-(-rows // parts), memory)
    pairs, size, kind = segments, segments * length, torch.uint8
    if memory > SHORT:
        pairs, size, kind = 1, parts * _THREADS * (length // (memory - 1)) * (memory // 2), torch.int32
    return (
        torch.empty(batch, rows, device=device), torch.empty(batch, pairs, 8, 8, device=device),
        torch.empty(batch, pairs, 8, dtype=torch.int32, device=device),
        torch.empty(batch, parts * (4 * segments + 2), dtype=torch.int32, device=device),
        torch.empty(batch, size, dtype=kind, device=device),
        torch.empty(batch, rows, dtype=torch.int32, device=device),
    )  # fmt: skip


def _meetings(batch: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return room for what the programs of a matrix tell one another, and how often they have met."""
    return torch.empty(batch, 2, parts, device=device), torch.zeros(batch, dtype=torch.int32, device=device)


def _parts(batch: int, rows: int, memory: int, device: torch.device) -> int:
    """Return by how many programs, a power of two, tall matrices are rounded; all of a batch run at the same time."""
    if memory == SHORT or device.type != "cuda":
        return 1
    most = torch.cuda.get_device_properties(device).multi_processor_count // batch
    most = min(most, _MOST, rows // (_least(memory) * _segments(memory)))
    return 1 << max(0, most.bit_length() - 1)


def _cut(rows: int, memory: int) -> tuple[int, int]:
    """Cut a column; returns (segments, rows of each).

    With eight states a column takes 2 steps a segment and 3 a row. Few numbers of segments are used, since each one is
    compiled. With more states segments are whole periods of a search, and some may be left empty.
    """
    if memory > SHORT:
        segments, period = _segments(memory), memory - 1
        return segments, -(-max(-(-rows // segments), min(rows, _least(memory))) // period) * period
    segments = 32 if rows <= 1024 else 128 if rows <= 16384 else 256
    return segments, -(-rows // segments)


def _segments(memory: int) -> int:
    """Return segments that a program of more than eight states has threads for."""
    return _THREADS >> plan(memory)["BITS"]


def _warm(memory: int) -> int:
    """Return rows by which a segment's search begins early, after which paths from all states have nearly merged.

    In columns of 2048 normal values, 32 states lose 0.2% of distortion, 128 states 0.3%.
    """
    return -(-max(_EARLY, 16 * (memory - 1)) // (memory - 1)) * (memory - 1)


def _least(memory: int) -> int:
    """Return rows of a segment at least; paths of few states merge sooner."""
    return _LEAST // 2 if memory <= _FEW else _LEAST


def _shape_of(memory: int) -> dict[str, int]:
    """Return rows at a time, and threads."""
    if memory == SHORT:
        return {"ROWS": 256, "num_warps": 8}
    return {"ROWS": 512, "num_warps": _THREADS // _WARP}


_SIZES = {
    "BLOCK": _BLOCK, "CLASSES": CLASSES, "CENTRES": CENTRES, "UNIT": UNIT_CLASS, "OCTAVE": OCTAVE,
    "SAMPLE": SAMPLE, "FIXED": _FIXED, "MOST": _MOST,
}  # fmt: skip
