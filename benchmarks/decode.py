"""How fast matrices are decoded: straight to values, by their symbols, and by numpy, which is the law.

A section of random normal weights is coded as a fit would (trellis of 128 states, spreads of rows and columns that
vary by an octave) and decoded by every engine in turn; `encode` is how fast the section is written. Processor time of
one core counts, so that other jobs disturb little. `--units N` decodes a file of N such matrices on all cores as well,
where wall time counts.

`--device cuda` measures a GPU instead, which decodes to bfloat16: `--units` matrices side by side as a block is decoded
whose bytes lie on the device, likewise all matrices of a file of `--blocks` such blocks (`resident`), and that file
from its bytes in memory, parsing and copying included (`file`). Values are held against the processor's. `--lanes` and
`--warps` are what its programs may be tuned by.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bytecap.format.coders import Shared, run
from bytecap.format.coders.direct import Direct
from bytecap.format.coders.grid import GridCode
from bytecap.format.coders.long_trellis import CODER
from bytecap.format.coders.trellis import subsets
from bytecap.format.contents import Contents, UnitSection
from bytecap.format.decoder import decode_units
from bytecap.format.entropy import jit
from bytecap.format.entropy.frequencies import Tables
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.model import device_decode
from bytecap.types import Unit
from common import record


def section(rows: int, cols: int, sigma: float, seed: int) -> tuple[bytes, Shared]:
    """A `long_trellis` section of random weights, and what its file shares."""
    code, shared = rounded(rows, cols, sigma, seed)
    return CODER.encode(code, shared).data, shared


def rounded(rows: int, cols: int, sigma: float, seed: int) -> tuple[GridCode, Shared]:
    """Random weights as a fit would round them, and what their file shares."""
    rng = np.random.default_rng(seed)
    middle = 20 + round(4 * np.log2(sigma))
    column_class = (middle + rng.integers(-3, 4, (1, cols))).astype(np.int64)
    row_class = rng.integers(-2, 3, rows).astype(np.int64)
    counts = {}
    for cls in range(1, 64):
        spread = 2 ** ((cls - 20) / 4)
        half = int(min(1000, 6 * spread + 3))
        z = np.arange(-half, half + 1)
        counts[cls] = dict(zip(z.tolist(), (1e6 * np.exp(-0.5 * (z / max(spread, 0.2)) ** 2)).tolist(), strict=True))
    offset = np.zeros((64, 17), np.float32)
    offset[:, 1:] = 0.05
    shared = Shared(Tables.from_counts(counts), offset)
    memory = 7
    code = GridCode(0.01, np.zeros((rows, cols), np.int32), column_class * 0, column_class, row_class * 0, row_class,
                    1, memory)  # fmt: skip
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-rows * cols // 8)), np.uint8), count=rows * cols)
    subset = subsets(bits.reshape(rows, cols), 1, memory).astype(np.int32)
    spread = np.float32(2) ** ((code.classes().astype(np.float32) - 20) / 4)
    base = np.array([0, 1, 2, 1], np.int32)[subset]
    sign = np.array([1, 1, 1, -1], np.int32)[subset]
    z = np.rint((rng.standard_normal((rows, cols), np.float32) * spread * sign - base) / 4).astype(np.int32)
    return replace(code, symbols=((4 * z + base) * sign).astype(np.int16)), shared


def best(work: Callable[[], Any], times: int) -> float:
    """Least processor seconds of one call."""
    found = []
    for _ in range(times):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def main() -> None:
    """Measure and record."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=2048)
    p.add_argument("--cols", type=int, default=2048)
    p.add_argument("--sigma", type=float, nargs="*", default=[2.5], help="spread over the fine grid's step")
    p.add_argument("--units", type=int, default=0, help="matrices of the file that all cores decode")
    p.add_argument("--device", default="cpu", help="cuda: decode there")
    p.add_argument("--blocks", type=int, default=22, help="of `--units` matrices, in the file that a GPU decodes")
    p.add_argument("--lanes", type=int, nargs="*", default=[device_decode._LANES])  # noqa: SLF001
    p.add_argument("--warps", type=int, nargs="*", default=[device_decode._WARPS])  # noqa: SLF001
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, help="JSON lines are appended here")
    args = p.parse_args()
    args.models = args.texts = None
    shape = (args.rows, args.cols)
    for sigma in args.sigma:
        code, shared = rounded(*shape, sigma, args.seed)
        data = CODER.encode(code, shared).data
        row: dict[str, Any] = {"benchmark": "decode", "rows": args.rows, "cols": args.cols,
                               "bits": round(8 * len(data) / args.rows / args.cols, 3)}  # fmt: skip
        if args.device != "cpu":
            for lanes, warps in itertools.product(args.lanes, args.warps):
                device_decode._LANES, device_decode._WARPS = lanes, warps  # noqa: SLF001
                found = on_device(contents_of(data, shape, shared, 1), args)
                print(record(args, {**row, "lanes": lanes, "warps": warps, **found}))
            continue
        row |= engines(data, shape, shared, args.times) | {"encode": encoders(code, shared, args.times)}
        if args.units:
            row |= all_cores(data, shape, shared, args.units)
        print(record(args, row))


def engines(data: bytes, shape: tuple[int, int], shared: Shared, times: int) -> dict[str, Any]:
    """Millions of weights a second of one core's processor time, and whether all engines give the same bits."""
    served, worth, results, found = Direct.served, jit.worth, {}, {}
    work = lambda: run([CODER.decode(data, shape, "F32", shared)])[0]  # noqa: E731
    for name in ("direct", "symbols", "numpy"):
        jit.worth = lambda _, name=name: name != "numpy"  # type: ignore[misc]
        Direct.served = served if name == "direct" else lambda _: False  # type: ignore[method-assign, assignment]
        results[name] = work()
        found[name] = round(shape[0] * shape[1] / best(work, times if name != "numpy" else 1) / 1e6, 1)
    Direct.served, jit.worth = served, worth  # type: ignore[method-assign]
    return {**found, "equal": all(r.tobytes() == results["numpy"].tobytes() for r in results.values())}


def encoders(code: GridCode, shared: Shared, times: int) -> dict[str, Any]:
    """Millions of weights a second of one core's processor time, and whether both engines write the same bytes."""
    worth, results, found = jit.worth, [], {}
    for name in ("compiled", "numpy"):
        jit.worth = lambda _, name=name: name == "compiled"  # type: ignore[misc]
        results.append(CODER.encode(code, shared).data)
        seconds = best(lambda: CODER.encode(code, shared), times if name == "compiled" else 1)
        found[name] = round(code.symbols.size / seconds / 1e6, 1)
    jit.worth = worth
    return {**found, "equal": results[0] == results[1]}


def contents_of(data: bytes, shape: tuple[int, int], shared: Shared, count: int) -> Contents:
    """A file's contents: so many units of the same bytes."""
    units = tuple(UnitSection(Unit(f"m{i}", shape, "F32"), CODER.tag, data) for i in range(count))
    return Contents(units, dump_shared(shared), (), {})


def on_device(one: Contents, args: argparse.Namespace) -> dict[str, Any]:
    """Billions of weights a second to bfloat16, of a block and of a file, by wall time; values are checked."""
    device, count = torch.device(args.device), args.units or 7
    (unit,) = one.units
    wanted = torch.from_numpy(decode_units(one)["m0"]).to(device, torch.bfloat16)
    dtypes = {f"m{i}": torch.bfloat16 for i in range(count)}
    block = Contents(tuple(replace(unit, unit=replace(unit.unit, name=n)) for n in dtypes), one.tables, (), {})
    batch = device_decode.DeviceUnits(block, device).batch(block.units, dtypes)
    found = batch.decode()
    if batch.served != count or not all(torch.equal(found[n], wanted) for n in dtypes):
        raise SystemExit(f"the device decoded {batch.served} of {count} matrices, or other values than the processor")
    seconds = wall(batch.decode, device, args.times)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    del found
    whole = [f"m{i}" for i in range(count * args.blocks)]
    file = Contents(tuple(replace(unit, unit=replace(unit.unit, name=n)) for n in whole), one.tables, (), {})

    def load() -> None:
        kept = [v for _, v in device_decode._decode_each(file, device, torch.bfloat16)]  # noqa: SLF001
        if not torch.equal(kept[-1], wanted):
            raise SystemExit("the file has other values than the processor's")

    weights = wanted.numel() * count
    every = device_decode.DeviceUnits(file, device).batch(file.units, dict.fromkeys(whole, torch.bfloat16))
    resident = wall(every.decode, device, args.times)
    del every
    return {
        "device": args.device, "block": round(weights / seconds / 1e9, 3), "block_ms": round(1e3 * seconds, 3),
        "block_peak_gb": peak and round(peak, 3), "block_weights": weights, "file_weights": weights * args.blocks,
        "resident": round(weights * args.blocks / resident / 1e9, 3),
        "file": round(weights * args.blocks / wall(load, device, args.times) / 1e9, 3),
    }  # fmt: skip


def wall(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Least wall seconds of one call that has ended on the device, the first one left out."""
    found = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def all_cores(data: bytes, shape: tuple[int, int], shared: Shared, count: int) -> dict[str, Any]:
    """Millions of weights a second of wall time, from a file's contents, and processor time against one core's."""
    contents = contents_of(data, shape, shared, count)
    cores, seconds = jit.cores, {}
    for number in (1, cores()):
        jit.cores = lambda number=number: number
        decode_units(contents)
        begun = time.perf_counter(), time.process_time()
        decode_units(contents)
        seconds[number] = time.perf_counter() - begun[0], time.process_time() - begun[1]
    jit.cores = cores
    return {
        "units": count, "cores": cores(),
        "file": {n: round(count * shape[0] * shape[1] / wall / 1e6, 1) for n, (wall, _) in seconds.items()},
        "processor_seconds": {n: round(used, 3) for n, (_, used) in seconds.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
