"""Choose calibration text: files, the words `self` and `general`, and the default made of both.

On a model that strangers trained, text decides more than any quantizer: at 2.5 bits SmolLM2-135M has a KL of 0.36 with
documentation of one database and 0.21 with text like that it is measured on (`results/real.jsonl`). Without text of the
user's, the model's own samples come closest, and a small text of many kinds keeps them from being narrow.

- `self`: windows sampled from the model at temperature 1, each from a first token drawn evenly from the vocabulary.
- `general`: the embedded general text (prose, documentation, code, dialogues, thirty languages). Every fifth document
  is left out: those are the evaluation text of jobs that name none.
- `NAME:WEIGHT`: how often windows of this source are drawn, relative to the others (1 by default).

>>> [(s.name, s.weight) for s in parse(["self:2", "general", "notes.txt"])]
[('self', 2.0), ('general', 1.0), ('notes.txt', 1.0)]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import brotli

from bytecap.errors import UsageError
from bytecap.model.texts import Encoder, Text, Window, load_documents, load_text

SELF = "self"
GENERAL = "general"
WORDS = (SELF, GENERAL)
SELF_SHARE = 0.5  # of a default that are samples: KL 0.219 on SmolLM2 (results/real.jsonl)
SELF_MOST = {"cpu": 2**15, "cuda": 2**20}  # tokens: sampling is slow on a processor
_HELD = 5  # every so manieth document of the general text is for evaluation

Sampler = Callable[[int], Sequence[Window]]
"""Windows with at least so many predicted tokens, sampled from the model."""


@dataclass(frozen=True)
class Source:
    """One source of calibration text.

    Attributes:
        name: `self`, `general`, or the path of a text file.
        weight: how often its windows are drawn, relative to other sources.
    """

    name: str
    weight: float = 1.0


def parse(names: Sequence[str | Path]) -> tuple[Source, ...]:
    """Read the names of sources, with their weights.

    Raises:
        UsageError: a weight is not a positive number, or a source is named twice.
    """
    found = []
    for name in map(str, names):
        head, _, tail = name.rpartition(":")
        weighted = bool(head) and not Path(name).exists() and (head in WORDS or Path(head).exists())
        found.append(Source(head, _weight(tail, name)) if weighted else Source(name))
    for s in found:
        if [f.name for f in found].count(s.name) > 1:
            raise UsageError(f"calibration text {s.name} is named twice; to draw it more often write {s.name}:2")
    return tuple(found)


def _weight(text: str, name: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UsageError(f"the weight in {name} is no positive number")
    return weight


@cache
def general_documents() -> tuple[str, ...]:
    """The embedded general text's documents; `benchmarks/general_text.py` makes it."""
    packed = (resources.files("bytecap") / "data" / "general.txt.br").read_bytes()
    return tuple(brotli.decompress(packed).decode("utf-8").split("\f"))


def general(*, held: bool) -> list[str]:
    """The general text's documents for evaluation (`held`), or all others."""
    return [d for i, d in enumerate(general_documents()) if (i % _HELD == _HELD - 1) == held]


def texts_of(
    sources: Sequence[Source],
    encode: Encoder,
    sampler: Sampler,
    *,
    window: int,
    shares: Mapping[str, int],
    vocabulary: int | None,
) -> list[Text]:
    """The windows of every source: of texts twice their share where they have it, since windows repeat and drop out.

    Args:
        sources: of `parse`.
        encode: documents to tokens.
        sampler: samples windows from the model.
        window: predicted tokens in a window.
        shares: predicted tokens that are wanted of every source, by name.
        vocabulary: rows of the model's embedding, where known.
    """
    found = []
    for s in sources:
        tokens = 2 * shares[s.name]
        if s.name == SELF:
            found.append(Text(SELF, tuple(sampler(shares[SELF]))))
        elif s.name == GENERAL:
            documents = general(held=False)
            found.append(load_documents(GENERAL, documents, encode, window=window, limit=tokens, vocabulary=vocabulary))
        else:
            found.append(load_text(s.name, encode, window=window, limit=tokens, vocabulary=vocabulary))
    return found
