"""Which path bits should choose a weight's subset: masks of a trellis of 2^m states, by their gap to the bound.

At high rate only the squared error of the nearest path counts, D in squared steps of the fine grid, and a code of this
kind stays log2(2 pi e D / 4) / 2 bits a weight above the rate-distortion bound. All masks are tried on a short column
of even values, the best of them on long ones. `--ungerboeck` measures the codes that textbooks list, which have the
largest free distance instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from bytecap.format.coders import trellis
from bytecap.quantization import viterbi
from common import record

UNGERBOECK = {3: (0o4, 0o13), 4: (0o4, 0o23), 5: (0o10, 0o45), 6: (0o24, 0o103), 7: (0o126, 0o235), 8: (0o362, 0o515)}
SHORT, LONG = {8: 12_000}, 200_000  # rows


def gap(memory: int, masks: tuple[int, int], rows: int, seeds: range) -> float:
    """Bits a weight above the bound."""
    states = range(1 << (memory - 1))
    table = np.array([[(2 * s & m).bit_count() & 1 for s in states] for m in masks], np.uint8)
    points, even, error = np.empty(rows, np.int32), np.ones(rows, np.float32), []
    for seed in seeds:
        u = np.random.default_rng(seed).uniform(0, 256, rows).astype(np.float32)
        viterbi.search(u, even, table, viterbi.decisions(rows, memory), points)
        error.append(float(np.square(u - points).mean()))
    return float(np.log2(2 * np.pi * np.e / 4 * np.mean(error)) / 2)


def candidates(memory: int) -> list[tuple[int, int]]:
    """All masks in which both branches of a state, and both into it, have subsets two apart."""
    inner = range(1 << (memory - 1))
    return [(low << 1, 1 << memory | high << 1 | 1) for low in inner if low for high in inner]


def main() -> None:
    """Search and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--memory", nargs="*", type=int, default=list(trellis.MASKS))
    p.add_argument("--search", action="store_true", help="try all masks, not only those in use and Ungerboeck's")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, help="JSON lines are appended here")
    args = p.parse_args()
    args.models = args.texts = None
    for memory in args.memory:
        known = {"in use": trellis.MASKS[memory], "Ungerboeck": UNGERBOECK[memory]}
        if args.search:
            rows, tried = SHORT.get(memory, 30_000), candidates(memory)
            order = sorted(tried, key=lambda masks: gap(memory, masks, rows, range(args.seed, args.seed + 1)))
            known |= {f"number {i + 1} on a short column": masks for i, masks in enumerate(order[:24])}
        for label, masks in known.items():
            above = gap(memory, masks, LONG, range(100 + args.seed, 108 + args.seed))
            row = {
                "benchmark": "trellises", "states": 1 << memory, "masks": label, "low": masks[0], "high": masks[1],
                "bits_above_bound": above, "weights": 8 * LONG,
            }  # fmt: skip
            record(args, row)
            print(
                f"{1 << memory:4d} states  {label:28s} low {masks[0]:5d} high {masks[1]:5d}  {above:.4f} bit",
                flush=True,
            )


if __name__ == "__main__":
    main()
