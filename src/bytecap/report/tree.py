"""A model drawn as a tree of its modules: units with uses and bytes at the leaves, sums at the branches.

Names come from files: one may have a million dots. Branches are drawn down to `_DEEPEST`, and what is left of a name
stands in its leaf. Sums are added up in one pass over the units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text
from rich.tree import Tree

from bytecap.escape import console, shown, styled
from bytecap.report.summary import Line
from bytecap.sizes import format_size

_DEEPEST = 16
_LONGEST = 400  # characters of a name that are shown


@dataclass
class _Sum:
    """Return the figures of the units in a branch."""

    units: int = 0
    parameters: int = 0
    bytes: int = 0
    planned: int | None = None

    def add(self, line: Line) -> None:
        self.units += 1
        self.parameters += line.unit.parameters
        self.bytes += line.bytes
        if line.planned is not None:
            self.planned = (self.planned or 0) + line.planned

    def __str__(self) -> str:
        after = f" -> {format_size(self.planned)}" if self.planned is not None else ""
        return f"{self.parameters:,} parameters, {format_size(self.bytes)}{after}"


def print_survey(lines: Sequence[Line], name: str) -> None:
    """The tree, sums on top."""
    sums: dict[tuple[str, ...], _Sum] = {(): _Sum()}
    paths = [tuple(line.unit.name.split(".", _DEEPEST)) for line in lines]
    for line, path in zip(lines, paths, strict=True):
        for depth in range(len(path)):
            sums.setdefault(path[:depth], _Sum()).add(line)
    root = Tree(styled((name, "bold"), f": {sums[()]}"))
    branches: dict[tuple[str, ...], Tree] = {(): root}
    for line, path in zip(lines, paths, strict=True):
        own = next((d for d in range(1, len(path)) if sums[path[:d]].units == 1), len(path))  # a branch of one is none
        for depth in range(1, own):
            inner = path[:depth]
            if inner not in branches:
                label = styled((shown(inner[-1], most=_LONGEST), "bold"), f": {sums[inner]}")
                branches[inner] = branches[inner[:-1]].add(label)
        branches[path[: own - 1]].add(_leaf(".".join(path[own - 1 :]), line))
    console().print(root, highlight=False, soft_wrap=True)


def _leaf(name: str, line: Line) -> Text:
    shape = " x ".join(map(str, line.unit.shape)) or "scalar"
    parts: list[str | tuple[str, str]] = [f"{shown(name, most=_LONGEST)}  {shape} {shown(line.unit.dtype, most=40)}"]
    if line.buffer:
        parts.append(", buffer, stored exactly")
    if line.uses is not None:
        style = "yellow" if line.uses > 1 else "dim"
        parts += [", ", (f"{line.uses} use{'s' * (line.uses != 1)}", style)]
    if line.unit.aliases:
        parts.append(f", also {shown(', '.join(line.unit.aliases), most=_LONGEST)}")
    parts.append(f", {line.bytes:,} bytes" + (f" -> {line.planned:,}" if line.planned is not None else ""))
    if line.bits is not None:
        parts += [", ", (f"{line.bits:.2f} bits", "green")]
    return styled(*parts)
