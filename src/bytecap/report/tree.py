"""Draw a model as a tree of its modules: units with uses and bytes at the leaves, sums at the branches."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.tree import Tree

from bytecap.report.summary import Line
from bytecap.sizes import format_size


def print_survey(lines: Sequence[Line], name: str) -> None:
    """Print the tree, with sums on top."""
    root = Tree(f"[bold]{name}[/bold]: {_sums(lines)}")
    branches: dict[str, Tree] = {"": root}
    for line in lines:
        parts = line.unit.name.split(".")
        for depth in range(1, len(parts)):
            path = ".".join(parts[:depth])
            if path not in branches:
                inside = [x for x in lines if x.unit.name.startswith(path + ".")]
                label = f"[bold]{parts[depth - 1]}[/bold]: {_sums(inside)}"
                branches[path] = branches[".".join(parts[: depth - 1])].add(label)
        branches[".".join(parts[:-1])].add(_leaf(parts[-1], line))
    Console().print(root, highlight=False)


def _sums(lines: Sequence[Line]) -> str:
    size, planned = sum(x.bytes for x in lines), [x.planned for x in lines if x.planned is not None]
    after = f" -> {format_size(sum(planned))}" if planned else ""
    return f"{sum(x.unit.parameters for x in lines):,} parameters, {format_size(size)}{after}"


def _leaf(name: str, line: Line) -> str:
    shape = " x ".join(map(str, line.unit.shape)) or "scalar"
    parts = [f"{name}  {shape} {line.unit.dtype}"]
    if line.buffer:
        parts.append("buffer, stored exactly")
    if line.uses is not None:
        parts.append(f"[{'yellow' if line.uses > 1 else 'dim'}]{line.uses} use{'s' * (line.uses != 1)}[/]")
    if line.unit.aliases:
        parts.append(f"also {', '.join(line.unit.aliases)}")
    parts.append(f"{line.bytes:,} bytes" + (f" -> {line.planned:,}" if line.planned is not None else ""))
    if line.bits is not None:
        parts.append(f"[green]{line.bits:.2f} bits[/]")
    return ", ".join(parts)
