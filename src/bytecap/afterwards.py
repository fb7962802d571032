"""Tuning what finished sections hold of continuous values, whatever coders they are for; codes are frozen.

A coder or layer that has some says so (`Continuous` in `bytecap.coders`): codewords, decoders, low-rank parts and
scales, protected columns, rows, channels and outliers, vectors. Adam moves them end to end by the KL to the original.
From time to time they are written as a file holds them and measured on the correction tokens; the best is kept, if it
is better than the sections were and no longer than the cap allows.

Source: ClusComp (ACL 2025), ReALLM (arXiv:2405.13155) and OWQ (arXiv:2306.02272) tune what their formats leave
continuous; here that is one loop for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bytecap.coders import Continuous
from bytecap.core import Unit
from bytecap.methods import Section

RATE = 0.002  # first learning rate, in mean sizes of an array
_CHECKS = 6


@dataclass
class _Part:
    """A unit with something to tune."""

    unit: Unit
    section: Section
    continuous: Continuous
    leaves: dict[str, Tensor]

    def values(self) -> Tensor:
        """In stored layout, with gradient."""
        matrix = self.continuous.matrix(self.leaves, None)
        return (matrix.T if self.unit.transposed else matrix).reshape(self.unit.shape)

    def stored(self) -> Section:
        """As a file would hold it now."""
        arrays = {n: t.detach().cpu().numpy() for n, t in self.leaves.items()}
        return Section(self.section.tag, self.continuous.encode(arrays))
