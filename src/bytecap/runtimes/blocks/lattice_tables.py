"""Make tables for the search of vector formats: entries near every cell, and factors of vectors.

>>> from bytecap.runtimes.blocks.lattice import LATTICES
>>> tables(LATTICES["IQ2_XS"])[-2].shape  # cells of three levels in eight columns, entries near each
(6561, 8, 24)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks import BlockFormat, FloatArray
from bytecap.runtimes.blocks.lattice import table
from bytecap.runtimes.blocks.lattice_search import COARSE, NEAR

_FACTORS = np.linspace(1.1, 0.5, 8, dtype=np.float32)  # candidates for a sub-block's scale
_TRIES = np.array((1.0, 0.93, 1.07, 0.86, 1.14), np.float32)  # and for the float16 of a block
_RIDGE = 1e-5  # of a vector's mean diagonal
_SIGNS = {"": 0, "free": 1, "even": 2}


@cache
def tables(form: BlockFormat) -> tuple[Any, ...]:
    """Arguments of `lattice_kernel.encode_vectors` that a format fixes."""
    entries = table(form)
    levels = np.unique(entries)
    mids = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    grid = np.stack(np.meshgrid(*[levels] * form.vector, indexing="ij"), -1).reshape(-1, form.vector)
    far = (grid**2).sum(-1)[:, None] - 2 * grid @ entries.T + (entries**2).sum(-1)
    near = entries[np.argsort(far, 1, kind="stable")[:, :NEAR]].transpose(0, 2, 1).astype(np.int8)
    offsets = np.array((1.0, -1.0) if form.offsets else (0.0,), np.float32)
    shared = form.offsets != 8  # one offset a sub-block, if there is any
    return (
        np.float32(levels.max()), form.scales[1], _SIGNS[form.signs], offsets, shared, _FACTORS, _TRIES,
        np.ascontiguousarray(near[..., :COARSE]), np.ascontiguousarray(near), mids,
    )  # fmt: skip


def factors_of(
    hessian: FloatArray, fed: FloatArray, weight: FloatArray, layout: BlockFormat
) -> tuple[npt.NDArray[Any], ...]:
    """Blocks of the Hessian, and of every vector: factors for feedback and for descent, inverses, the diagonal.

    Args:
        hessian: float32 (cols, cols), `fed` and `weight` as in `encode.Form`.
        fed: (cols, cols).
        weight: (cols,).
        layout: a vector format.
    """
    n, cols = layout.vector, len(hessian)
    tiles = np.stack([hessian[i : i + layout.block, i : i + layout.block] for i in range(0, cols, layout.block)])
    own = np.stack([hessian[i : i + n, i : i + n] for i in range(0, cols, n)]).astype(np.float64)
    own += np.eye(n) * (_RIDGE * own.diagonal(0, 1, 2).mean(-1))[:, None, None]  # float32 may have lost that much
    parts = np.stack([fed[i : i + n, i : i + n] for i in range(0, cols, n)])
    feedback = np.triu(parts) * np.sqrt(weight).reshape(-1, n, 1)
    lower = np.linalg.cholesky(own)  # own = lower lower^T, so the factor R is lower^T
    arrays: tuple[FloatArray, ...] = (feedback.transpose(0, 2, 1), lower, np.linalg.inv(own))
    return (tiles, *(np.ascontiguousarray(a, np.float32) for a in arrays), hessian.diagonal().copy())
