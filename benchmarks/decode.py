"""How fast sections are decoded: weights a second of one core and of all, beside the numpy decoder that is the law.

A section of random normal weights is coded as a fit would (trellis of 128 states, spreads of rows and columns that
vary by an octave), and decoded by every engine in turn; processor time counts, so that other jobs disturb little.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bytecap.format.coders import Shared, run
from bytecap.format.coders.grid import GridCode
from bytecap.format.coders.long_trellis import CODER
from bytecap.format.coders.trellis import subsets
from bytecap.format.entropy import jit
from bytecap.format.entropy.frequencies import Tables
from common import record


def section(rows: int, cols: int, sigma: float, seed: int) -> tuple[bytes, Shared]:
    """A `long_trellis` section of random weights, and what its file shares."""
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
    points = (4 * z + base) * sign
    return CODER.encode(GridCode(0.01, points, code.column_step, column_class, code.row_step, row_class, 1, memory),
                        shared).data, shared  # fmt: skip


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
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, help="JSON lines are appended here")
    args = p.parse_args()
    args.models = args.texts = None
    shape = (args.rows, args.cols)
    for sigma in args.sigma:
        data, shared = section(*shape, sigma, args.seed)
        row: dict[str, Any] = {"benchmark": "decode", "rows": args.rows, "cols": args.cols, "seed": args.seed,
                               "bits": 8 * len(data) / args.rows / args.cols}  # fmt: skip
        results = {}
        for name, engine in ENGINES.items():
            jit.worth = engine  # type: ignore[assignment]
            work = lambda: run([CODER.decode(data, shape, "F32", shared)])[0]  # noqa: E731, B023
            results[name] = work()
            seconds = best(work, args.times if engine(0) else 1)
            row[name] = round(args.rows * args.cols / seconds / 1e6, 1)
        row["equal"] = all(np.array_equal(r, results["numpy"]) for r in results.values())
        print({**row, "cpu": os.uname().machine})
        record(args, row)


ENGINES: dict[str, Callable[[int], bool]] = {"numba": lambda _: True, "numpy": lambda _: False}

if __name__ == "__main__":
    main()
