"""Store the merges of a byte-pair tokenizer as spellings of the tokens that they make.

The byte-pair encoding of a token under the merges before its own says which two parts it joins, so the strings,
in order, are all there is to write. `_Speller` spells them letter by letter (a letter is a few binary decisions
down a fixed Huffman tree; wherever a token could end, one more decision says whether it does) and a binary
arithmetic coder writes the decisions. Their probabilities come from adaptive counters under six contexts (the
last letters, the part being spelled) that have read a list of common words, weighted by a small online mixer in
the logistic domain. Everything is integer arithmetic, so every machine reads the same bytes.

What it omits: merges the encoding does not determine (`write` declines, and the caller numbers them instead),
alphabets whose first symbols are longer than a letter, and vocabularies so large that reading would take long.

>>> merges = [("a", "b"), ("ab", "a"), ("c", "aba")]
>>> read(write("abc", merges), "abc", 3) == merges
True
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

from bytecap.errors import CorruptError
from bytecap.format.sidefiles.dictionary import WORDS

Merge = tuple[str, str]
Path = tuple[int, ...]  # decisions
Cell = dict[int, list[int]]  # [probability of 1 in 65,536ths, count] by decision
Weights = list[list[list[int]]]

MAX_MERGES = 1 << 13  # beyond this, reading takes longer than the bytes are worth
_SQUARES = 1 << 24  # letters looked at while parsing: damage must not keep the reader busy
_DECISIONS, _DECISIONS_PER_BYTE = 1 << 16, 1 << 6  # binary decisions: for nothing, and for every packed byte
_SETS, _SLOTS = 12, 6  # mixer weights by position in the token; contexts
_LOWER = {c: c + 32 for c in range(65, 91)}  # not str.lower: its tables grow with Unicode
_FREQUENT = "\u0120etaoinsrhldcumfpgwybvkx"


@dataclass
class Spelling:
    """Work that reading spelled merges may still take, over all blocks of a file (format.md, 7.3).

    Attributes:
        squares: sum of the squared lengths of the texts encoded into parts.
        decisions: binary decisions, those of the warm-up and one for every letter of an alphabet included.
    """

    squares: int
    decisions: int

    @classmethod
    def of(cls, size: int) -> Spelling:
        """The allowance of a file whose side and code files have so many packed bytes."""
        return cls(_SQUARES, _DECISIONS + _DECISIONS_PER_BYTE * size)

    def parse(self, letters: int) -> None:
        """Account for encoding a text of so many letters."""
        self.squares -= letters**2
        if self.squares < 0:
            raise CorruptError("its tokens are too long to be spelled")

    def decide(self, count: int = 1) -> None:
        """Account for decisions."""
        self.decisions -= count
        if self.decisions < 0:
            raise CorruptError("its merges take more decisions than so few bytes may ask for")


@cache
def _curves() -> tuple[list[int], list[int]]:
    """Return the logistic curve and its inverse: squash[d + 2047] of 65,536, stretch[p of 4,096], 256 to a nat."""
    fall, odds = 1095225148336, [1 << 40]  # 2**40 * exp(-1 / 256)
    for _ in range(2047):
        odds.append(odds[-1] * fall >> 40)
    high = [(1 << 56) // ((1 << 40) + x) for x in odds]
    squash = [65536 - p for p in high[:0:-1]] + high
    stretch, d = [], 0
    for p in range(4096):
        while d < 4094 and squash[d] < 16 * p + 8:
            d += 1
        stretch.append(d - 2047)
    return squash, stretch


class _Coder:
    """Binary arithmetic coder whose probabilities come from counters under several contexts, mixed online."""

    def __init__(self, slots: int, spelling: Spelling, source: bytes | None = None) -> None:
        self.squash, self.stretch = _curves()
        self.spelling = spelling
        self.source, self.at, self.out = source, 4, bytearray()
        self.low, self.high = 0, 0xFFFFFFFF
        self.value = int.from_bytes((source or b"")[:4].ljust(4, b"\0"), "big")
        self.rates = [655360 // (10 * n + 13) for n in range(256)]
        self.trust = [min(10, n if n < 4 else n.bit_length() + 1) for n in range(256)]
        self.weights: Weights = [[[14000] * 11 for _ in range(slots)] for _ in range(_SETS)]

    def bit(self, cells: Sequence[Cell], node: int, chosen: int, bit: int, *, learn_only: bool = False) -> int:
        """Code one binary decision.

        Args:
            cells: the counters of the decision's context, one dictionary a slot.
            node: which decision it is within the symbol.
            chosen: set of mixer weights.
            bit: the decision, ignored when reading.
            learn_only: adapt to `bit` and code nothing.

        Returns:
            The decision.
        """
        self.spelling.decide()
        squash, stretch, trust, rates = self.squash, self.stretch, self.trust, self.rates
        votes, total = [], 0
        for cell, weights in zip(cells, self.weights[chosen], strict=True):
            counter = cell.get(node)
            if counter is None:
                counter = cell[node] = [32768, 0]
            vote, bucket = stretch[counter[0] >> 4], trust[counter[1]]
            total += weights[bucket] * vote
            votes.append((counter, vote, weights, bucket))
        p = min(65504, max(32, squash[min(4094, max(0, (total >> 16) + 2047))]))
        if not learn_only:
            bit = self._narrow(p, bit)
        error, target = 8 * ((bit << 16) - p), 65535 * bit
        for counter, vote, weights, bucket in votes:
            weights[bucket] += (vote * error + 131072) >> 18
            counter[0] += (target - counter[0]) * rates[counter[1]] >> 16
            if counter[1] < 255:
                counter[1] += 1
        return bit

    def _narrow(self, p: int, bit: int) -> int:
        """Write `bit`, or read one, whose probability of being 1 is p / 65536."""
        span = self.high - self.low
        middle = self.low + (span * p >> 16)
        if self.source is not None:
            bit = int(self.value <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while (self.low ^ self.high) < 1 << 24:
            if self.source is None:
                self.out.append(self.high >> 24)
            else:
                if self.at > len(self.source) + 3:
                    raise CorruptError("its merges end too soon")
                byte = self.source[self.at] if self.at < len(self.source) else 0
                self.value, self.at = (self.value << 8 | byte) & 0xFFFFFFFF, self.at + 1
            self.low, self.high = self.low << 8 & 0xFFFFFFFF, self.high << 8 & 0xFFFFFFFF | 255
        return bit

    def finish(self) -> bytes:
        """Return the bytes written; up to four zeros are implied after their end.

        The first bytes of `low` and `high` differ, so one byte is enough to lie between them.
        """
        return bytes(self.out) + bytes([(self.low + (1 << 24) - 1) >> 24]).rstrip(b"\0")


def _letters(names: Iterable[str], spelling: Spelling) -> Any:
    """Build a Huffman tree over the one-letter names from fixed, guessed frequencies."""
    alphabet = sorted({n for n in names if len(n) == 1}, key=lambda c: (_FREQUENT.find(c) % 99, c))
    spelling.decide(len(alphabet))
    heap: list[tuple[int, int, Any]] = [
        (100000 // (8 + i if i < 24 else 3 * i), i, letter) for i, letter in enumerate(alphabet)
    ]
    heapq.heapify(heap)
    serial = len(heap)
    while len(heap) > 1:
        a, b = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a[0] + b[0], serial, (a[2], b[2])))
        serial += 1
    if not heap:
        raise ValueError("no letters to spell with")
    return heap[0][2]


class _Table(dict[Any, Cell]):
    """Counters by context. Those of an earlier table are copied when they are first asked for: most never are."""

    def __init__(self, earlier: Mapping[Any, Cell] | None = None) -> None:
        super().__init__()
        self.earlier = {} if earlier is None else earlier

    def __missing__(self, context: Any) -> Cell:
        cell = self[context] = {node: [*counter] for node, counter in self.earlier.get(context, {}).items()}
        return cell


Tables = list[_Table]


def _walk(tree: Any, path: Path = ()) -> Iterator[tuple[str, Path]]:
    """Yield the letters of a tree and the decisions that lead to them."""
    if type(tree) is str:
        yield tree, path
    else:
        for bit in (0, 1):
            yield from _walk(tree[bit], (*path, bit))


def _cells(tables: Tables, text: str, last: str, second: bool) -> list[Cell]:
    """Return the counters for the part after `text`, whose last part is `last`."""
    keys = (text[-1:], text[-2:], text[-3:], text[-3:].translate(_LOWER), text[-3:-1], (last, second))
    return [table[key] for table, key in zip(tables, keys, strict=True)]


def _usual(paths: Iterable[str]) -> list[str]:
    """Return the usual words as they begin in an alphabet."""
    space = next((c for c in "\u0120\u2581" if c in paths), "")
    return [space + word for word in WORDS]


@lru_cache(2)  # 40 ms each, of a file that is written and read back
def _warm(alphabet: tuple[tuple[str, Path], ...]) -> tuple[Weights, Tables]:
    """Return the state of a coder that has read the usual words, coding nothing."""
    paths, tables = dict(alphabet), [_Table() for _ in range(_SLOTS)]
    coder = _Coder(_SLOTS, Spelling(0, 1 << 62))
    for word in _usual(paths):
        text = ""
        for letter in word:
            cells, node = _cells(tables, text, text[-1:], len(text) > 1), 1
            for bit in paths.get(letter, ()):
                coder.bit(cells, node, 2 * min(len(text), 5) + 1, bit, learn_only=True)
                node = 2 * node + bit
            text += letter
    return coder.weights, tables


class _Speller:
    """Spells the tokens that merges make, in order, each under the merges before it."""

    def __init__(self, coder: _Coder, names: Iterable[str]) -> None:
        self.coder, self.known = coder, set(names)
        self.tree = _letters(self.known, coder.spelling)
        self.paths = dict(_walk(self.tree))
        self.ranks: dict[Merge, int] = {}
        coder.spelling.decide(sum(len(self.paths.get(c, ())) for word in _usual(self.paths) for c in word))
        weights, tables = _warm(tuple(self.paths.items()))
        coder.weights = [[[*w] for w in slots] for slots in weights]
        self.tables = [_Table(table) for table in tables]

    def _parts(self, text: str) -> list[str]:
        """Encode `text` with the merges so far; returns its parts."""
        self.coder.spelling.parse(len(text))
        parts, ranks = list(text), self.ranks
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            # All of the pair at once: merges that take the new part came later, so none of them is earlier.
            joined, i = list[str](), 0
            while i < len(parts):
                found = (parts[i], parts[i + 1]) == best if i + 1 < len(parts) else False
                joined.append(parts[i] + parts[i + 1] if found else parts[i])
                i += 1 + found
            parts = joined
        return parts

    def merge(self, word: str | None = None) -> Merge:
        """Code one token; write `word`, or read one."""
        text, coder = "", self.coder
        while True:
            parts = self._parts(text)
            last = parts[-1] if parts else ""
            cells = _cells(self.tables, text, last, len(parts) > 1)
            chosen = 2 * min(len(text), 5)
            ends = -1 if word is None else int(text == word)
            if len(parts) == 2 and text not in self.known and coder.bit(cells, 0, chosen, ends):
                break
            if word is not None and (ends or word[len(text)] not in self.paths):
                raise ValueError("no spelling")
            path = self.paths[word[len(text)]] if word is not None else None
            tree, node = self.tree, 1
            while type(tree) is not str:
                bit = coder.bit(cells, node, chosen + 1, path[node.bit_length() - 1] if path else -1)
                tree, node = tree[bit], 2 * node + bit
            text += tree
        self.known.add(text)
        pair = parts[0], parts[1]
        self.ranks[pair] = len(self.ranks)
        return pair


def write(names: Iterable[str], merges: Sequence[Merge]) -> bytes:
    """Spell the tokens that merges make.

    Args:
        names: the tokens no merge makes; the one-letter ones are the alphabet.
        merges: the pairs, in order.

    Returns:
        The spelling, or nothing where it would not determine the merges.
    """
    coder = _Coder(_SLOTS, Spelling(_SQUARES, 1 << 62))  # how much so many bytes may ask for is seen at the end
    try:
        speller = _Speller(coder, names)
        if any(speller.merge(a + b) != (a, b) for a, b in merges):
            return b""
    except (ValueError, CorruptError):
        return b""
    return coder.finish()


def read(block: bytes, names: Iterable[str], count: int, spelling: Spelling | None = None) -> list[Merge]:
    """Invert `write`, taking its work from an allowance (one of its own by default).

    Raises:
        CorruptError: the spelling is damaged.
        ValueError: the names hold no alphabet.
    """
    if count > MAX_MERGES:
        raise CorruptError("it claims more merges than are spelled")
    coder = _Coder(_SLOTS, spelling or Spelling.of(len(block)), block)
    speller = _Speller(coder, names)
    merges = [speller.merge() for _ in range(count)]
    if not coder.at - 4 <= len(block) <= coder.at:
        raise CorruptError("its merges do not end where they should")
    return merges
