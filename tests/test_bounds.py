"""Bounds that hold for a whole artifact: work for every byte, memory of all its files together, names it may write.

Work is counted, never timed: multiply-adds by what numpy is asked for, spelling by the lines of Python that run.
"""

import json
import lzma
import os
import random
import struct
import sys
import tracemalloc
from types import SimpleNamespace

import brotli
import numpy as np
import pytest

import fuzz
import golden_parts
from bytecap import errors, reference
from bytecap.format import codefiles, container, work
from bytecap.format.coders import leb
from bytecap.format.decoder import decode_units, side_files
from bytecap.format.overlays import lowrank
from bytecap.format.sidefiles import bpe_merges, names, packing
from bytecap.pipeline import export
from stranger.basics import FormatError
from stranger.reader import read as strange
from test_hostile import VECTOR, index, made, unit

pytestmark = pytest.mark.coverage
VALID = [p for p in sorted(golden_parts.DIRECTORY.glob("*.bcap")) if not p.stem.startswith("bad_")]


def low_rank(rows, cols, rank):
    """A layer of zeros: some bytes whatever its size."""
    codes = brotli.compress(bytes(rank * (rows + cols)), quality=11, lgwin=24)
    return bytes([rank, 8, 1]) + struct.pack("<f", 1.0) * rank + codes


def stack(layers):
    out = bytes([2, len(layers)]) + leb(len(VECTOR)) + VECTOR
    return out + b"".join(bytes([tag]) + leb(len(data)) + data for tag, data in layers)


def stacked(shape, layers):
    return made((1, index([unit(shape=shape, coder=5)])), (3, stack(layers)))


def outcomes(data):
    """Outcome of a file for the three readers: the name of an error, or nothing."""
    found = []
    for read in (lambda d: decode_units(container.parse(d)), reference.decode_file, strange):
        try:
            read(data)
            found.append("")
        except (errors.ArtifactError, FormatError) as exc:
            found.append(type(exc).__name__)
    return found


# -------------------------------------------------------------------------------------------------- work of the units


@pytest.mark.parametrize("count", [1, 2, 16])
def test_overlays_of_zeros_ask_for_too_much(count):
    data = stacked([4096, 4096], [(35, low_rank(4096, 4096, 255))] * count)
    assert len(data) < 2000 * count
    with pytest.raises(errors.CorruptError, match="unit w asks for more work than so small a file may"):
        container.parse(data)
    assert outcomes(data) == ["CorruptError"] * 3


def test_work_is_added_over_all_units():
    section, shape = stack([(35, low_rank(1024, 1024, 200))]), [1024, 1024]
    for count, error in ((1, ""), (2, "CorruptError")):
        units = [unit(f"w{i}", shape, coder=5) for i in range(count)]
        data = made((1, index(units)), *[(3, section)] * count)
        assert (outcomes(data) if error else [container.parse(data) and ""] * 3) == [error] * 3


def counted(monkeypatch, data):
    """Values that outer products make while a file is decoded."""
    found, ufunc = [0], np.multiply

    def outer(a, b):
        found[0] += len(a) * len(b)
        return ufunc.outer(a, b)

    class Numpy(SimpleNamespace):
        def __getattr__(self, name):
            return getattr(np, name)

    monkeypatch.setattr(lowrank, "np", Numpy(multiply=SimpleNamespace(outer=outer)))
    decode_units(container.parse(data))
    return found[0]


@pytest.mark.parametrize(("shape", "rank", "count"), [((64, 96), 5, 1), ((300, 7), 7, 3), ((128, 128), 128, 16)])
def test_what_is_done_is_what_was_announced(monkeypatch, shape, rank, count):
    data = stacked(list(shape), [(35, low_rank(*shape, rank))] * count)
    assert counted(monkeypatch, data) == shape[0] * shape[1] * rank * count
    steps = work.steps(5, container.parse(data).units[0].data, shape)
    assert steps == 1 + rank * count
    assert shape[0] * shape[1] * steps <= work.most(len(data))


@pytest.mark.parametrize("path", VALID, ids=lambda p: p.stem)
def test_goldens_ask_for_far_less(path):
    """And every coder and layer says how much."""
    data = path.read_bytes()
    contents = container.parse(data)
    asked = sum(max(1, u.unit.parameters) * work.steps(u.tag, u.data, u.unit.matrix_shape) for u in contents.units)
    assert asked < work.SPARE / 1000


def test_latents_count_ranks_and_decoders():
    for u in container.parse((golden_parts.DIRECTORY / "latent.bcap").read_bytes()).units:
        steps = work.steps(u.tag, u.data, u.unit.matrix_shape)
        n = next(i for i in range(2, 12) if u.data[i] < 128)
        assert steps == 1 + u.data[n + 1] + (192 if u.data[0] & 2 else 0)


def test_work_of_headers_that_say_nonsense():
    for coder, section, said in ((99, b"", "coder 99"), (5, b"\2", "shorter than its header"),
                                 (5, stack([(35, b"")]), "a layer needs 3 bytes"), (5, stack([(99, b"")]), "layer 99"),
                                 (7, b"\2", "shorter than its header")):  # fmt: skip
        data = made((1, index([unit(coder=coder)])), (3, section))
        with pytest.raises(errors.CorruptError, match=f"units w: .*{said}"):
            container.parse(data)
        assert outcomes(data) == ["CorruptError"] * 3


# ------------------------------------------------------------------------------------------------------- side files

BOMB = b"\1" + brotli.compress(bytes(4 << 20))


def files_of(sections, kind=4):
    listed = {"files": [f"f{i}" for i in range(len(sections))]}
    if kind == 5:
        listed = {"files": [], "code": listed["files"]}
    return made((1, index([unit()], **listed)), (3, VECTOR), *[(kind, s) for s in sections])


@pytest.mark.parametrize("kind", [4, 5])
@pytest.mark.parametrize("count", [2, 50])
def test_memory_of_all_files_together(kind, count):
    data = files_of([BOMB] * count, kind)
    tracemalloc.start()
    with pytest.raises(errors.CorruptError, match="more than"):
        export.directory_files(container.parse(data))
    assert tracemalloc.get_traced_memory()[1] < 4 * ((1 << 22) + 1024 * len(data))
    tracemalloc.stop()


def test_one_file_may_take_all_of_it():
    assert len(codefiles.files(container.parse(files_of([BOMB])), (container.FILE,))["f0"]) == 4 << 20


def test_code_of_lzma_counts_too():
    packed = b"\2" + lzma.compress(bytes(3 << 20), lzma.FORMAT_RAW, filters=codefiles._FILTERS)
    data = files_of([packed] * 2, 5)
    with pytest.raises(errors.CorruptError, match="is more than"):
        export.directory_files(container.parse(data))
    assert len(codefiles.files(container.parse(files_of([packed], 5)))["f0"]) == 3 << 20


def spelled(names_, count, block):
    head = bytes([2, 128, 0]) + leb(0) + leb(0) + leb(1) + leb(count) + leb(len(block) + 1) + b"\1" + block
    return head + b"\1" + brotli.compress(json.dumps(names_, ensure_ascii=False, separators=(",", ":")).encode())


LETTERS = [chr(0x4E00 + i) for i in range(4000)]
SPELLINGS = {
    "two letters": [spelled(["a", "b"], 300, bytes(40))],
    "many letters": [spelled(LETTERS, 8192, bytes(range(1, 255)))],
    "a great alphabet": [spelled([chr(0x20000 + i) for i in range(100_000)], 1, b"")],
    "many files": [spelled(["a", "b", "e"], 2, bytes([i, 7, 9])) for i in range(60)],
}


class Lines:
    """Lines of the spelling's code that run."""

    def __init__(self):
        self.count = 0

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.endswith("bpe_merges.py"):
            return None
        self.count += event == "line"
        return self


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPELLINGS)
def test_spelling_takes_so_many_steps_for_every_byte(kind):
    data = files_of(SPELLINGS[kind])
    contents, lines = container.parse(data), Lines()
    bpe_merges._curves()  # once for all
    before = sys.gettrace()
    sys.settrace(lines)
    try:
        side_files(contents)
    except errors.CorruptError:
        pass
    finally:
        sys.settrace(before)
    allowed = bpe_merges.Spelling.of(sum(len(f.data) for f in contents.files))
    most = 120 * allowed.decisions + allowed.squares // 8  # a decision runs some 60 lines, a letter of a long text few
    assert lines.count < most


@pytest.mark.slow
def test_decisions_are_counted_by_the_other_reader_too():
    for kind in ("many letters", "a great alphabet", "many files"):
        data = files_of(SPELLINGS[kind])
        assert outcomes(data)[2] == "CorruptError"
        with pytest.raises(errors.CorruptError, match=r"decisions|do not end|end too soon"):
            side_files(container.parse(data))


def test_decisions_run_out():
    block = bpe_merges.write(["a", "b"], [("a", "b")])
    with pytest.raises(errors.CorruptError, match="more decisions than so few bytes may ask for"):
        bpe_merges.read(block, ["a", "b"], 1, bpe_merges.Spelling(1 << 24, 10))


@pytest.mark.slow
def test_a_tokenizer_takes_a_share_of_its_allowance():
    """Sound files stay far below the bound."""
    from bytecap.model.checkpoint import demo_directory

    content = (demo_directory() / "tokenizer.json").read_bytes()
    packed = packing.pack("tokenizer.json", content)
    allowance = packing.Allowance.of([packed])
    before = allowance.spelling.decisions
    assert packing.unpack("t", packed, allowance=allowance) == content
    assert before - allowance.spelling.decisions < before / 3


def test_numbered_merges_of_nothing():
    block = b"\0\1" + brotli.compress(bytes(2 * (2 << 20)))
    data = bytes([2, 128, 0]) + leb(0) + leb(0) + leb(0) + leb(2 << 20) + leb(len(block)) + block + b'\0[""]'
    with pytest.raises(errors.CorruptError, match="more text than the limit"):
        packing.unpack("x", data)


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_memory_of_unpacking(dtype, tmp_path):
    """At most four bytes for every byte of decoded values, as SECURITY.md says: writing takes no copy."""
    count = 1 << 23
    path = tmp_path / "a.bcap"
    path.write_bytes(made((1, index([unit(shape=[2048, count >> 11], dtype=dtype)])), (3, VECTOR)))
    tracemalloc.start()
    export.unpack(path, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 4 * count
    width = 4 if dtype == "F32" else 2
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == 8 + header_size(tmp_path) + width * count


def header_size(tmp_path):
    with (tmp_path / "out" / "model.safetensors").open("rb") as f:
        return struct.unpack("<Q", f.read(8))[0]


# ------------------------------------------------------------------------------------------------------------ names

FAULTS = [
    "CON", "con.txt", "Aux.json", "nul", "COM1", "com\u00b9.x", "LPT9.json", "a:b", "a?", "a*", "<a", "a|b", 'a"',
    "a.", "a ",
    "a\x1b[2J", "a\nb", "a\x7f", "a\u202egpj.exe", "a\u2028b", "a\u200bb", "x" * 256, "é" * 128,
    "model.safetensors.index.json", "MODEL.SAFETENSORS.INDEX.JSON", "other.safetensors", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "adapter_config.json", "Adapter_Config.json", "x.pth", "consolidated.00.pth",
    "x.gguf",
    "tf_model.h5", "flax_model.msgpack",
]  # fmt: skip
FINE = [
    "config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "train_gpt.py",
    "kernel.cu", "x" * 255, "naïve.txt", "日本.json", "console.py", "com10.txt", "auxiliary", "a b.txt", "README",
]  # fmt: skip


@pytest.mark.parametrize("kind", [4, 5])
@pytest.mark.parametrize("name", FAULTS)
def test_names_that_no_file_may_have(name, kind, tmp_path):
    listed = {"files": [name]} if kind == 4 else {"files": [], "code": [name]}
    path = tmp_path / "a.bcap"
    path.write_bytes(made((1, index([unit()], **listed)), (3, VECTOR), (kind, b"\0x")))
    with pytest.raises(errors.ArtifactError, match="must not have the name"):
        export.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert decode_units(container.read(path))["w"].size == 1  # its tensors can be read


def test_names_that_files_may_have(tmp_path):
    path = tmp_path / "a.bcap"
    files = [n for n in FINE if n != "config.json"]
    path.write_bytes(made((1, index([unit()], files)), (3, VECTOR), *[(4, b"\0x")] * len(files)))
    export.unpack(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*files, "model.safetensors"])  # noqa: PTH208


@pytest.mark.parametrize("pair", [("a.txt", "A.txt"), ("Straße", "STRASSE"), ("\u00e9", "e\u0301"), ("ﬁ.x", "FI.x")])
def test_names_that_differ_in_case_alone(pair):
    with pytest.raises(errors.CorruptError, match="are one file where case does not count"):
        names.check(pair)
    names.check([pair[0]])


# --------------------------------------------------------------------------------------------------- check and unpack


def verdict(run, path, tmp_path):
    """Exit codes of `check` and `unpack`, and whether `load` and `unpack` in Python succeed."""
    shown = run("check", path)[0], run("unpack", path, "-o", tmp_path / "out")[0]
    try:
        decode_units(container.read(path))
        export.directory_files(container.read(path))
    except errors.ArtifactError:
        return (*shown, 2)
    return (*shown, 0)


CASES = {
    "sound": lambda: made((1, index([unit()], ["f"])), (3, VECTOR), (4, b"\0x")),
    "a damaged side file": lambda: made((1, index([unit()], ["f"])), (3, VECTOR), (4, b"\1x")),
    "a damaged code file": lambda: made((1, index([unit()], code=["f"])), (3, VECTOR), (5, b"\7x")),
    "a name": lambda: made((1, index([unit()], ["aux"])), (3, VECTOR), (4, b"\0x")),
    "names of one file": lambda: made((1, index([unit()], ["f", "F"])), (3, VECTOR), (4, b"\0x"), (4, b"\0x")),
    "a config": lambda: made((1, index([unit()], ["config.json"])), (3, VECTOR), (4, b"\0[]")),
    "a nested config": lambda: made((1, index([unit()], ["config.json"])), (3, VECTOR), (4, b"\0" + b"[" * 99_999)),
    "the header's own name": lambda: made((1, index([unit("__metadata__")])), (3, VECTOR)),
    "bombs": lambda: files_of([BOMB] * 3),
    "an unknown dtype": lambda: made((1, index([unit(dtype="F8_E4M3")])), (3, VECTOR)),
    "an integer dtype of real values": lambda: made((1, index([unit(dtype="I64")])), (3, VECTOR)),
    "work": lambda: stacked([4096, 4096], [(35, low_rank(4096, 4096, 255))]),
}


@pytest.mark.parametrize("case", CASES)
def test_sound_is_what_can_be_unpacked(case, run, tmp_path):
    path = tmp_path / "a.bcap"
    path.write_bytes(CASES[case]())
    found = verdict(run, path, tmp_path)
    assert len(set(found)) == 1, found
    assert (found[0] == 0) == (case in {"sound", "an unknown dtype", "an integer dtype of real values"})
    if found[0] == 0:
        from safetensors.numpy import load_file

        assert load_file(tmp_path / "out" / "model.safetensors")["w"].shape == (1,)
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mutations_are_judged_alike():
    """`check` opens what `unpack` writes: whatever the file, they agree by construction, and nothing else is raised."""
    rng, sound = random.Random(3), fuzz.sound()  # noqa: S311 (no secret)
    for _ in range(300):
        data = fuzz.mutate(rng.choice(sound), rng, sound, "repaired")
        try:
            export.directory_files(container.parse(data))
        except errors.ArtifactError:
            continue
