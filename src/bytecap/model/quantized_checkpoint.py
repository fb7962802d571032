"""Read checkpoints whose weights are quantized as the dense ones that they stand for.

A quantized weight is stored as several tensors: codes, scales, zero points, code books. Here each such set becomes one
dense tensor under the name that the model has for it, computed by the scheme's formula (`bytecap.model.dequantize`),
and everything that follows sees an ordinary checkpoint: the account of all tensors, the module that transformers
builds, and what is written out again. What belongs to no weight stays in the account, so stray scales are refused as
ever. transformers' own dequantizing is not used: it needs packages for some schemes, and refuses block scales whose
last block is cut off, which DeepSeek-V3 has.

Source dtypes are the narrowest that hold the values, as for GGUF files: values are what is measured against.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytecap.errors import CheckpointError
from bytecap.format.coders.exact import WIDTH, is_lossless
from bytecap.model import dequantize, tying
from bytecap.model.building import parts
from bytecap.model.fileset import DEQUANTIZE, Header
from bytecap.model.quantized_weights import (
    FINDERS,
    FLOAT8,
    Weight,
    layout_not_read,
    method_of,
    settings_at,
    settings_of,
)
from bytecap.model.tensor_files import Tensors

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ACTIVATIONS = (
    "activation_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale",
    "q_scale", "qscale_act",
)  # fmt: skip
_TOOLS = {
    "gptq": "gptqmodel", "awq": "gptqmodel", "quanto": "optimum-quanto", "hqq": "hqq", "aqlm": "aqlm",
    "torchao": "torchao", "modelopt": "nvidia-modelopt", "auto-round": "auto-round", "mlx": "mlx-lm",
}  # fmt: skip
_METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "bitsandbytes", "compressed-tensors", "gptq", "awq", "mlx")
_CODES = ("weight", "_packed", "_blocks", "_proj", "qzeros", "g_idx")  # how names of tensors of codes end
_PACKED = ("weight", "_packed", "_blocks")  # of which those that share bytes and words
_BITS = 4  # of a code, where nothing else is said


@dataclass
class Dequantized:
    """The dense tensors of a quantized checkpoint.

    Attributes:
        headers: of the files as if weights were dense: names, shapes and dtypes.
        method: of the quantization.
        config: `config.json` without what it says of the quantization.
        notes: for the user.
    """

    headers: dict[Path, Header]
    method: str
    config: bytes
    notes: list[str]
    _weights: dict[str, Weight] = field(repr=False)
    _stored: Tensors = field(repr=False)
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def value(self, name: str) -> Tensor:
        """Return a dense tensor, by its name in the files or, where it was quantized, in the model.

        Raises:
            CheckpointError: what is stored for it does not fit together.
        """
        if name not in self._weights:
            return self._stored.read(name)
        if name in self._kept:
            return self._kept[name].to(torch.float32, copy=True)
        weight = self._weights[name]
        try:
            return weight.formula({role: self._stored.read(part) for role, part in weight.parts.items()})
        except (ValueError, LookupError, TypeError, OverflowError, RuntimeError) as exc:
            raise CheckpointError(f"tensor {name} cannot be dequantized from {weight.parts['codes']}: {exc}") from exc

    def keep(self, name: str, value: Tensor, dtype: str) -> None:
        """Keep the value of a weight in a dtype that holds it, so that it need not be computed again."""
        self._kept[name] = value.to(_TORCH[dtype])

    def values(self, headers: Mapping[Path, Header], names: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors with the given names, one at a time."""
        for header in headers.values():
            for name in header:
                if name in names:
                    yield name, self.value(name)


def refuse_finished(config: bytes, where: Path) -> None:
    """Refuse a directory whose weights are a file of ours: what is decoded from it is no source.

    Raises:
        CheckpointError: it is one.
    """
    settings = settings_of(json.loads(config))
    if settings is None or method_of(settings) != "bytecap":
        return
    if (where / "model.bcap").is_file():
        raise CheckpointError(f"{where} is a finished model: start from what it was made of, or unpack it")
    raise CheckpointError(f"{where} holds no model.bcap, which its config.json names: copy it again")


def dense(config: bytes, headers: dict[Path, Header], where: Path, keep: int = 0) -> Dequantized | None:
    """Return the dense tensors of a directory that says that its weights are quantized; None if it says so not.

    Args:
        config: `config.json`.
        headers: of the weight files.
        where: the directory.
        keep: most bytes of weights that are kept from the look at their dtypes, so that they are computed once.

    Raises:
        CheckpointError: the scheme is none of those that are read, or its tensors do not fit together.
    """
    parsed = json.loads(config)
    entries = {n: e for header in headers.values() for n, e in header.items()}
    settings = settings_at(parsed, entries, where)
    if settings is None:
        return None
    method = _check_method(settings, where)
    if (where / tying.FILE).is_file():
        raise CheckpointError(
            f"{where} shares layers by {tying.FILE} and is quantized, which no file can be: {DEQUANTIZE}"
        )
    weights = dict(FINDERS[method](entries, settings))
    dropped = {n for n in entries if n.rpartition(".")[2] in _ACTIVATIONS}
    consumed = dropped | {p for w in weights.values() for p in w.parts.values()}
    stored = Tensors(headers, {n: n for n in entries})
    kept = {path: {n: e for n, e in header.items() if n not in consumed} for path, header in headers.items()}
    odd = next((n for header in kept.values() for n, e in header.items() if _is_code(n, e)), None)
    if odd is not None:
        raise CheckpointError(
            f"{where}: tensor {odd} is stored as {entries[odd]['dtype']}, and the scale that {method} has beside it "
            f"is missing: {DEQUANTIZE}"
        )
    notes = [f"{len(weights)} weights of {method} are dequantized: they are what is measured against"]
    if dropped:
        notes.append(f"{len(dropped)} scales of activations ({min(dropped)}) are left out: activations stay floats")
    found = Dequantized(kept, method, b"", notes, weights, stored)
    home = {n: path for path, header in headers.items() for n in header}
    wide = False
    for name, weight in weights.items():
        value = found.value(name)
        dtype = next((d for d in ("BF16", "F16") if is_lossless(value.numpy(), d)), "F32")
        wide |= dtype == "F32"
        keep -= value.numel() * WIDTH[dtype]
        if keep >= 0:
            found.keep(name, value, dtype)
        kept[home[weight.parts["codes"]]][name] = {"dtype": dtype, "shape": list(value.shape)}
    found.config = _plain(parsed, wide)
    return found


def roughly_dense(config: Mapping[str, Any], headers: dict[Path, Header], where: Path) -> dict[Path, Header]:
    """Return headers that have as many values as the dense weights, so that memory can be planned before they are read.

    Shapes are not those of the weights: codes that share a byte or a word are counted along an axis of their own.
    """
    settings = settings_at(config, (n for header in headers.values() for n in header), where)
    if settings is None:
        return headers
    said = settings.get("bits", settings.get("w_bit"))
    bits = said if type(said) is int and said in dequantize.GPTQ_BITS else _BITS

    def counted(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        packed = {"I32": 32 // bits, "U32": 32 // bits, "U8": 2}.get(entry["dtype"], 1) if name.endswith(_PACKED) else 1
        return {**entry, "shape": [*entry["shape"], packed]}

    return {path: {n: counted(n, e) for n, e in header.items()} for path, header in headers.items()}


def _is_code(name: str, entry: Mapping[str, Any]) -> bool:
    """Return whether a tensor that belongs to no weight looks like the codes of one."""
    return name.endswith(_CODES) and entry["dtype"] in (*FLOAT8, "I8", "U8", "I32", "U32")


def _check_method(settings: Mapping[str, Any], where: Path) -> str:
    """Return the method if it is read.

    Raises:
        CheckpointError: it is not.
    """
    method, layout = method_of(settings), layout_not_read(settings)
    if method in _METHODS and layout is None:
        return method
    bits = f" at {settings['bits']} bits" if isinstance(settings.get("bits"), int) else ""
    tool = f"load it with {_TOOLS[method]} and save it dequantized, in bfloat16" if method in _TOOLS else DEQUANTIZE
    called = f"{method} {layout}" if layout else method
    raise CheckpointError(
        f"{where} is quantized with {called}{bits}, which is not read ({', '.join(_METHODS)} are): start from the "
        f"unquantized checkpoint, or {tool}"
    )


def _plain(config: Any, wide: bool) -> bytes:
    """Return a config that says nothing of the quantization, and float32 where dense values need it."""
    for part in parts(config):
        for key in ("quantization_config", "compression_config", "quantization"):
            if key != "quantization" or isinstance(part.get(key), dict):
                part.pop(key, None)
        for key in ("dtype", "torch_dtype"):
            if wide and key in part:
                part[key] = "float32"
    if wide and "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = "float32"
    return (json.dumps(config, indent=2) + "\n").encode()
