"""Fuzz the reader: `artifact.parse`, `decode_units`, `ledger`, and what `unpack` does with values and files.

    python tests/fuzz.py --seconds 60                      # mutations that keep checksums right, and raw ones
    python tests/fuzz.py --engine atheris --corpus DIR     # coverage-guided; the corpus grows in DIR
    python tests/fuzz.py --replay DIR                      # coverage of a corpus: under `coverage run --branch`

Seeds are the goldens. A mutation is *repaired* (sections change, and directory, checksums and lengths are made right
again, so that the decoder behind them is reached) or *raw*. Any outcome other than success or an `ArtifactError` is a
finding: another exception, more than 2 s of processor time, or more memory than `--memory` allows (so a finding is a
`MemoryError`). Findings are written to `--findings`, one for every place in the code.
"""

import argparse
import hashlib
import json
import lzma
import os
import random
import resource
import struct
import sys
import time
import traceback
import warnings
import zlib
from pathlib import Path

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens"
SLOW = 2.0  # seconds of processor time, whatever else runs on the machine
LARGEST = 4096  # bytes of an input
_INTERESTING = (0, 1, 2, 3, 4, 7, 8, 16, 32, 63, 64, 127, 128, 129, 254, 255)
_LEBS = (127, 128, 16383, 16384, 65535, 65536, 2**20, 2**24, 2**31, 2**32, 2**62, 2**63 - 1, 2**63)
_WORDS = ("0", "1", "-1", "2", "3", "33", "64", "1048576", "16777216", "4294967296", "9223372036854775808", "1e3",
          "NaN",
          '"F64"', '"F32"', '"F16"', '"BF16"', '"I64"', '"BOOL"', '"U8"', '"X"', "[]", "{}", "null", "true", '"../a"',
          '"\\ud800"', '"a"', "[2,3]", "[0,3]", "[3,0,2]", "[]", "[1]", "[16777216]",
          '"model.safetensors"')  # fmt: skip
_INDEX_FILTER = [{"id": lzma.FILTER_LZMA1, "lc": 4, "lp": 0, "pb": 0, "dict_size": 1 << 20}]
_TABLE_FILTER = [{"id": lzma.FILTER_LZMA1, "lc": 3, "lp": 0, "pb": 0, "dict_size": 1 << 16}]


# ----------------------------------------------------------------------------------------------- taking files apart


def leb(value):
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def take_apart(data):
    """(kind, content) of every section as far as the directory can be read; None if it cannot."""
    try:
        (length,) = struct.unpack_from("<I", data, 12)
        at, start, sections = 28, 28 + length, []
        numbers = []

        def read():
            nonlocal at
            value = shift = 0
            while True:
                value |= (data[at] & 127) << shift
                shift += 7
                at += 1
                if data[at - 1] < 128:
                    return value

        for _ in range(min(read(), 64)):
            kind = data[at]
            at += 1
            numbers.append((kind, read()))
            at += 4
        for kind, size in numbers:
            sections.append([kind, open_up(kind, data[start : start + size])])
            start += size
    except (IndexError, struct.error):
        return None
    return sections


def open_up(kind, content):
    """Index and tables without their compression, so that mutations make sense."""
    filters = {1: _INDEX_FILTER, 2: _TABLE_FILTER}.get(kind)
    if filters is None or content[:1] != b"\x01":
        return content
    try:
        return b"\x00" + lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(content[1:], 1 << 16)
    except lzma.LZMAError:
        return content


def put_together(sections, minor=2):
    """A file with right lengths and checksums."""
    directory = leb(len(sections))
    for kind, content in sections:
        directory += bytes([kind]) + leb(len(content)) + struct.pack("<I", zlib.crc32(content))
    body = b"".join(content for _, content in sections)
    head = struct.pack("<8sBBHIQ", b"\x89BCAP\r\n\x1a", 1, minor, 0, len(directory), 28 + len(directory) + len(body))
    return head + struct.pack("<I", zlib.crc32(head + directory)) + directory + body


# ------------------------------------------------------------------------------------------------------- mutations


def mutate_bytes(data, rng):
    """One small change."""
    data = bytearray(data)
    at = rng.randrange(len(data) + 1)
    action = rng.randrange(9)
    if action <= 2 and at < len(data):
        data[at] = rng.choice((rng.choice(_INTERESTING), rng.randrange(256), (data[at] + rng.choice((1, -1))) % 256))
    elif action == 3 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif action == 4:
        data[at:at] = rng.randbytes(rng.randint(1, 9))
    elif action == 5:
        del data[at : at + rng.choice((1, 1, 1, 2, 4, 8, 64))]
    elif action == 6:
        del data[at:]
    elif action == 7:
        data[at : at + rng.choice((0, 1, 1, 2))] = leb(rng.choice(_LEBS))
    else:
        start = rng.randrange(len(data) + 1)
        data[at:at] = data[start : start + rng.choice((1, 4, 16, 64))]
    return bytes(data[:LARGEST])


def mutate_index(content, rng):
    """Replace a number or a string of the index by another."""
    text = content[1:].decode("utf-8", "replace")
    spots = [i for i, c in enumerate(text) if c in "[,:"]
    if not spots:
        return content
    start = rng.choice(spots) + 1
    end = start
    while end < len(text) and text[end] not in ",]}":
        end += 1
    return b"\x00" + (text[:start] + rng.choice(_WORDS) + text[end:]).encode()


def mutate_coder(content, rng):
    """Another coder, shape or dtype for some unit."""
    try:
        index = json.loads(content[1:])
        unit = rng.choice(index["units"])
        place = rng.randrange(3)
        if place == 0:
            unit[3] = rng.randint(1, 17)
        elif place == 1:
            unit[1] = [rng.choice((0, 1, 1, 2, 2, 3, 4, 5, 8, 16, 33)) for _ in range(rng.choice((0, 1, 2, 2, 2, 3)))]
        else:
            unit[4] = rng.randrange(4)
        return b"\x00" + json.dumps(index, separators=(",", ":")).encode()
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return content


def repaired(data, rng, others):
    """A file with some sections changed and everything else right; None if it cannot be taken apart."""
    sections = take_apart(data)
    if not sections:
        return None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        which = rng.randrange(len(sections))
        kind, content = sections[which]
        action = rng.randrange(24)
        if action == 0:
            del sections[which]
        elif action == 1:
            sections.insert(rng.randrange(len(sections) + 1), [rng.choice((kind, rng.randrange(9))), content])
        elif action == 2 and (donor := take_apart(rng.choice(others))):
            sections[which][1] = rng.choice(donor)[1]
        elif kind == 1 and action < 14:
            sections[which][1] = (mutate_coder if action < 8 else mutate_index)(content, rng)
        else:
            sections[which][1] = mutate_bytes(content, rng)
        if not sections:
            return None
    return put_together(sections, rng.choice((2, 2, 2, 2, 0, 9)))


def mutate(data, rng, others, mode):
    if mode == "raw":
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = mutate_bytes(data, rng)
        return data
    return repaired(data, rng, others) or repaired(rng.choice(others), rng, others) or data


# ---------------------------------------------------------------------------------------------------------- target


class Target:
    """One input after the other, and what was seen."""

    def __init__(self, findings):
        from bytecap.errors import ArtifactError
        from bytecap.format import codefiles, container, decoder
        from bytecap.pipeline import export
        from golden_updates import on_known

        self.parse, self.ledger, self.refusal = container.parse, container.ledger, ArtifactError
        self.decode, self.unpack, self.codefiles = decoder.decode_units, export, codefiles
        self.side_files = decoder.side_files
        self.on_known = on_known
        self.findings, self.places = findings, {}
        self.executed = self.accepted = self.parsed = 0
        self.slowest = 0.0

    def steps(self, data):
        contents = self.on_known(self.parse(data))
        self.parsed += 1
        refused = None
        for step in (
            self.decode,
            self.ledger,
            self.unpack.directory_files,
            self.side_files,
            self.codefiles.files,
        ):
            try:
                step(contents)
            except self.refusal as error:
                refused = error
        if refused is not None:
            raise refused
        self.accepted += 1

    def __call__(self, data):
        self.executed += 1
        spent = self.timed(data)
        if spent > SLOW:
            spent = self.timed(data)  # once more: what a process compiles or imports once is not the file's work
        self.slowest = max(self.slowest, spent)
        if spent > SLOW:
            self.found(f"slow {round(spent)} s", data)

    def timed(self, data):
        """Seconds of processor time that an input takes."""
        start = time.process_time()
        try:
            self.steps(data)
        except self.refusal:
            pass
        except Exception as error:  # noqa: BLE001 (everything else is what we are looking for)
            frames = traceback.extract_tb(error.__traceback__)
            frames = [f for f in frames if "bytecap/" in f.filename] or frames
            self.found(f"{type(error).__name__} {Path(frames[-1].filename).name}:{frames[-1].lineno} {error}", data)
        return time.process_time() - start

    def found(self, what, data):
        key = what.split(" ")[1] if not what.startswith("slow") else what
        self.places.setdefault(key, what)
        if self.findings and not (path := self.findings / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}").exists():
            self.findings.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(what + "\n", "utf-8")


def files_of_all_packings():
    """Artifacts with side files that the goldens lack: merges spelled and numbered, implied tokens and none."""
    from bytecap.format import container
    from bytecap.format.sidefiles import packing

    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("\u0120", "the"), ("in", "g"), ("a", "n"), ("an", "d")]
    letters = [*"\u0120abdeghint"]
    found = []
    for implied, pairs in ((True, False), (True, True), (False, False)):
        tokens = letters + [a + b for a, b in merges] if implied else [a + b for a, b in merges] + letters
        listed = [list(m) if pairs else " ".join(m) for m in merges]
        model = {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": listed}
        text = json.dumps({"model": model}, indent=2 if pairs else None, ensure_ascii=implied).encode()
        for data in (packing.pack("t", text), *packing._dismantle(text)):
            section = container.FileSection("tokenizer.json", data)
            found.append(container.serialize(container.Contents((), b"", (section,), {})))
    return found


def seeds():
    return [p.read_bytes() for p in sorted(GOLDENS.rglob("*.bcap"))] + files_of_all_packings()


def sound():
    """The seeds that are valid."""
    files = [p for p in sorted(GOLDENS.rglob("*.bcap")) if p.name[:4] != "bad_" and p.name != "cut.bcap"]
    return [p.read_bytes() for p in files] + files_of_all_packings()


# --------------------------------------------------------------------------------------------------------- engines


def plain(target, arguments, start):
    """Mutations of the seeds, not guided; what is accepted becomes a seed."""
    rng = random.Random(arguments.seed)  # noqa: S311 (no secret)
    pool = seeds()
    valid = sound()
    pool += 8 * valid
    fixed = len(pool)
    while time.perf_counter() - start < arguments.seconds and target.executed < arguments.runs:
        mode = arguments.mode if arguments.mode != "both" else ("repaired", "raw")[target.executed % 2]
        data, accepted = mutate(rng.choice(pool), rng, valid, mode), target.accepted
        target(data)
        if target.accepted > accepted and len(data) < LARGEST:
            if len(pool) < fixed + 500:
                pool.append(data)
            else:
                pool[rng.randrange(fixed, len(pool))] = data


def guided(target, arguments, start):
    """Coverage-guided, with libFuzzer under atheris; never returns."""
    import atheris

    others = sound()
    corpus = Path(arguments.corpus)
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds():
        (corpus / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)

    def custom(data, size, seed):
        rng = random.Random(seed)  # noqa: S311 (no secret)
        if arguments.mode == "raw":
            return atheris.Mutate(data, size)
        return mutate(data, rng, others, "repaired")[:size]

    def one(data):
        target(data)
        if target.executed >= arguments.runs or time.perf_counter() - start > arguments.seconds:
            finish(target, arguments, start)
            os._exit(bool(target.places))  # libFuzzer has no other way out that keeps our figures

    flags = [
        sys.argv[0], f"-max_len={LARGEST}", "-len_control=0", f"-seed={arguments.seed}", "-timeout=60",
        "-rss_limit_mb=0", "-verbosity=0", str(corpus),
    ]  # fmt: skip
    atheris.Setup(flags, one, custom_mutator=custom)
    atheris.Fuzz()


def finish(target, arguments, start):
    line = {
        "engine": arguments.engine, "mode": arguments.mode, "seed": arguments.seed, "executions": target.executed,
        "parsed": target.parsed, "accepted": target.accepted, "seconds": round(time.perf_counter() - start, 1),
        "slowest_seconds": round(target.slowest, 3), "memory_limit_mb": arguments.memory,
        "findings": sorted(target.places.values()),
    }  # fmt: skip
    print(json.dumps(line), flush=True)  # noqa: T201
    if arguments.record:
        with Path(arguments.record).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("plain", "atheris"), default="plain")
    parser.add_argument("--mode", choices=("repaired", "raw", "both"), default="both")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--runs", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", default="build/corpus")
    parser.add_argument("--findings", type=Path, default=Path("build/findings"))
    parser.add_argument("--memory", type=int, default=2048, help="address space in MB beyond what the start takes")
    parser.add_argument("--record", help="append the result to this file")
    parser.add_argument("--replay", type=Path, help="only run the files of a directory")
    parser.add_argument("--compiled", action="store_true", help="decode streams in machine code")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    if arguments.engine == "atheris" and not arguments.replay:
        import atheris

        with atheris.instrument_imports(
            include=["bytecap"], exclude=["bytecap.format.entropy.kernels", "bytecap.format.entropy.simd"]
        ):
            target = Target(arguments.findings)
            from bytecap.format.coders import overlay_coders

            overlay_coders()  # imports every coder
    else:
        target = Target(arguments.findings)
    if arguments.compiled:
        from bytecap.format.entropy import jit

        jit.kernel("lanes")
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (arguments.memory << 20), resource.RLIM_INFINITY))
    start = time.perf_counter()
    if arguments.replay:
        for path in sorted(arguments.replay.iterdir()):
            target(path.read_bytes())
    else:
        (plain if arguments.engine == "plain" else guided)(target, arguments, start)
    finish(target, arguments, start)
    return bool(target.places)


if __name__ == "__main__":
    sys.exit(main())
