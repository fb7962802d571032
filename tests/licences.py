"""Licences of what the core needs, from the installed packages' own metadata, as a table for docs/licences.md.

python tests/licences.py > docs/licences.md
"""

import re
from importlib import metadata

HEAD = """# Licences

What `pip install bytecap` installs, and the licence each package declares. Made by `python tests/licences.py`;
`tests/test_supply.py` compares the names and licences with what is installed. bytecap itself is Apache-2.0.

| package | licence |
|---|---|
"""


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


def table():
    return HEAD + "".join(f"| {name} | {licence(name)} |\n" for name in core())


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201
