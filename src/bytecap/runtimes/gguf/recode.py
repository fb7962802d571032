"""Sources of `recode`: GGUF files that have not lost too much already."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from bytecap.errors import UsageError
from bytecap.runtimes.gguf.file import PLAIN, open_model

_GOOD = (*PLAIN, "Q8_0")


def check_source(path: Path, *, allow_quantized: bool) -> str | None:
    """Refuse a file that has lost too much already; returns a warning, or None.

    Raises:
        UsageError: it holds matrices below Q8_0, and `allow_quantized` is not given.
    """
    kinds = Counter(t.tensor_type.name for t in open_model(path).tensors)
    coarse = sorted(k for k in kinds if k not in _GOOD)
    if coarse and not allow_quantized:
        raise UsageError(
            f"{path} is quantized already ({', '.join(f'{kinds[k]} tensors {k}' for k in coarse)}): start from an F32, "
            "F16, BF16 or Q8_0 file, or say --allow-quantized; KL is then measured to the quantized model"
        )
    if coarse or "Q8_0" in kinds:
        return f"{path} is quantized; quality is measured against what it holds, not against its source"
    return None
