"""Section 7.3 of docs/format.md: merges spelled by binary decisions."""

import heapq
from itertools import pairwise

from stranger.basics import need

ORDER = "\u0120etaoinsrhldcumfpgwybvkx"
ODDS = [1 << 40]
for _ in range(2047):
    ODDS.append(ODDS[-1] * 1095225148336 >> 40)
HIGH = [(1 << 56) // ((1 << 40) + odds) for odds in ODDS]


def squash(d):
    return HIGH[d] if d >= 0 else 65536 - HIGH[-d]


def _stretches():
    found, d = [], -2047
    for p in range(4096):
        while d < 2047 and squash(d) < 16 * p + 8:
            d += 1
        found.append(d)
    return found


STRETCH = _stretches()


def trust(n):
    return n if n < 4 else min(10, n.bit_length() + 1)


class Work:
    """The work that all spelled merges of a file whose side and code files have `size` bytes may take (7.3)."""

    def __init__(self, size):
        self.squares, self.decisions = 1 << 24, (1 << 16) + 64 * size

    def parse(self, length):
        self.squares -= length**2
        need(self.squares >= 0, "too much to spell")

    def decide(self, count):
        self.decisions -= count
        need(self.decisions >= 0, "too many decisions")


class Coder:
    """The adaptive arithmetic decoder."""

    def __init__(self, data, work):
        self.work = work
        self.data, self.at, self.low, self.high = data, 0, 0, 2**32 - 1
        self.counters, self.weights = {}, {}
        self.value = 0
        for _ in range(4):
            self.value = self.value << 8 | self._byte()

    def _byte(self):
        self.at += 1
        need(self.at <= len(self.data) + 4, "a spelling is cut short")
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def _decode(self, p):
        middle = self.low + ((self.high - self.low) * p >> 16)
        bit = int(self.value <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 24 == self.high >> 24:
            self.low = self.low << 8 & 0xFFFFFFFF
            self.high = self.high << 8 & 0xFFFFFFFF | 255
            self.value = self.value << 8 & 0xFFFFFFFF | self._byte()
        return bit

    def decide(self, contexts, node, which, known=None):
        self.work.decide(1)
        slots = []
        for j, context in enumerate(contexts):
            key = (j, context, node)
            P, n = self.counters.get(key, (32768, 0))
            slots.append((key, P, n, (which, j, trust(n)), STRETCH[P >> 4]))
        d = sum(self.weights.get(w, 14000) * v for _, _, _, w, v in slots) >> 16
        p = min(65504, max(32, squash(min(2047, max(-2047, d)))))
        bit = self._decode(p) if known is None else known
        for key, P, n, w, v in slots:
            self.weights[w] = self.weights.get(w, 14000) + ((v * 8 * (65536 * bit - p) + 131072) >> 18)
            rate = 655360 // (10 * n + 13)
            self.counters[key] = (P + (((65535 * bit - P) * rate) >> 16), min(255, n + 1))
        return bit


def tree(names):
    """Path to every letter, and the tree as nested pairs."""
    known = {name for name in names if len(name) == 1}
    letters = [c for c in ORDER if c in known] + sorted(known - set(ORDER))
    need(letters, "no letter to spell with")
    heap = [(100000 // (8 + i) if i < 24 else 100000 // (3 * i), i, c) for i, c in enumerate(letters)]
    heapq.heapify(heap)
    for number in range(len(letters), 2 * len(letters) - 1):
        (a, _, zero), (b, _, one) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a + b, number, (zero, one)))
    found = {}

    def walk(branch, path):
        if isinstance(branch, str):
            found[branch] = path
        else:
            walk(branch[0], (*path, 0))
            walk(branch[1], (*path, 1))

    walk(heap[0][2], ())
    return found, heap[0][2]


def contexts_of(text, last):
    return (text[-1:], text[-2:], text[-3:], lower(text[-3:]), text[-3:][:-1], last)


def lower(text):
    return "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in text)


def join(text, ranks):
    """Parts of a text under the merges so far."""
    parts = list(text)
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            return parts
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def spelled(data, names, count, words, work):
    coder, (path_of, root) = Coder(data, work), tree(names)
    work.decide(len(path_of))
    sign = next((c for c in ("\u0120", "\u2581") if c in path_of), "")
    for word in words:
        text = ""
        for letter in sign + word:
            node = 1
            for bit in path_of.get(letter, ()):
                sets = 2 * min(len(text), 5) + 1
                coder.decide(contexts_of(text, (text[-1:], len(text) > 1)), node, sets, bit)
                node = 2 * node + bit
            text += letter
    ranks, taken = {}, set(names)
    while len(ranks) < count:
        text = ""
        while True:
            work.parse(len(text))
            parts = join(text, ranks)
            contexts = contexts_of(text, ("".join(parts[-1:]), len(parts) > 1))
            sets = 2 * min(len(text), 5)
            if len(parts) == 2 and text not in taken and coder.decide(contexts, 0, sets):
                break
            node, branch = 1, root
            while not isinstance(branch, str):
                bit = coder.decide(contexts, node, sets + 1)
                node, branch = 2 * node + bit, branch[bit]
            text += branch
        ranks[tuple(parts)] = len(ranks)
        taken.add(text)
    need(coder.at >= len(data), "a spelling has bytes left over")
    return list(ranks)
