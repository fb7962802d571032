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
from collections.abc import Callable, Iterator, Mapping
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
from bytecap.model.tensor_files import Tensors

Parts = Mapping[str, str]  # role to the name of a stored tensor
Formula = Callable[[Mapping[str, Tensor]], Tensor]

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES_OF_8 = ("_scale_inv", "_scale")  # behind the weight's name
_SCALES_BESIDE = ("scale", "qscale_weight")  # in place of `weight`
_ACTIVATIONS = (
    "activation_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale",
    "q_scale", "qscale_act",
)  # fmt: skip
_TOOLS = {
    "gptq": "gptqmodel", "awq": "gptqmodel", "quanto": "optimum-quanto", "hqq": "hqq", "aqlm": "aqlm",
    "torchao": "torchao", "modelopt": "nvidia-modelopt", "auto-round": "auto-round",
}  # fmt: skip
_METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "bitsandbytes", "compressed-tensors", "gptq", "awq")
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
            "mxfp4-pack-quantized", "mixed-precision", "dense")  # fmt: skip
_LAYOUT_KEYS = ("format", "checkpoint_format", "version")  # in which writers of GPTQ and AWQ name it
_ZEROS_OFF = {"gptq": 1, "gptq_v2": 0}  # what the stored zero points of a format of GPTQ lack
_CODES = ("weight", "_packed", "_blocks", "_proj", "qzeros", "g_idx")  # how names of tensors of codes end
_PACKED = ("weight", "_packed", "_blocks")  # of which those that share bytes and words
_BITS = 4  # of a code, where nothing else is said
_WIDTHS = (2, 4, 8)  # bits of packed integers


@dataclass(frozen=True)
class _Weight:
    """A weight in parts."""

    parts: Parts
    formula: Formula


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
    _weights: dict[str, _Weight] = field(repr=False)
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
        except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as exc:
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


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a config says of the quantization of its weights, itself or nested; None if it is dense."""
    for part in parts(config):
        found = part.get("quantization_config", part.get("compression_config"))
        if isinstance(found, dict) and found:
            return found
    return None


def method_of(settings: Mapping[str, Any]) -> str:
    """Return the name of a quantization's method."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    method, form = settings.get("quant_method", settings.get("method")), settings.get("format")
    return str(method or ("compressed-tensors" if form in _FORMATS else form) or "an unnamed method")


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
    """Return the dense tensors of a directory whose config says that its weights are quantized; None if it says so not.

    Args:
        config: `config.json`.
        headers: of the weight files.
        where: the directory.
        keep: most bytes of weights that are kept from the look at their dtypes, so that they are computed once.

    Raises:
        CheckpointError: the scheme is none of those that are read, or its tensors do not fit together.
    """
    parsed = json.loads(config)
    settings = settings_of(parsed)
    if settings is None:
        return None
    method = _check_method(settings, where)
    if (where / tying.FILE).is_file():
        raise CheckpointError(
            f"{where} shares layers by {tying.FILE} and is quantized, which no file can be: {DEQUANTIZE}"
        )
    entries = {n: e for header in headers.values() for n, e in header.items()}
    weights = dict(_FINDERS[method](entries, settings))
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


def roughly_dense(config: bytes, headers: dict[Path, Header]) -> dict[Path, Header]:
    """Return headers that have as many values as the dense weights, so that memory can be planned before they are read.

    Shapes are not those of the weights: codes that share a byte or a word are counted along an axis of their own.
    """
    settings = settings_of(json.loads(config))
    if settings is None:
        return headers
    said = settings.get("bits", settings.get("w_bit"))
    bits = said if type(said) is int and said in dequantize.GPTQ_BITS else _BITS

    def counted(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        packed = {"I32": 32 // bits, "U8": 2}.get(entry["dtype"], 1) if name.endswith(_PACKED) else 1
        return {**entry, "shape": [*entry["shape"], packed]}

    return {path: {n: counted(n, e) for n, e in header.items()} for path, header in headers.items()}


def _is_code(name: str, entry: Mapping[str, Any]) -> bool:
    """Return whether a tensor that belongs to no weight looks like the codes of one."""
    return name.endswith(_CODES) and entry["dtype"] in (*_FLOAT8, "I8", "U8", "I32")


def _check_method(settings: Mapping[str, Any], where: Path) -> str:
    """Return the method if it is read.

    Raises:
        CheckpointError: it is not.
    """
    method, layout = method_of(settings), _layout_not_read(settings)
    if method in _METHODS and layout is None:
        return method
    bits = f" at {settings['bits']} bits" if isinstance(settings.get("bits"), int) else ""
    tool = f"load it with {_TOOLS[method]} and save it dequantized, in bfloat16" if method in _TOOLS else DEQUANTIZE
    called = f"{method} {layout}" if layout else method
    raise CheckpointError(
        f"{where} is quantized with {called}{bits}, which is not read ({', '.join(_METHODS)} are): start from the "
        f"unquantized checkpoint, or {tool}"
    )


def _layout_not_read(settings: Mapping[str, Any]) -> str | None:
    """Return the name of a method's layout, empty if it has none, where it is one that is not read; else None."""
    method, found = method_of(settings), None
    if method == "compressed-tensors" and settings.get("format", "dense") not in _FORMATS:
        found = settings["format"]
    elif method == "gptq":
        said = "marlin" if settings.get("is_marlin_format") else _layout(settings)
        found = said if said not in _ZEROS_OFF else None
        if found is None and settings.get("bits") not in dequantize.GPTQ_BITS:
            return ""
    elif method == "awq":
        said = "llm-awq" if settings.get("backend") == "llm-awq" else _layout(settings)
        found = said if said not in {"gemm", "GEMM"} else None
        if found is None and settings.get("bits", settings.get("w_bit")) != 4:
            return ""
    return None if found is None else str(found)[:40]


def _layout(settings: Mapping[str, Any]) -> str:
    """Return the layout that a config of GPTQ or AWQ names, under one key or another; two that differ are none."""
    said = dict.fromkeys(str(settings[k]) for k in _LAYOUT_KEYS if settings.get(k))
    return " or ".join(said) or ("gemm" if method_of(settings) == "awq" else "gptq")


def _plain(config: Any, wide: bool) -> bytes:
    """Return a config that says nothing of the quantization, and float32 where dense values need it."""
    for part in parts(config):
        for key in ("quantization_config", "compression_config"):
            part.pop(key, None)
        for key in ("dtype", "torch_dtype"):
            if wide and key in part:
                part[key] = "float32"
    if wide and "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = "float32"
    return (json.dumps(config, indent=2) + "\n").encode()


def _float8(entries: Header, settings: Mapping[str, Any]) -> Iterator[tuple[str, _Weight]]:
    """Float8 weights with a scale for the whole, a row, or a block."""
    block = settings.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)):
        raise CheckpointError(f"quantization_config: weight_block_size is {str(block)[:40]}, not two numbers")
    if block is not None and min(block) < 1:
        raise CheckpointError(f"quantization_config: weight_block_size {block} holds a number below 1")

    def formula(parts: Mapping[str, Tensor]) -> Tensor:
        return dequantize.block_scaled(parts["codes"], parts["scales"], block)

    for name, entry in entries.items():
        stem = name.rpartition(".")[0]
        beside = [f"{stem}.{s}" for s in _SCALES_BESIDE] if name.endswith(".weight") else []
        scale = next((n for n in (*(name + s for s in _SCALES_OF_8), *beside) if n in entries), None)
        if entry["dtype"] in _FLOAT8 and scale is not None:
            yield name, _Weight({"codes": name, "scales": scale}, formula)


def _mxfp4(entries: Header, _: Mapping[str, Any]) -> Iterator[tuple[str, _Weight]]:
    """Stacks of matrices in blocks of four-bit floats."""
    for name in entries:
        stem = name.removesuffix("_blocks")
        if stem != name and f"{stem}_scales" in entries:
            parts = {"codes": name, "scales": f"{stem}_scales"}
            yield stem, _Weight(parts, lambda p: dequantize.experts(p["codes"], p["scales"]))


def _bitsandbytes(entries: Header, _: Mapping[str, Any]) -> Iterator[tuple[str, _Weight]]:
    """Code books of 16 values in blocks, and rows of eight bits."""
    for name, entry in entries.items():
        stem = name.removesuffix("weight")
        if entry["dtype"] == "I8" and f"{stem}SCB" in entries:
            parts = {"codes": name, "scales": f"{stem}SCB"}
            if f"{name}_format" in entries:
                parts["format"] = f"{name}_format"
            yield name, _Weight(parts, _int8)
        state = next((n for n in _states(name) if n in entries), None)
        if state is not None:
            parts = {"codes": name, "state": state} | {
                role: f"{name}.{role}" for role in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
                if f"{name}.{role}" in entries
            }  # fmt: skip
            yield name, _Weight(parts, _book)


def _states(name: str) -> tuple[str, str]:
    return f"{name}.quant_state.bitsandbytes__nf4", f"{name}.quant_state.bitsandbytes__fp4"


def _int8(parts: Mapping[str, Tensor]) -> Tensor:
    if int(parts["format"].reshape(-1)[0]) if "format" in parts else 0:
        raise dequantize.Misfit("its rows are in the order of a GPU's kernel (weight_format)")
    return dequantize.rows_of_int8(parts["codes"], parts["scales"])


def _book(parts: Mapping[str, Tensor]) -> Tensor:
    inner = [parts["nested_absmax"], parts["nested_quant_map"]] if "nested_absmax" in parts else []
    state = dequantize.parse_state(parts["state"])
    return dequantize.code_book(parts["codes"], parts["absmax"], parts["quant_map"], state, inner)


def _compressed(entries: Header, settings: Mapping[str, Any]) -> Iterator[tuple[str, _Weight]]:
    """Packed and plain integers, and floats of four and eight bits, as the tensors themselves tell."""
    groups = settings.get("config_groups")
    members = groups.values() if isinstance(groups, dict) else ()
    weights = [g.get("weights") for g in members if isinstance(g, dict)]
    widths = sorted({w["num_bits"] for w in weights if isinstance(w, dict) and w.get("num_bits") in _WIDTHS})

    def packed(p: Mapping[str, Tensor]) -> Tensor:
        return dequantize.packed_integers(p["codes"], p["scales"], p["shape"], p.get("zeros"), widths or _WIDTHS)

    def floats(p: Mapping[str, Tensor]) -> Tensor:
        return dequantize.global_scaled(p["codes"], p["scales"], p.get("whole"))

    def plain(p: Mapping[str, Tensor]) -> Tensor:
        return dequantize.integers(p["codes"], p["scales"], p.get("zeros"))

    for name, entry in entries.items():
        stem = name.removesuffix("_packed")
        if f"{stem}_scale" not in entries:
            continue
        if f"{stem}_g_idx" in entries:
            raise CheckpointError(f"{stem} is grouped in the order of activations ({stem}_g_idx), which is not read")
        roles = {"scales": "_scale", "shape": "_shape", "zeros": "_zero_point", "whole": "_global_scale"}
        parts = {"codes": name} | {r: stem + s for r, s in roles.items() if stem + s in entries}
        if stem != name and entry["dtype"] == "I32" and "shape" in parts:
            yield stem, _Weight(parts, packed)
        elif stem != name and entry["dtype"] == "U8" and "zeros" not in parts:
            yield stem, _Weight(parts, floats)
        elif entry["dtype"] in (*_FLOAT8, "I8"):
            yield name, _Weight(parts, plain)


def _gptq(entries: Header, settings: Mapping[str, Any]) -> Iterator[tuple[str, _Weight]]:
    """Integers of 2 to 8 bits with a scale and a zero point for groups of inputs, in any order."""
    off = _ZEROS_OFF[_layout(settings)]
    size, own = settings.get("group_size"), bool(settings.get("dynamic"))  # where layers may have sizes of their own
    group = size if type(size) is int and size > 0 and not own else None

    def formula(p: Mapping[str, Tensor]) -> Tensor:
        return dequantize.gptq(p["codes"], p["zeros"], p["scales"], p.get("order"), group, off)

    return _layers(entries, {"zeros": "qzeros", "scales": "scales"}, {"order": "g_idx"}, formula)


def _awq(entries: Header, _: Mapping[str, Any]) -> Iterator[tuple[str, _Weight]]:
    """Integers of 4 bits with a scale and a zero point for groups of inputs, the even outputs of eight first."""

    def formula(p: Mapping[str, Tensor]) -> Tensor:
        return dequantize.awq(p["codes"], p["zeros"], p["scales"])

    return _layers(entries, {"zeros": "qzeros", "scales": "scales"}, {}, formula)


def _layers(
    entries: Header, needed: Mapping[str, str], optional: Mapping[str, str], formula: Formula
) -> Iterator[tuple[str, _Weight]]:
    """Layers whose codes are `qweight`, with what lies beside them by role."""
    for name, entry in entries.items():
        stem = name.removesuffix("qweight")
        if stem == name or entry["dtype"] != "I32" or any(stem + n not in entries for n in needed.values()):
            continue
        beside = {role: stem + n for role, n in {**needed, **optional}.items() if stem + n in entries}
        yield f"{stem}weight", _Weight({"codes": name, **beside}, formula)


_FINDERS: dict[str, Callable[[Header, Mapping[str, Any]], Iterator[tuple[str, _Weight]]]] = {
    "fp8": _float8, "fbgemm_fp8": _float8, "mxfp4": _mxfp4, "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq,
}  # fmt: skip
