"""Recode units as a binary or ternary base, with the columns of most worth beside it in 8 bits, after pQuant.

Rows have one scale. Signs are rounded with error feedback, so that later columns absorb what earlier ones lost, which
is more than the trained form needs and the least that an untrained one does. The amount is the share of 8-bit columns.

Sources: pQuant (arXiv:2602.22592), BitNet b1.58, and `bytecap.format.coders.binary`. Omitted: training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bytecap.format.coders import Shared, run
from bytecap.format.coders.binary import CODER, NO_MEAN, Binary, binarize
from bytecap.format.coders.stack import CODER as STACK
from bytecap.job import Section
from bytecap.methods.baselines.gptq import factorize, feedback
from bytecap.quantization.overlays import UnitProblem
from bytecap.quantization.overlays.columns import OVERLAY as COLUMNS
from bytecap.quantization.overlays.protect import Amount, scores
from bytecap.system.threads import NESTED, in_threads
from bytecap_lab.rd_curves.base import Base
from bytecap_lab.rd_curves.paths import Recoded, Recoding

_SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 3 / 8)  # of the columns


def signs(problem: UnitProblem, levels: int, protected: Sequence[int] = ()) -> Binary:
    """Round a problem to 2 or 3 levels with error feedback; `protected` columns do not count for the scales."""
    others = np.setdiff1d(np.arange(problem.weight.shape[1]), np.asarray(protected, np.int64))
    plain = binarize(problem.weight.numpy()[:, others], levels)
    scale = torch.from_numpy(plain.scales.astype(np.float32))
    factor, ones = factorize(problem.hessian), torch.ones(())
    if levels == 2:  # codes 0 and 1, two scales apart, of weights moved up by one
        codes, _ = feedback(problem.weight + scale[:, None], factor, 2 * scale, 0 * ones, ones)
    else:
        codes, _ = feedback(problem.weight, factor, scale, -ones, ones)
        codes = codes + 1
    return Binary(codes.numpy().astype(np.int64), levels, plain.scales, np.zeros(0, np.float16), NO_MEAN)


@dataclass(frozen=True)
class Signs:
    """The recoding; a setting is an `Amount` of 8-bit columns."""

    id: str
    levels: int
    brief: int = 2

    def refusal(self, base: Base) -> str:
        """Acts on every base."""
        del base
        return ""

    def settings(self, base: Base, name: str) -> Sequence[Amount]:
        """Return no columns up to three in eight."""
        problem = base.problems[name]
        cols = problem.weight.shape[1]
        near = torch.from_numpy(
            run([CODER.decode(CODER.encode(binarize(problem.weight.numpy(), self.levels)),
                              problem.unit.matrix_shape, problem.unit.dtype, Shared())])[0]
        )  # fmt: skip
        order = scores(problem, near).sum(0).argsort(descending=True, stable=True).numpy()
        return [Amount(k, 8, 0, order) for k in sorted({int(s * cols) for s in _SHARES})]

    def code(self, base: Base, wanted: Mapping[str, Amount]) -> dict[str, Recoded]:
        """Code signs, then the columns over them."""
        found = in_threads(lambda item: self._code(base, *item), list(wanted.items()), most=NESTED)
        return dict(zip(wanted, found, strict=True))

    def _code(self, base: Base, name: str, amount: Amount) -> Recoded:
        problem = base.problems[name]
        rows, cols = problem.unit.matrix_shape
        below = COLUMNS.before(problem, amount) if amount.count else problem
        data = CODER.encode(signs(below, self.levels, amount.index.tolist()))
        section, side = Section(CODER.tag, data), 2 * rows
        if amount.count:
            values = run([CODER.decode(data, (rows, cols), problem.unit.dtype, Shared())])[0]
            layer = COLUMNS.after(problem, torch.from_numpy(values), amount)
            section = Section(STACK.tag, STACK.encode((CODER.tag, data), [(layer.tag, layer.data)]))
            side += layer.side
        return Recoded(section, side=side, share=amount.count / cols)


RECODINGS: tuple[Recoding, ...] = (Signs("binary", 2), Signs("ternary", 3))
