"""A model from a GGUF file alone, for those who have no Hugging Face directory at hand.

transformers builds the module and the tokenizer; the file is its own template, so names, metadata and tokenizer of the
new file are the old one's.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from bytecap.errors import CheckpointError, UsageError
from bytecap.model.checkpoint import Model, find_units, freeze
from bytecap.progress import Reporter
from bytecap.runtimes.gguf.file import PLAIN, open_file
from bytecap.system import allocator

_GOOD = (*PLAIN, "Q8_0")


def check_source(path: Path, *, allow_quantized: bool, reporter: Reporter) -> None:
    """Refuse a file that has lost too much already.

    Raises:
        UsageError: it holds matrices below Q8_0, and `allow_quantized` is not given.
    """
    kinds = Counter(t.tensor_type.name for t in open_file(path).tensors)
    coarse = sorted(k for k in kinds if k not in _GOOD)
    if coarse and not allow_quantized:
        raise UsageError(
            f"{path} is quantized already ({', '.join(f'{kinds[k]} tensors {k}' for k in coarse)}): start from an F32, "
            "F16, BF16 or Q8_0 file, or say --allow-quantized; KL is then measured to the quantized model"
        )
    if coarse or "Q8_0" in kinds:
        reporter.note(
            f"warning: {path} is quantized; quality is measured against what it holds, not against its source"
        )


def load_gguf(path: Path) -> Model:
    """The model in a GGUF file.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where, name = str(path.parent), path.name
    try:
        module = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    except (ValueError, OSError, KeyError, NotImplementedError, ImportError) as exc:
        line = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise CheckpointError(f"transformers cannot build the model in {path}: {line}") from exc
    files = {
        "config.json": module.config.to_json_string(use_diff=False).encode(),
        "tokenizer.json": tokenizer.backend_tokenizer.to_str().encode(),
    }
    allocator.release()
    return Model(freeze(module), find_units(module), files, str(path))
