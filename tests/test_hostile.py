"""Files made to hurt their reader: sizes, names, overlaps, bombs, flipped bits, and fuzzing."""

import importlib.util
import json
import lzma
import random
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import brotli
import numpy as np
import pytest

import fuzz
import golden_parts
import golden_updates
from bytecap import errors
from bytecap.format import codefiles, container
from bytecap.format.coders import leb
from bytecap.format.decoder import decode_units, side_files
from bytecap.format.sidefiles import bpe_merges
from bytecap.format.sidefiles import packing as sidefiles
from bytecap.pipeline import export
from stranger.basics import FormatError
from stranger.reader import parts
from stranger.reader import read as strange
from test_determinism import demo

pytestmark = pytest.mark.coverage

HERE = Path(__file__).parent
EXPECTED = json.loads((golden_parts.DIRECTORY / "expected.json").read_text("utf-8"))
VECTOR = bytes(8) + b"\0"  # centre 0, step 0, class 0: any shape, all zeros


def made(*sections):
    return fuzz.put_together([list(s) for s in sections])


def index(units=(), files=(), about="{}", **more):
    text = f'{{"about":{about},"files":{json.dumps(files)},"units":{json.dumps(units)}'
    return b"\0" + (text + "".join(f',"{k}":{json.dumps(v)}' for k, v in more.items()) + "}").encode()


def unit(name="w", shape=(1,), dtype="F32", coder=2, flags=0, aliases=()):
    return [name, list(shape), dtype, coder, flags, list(aliases)]


def everything(data):
    """All a reader may be asked for."""
    contents = container.parse(data)
    container.ledger(contents)
    return export.directory_files(contents)[0]


def refused(data, message, error=errors.ArtifactError):
    with pytest.raises(error, match=message):
        everything(data)


def peak(data):
    """Bytes allocated at most while a file is read."""
    tracemalloc.start()
    try:
        decode_units(container.parse(data))
    except errors.ArtifactError:
        pass
    finally:
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


# ----------------------------------------------------------------------------------------------- sizes and numbers


@pytest.mark.parametrize("shape", [[2**63], [2**31, 2**33], [2**64], [2**200], [0, 2**62], [2**24 + 1_000_000], [-1]])
def test_impossible_shapes(shape):
    refused(made((1, index([unit(shape=shape)])), (3, VECTOR)), None, errors.CorruptError)


def test_sizes_are_added_over_all_units():
    units = [unit(f"w{i}", [2**20]) for i in range(32)]
    refused(made((1, index(units)), *[(3, VECTOR)] * 32), "impossible shape")


@pytest.mark.parametrize("place", [3, 4])
@pytest.mark.parametrize("number", [-1, 2**31, 2**63, 2**64, 10**40])
def test_absurd_coders_and_flags(place, number):
    entry = unit()
    entry[place] = number
    refused(made((1, index([entry])), (3, VECTOR)), None, errors.CorruptError)


@pytest.mark.parametrize("major", [2, 127, 255])
def test_absurd_versions(major):
    data = bytearray(made((1, index())))
    data[8], data[9] = major, 255
    refused(bytes(data), f"version {major}.255", errors.VersionError)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**62])
def test_sections_that_overlap_or_leave_gaps(length):
    """Sections have no offsets: another length in the directory is an overlap, a gap, or an end beyond the file."""
    content = index([unit()])
    directory = leb(2) + b"".join(
        bytes([kind]) + leb(size) + fuzz.struct.pack("<I", fuzz.zlib.crc32(data))
        for kind, size, data in ((1, len(content), content), (3, length, VECTOR[:length] if length < 9 else VECTOR))
    )
    head = fuzz.struct.pack("<8sBBHIQ", container.MAGIC, 1, 0, 0, len(directory), 37 + len(directory) + len(content))
    data = head + fuzz.struct.pack("<I", fuzz.zlib.crc32(head + directory)) + directory + content + VECTOR
    refused(data, "left over|past the end", errors.CorruptError)


# ----------------------------------------------------------------------------------------------------------- names

UNSAFE = ["../x", "..", ".", "/x", "a/b", "a\\b", "", ".hidden", "a\0b"]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("kind", ["files", "code"])
def test_names_that_are_paths(name, kind):
    refused(made((1, index(**{kind: [name]})), (4 if kind == "files" else 5, b"\0{}")), "unsafe name")


@pytest.mark.parametrize("name", ["model.safetensors", "Model.SafeTensors", "C:x", "config.json:stream"])
def test_names_that_a_directory_gives_to_others(name, tmp_path):
    path = tmp_path / "a.bcap"
    path.write_bytes(made((1, index(files=[name])), (4, b"\0{}")))
    with pytest.raises(errors.ArtifactError, match="must not have the name"):
        export.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b", "a"]])
def test_names_twice(names):
    units = [unit(n) for n in names]
    refused(made((1, index(units)), *[(3, VECTOR)] * len(names)), "twice")
    refused(made((1, index([unit("a", aliases=names[1:])])), (3, VECTOR)), "twice")
    refused(made((1, index(files=names)), *[(4, b"\0")] * len(names)), "twice")
    refused(made((1, index(files=["a"], code=["a"])), (4, b"\0"), (5, b"\0")), "twice")


@pytest.mark.parametrize("name", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\\ud800"])
def test_names_that_are_not_text(name):
    for content in (index([unit("NAME")]), index(files=["NAME"])):
        damaged = content.replace(b"NAME", name)
        section = (3, VECTOR) if b"F32" in content else (4, b"\0")
        refused(made((1, damaged), section), None, errors.CorruptError)


def test_a_tensor_of_the_name_that_safetensors_keeps():
    refused(made((1, index([unit("__metadata__")])), (3, VECTOR)), "__metadata__")


@pytest.mark.parametrize("config", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_a_config_that_is_none(config):
    refused(made((1, index(files=["config.json"])), (4, b"\0" + config)), "config.json")


# ----------------------------------------------------------------------------------------------------------- bombs


def declared(name):
    """The units of a golden, each alone in a file that declares as many values as so small a file may."""
    most = 2**24 - 2048
    index_section, *rest = fuzz.take_apart((golden_parts.DIRECTORY / name).read_bytes())
    shared = [s for s in rest if s[0] in {2, 7}]
    units = json.loads(index_section[1][1:])["units"]
    for entry, section in zip(units, (s for s in rest if s[0] == 3), strict=True):
        for shape in ([most], [4096, 4095]):
            one = [entry[0], shape, *entry[2:5], []]
            yield most * (8 if entry[2] in {"F64", "I64"} else 4), made((1, index([one])), *shared, section)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bands", "fixed", "grid", "latent", "long_trellis", "packed", "stack", "trellis", "vector_constant"]
)
def test_memory_for_what_a_small_file_declares(name):
    from bytecap.format.entropy import jit

    jit.kernel("lanes")  # what numba itself takes is not the file's
    for size, data in declared(f"{name}.bcap"):
        assert peak(data) < 4 * size


def squeezed(content):
    return lzma.compress(content, lzma.FORMAT_RAW, filters=container._LZMA)


@pytest.mark.slow
@pytest.mark.parametrize("filler", [b"[],", b'"",', b"1,", b'{"a":0},'])
def test_an_index_that_expands(filler):
    data = made((1, b"\1" + squeezed(index(about='{"a":[' + "~0]}").replace(b"~", filler * 2**22)[1:])))
    assert peak(data) < 2**25
    refused(data, "too much", errors.CorruptError)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["brotli", "deflate", "lzma"])
def test_files_that_expand(packing):
    zeros = bytes(2**25)
    if packing == "deflate":
        engine = fuzz.zlib.compressobj(9, fuzz.zlib.DEFLATED, -15)
        data = b"\3" + engine.compress(zeros) + engine.flush()
        data, read = data[: 2**11], sidefiles.unpack
    else:
        read = codefiles.unpack
        data = b"\1" + brotli.compress(zeros) if packing == "brotli" else b"\2" + squeezed(zeros)
        data = data[: 2**11]
    tracemalloc.start()
    with pytest.raises(errors.CorruptError):
        read("x", data)
    assert tracemalloc.get_traced_memory()[1] < 4 * sidefiles.most(data)
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("content", [bytes(2**23), b"ab" * 2**22])
def test_what_expands_too_far_is_stored(content):
    assert sidefiles.unpack("x", sidefiles.pack("x", content)) == content
    assert codefiles.unpack("x", codefiles.squeeze(content)) == content


@pytest.mark.slow
@pytest.mark.parametrize("names", [b'["a"]', b'["a","b"]'])
def test_spellings_of_endless_tokens_take_little_work(monkeypatch, names):
    looked_at = []

    def counted(parts):
        looked_at.append(len(parts))
        return pairwise(parts)

    monkeypatch.setattr(bpe_merges, "pairwise", counted)
    block = b"\1" + bytes(40)
    data = bytes([2, 128, 0]) + leb(0) + leb(0) + leb(1) + leb(300) + leb(len(block)) + block + b"\0" + names
    with pytest.raises(errors.CorruptError, match="too long to be spelled"):
        sidefiles.unpack("x", data)
    assert 0 < sum(looked_at) < 2**20  # letters; joining pair by pair looked at eleven times as many


@pytest.mark.parametrize("spoil", [(64, 0), (0, 128)])
def test_styles_with_unused_bits(spoil):
    text = b'{"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}'
    data = next(d for d in sidefiles._dismantle(text))
    spoiled = bytes([data[0], data[1] | spoil[0], data[2] | spoil[1]]) + data[3:]
    assert sidefiles.unpack("x", data) == text
    with pytest.raises(errors.CorruptError, match="mean nothing"):
        sidefiles.unpack("x", spoiled)


def test_tokens_twice():
    with pytest.raises(errors.CorruptError, match="distinct"):
        sidefiles.unpack("x", bytes([2, 0, 0, 0]) + b'["a","a"]')


# ---------------------------------------------------------------------------------------------------- flipped bits


@pytest.mark.slow
@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_flipped_bits_of_a_real_artifact(fitted, count):
    """Anywhere in the file; every section is hit."""
    check_flips(fitted("rotary")[1].read_bytes(), count)


@pytest.mark.nightly
def test_flipped_bits_of_the_demo_artifact():
    check_flips(demo(), 10_000)


def check_flips(whole, count):
    data = bytearray(whole)
    rng = random.Random(5)  # noqa: S311 (no secret)
    for place in rng.sample(range(8 * len(data)), count):
        data[place // 8] ^= 1 << place % 8
        with pytest.raises(errors.ArtifactError):
            container.parse(bytes(data))
        data[place // 8] ^= 1 << place % 8
    container.parse(bytes(data))


# --------------------------------------------------------------------------------------------------------- fuzzing


def stranger_outcome(data):
    try:
        found = strange(data, bases_of(data))
    except FormatError as error:
        return type(error).__name__
    return found.tensors, found.files | found.code


def bases_of(data):
    """The golden files that an update among the goldens stands on."""
    found, known = [], golden_updates.known()
    try:
        while (base := parts(data)[0].get("base")) and base[0] in known:
            data = known[base[0]].data
            found.append(data)
    except FormatError:
        pass
    return found


def our_outcome(data):
    try:
        contents = golden_updates.on_known(container.parse(data))
        return decode_units(contents), side_files(contents) | codefiles.files(contents)
    except errors.ArtifactError as error:
        return type(error).__name__


def assert_agree(data):
    ours, theirs = our_outcome(data), stranger_outcome(data)
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs or {ours, theirs} == {"BaseError", "CorruptError"}  # 4.1 leaves open which comes first
        return False
    assert ours[1] == theirs[1]
    assert list(ours[0]) == list(theirs[0])
    for name, values in ours[0].items():
        assert values.dtype == theirs[0][name].dtype
        assert values.shape == theirs[0][name].shape
        assert values.tobytes() == np.ascontiguousarray(theirs[0][name]).tobytes()
    return True


@pytest.mark.slow
@pytest.mark.parametrize("count", [400, pytest.param(800, marks=pytest.mark.nightly)])
def test_the_stranger_agrees_on_mutations(count):
    rng, sound, agreed = random.Random(11), fuzz.sound(), 0  # noqa: S311 (no secret)
    for data in sound:
        assert assert_agree(data)
    for _ in range(count):
        agreed += assert_agree(fuzz.mutate(rng.choice(sound), rng, sound, "repaired"))
    assert agreed > count // 26


@pytest.mark.slow
def test_the_stranger_reads_a_real_artifact(fitted):
    for kind in ("rotary", "transposed"):
        assert assert_agree(fitted(kind)[1].read_bytes())


def run_fuzzer(tmp_path, *arguments):
    command = [sys.executable, str(HERE / "fuzz.py"), "--findings", str(tmp_path / "found"), *arguments]
    done = subprocess.run(  # noqa: S603 (our own script)
        command, capture_output=True, text=True, check=False, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    line = json.loads(done.stdout.strip().splitlines()[-1])
    assert line["findings"] == []
    return line


@pytest.mark.slow
@pytest.mark.parametrize("runs", [800, pytest.param(5000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("seed", [1, 2])
def test_fuzzing_thousands_of_mutations(tmp_path, seed, runs):
    flags = ["--compiled"] if seed == 2 and importlib.util.find_spec("numba") else []
    line = run_fuzzer(tmp_path, "--runs", str(runs), "--seconds", "inf", "--seed", str(seed), *flags)
    assert line["executions"] == runs
    assert line["parsed"] > line["executions"] / 10  # checksums were repaired


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["repaired", "raw"])
def test_fuzzing_guided_by_coverage(tmp_path, mode):
    pytest.importorskip("atheris", reason="pip install 'bytecap[fuzz]'")
    line = run_fuzzer(
        tmp_path, "--engine", "atheris", "--mode", mode, "--runs", "200000", "--seconds", "inf",
        "--corpus", str(tmp_path / "corpus"),
    )  # fmt: skip
    assert line["executions"] >= 200_000
