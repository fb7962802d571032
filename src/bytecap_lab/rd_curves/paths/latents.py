"""Recode units as latents that one small network, shared by the whole file, decodes, after ReALLM.

Encoder, codewords and decoder are trained on patches of all units; a unit has a scale, which is its rate, and maybe a
low-rank part. Source: `bytecap.methods.baselines.reallm`. Omitted: a network for each tensor, which small tensors
cannot pay for, and tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bytecap.methods.baselines import reallm, shared_codewords
from bytecap.methods.baselines.shared_codewords import STEPS, System
from bytecap_lab.rd_curves.base import Base
from bytecap_lab.rd_curves.paths import SEED, Recoded, Recoding, material, rate

_MOST, _DIMENSION, _HEADROOM = 9, 2, 1.0
_RANKS = (0, 4)
_AROUND = (0, 3)  # quarter octaves finer than the base's rate asks


@dataclass(frozen=True)
class Patches:
    """A setting: the unit's scale by its number in `STEPS`, and the rank of what is added."""

    step: int
    rank: int
    shared: str = field(default="file: decoder", repr=False)


class Latents:
    """The recoding; a setting is `Patches`."""

    id = "latents"
    brief = 2

    def refusal(self, base: Base) -> str:
        """Acts on every base."""
        del base
        return ""

    def _power(self, base: Base) -> int:
        """Return the binary logarithm of the number of codewords."""
        return min(_MOST, max(1, round(_DIMENSION * (rate(base, list(base.problems)) + _HEADROOM))))

    def settings(self, base: Base, name: str) -> Sequence[Patches]:
        """Return scales near the base's rate, without and with a low-rank part."""
        shape = base.problems[name].unit.matrix_shape
        if shape[1] < shared_codewords.PATCH:
            return []
        middle = round(4 * (self._power(base) / _DIMENSION - rate(base, [name]))) + 1
        steps = {min(len(STEPS) - 1, max(0, middle - k)) for k in _AROUND}
        ranks = [r for r in _RANKS if 2 * r <= min(shape)]
        return [Patches(k, r) for k in sorted(steps, reverse=True) for r in ranks]

    def _system(self, base: Base) -> System:
        """Train the networks once."""
        if self.id not in base.memo:
            fitting = [n for n, p in base.problems.items() if p.unit.matrix_shape[1] >= shared_codewords.PATCH]
            base.memo[self.id] = shared_codewords.autoencoder(
                [material(base, n) for n in fitting], 1 << self._power(base), _DIMENSION, byte=True, seed=SEED
            )
        found: System = base.memo[self.id]
        return found

    def code(self, base: Base, wanted: Mapping[str, Patches]) -> dict[str, Recoded]:
        """Encode every unit's patches."""
        system, found = self._system(base), {}
        family = reallm.ReALLM(reallm.OPTIONS, SEED).sharing(system)
        objects = dict(enumerate(system.objects()))
        for name, s in wanted.items():
            mine = material(base, name)
            setting = reallm.pack_setting(float(shared_codewords.BASE + s.step), s.rank, decoder=False)
            section = family.section(mine, family.encode(mine, setting).kept)
            side = 4 + s.rank * sum(mine.unit.matrix_shape)
            found[name] = Recoded(section, side=side, objects=objects, users=len(base.problems))
        return found


RECODINGS: tuple[Recoding, ...] = (Latents(),)
