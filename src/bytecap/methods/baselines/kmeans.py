"""Run k-means for codebooks: Lloyd's iterations from a sample of the vectors, in chunks, on any device.

Codewords that lose all their vectors move to the vectors that are served worst. Sums are over weights `(n,)` if they
are given, so that vectors that matter pull harder. Source: Lloyd 1982; weighting as in SqueezeLLM (arXiv:2306.07629).
Omitted: k-means++, whose passes over the data cost more than they gain beyond a few hundred codewords.

>>> x = torch.tensor([[0.0], [0.1], [5.0], [5.2]])
>>> words = fit(x, 2, torch.Generator().manual_seed(0))
>>> sorted(round(float(w), 2) for w in words[:, 0])
[0.05, 5.1]
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22  # scores held at a time
ITERATIONS = 12
_WORK = 1 << 27  # distances in one iteration


def assign(vectors: Tensor, words: Tensor) -> Tensor:
    """Assign vectors (count, g) to their nearest codewords (n, g); returns int64 (count,)."""
    half = words.square().sum(1) / 2
    step = max(1, _CHUNK // max(1, len(words)))
    found = [_least(torch.addmm(half, part, words.T, alpha=-1)) for part in vectors.split(step)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def _least(scores: Tensor) -> Tensor:
    """Return the first column of the least score of each row; numpy finds it eight times as fast on a processor."""
    if scores.device.type != "cpu":
        return scores.argmin(1)
    return torch.from_numpy(scores.numpy().argmin(1))


def centres(vectors: Tensor, index: Tensor, n: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean (n, g) and the weight (n,) of the vectors of every codeword."""
    w = torch.ones(len(vectors), dtype=vectors.dtype, device=vectors.device) if weights is None else weights
    sums = torch.zeros(n, vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    sums.index_add_(0, index, vectors * w[:, None])
    mass = torch.zeros(n, dtype=vectors.dtype, device=vectors.device).index_add_(0, index, w)
    return sums / mass.clamp(min=1e-30)[:, None], mass


def fit(
    vectors: Tensor,
    n: int,
    generator: torch.Generator,
    *,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Fit codewords (n, g) to vectors (count, g).

    Args:
        vectors: float32.
        n: number of codewords; with fewer vectors, some repeat.
        generator: of the vectors to begin with.
        weights: (count,) non-negative importance; None weighs all alike.
        start: codewords to begin with instead.
        iterations: of Lloyd's algorithm.
    """
    count = len(vectors)
    chosen = torch.randperm(count, generator=generator)[:n]
    chosen = torch.cat([chosen, chosen.new_zeros(max(0, n - len(chosen)))])
    words = vectors[chosen.to(vectors.device)].clone() if start is None else start.clone()
    if vectors.shape[1] == 1 and start is None:  # on a line, even spacing halfway to even counts is close to optimal
        flat = vectors[:, 0].sort().values
        at = torch.linspace(0, 1, n + 2, device=flat.device)[1:-1]
        counts = flat[(at * (count - 1)).round().long()]
        words = (counts + flat[0] + (flat[-1] - flat[0]) * at)[:, None] / 2
    for _ in range(iterations):
        index = assign(vectors, words)
        fresh, mass = centres(vectors, index, n, weights)
        empty = (mass <= 0).nonzero()[:, 0]
        words = torch.where(mass[:, None] > 0, fresh, words)
        if len(empty):
            error = (vectors - words[index]).square().sum(1)
            worst = error.topk(min(len(empty), count)).indices
            words[empty[: len(worst)]] = vectors[worst]
    return words


def quantize(
    vectors: Tensor,
    n: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    *,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit codewords to a part of many vectors and polish them on all; returns (codewords (n, g), indices (count,))."""
    limit = max(16_384, min(64 * n, _WORK // n))
    few = torch.randperm(len(vectors), generator=generator)[:limit].to(vectors.device)
    part, heavy = (vectors, weights) if len(few) == len(vectors) else (vectors[few], None)
    if weights is not None and heavy is None:
        heavy = weights[few]
    rounds = ITERATIONS if vectors.shape[1] > 1 else 4 * ITERATIONS
    words = fit(part, n, generator, weights=heavy, start=start, iterations=rounds)
    if len(few) < len(vectors):
        words = fit(vectors, n, generator, weights=weights, start=words, iterations=2)
    return words, assign(vectors, words)


def vectors_of(weight: Tensor, g: int) -> Tensor:
    """Cut the rows of a matrix into vectors (rows * ceil(cols / g), g), padding the last one of a row with zeros."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % g))
    return padded.reshape(rows * (padded.shape[1] // g), g)
