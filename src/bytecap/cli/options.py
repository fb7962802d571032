"""Turn `FitConfig` into options of a command: words, types and defaults; the class documents them once.

`with_config` adds the options to a command whose first parameter is the config that they make.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import EMBEDDED, names
from bytecap.job.config import FitConfig, documentation
from bytecap.methods import METHODS

_Texts = list[Path] | None
_NONE = "none"


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class _Option:
    """The spelling of an option on the command line.

    Attributes:
        words: as they are written.
        kind: type that typer reads.
        shown: how `--help` shows a default that is not a plain value.
        read: value of the field from what typer read.
        before, behind: words around the field's documentation.
        required: there is no default.
        flag: the option takes no value.
        least: smallest number.
    """

    words: tuple[str, ...]
    kind: Any = str
    shown: str | bool = True
    read: Callable[[Any], Any] = _same
    before: str = ""
    behind: str = ""
    required: bool = False
    flag: bool = False
    least: int | None = None


OPTIONS = {
    "budget": _Option(("--budget",), list[str], read=",".join, behind="Several by comma.", required=True),
    "output": _Option(("-o", "--output"), Path | None, _NONE, behind="{budget} in it stands for each of several."),
    "calibration": _Option(("--calibration", "--calib"), _Texts, EMBEDDED, behind="Repeatable."),
    "evaluation": _Option(("--evaluation", "--eval"), _Texts, EMBEDDED, behind="Repeatable."),
    "method": _Option(("--method",), behind=f"There are {', '.join(METHODS)}."),
    "effort": _Option(("--effort",), int, least=0),
    "device": _Option(("--device",)),
    "seed": _Option(("--seed",), int),
    "window": _Option(("--window",), int, least=1),
    "dry_run": _Option(("--dry-run",), bool, flag=True),
    "tokenizer": _Option(("--no-tokenizer",), bool, read=lambda x: not x, before="Do not", flag=True),
    "config": _Option(("--no-config",), bool, read=lambda x: not x, before="Do not", flag=True),
    "paths": _Option(("--paths",), list[str] | None, _NONE, names, behind="By comma or repeated."),
    "recover": _Option(("--recover",), str | None, _NONE),
    "recover_text": _Option(("--recover-text",), _Texts, "the calibration texts", behind="Repeatable."),
    "allow_unused": _Option(("--allow-unused",), list[str] | None, _NONE, names, behind="By comma or repeated."),
    "memory": _Option(("--memory",), str | None, "what is free"),
    "unused": _Option(("--unused",)),
    "format": _Option(("--format",), str | None, _NONE),
    "layout": _Option(("--layout",)),
    "types": _Option(("--types",), list[str] | None, _NONE, names, behind="By comma or repeated."),
    "pure": _Option(("--pure",), bool, flag=True),
    "template": _Option(("--template",), Path | None, _NONE),
    "emit": _Option(("--emit",), Path | None, _NONE),
    "store": _Option(("--store",), Path | None, _NONE),
    "base": _Option(("--base",), _Texts, _NONE, behind="Repeatable."),
}  # fmt: skip


def described(name: str) -> str:
    """Return the meaning of an option, as `--help` says it."""
    text = documentation().get(name, "").partition("; for a torch module")[0].replace("`", "").rstrip(".")
    text = f"{OPTIONS[name].before} {text}".strip() if name in OPTIONS else text
    behind = OPTIONS[name].behind if name in OPTIONS else ""
    return f"{text[:1].upper()}{text[1:]}. {behind}".strip()


def _parameter(name: str, option: _Option) -> inspect.Parameter:
    defaults = {f.name: f.default for f in fields(FitConfig)}
    about = typer.Option(*option.words, help=described(name), show_default=option.shown, min=option.least)
    default = inspect.Parameter.empty if option.required else False if option.flag else defaults[name]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[option.kind, about])


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command of a config and own options the config's options too."""
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    ]

    @wraps(command)
    def call(**given: Any) -> None:
        asked: dict[str, Any] = {n: o.read(given.pop(n)) for n, o in OPTIONS.items()}
        command(FitConfig(**asked), **given)

    vars(call)["__signature__"] = inspect.Signature([*(_parameter(n, o) for n, o in OPTIONS.items()), *own])
    return call
