"""Describe a comparison: methods with their options, budgets, and the cells to be run.

A method is written `NAME`, `NAME:coded`, `NAME:published`, or `NAME:option=value:option=value`; NAME may be
`FILE.py:CALLABLE`. A budget is a size, or bits per parameter such as `3.5bpp`.

>>> read_method("owq:published").options, read_method("golf:coder=brotli:lowrank_bits=4").options
({'accounting': 'published'}, {'coder': 'brotli', 'lowrank_bits': 4})
>>> parse_budget("600kB", 1_000_000), parse_budget("3.5bpp", 1_000_000)
(600000, 437500)
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytecap import methods
from bytecap.errors import UsageError
from bytecap.sizes import parse_budget, parse_size

ACCOUNTED = ("owq", "radio", "cluscomp", "reallm")  # methods that have a published accounting besides the coded one
_ACCOUNTINGS = ("coded", "published")


@dataclass(frozen=True)
class MethodSpec:
    """A method with the options it is run with.

    Attributes:
        name: of the method.
        options: of the job.
        paths: overlays it may choose from, None for its default menu.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    paths: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ComparisonSetting:
    """The settings that all cells share.

    Attributes:
        calibration: text files; none for the embedded text.
        evaluation: text files; none for the embedded text.
        tokens: most tokens for statistics.
        evaluation_tokens: most tokens for evaluation.
        window: predicted tokens in a window.
        device: `cpu` or `cuda`.
        tasks: task files of lm-evaluation-harness.
    """

    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    tokens: int
    evaluation_tokens: int
    window: int
    device: str
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSpec:
    """One run: `method` on `model` under `budget` bytes with a calibration seed.

    Attributes:
        directory: of a model somebody else made, `method` being its name and `budget` its size; empty for a method.
    """

    model: str
    method: str
    budget: int
    seed: int = 0
    directory: str = ""


@dataclass(frozen=True)
class External:
    """A model that another tool made smaller, evaluated as it is at its stated size."""

    name: str
    directory: str
    bytes: int
    model: str = ""


def read_method(text: str) -> MethodSpec:
    """Parse a method and its options.

    Raises:
        UsageError: an unknown method or option.
    """
    words = text.split(":")
    count = 2 if words[0].endswith(".py") else 1
    name, options = ":".join(words[:count]), dict[str, Any]()
    methods.find(name)
    for word in words[count:]:
        key, equals, value = word.partition("=")
        if not equals:
            if word not in _ACCOUNTINGS or name not in ACCOUNTED:
                raise UsageError(
                    f"cannot read {text!r}: {word!r} is no option=value (coded and published are for "
                    f"{', '.join(ACCOUNTED)})"
                )
            key, value = "accounting", word
        options[key] = _literal(value)
    paths = options.pop("paths", None)
    menu = None if paths is None else methods.menu_of(str(paths).split("+"), name)
    if name == "bytecap":
        _check_ingredients(options, text)
    return MethodSpec(name, options, menu)


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(value.lower(), value)


def _check_ingredients(options: dict[str, Any], text: str) -> None:
    from bytecap.quantization.options import Options

    try:
        Options.of(options)
    except UsageError as exc:
        raise UsageError(f"cannot read {text!r}: {exc}") from None


def read_external(text: str, models: Sequence[str]) -> External:
    """`NAME:DIR:BYTES`, with `:MODEL` behind it where several models are compared.

    Raises:
        UsageError: it cannot be read, the directory is missing, or which model is meant is not said.
    """
    model, rest = "", text
    for name in models:
        if text.endswith(":" + name):
            model, rest = name, text[: -len(name) - 1]
    if not model:
        if len(models) > 1:
            raise UsageError(f"cannot read {text!r}: with several models give NAME:DIR:BYTES:MODEL")
        model = models[0]
    name, _, behind = rest.partition(":")
    directory, _, size = behind.rpartition(":")
    if not name or not directory:
        raise UsageError(f"cannot read {text!r}: use NAME:DIR:BYTES, BYTES being the real size, such as 3MB")
    if not Path(directory).is_dir():
        raise UsageError(f"no model at {directory}: the directory of {name} does not exist")
    return External(name, directory, parse_size(size), model)


def grid(
    models: Sequence[str], names: Sequence[str], budgets: Sequence[str | int], seeds: Sequence[int],
    parameters: Sequence[int],
) -> list[RunSpec]:  # fmt: skip
    """Return all cells, ordered so that neighbours need different statistics and equal models."""
    return [
        RunSpec(model, name, size, seed)
        for model, count in zip(models, parameters, strict=True)
        for seed in seeds
        for size in sorted({parse_budget(b, count) for b in budgets})
        for name in names
    ]
