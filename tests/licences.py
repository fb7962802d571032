"""Licences of what the core and development need, from the packages' own metadata, as tables for docs/licences.md.

python tests/licences.py > docs/licences.md
"""

import re
from importlib import metadata
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"

HEAD = """# Licences

What `pip install bytecap` installs, and the licence each package declares. Made by `python tests/licences.py`;
`tests/test_supply.py` compares the names and licences with what is installed. bytecap itself is Apache-2.0.

| package | licence |
|---|---|
"""
MORE = """
## Development

What else `constraints.txt` pins, for the extras and for development; none of it is part of bytecap. MPL-2.0
(hypothesis, pathspec, tqdm) asks for the source of those packages' own files where they are passed on, and nothing
of what uses them.

| package | licence |
|---|---|
"""
SILENT = {"atheris": "Apache-2.0 (its repository's; the package declares none)"}


def name_of(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def needed(package):
    """Names that a package requires here without extras."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in metadata.requires(package) or []]
    return {name_of(r.name) for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def core():
    """Names of everything the core needs, from pyproject.toml's dependencies on."""
    found, left = set(), needed("bytecap")
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left |= needed(name)
    return sorted(found)


def licence(package):
    """What a package declares: an SPDX expression, else its field, else its classifiers."""
    about = metadata.metadata(package)
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier", []) if c.startswith("License ::")]
    field = (about.get("License") or "").strip()
    return about.get("License-Expression") or (field if 0 < len(field) < 40 else " and ".join(classifiers))


def pinned(path=CONSTRAINTS):
    """Version by name of what a file pins."""
    lines = [line.partition(";")[0].rstrip("\\ \n") for line in path.read_text("utf-8").splitlines()]
    return {name_of(line): line.partition("==")[2].strip() for line in lines if re.match(r"[A-Za-z0-9]", line)}


def rows(names):
    return "".join(f"| {name} | {SILENT.get(name) or licence(name)} |\n" for name in names)


def table():
    return HEAD + rows(core()) + MORE + rows(sorted(set(pinned()) - set(core())))


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201
