"""Train for the file: layers that are stored as they are trained, and a loss term that counts coded bytes.

`PQuantLinear` (pQuant, arXiv:2602.22592) has a 1-bit main branch and a narrow 8-bit branch; `replace` puts it in place
of a module's linear layers, `schedule` gives learning rate and weight decay, `export` writes the finished module
exactly. `rate` estimates the coded bytes of any module's weights, differentiably: `loss + mu * rate(module)`.
"""

from __future__ import annotations

from bytecap_lab.train.convert import inference, replace
from bytecap_lab.train.estimate import energies, rate, step_for
from bytecap_lab.train.exporting import export, sections
from bytecap_lab.train.pquant import PQuantLinear, schedule

__all__ = [
    "PQuantLinear", "energies", "export", "inference", "rate", "replace", "schedule", "sections", "step_for"
]  # fmt: skip
