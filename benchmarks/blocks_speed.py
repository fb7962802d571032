"""Millions of weights a second that each block format is rounded at: one core of the processor, or a CUDA device.

Random weights under a Hessian of correlated columns, two sweeps of descent. A core's time is that of the process, the
least of three passes, so that other jobs count little. On a device the time is that of whole
matrices side by side, codes back in the host's memory; the first pass, which compiles, is not counted, and a second one
must give the same bytes. `loss` is the distortion over that of the processor on the first rows.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from bytecap.runtimes.blocks import Codes, FloatArray
from bytecap.runtimes.blocks.encode import Factors, encode, encode_all, factor
from bytecap.runtimes.blocks.ggml import FORMATS
from common import parser, record


def correlated(cols: int, seed: int, device: str) -> torch.Tensor:
    """A Hessian of four times as many samples as columns."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * cols, cols, generator=g).to(device)
    mixed = torch.eye(cols, device=device) + 0.1 * torch.randn(cols, cols, generator=g).to(device)
    x = x @ mixed
    return (x.T @ x).double() / len(x)


def loss(found: Codes, weight: FloatArray, h: torch.Tensor) -> float:
    """Distortion of coded rows."""
    error = torch.from_numpy(found.values() - weight).double()
    return float(((error @ h.cpu().double()) * error).sum())


def there(name: str, weights: list[FloatArray], factors: list[Factors]) -> tuple[float, list[Codes], bool]:
    """Seconds, codes, and whether two passes gave the same."""
    found, seconds = [], 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        found.append([c for c, _ in encode_all(weights, factors, FORMATS[name])])
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    same = all(
        np.array_equal(getattr(a, k), getattr(b, k))
        for a, b in zip(found[1], found[2], strict=True)
        for k in ("codes", "sub_scales", "sub_minimums", "scale", "minimum")
    )
    return seconds, found[2], same


def main() -> None:
    """Every format."""
    p = parser(__doc__ or "", required=False)
    p.add_argument("--rows", type=int, default=2048)
    p.add_argument("--cols", type=int, nargs="*", default=[2048])
    p.add_argument("--matrices", type=int, default=4, help="side by side on a device")
    p.add_argument("--formats", nargs="*", default=[n for n, f in FORMATS.items() if not getattr(f, "vector", 0)])
    args = p.parse_args()
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    few = 128
    for cols in args.cols:
        count = args.matrices if device == "cuda" else 1
        hessians = [correlated(cols, i, device) for i in range(count)]
        factors = [factor(h) for h in hessians]
        rows = args.rows if device == "cuda" else min(args.rows, 512)
        weights = [np.random.default_rng(i).standard_normal((rows, cols), dtype=np.float32) for i in range(count)]
        for name in args.formats:
            form = factors[0].form()
            encode(weights[0][:64], form, FORMATS[name], threads=1)
            seconds = math.inf
            for _ in range(3):
                began = time.process_time()
                part = encode(weights[0][:few], form, FORMATS[name], threads=1)
                seconds = min(seconds, time.process_time() - began)
            row: dict[str, Any] = {
                "benchmark": "blocks_speed", "format": name, "rows": rows, "cols": cols, "matrices": count,
                "processor_core_mw_s": round(few * cols / seconds / 1e6, 2),
            }  # fmt: skip
            if device == "cuda":
                seconds, codes, same = there(name, weights, factors)
                first = codes[0].part(slice(0, few))
                row |= {
                    "device_mw_s": round(count * rows * cols / seconds / 1e6, 1), "same_bytes": same,
                    "loss": loss(first, weights[0][:few], hessians[0]) / loss(part, weights[0][:few], hessians[0]),
                }  # fmt: skip
            print(row, flush=True)
            record(args, row)


if __name__ == "__main__":
    main()
