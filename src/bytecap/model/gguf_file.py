"""A `.gguf` file as a model: weights dequantized, config and tokenizer taken from its metadata.

transformers does both, through gguf-py. The values are those that a GGUF runtime computes with, so a file made from
them is compared with the quantized model, not with the one before it.

>>> import numpy as np
>>> as_dtype(np.float32([1.0, 0.5])), as_dtype(np.float32([1 / 3]))
('BF16', 'F32')
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy.typing as npt

from bytecap.errors import CheckpointError
from bytecap.format.coders.exact import is_lossless
from bytecap.model.fileset import TOKENIZER

SUFFIX = ".gguf"
_DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # the config says them too


def as_dtype(values: npt.NDArray[Any]) -> str:
    """The narrowest float dtype that holds all values."""
    return next((d for d in ("BF16", "F16") if is_lossless(values, d)), "F32")


def read(path: Path) -> tuple[dict[str, Any], dict[str, bytes], tuple[str, ...]]:
    """Tensors by the names that transformers gives them, side files, and notes.

    Raises:
        CheckpointError: it cannot be read, is of an architecture transformers does not know, or is not read whole.
    """
    try:
        import accelerate  # noqa: F401 (transformers asks for it)
        import gguf
        import torch
        import transformers
    except ImportError as exc:
        raise CheckpointError(f"{path} needs the extra packages ({exc.name}): pip install 'bytecap[gguf]'") from exc
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        inside = {t.name: int(t.n_elements) for t in gguf.GGUFReader(path).tensors}
        built: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, output_loading_info=True, **options
        )
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    except Exception as exc:
        first = next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise CheckpointError(f"{path} cannot be read by transformers: {first}") from exc
    module, report = built
    _check_whole(path, inside, module, report)
    files = _side_files(module, tokenizer)
    return dict(module.state_dict()), files, (f"{path.name} is dequantized: it is what is measured against",)


def _check_whole(path: Path, inside: dict[str, int], module: Any, report: dict[str, Any]) -> None:
    """Refuse a file some of whose tensors have not become the model's, as far as their sizes show."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise CheckpointError(
                f"{path} and the model of its metadata differ ({kind}): {min(map(str, report[kind]))}"
            )
    live = {n: t.numel() for n, t in module.state_dict().items()}
    fewest = sum(p.numel() for p in module.parameters())
    held = sum(size for name, size in inside.items() if name not in _DERIVED)
    if not fewest <= held <= sum(live.values()):
        raise CheckpointError(
            f"{path} holds {held:,} values, the model that transformers makes of it {fewest:,}: it is not read whole"
        )


def _side_files(module: Any, tokenizer: Any) -> dict[str, bytes]:
    """Config, tokenizer and chat template, as files."""
    config = module.config.to_dict()
    for key in ("quantization_config", "_pre_quantization_dtype", "_name_or_path"):
        config.pop(key, None)
    config |= {"dtype": "float32", "architectures": [type(module).__name__]}
    files = {
        "config.json": (json.dumps(config, indent=2, sort_keys=True, default=str) + "\n").encode(),
        TOKENIZER: tokenizer.backend_tokenizer.to_str().encode(),
    }
    if isinstance(tokenizer.chat_template, str):
        files["chat_template.jinja"] = tokenizer.chat_template.encode()
    return files


def dtypes(tensors: dict[str, Any]) -> dict[str, str]:
    """Source dtypes: the narrowest that hold the values, which say nothing of the blocks they came from."""
    return {n: as_dtype(t.numpy()) for n, t in tensors.items() if t.is_floating_point()}
