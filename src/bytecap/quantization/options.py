"""Ingredients of the `grid` coder, and effort levels of its search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from bytecap.errors import UsageError
from bytecap.format.coders.trellis import MASKS

STATES = tuple(1 << memory for memory in MASKS)
EFFORTS = (8, 32, 128, 256)  # states of the trellis by effort
_DEFAULT_EFFORT = {"cpu": 2, "cuda": 1}  # seconds over those of 8 states: 1.0 on a processor, 1.04 on an H200 (2: 1.23)
_WITHDRAWN = {"groups": "row groups of the Hessian cost more quality than they gain at equal bytes"}


def effort_on(device: str, effort: int | None) -> int:
    """Return the effort that is asked for, or the default of a torch device."""
    return _DEFAULT_EFFORT[torch.device(device).type] if effort is None else effort


@dataclass(frozen=True)
class Options:
    """Ingredients of the `grid` coder, each of which can be switched off.

    Attributes:
        feedback: error feedback and per-column steps from the Cholesky factor.
        waterfill: per-column steps; False gives one step per row with feedback, as GPTQ.
        order: round columns of large input energy first.
        row_power: row steps proportional to `G^(-row_power / 2)`; 0 switches them off.
        row_quantum: quarter octaves a row step is rounded to.
        row_class: quarter octaves a row's spread class is rounded to; 0 switches row classes off.
        trellis: walk columns of some spread along a trellis.
        states: of the trellis, see `STATES`; more take longer and distort less.
        shrink: reconstruct at centroids.
        damping: of the Hessian, in fractions of its mean diagonal.
        guided: weight tokens by output gradient energy.
        correct: measure correction factors with the real loss.
        allocate: choose steps on measured rate-distortion points; False gives every unit the same step.
        drift: most strength of drift targets, which tokens decide by which they were not made; 0 off.
        drift_tokens: tokens they are computed from.
    """

    feedback: bool = True
    waterfill: bool = True
    order: bool = True
    row_power: float = 1.0
    row_quantum: int = 2
    row_class: int = 1
    trellis: bool = True
    states: int = 8
    shrink: bool = True
    damping: float = 1e-3
    guided: bool = True
    correct: bool = True
    allocate: bool = True
    drift: float = 1.0
    drift_tokens: int = 16_384

    @property
    def memory(self) -> int:
        """Bits of a trellis' state."""
        return self.states.bit_length() - 1

    @staticmethod
    def of(given: Mapping[str, Any], warn: Callable[[str], None] = lambda _: None, effort: int = 0) -> Options:
        """Read the options of a job.

        Args:
            given: options by name.
            warn: told about options that no longer do anything.
            effort: 0 to 3, says how many states the trellis has where the options do not.

        Raises:
            UsageError: an unknown option, or a number of states that there is no trellis of.
        """
        known = [f.name for f in fields(Options)]
        unknown = sorted(set(given) - set(known) - set(_WITHDRAWN))
        if unknown:
            raise UsageError(f"method bytecap has no option {unknown[0]!r} ({', '.join(known)})")
        for name in sorted(set(given) & set(_WITHDRAWN)):
            warn(f"the option {name} of method bytecap does nothing any more: {_WITHDRAWN[name]}")
        options = Options(**{"states": EFFORTS[effort], **{n: v for n, v in given.items() if n in known}})
        if options.states not in STATES:
            raise UsageError(f"there is no trellis of {options.states} states ({', '.join(map(str, STATES))})")
        return options
