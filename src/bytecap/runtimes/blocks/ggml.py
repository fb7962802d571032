"""The block formats of ggml, which llama.cpp runs: sizes, ranges, and where every bit goes.

Source: the structures of ggml-common.h (MIT), described here anew; gguf-py decodes all of them, and tests compare.

>>> sorted(FORMATS, key=lambda n: FORMATS[n].bits)[0], FORMATS["IQ4_XS"].bits
('IQ1_S', 4.25)
"""

from __future__ import annotations

from bytecap.runtimes.blocks import BlockFormat, Part
from bytecap.runtimes.blocks.lattice import LATTICES

# the 4-bit table of ggml's IQ4 formats
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_SCALE, _MINIMUM = Part("scale"), Part("minimum")
_NIBBLES = Part("codes", 0, 4, 16)  # two halves of 32 in 16 bytes
_FIFTH = Part("codes", 4, 1, 1)  # bit 4 of 32 codes, in order
_TWOS = Part("codes", 0, 2, 32)
_K_NIBBLES = Part("codes", 0, 4, 32)

# doubled values of E2M1, and the place of every stored code among them
_E2M1 = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
_E2M1_ORDER = (*range(7, 15), *range(7, -1, -1))

_ALL = (
    BlockFormat("TQ1_0", 54, 256, 256, -1, 1, (Part("trits"), _SCALE), code_zero=1),
    BlockFormat("TQ2_0", 66, 256, 256, -1, 1, (_TWOS, _SCALE), code_zero=1),
    BlockFormat(
        "MXFP4", 17, 32, 32, -12, 12, (Part("power"), _NIBBLES), levels=_E2M1, order=_E2M1_ORDER, float_type="E8M0"
    ),
    BlockFormat("Q4_0", 18, 32, 32, -8, 7, (_SCALE, _NIBBLES), code_zero=8),
    BlockFormat("Q4_1", 20, 32, 32, 0, 15, (_SCALE, _MINIMUM, _NIBBLES), minimums=1),
    BlockFormat("Q5_0", 22, 32, 32, -16, 15, (_SCALE, _FIFTH, _NIBBLES), code_zero=16),
    BlockFormat("Q5_1", 24, 32, 32, 0, 31, (_SCALE, _MINIMUM, _FIFTH, _NIBBLES), minimums=1),
    BlockFormat("Q8_0", 34, 32, 32, -127, 127, (_SCALE, Part("codes"))),
    BlockFormat("IQ4_NL", 18, 32, 32, -127, 113, (_SCALE, _NIBBLES), levels=_IQ4),
    BlockFormat(
        "Q2_K", 84, 256, 16, 0, 3, (Part("pairs", 0, 4, 16), _TWOS, _SCALE, _MINIMUM), (0, 15), 15
    ),
    BlockFormat(
        "Q3_K", 110, 256, 16, -4, 3,
        (Part("codes", 2, 1, 32), _TWOS, Part("sub_scales", 0, 4, 8), Part("sub_scales", 4, 2, 4), _SCALE),
        (-32, 31), code_zero=4, scale_zero=32,
    ),
    BlockFormat("Q4_K", 144, 256, 32, 0, 15, (_SCALE, _MINIMUM, Part("six"), _K_NIBBLES), (0, 63), 63),
    BlockFormat(
        "Q5_K", 176, 256, 32, 0, 31, (_SCALE, _MINIMUM, Part("six"), Part("codes", 4, 1, 32), _K_NIBBLES), (0, 63), 63
    ),
    BlockFormat(
        "Q6_K", 210, 256, 16, -32, 31,
        (Part("codes", 0, 4, 64), Part("codes", 4, 2, 32), Part("sub_scales"), _SCALE), (-128, 127), code_zero=32,
    ),
    BlockFormat(
        "IQ4_XS", 136, 256, 32, -127, 113,
        (_SCALE, Part("sub_scales", 4, 2, 1), Part("sub_scales", 0, 4, 1), _NIBBLES),
        (-32, 31), scale_zero=32, levels=_IQ4,
    ),
)  # fmt: skip

FORMATS = {f.name: f for f in _ALL} | LATTICES
