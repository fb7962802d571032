"""The container to the byte: every limit, count and order of the format's sections 2 to 4 and 7, and the ledger."""

import json
import lzma
import random
import struct
import zlib

import numpy as np
import pytest

from bytecap.errors import CorruptError, NotAnArtifact, OutputError, VersionError
from bytecap.format import container
from bytecap.format.coders import leb
from bytecap.format.container import CODE, FILE, Contents, FileSection, UnitSection, parse, serialize
from bytecap.format.ledger import Entry
from bytecap.format.wire.shared_objects import describe, write_list
from bytecap.types import Unit
from golden_parts import DIRECTORY

pytestmark = pytest.mark.coverage

MAGIC = b"\x89BCAP\r\n\x1a"
GOLDENS = [p for p in sorted(DIRECTORY.glob("*.bcap")) if not p.name.startswith("bad_")]
VECTOR = bytes(8) + b"\0"  # centre 0, step 0, class 0: any shape, all zeros
FILTER = [{"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": 1 << 20, "lc": 4, "lp": 0, "pb": 0}]


def file(*sections, directory=None, **header):
    """A file of (kind, bytes) sections, right in all that is not given."""
    if directory is None:
        directory = leb(len(sections)) + b"".join(
            bytes([kind]) + leb(len(data)) + struct.pack("<I", zlib.crc32(data)) for kind, data in sections
        )
    body = b"".join(data for _, data in sections)
    h = {"major": 1, "minor": 0, "reserved": 0, "length": len(directory), "size": 28 + len(directory) + len(body)}
    h |= header
    head = struct.pack("<8sBBHIQ", MAGIC, h["major"], h["minor"], h["reserved"], h["length"], h["size"])
    return head + struct.pack("<I", zlib.crc32(head + directory)) + directory + body


def index(units=(), files=(), about=None, **more):
    return b"\0" + json.dumps({"about": about or {}, "files": list(files), "units": list(units), **more}).encode()


def unit(name="w", shape=(1,), dtype="F32", coder=2, flags=0, aliases=()):
    return [name, list(shape), dtype, coder, flags, list(aliases)]


def refused(data, message, error=CorruptError):
    with pytest.raises(error, match=message):
        parse(data)


class TestWriting:
    """`serialize` makes what the document says, put together here by hand."""

    def test_the_empty_file(self):
        text = b'\0{"about":{},"files":[],"units":[]}'
        assert serialize(Contents((), b"", (), {})) == file((1, text))

    def test_all_kinds_of_sections_in_their_order(self):
        units = (UnitSection(Unit("a", (2, 3), "F32", ("b",), transposed=True), 2, VECTOR),
                 UnitSection(Unit("c", (4,), "BF16", (), linear=True), 2, VECTOR + b"x"),
                 UnitSection(Unit("d", (), "F16", (), transposed=True, linear=True), 2, VECTOR))  # fmt: skip
        files = (FileSection("z.py", b"\0zz", CODE), FileSection("config.json", b"\0{}"))
        text = (b'{"about":{"n":1},"files":["config.json"],"units":[["a",[2,3],"F32",2,1,["b"]],'
                b'["c",[4],"BF16",2,2,[]],["d",[],"F16",2,3,[]]],"code":["z.py"]}')  # fmt: skip
        packed = b"\1" + lzma.compress(text, lzma.FORMAT_RAW, filters=FILTER)
        made = serialize(Contents(units, b"T", files, {"n": 1}, 3, (b"O1", b"O2")))
        sections = [(1, packed), (2, b"T"), (7, b"O1"), (7, b"O2"), (3, VECTOR), (3, VECTOR + b"x"), (3, VECTOR),
                    (4, b"\0{}"), (5, b"\0zz"), (6, bytes(3))]  # fmt: skip
        assert len(packed) < len(text)
        assert made == file(*sections, minor=2)
        again = parse(made)
        assert again == Contents(units, b"T", (files[1], files[0]), {"n": 1}, 3, (b"O1", b"O2"))
        assert serialize(again) == made

    @pytest.mark.parametrize("length", range(40, 60))
    def test_the_index_is_packed_where_that_is_smaller(self, length):
        contents = Contents((), b"", (), {"a": "x" * length})
        text = json.dumps({"about": contents.about, "files": [], "units": []}, separators=(",", ":")).encode()
        packed = lzma.compress(text, lzma.FORMAT_RAW, filters=FILTER)
        assert serialize(contents) == file((1, b"\1" + packed if len(packed) < len(text) else b"\0" + text))

    def test_an_index_that_packing_leaves_as_long_is_stored(self):
        rng, equal = random.Random(1), 0  # noqa: S311 (no secret)
        for _ in range(400):
            about = {"a": "".join(rng.choices("abcd", k=rng.randint(20, 60)))}
            text = json.dumps({"about": about, "files": [], "units": []}, separators=(",", ":")).encode()
            if len(lzma.compress(text, lzma.FORMAT_RAW, filters=FILTER)) == len(text):
                equal += 1
                assert serialize(Contents((), b"", (), about)) == file((1, b"\0" + text))
        assert equal > 0

    def test_names_are_written_as_they_are(self):
        assert '"ü"'.encode() in serialize(Contents((UnitSection(Unit("ü", (1,), "F32"), 2, VECTOR),), b"", (), {}))

    @pytest.mark.parametrize(("changes", "minor"), [
        ({}, 0), ({"tag": 4}, 0), ({"tag": 6}, 1), ({"tag": 14}, 1), ({"tag": 15}, 3),
        ({"files": (FileSection("a", b"\0"),)}, 0), ({"files": (FileSection("a", b"\0", CODE),)}, 2),
        ({"objects": (b"x",)}, 2), ({"padding": 1}, 0), ({"stack": (32, b"")}, 1), ({"stack": (35, b"\0\0\2")}, 2),
        ({"stack": (32, b""), "base": 15}, 3),
    ])  # fmt: skip
    def test_the_lowest_minor_version(self, changes, minor):
        tag, data = changes.get("tag", 2), VECTOR
        if "stack" in changes:
            tag, data = (
                container.STACK.tag,
                container.STACK.encode((changes.get("base", 2), VECTOR), [changes["stack"]]),
            )
        units = (UnitSection(Unit("w", (1,), "F32"), tag, data),)
        more = {k: v for k, v in changes.items() if k in {"files", "objects", "padding"}}
        made = serialize(Contents(units, b"", **{"files": (), "about": {}, **more}))
        assert made[8:10] == bytes([1, minor])

    def test_files(self, tmp_path):
        contents, path = Contents((), b"", (), {}), tmp_path / "a.bcap"
        assert container.write(contents, path) == len(serialize(contents)) == path.stat().st_size
        assert container.read(path) == container.read(str(path)) == contents
        with pytest.raises(NotAnArtifact, match=r"cannot read .*none\.bcap: No such file"):
            container.read(tmp_path / "none.bcap")
        with pytest.raises(OutputError, match="cannot write"):
            container.write(contents, tmp_path / "none" / "a.bcap")
        path.write_bytes(b"other")
        with pytest.raises(NotAnArtifact, match=r"a\.bcap is not a bcap artifact|a\.bcap is not a bytecap artifact"):
            container.read(path)


class TestHeader:
    def test_other_files(self):
        for data in (b"", b"\x89BCAP\r\n", MAGIC[:-1] + b"x" + bytes(40)):
            refused(data, "the artifact is not a bytecap artifact", NotAnArtifact)

    def test_too_short_for_a_header(self):
        for n in (8, 27):
            refused(file((1, index()))[:n], f"truncated: {n} bytes, the header alone has 28")
        refused(file((1, index()))[:28], "the header says [0-9]+ bytes, the file has 28")

    def test_versions(self):
        assert container.VERSION == (1, 3)
        for minor in (0, 2, 3, 255):
            assert parse(file((1, index()), minor=minor)).units == ()
        refused(file((1, index()), major=2, minor=7), r"format version 2\.7, this reader knows 1\.3", VersionError)
        refused(file((1, index()), major=0), r"reserved header bits or version 0\.0")

    def test_reserved_bits(self):
        refused(file((1, index()), reserved=1), "reserved header bits")

    def test_lengths(self):
        good = file((1, index()))
        refused(file((1, index()), size=len(good) + 1), "the header says")
        refused(good + b"\0", "the header says")
        refused(file((1, index()), length=len(good)), "a directory of [0-9]+ bytes does not fit")
        refused(file((1, index()), length=len(good) - 27), "a directory of [0-9]+ bytes does not fit")
        refused(file((1, index()), length=len(good) - 28), "checksum of header and directory")

    def test_a_directory_as_long_as_the_file(self):
        refused(file(directory=b"\0"), "does not begin with an index")
        refused(file(directory=b""), "ends inside an integer")

    def test_checksum(self):
        good = bytearray(file((1, index())))
        for place in (9, 24, 30):
            bad = good.copy()
            bad[place] ^= 16
            refused(bytes(bad), "checksum of header and directory")


class TestDirectory:
    def test_ends(self):
        content = index()
        entry = b"\1" + leb(len(content)) + struct.pack("<I", zlib.crc32(content))
        assert parse(file((1, content), directory=b"\1" + entry)).units == ()
        refused(file((1, content), directory=b"\2" + entry), "the directory ends at section 1 of 2")
        refused(file((1, content), directory=b"\1"), "the directory ends at section 0 of 1")
        refused(file((1, content), directory=b"\1" + entry[:-1]), "section 0 runs past the end")
        refused(file((1, content), directory=b"\1" + entry[:-4]), "section 0 runs past the end")
        refused(file((1, content), directory=b"\1\1"), "ends inside an integer")
        refused(file((1, content), directory=b"\1" + entry + b"\0"), "left over behind the last section")
        refused(file((1, content), directory=b"\0"), "left over behind the last section")
        refused(file((1, content), (1, b"x"), directory=b"\1" + entry), "left over behind the last section")

    def test_lengths(self):
        content = index()
        long = b"\1" + leb(len(content) + 1) + struct.pack("<I", zlib.crc32(content))
        refused(file((1, content), directory=b"\1" + long), "section 0 runs past the end")
        short = b"\1" + leb(len(content) - 1) + struct.pack("<I", zlib.crc32(content[:-1]))
        refused(file((1, content), directory=b"\1" + short), "left over behind the last section")

    def test_checksums_of_sections(self):
        good = bytearray(file((1, index([unit()])), (3, VECTOR)))
        good[-1] ^= 1
        refused(bytes(good), r"the checksum of section 1 \(kind 3\) does not match")

    def test_kinds_and_their_order(self):
        one, two = index([unit()]), index([unit()], ["f"], code=["c"])
        assert parse(file((1, one), (2, b"T"), (7, b"O"), (3, VECTOR), (6, b"\0\0"))).padding == 2
        assert parse(file((1, two), (3, VECTOR), (4, b"F"), (5, b"C"))).files == (
            FileSection("f", b"F", FILE), FileSection("c", b"C", CODE),
        )  # fmt: skip
        for wrong in ([(3, VECTOR), (1, one)], [(6, b"")], []):
            refused(file(*wrong), "does not begin with an index")
        for wrong in ([(1, one)], [(1, one), (3, VECTOR), (3, VECTOR)], [(1, one), (3, VECTOR), (2, b"T")],
                      [(1, one), (2, b"T"), (2, b"T"), (3, VECTOR)], [(1, one), (3, VECTOR), (7, b"O")],
                      [(1, one), (7, b"O"), (2, b"T"), (3, VECTOR)], [(1, one), (6, b"\0"), (3, VECTOR)],
                      [(1, one), (3, VECTOR), (6, b"\0"), (6, b"\0")], [(1, one), (3, VECTOR), (8, b"")],
                      [(1, one), (3, VECTOR), (4, b"F")], [(1, two), (3, VECTOR), (5, b"C"), (4, b"F")],
                      [(1, one), (1, one), (3, VECTOR)]):  # fmt: skip
            refused(file(*wrong), "unexpected kinds or in an unexpected order")

    def test_tables_alone(self):
        assert parse(file((1, index()), (2, b"T"))).tables == b"T"
        assert parse(file((1, index()), (6, b""))).padding == 0

    def test_padding_holds_nothing(self):
        assert parse(file((1, index()), (6, bytes(9)))).padding == 9
        refused(file((1, index()), (6, b"\0\0\1\0")), "holds something in its padding")


class TestIndex:
    def test_packings(self):
        raw = index(about={"a": [1, "x" * 300]})[1:]
        packed = lzma.compress(raw, lzma.FORMAT_RAW, filters=FILTER)
        assert parse(file((1, b"\0" + raw))) == parse(file((1, b"\1" + packed)))
        refused(file((1, b"\2" + raw)), "an index of unknown packing")
        refused(file((1, b"")), "an index of unknown packing")
        refused(file((1, b"\1" + packed + b"\0")), "packing does not end where it should")
        refused(file((1, b"\1" + packed[:-3])), "packing does not end where it should|cannot be read")
        refused(file((1, b"\1")), "packing does not end where it should|cannot be read")
        refused(file((1, b"\1" + b"\xff" * 50)), "cannot be read")
        refused(file((1, b"\0{")), "cannot be read")

    @pytest.mark.parametrize("spare", [-1, 0, 1])
    def test_most_text_that_a_small_file_may_hold(self, spare):
        """1 MiB, and 64 bytes for every byte of the file."""
        empty = len(index(about={"a": ""})) - 1
        size, limit = 0, 0
        for _ in range(9):  # the file's length depends on its contents, and the limit on its length
            raw = index(about={"a": "x" * (limit - empty + spare)} if limit else {})[1:]
            data = file((1, b"\1" + lzma.compress(raw, lzma.FORMAT_RAW, filters=FILTER)))
            size, limit = len(data), (1 << 20) + 64 * len(data)
        assert len(raw) == limit + spare
        if spare > 0:
            refused(data, f"more than {limit} bytes, which is too much for {size}")
        else:
            assert parse(data).units == ()

    @pytest.mark.slow
    def test_most_text_at_all(self):
        with pytest.raises(CorruptError, match=f"more than {1 << 26} bytes"):
            container._read_index(b"\0" + b" " * (2**26 + 1), 2**21, "a file")
        with pytest.raises(CorruptError, match="cannot be read"):
            container._read_index(b"\0" + b" " * 2**26, 2**21, "a file")

    def test_the_most_text_with_something_behind_it(self):
        raw = index(about={"a": ""})[1:]
        raw = index(about={"a": "x" * (2**20 - len(raw))})[1:]
        packed = b"\1" + lzma.compress(raw, lzma.FORMAT_RAW, filters=FILTER)
        assert len(raw) == 2**20
        assert container._read_index(packed, 0, "a file").units == []
        with pytest.raises(CorruptError, match="packing does not end where it should"):
            container._read_index(packed + b"\0", 0, "a file")

    def test_fields(self):
        good = {"about": {}, "files": [], "units": []}
        for wrong in (
            {"about": {}, "files": []},
            good | {"more": 1},
            [],
            good | {"units": [unit()[:5]]},
            good | {"about": 1},
        ):
            refused(file((1, b"\0" + json.dumps(wrong).encode())), "cannot be read")
        refused(file((1, b"\0" + b"[" * 100_000)), "cannot be read")
        refused(file((1, b'\0{"about":{},"files":["\xff"],"units":[]}')), "cannot be read")

    def test_names_twice(self):
        sections = [(3, VECTOR)] * 2
        refused(file((1, index([unit("a"), unit("a")])), *sections), "names a unit or file twice")
        refused(file((1, index([unit("a", aliases=["b"]), unit("b")])), *sections), "names a unit or file twice")
        refused(file((1, index(files=["a", "a"])), (4, b""), (4, b"")), "names a unit or file twice")
        refused(file((1, index(files=["a"], code=["a"])), (4, b""), (5, b"")), "names a unit or file twice")
        refused(file((1, index(code=[]))), "or lists no code")
        assert len(parse(file((1, index([unit("a")], ["a"])), (3, VECTOR), (4, b""))).files) == 1

    @pytest.mark.parametrize("name", ["", "/", "a/b", "a\\b", ".a", "..", "a\0b"])
    def test_unsafe_names(self, name):
        refused(file((1, index(files=["ok", name])), (4, b""), (4, b"")), "the unsafe name")
        refused(file((1, index(code=[name])), (5, b"")), "the unsafe name")

    def test_flags(self):
        for flags in range(8):
            found = parse(file((1, index([unit(flags=flags)])), (3, VECTOR))).units[0].unit
            assert (found.transposed, found.linear, found.stacked) == (
                bool(flags & 1),
                bool(flags & 2),
                bool(flags & 4),
            )
        for flags in (8, 9, -1, 256):
            refused(file((1, index([unit(flags=flags)])), (3, VECTOR)), "reserved flags for w")

    def test_shapes(self):
        most = 2**24 - 1  # and 2,048 for every byte
        assert parse(file((1, index([unit(shape=[most])])), (3, VECTOR))).units[0].unit.shape == (most,)
        for shape in ([-1], [2, -1], [0, -1], [2**62, 0], [0, 2**62], [1] * 33, [2**12, 2**14]):
            refused(file((1, index([unit(shape=shape)])), (3, VECTOR)), "declares the impossible shape .* for w")
        assert parse(file((1, index([unit(shape=[1] * 32)])), (3, VECTOR))).units[0].unit.shape == (1,) * 32
        assert parse(file((1, index([unit(shape=[0] * 3)])), (3, VECTOR))).units[0].unit.shape == (0, 0, 0)

    @pytest.mark.parametrize("split", [False, True])
    def test_most_values(self, split):
        """2^24, and 2,048 for every byte of the file, over all units; an empty one counts as one value."""

        def made(count):
            shapes = ([count - 1001], [1000], [0, 1]) if split else ([count],)
            units = [unit(f"u{i}", s) for i, s in enumerate(shapes)]
            return file((1, index(units)), *[(3, VECTOR)] * len(units))

        limit = 2**24 + 2048 * len(made(2**24))
        assert len(made(limit)) == len(made(2**24))
        assert len(parse(made(limit)).units) == (3 if split else 1)
        refused(made(limit + 1), "impossible shape")


class TestLedger:
    def test_every_byte_has_an_owner(self):
        units = (
            UnitSection(Unit("a", (2, 3), "F32"), 2, VECTOR),
            UnitSection(Unit("b", (5,), "F32"), 2, VECTOR + b"xy"),
        )
        files = (FileSection("config.json", b"\0{}"), FileSection("tokenizer.json", b"\0ab"),
                 FileSection("chat_template.jinja", b"\0x"), FileSection("m.py", b"\0p", CODE))  # fmt: skip
        contents = Contents(units, b"TABLE", files, {}, 4)
        data = serialize(contents)
        (length,) = struct.unpack_from("<I", data, 12)
        named = next(s.length for s in container._directory(data, ""))
        entries = container.ledger(contents)
        assert entries == [
            Entry("(file)", "header", 28), Entry("(file)", "index", length + named), Entry("(shared)", "table", 5),
            Entry("a", "header", 9, 6), Entry("a", "payload", 0, 6), Entry("b", "header", 9, 5),
            Entry("b", "payload", 2, 5), Entry("config.json", "config", 3), Entry("tokenizer.json", "tokenizer", 3),
            Entry("chat_template.jinja", "tokenizer", 2), Entry("m.py", "code", 2), Entry("(file)", "padding", 4),
        ]  # fmt: skip
        assert sum(e.bytes for e in entries) == len(data)
        nothing = Contents((), b"", (), {})
        assert [e.bytes for e in container.ledger(nothing)] == [28, len(serialize(nothing)) - 28]

    def test_objects_have_numbers(self):
        listed = write_list(np.array([1, 3]), 9)
        entries = container.ledger(Contents((), b"", (), {}, 0, (listed, listed)))
        assert entries[2:] == [
            Entry(f"(shared) list {i}", kind, size) for i in (0, 1) for kind, size in describe(listed)[1]
        ]

    @pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
    def test_a_unit_has_one_entry_of_a_kind(self, path):
        contents = container.read(path)
        entries = container.ledger(contents)
        owned = [(e.unit, e.kind) for e in entries if e.unit in {u.unit.name for u in contents.units}]
        assert len(set(owned)) == len(owned)
        assert sum(e.bytes for e in entries) == path.stat().st_size
        for u in contents.units:
            assert sum(e.bytes for e in entries if e.unit == u.unit.name) == len(u.data)

    def test_long_sections_and_many(self):
        """Lengths and counts of several bytes."""
        units = tuple(UnitSection(Unit(f"u{i}", (1,), "F32"), 2, VECTOR) for i in range(200))
        files = (FileSection("a", bytes(300)), FileSection("b", bytes(20_000)))
        contents = Contents(units, b"", files, {})
        assert sum(e.bytes for e in container.ledger(contents)) == len(serialize(contents))

    def test_tokenizer_files(self):
        named = ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "vocab.txt", "merges.txt"]
        assert [n for n in [*named, "config.json", "source_tensors.json"] if container.is_tokenizer(n)] == named


def test_the_first_damaged_section_is_named(tmp_path):
    sound = [(1, b"index"), (4, b"one"), (4, b"two")]
    data = bytearray(file(*sound))
    for at, number in ((-1, 2), (-4, 1)):  # the last section, then the one in front of it as well
        data[at] ^= 1
        (tmp_path / "m.bcap").write_bytes(data)
        for read in (lambda: parse(bytes(data)), lambda: container.open_file(tmp_path / "m.bcap")):
            with pytest.raises(CorruptError, match=f"the checksum of section {number} .kind 4. does not match"):
                read()
