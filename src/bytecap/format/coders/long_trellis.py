"""`long_trellis` is `trellis` with more states, 16 to 256: less distortion at equal bytes, and a longer search.

Section (format.md, 6.21): as `trellis`, with memory u8, the bits of a state, behind `first`.
Bytes: one more than `trellis`. Gaps to the rate-distortion bound at high rate are in `docs/adr/0014-more-states.md`.
"""

from __future__ import annotations

from typing import ClassVar

from bytecap.errors import CorruptError
from bytecap.format.coders.grid import GridCode, Head
from bytecap.format.coders.trellis import MASKS, SHORT, Trellis


class LongTrellis(Trellis):
    """Reader and writer of `long_trellis` sections."""

    id: ClassVar[str] = "long_trellis"
    tag: ClassVar[int] = 15
    own: ClassVar[int] = 2

    def _extra(self, code: GridCode) -> bytes:
        """Serialise what stands behind the side arrays' pairs."""
        return bytes([code.first, code.memory])

    def _memory(self, head: Head) -> int:
        """Read the bits of a state."""
        memory = head.extra[1]
        if memory not in MASKS or memory == SHORT:
            raise CorruptError(f"a long_trellis section declares states of {memory} bits")
        return memory


CODER = LongTrellis()
"""Section 6.21: the trellis with a longer memory."""
