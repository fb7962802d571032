"""`check` calls a file sound exactly when `unpack` and `load` take it, updates on their bases included."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

import bytecap
import fuzz
import golden_updates
from bytecap import errors
from bytecap.cli.check import check
from bytecap.cli.ledger import ledger
from bytecap.cli.unpack import unpack
from bytecap.format import container
from bytecap.runtimes import hub
from conftest import SMALL

pytestmark = pytest.mark.slow
ALL = golden_updates.updates()
GOLDEN = {name: u for name, u in ALL.items() if u.error is None}
FILES = golden_updates.whole() | {name: u.data for name, u in GOLDEN.items()}


class Verdicts:
    """Outcome of a file on its bases for every reader."""

    def __init__(self, capsys, place):
        self.capsys, self.place = capsys, place

    def said(self, call):
        """The result or output of a call; None where it refuses, in a line."""
        error, found = "", None
        try:
            found = call()
        except errors.BytecapError as exc:
            error = str(exc)
        assert "\n" not in error
        if error:
            return None
        out = self.capsys.readouterr().out
        return found if found is not None else json.loads(out)

    def hold(self, path, bases=()):
        """Hold them against each other; returns whether the file is sound."""
        out, source, bases = self.place / "out", self.place / "source", list(bases)
        checked = self.said(lambda: check(path, bases, as_json=True))
        values = self.said(lambda: bytecap.load(path, base=bases))
        listed = self.said(lambda: ledger(path, bases, as_json=True))
        alone = self.said(lambda: ledger(path, None, as_json=True))
        written = self.said(lambda: unpack(path, out, "float32", bases, as_json=True))
        as_source = self.said(lambda: unpack(path, source, "source", bases, as_json=True))
        try:
            assert (checked is not None) == (written is not None) == (as_source is not None)
            assert checked is None or values is not None
            assert out.exists() == (written is not None)
            if checked is not None:
                stored = load_file(out / "model.safetensors")
                assert all(v.tobytes() == values[n].tobytes() for n, v in stored.items())
                assert sum(np.prod(v.shape, dtype=int) for v in stored.values()) == checked["parameters"]
                assert listed["file_bytes"] == checked["file_bytes"] == sum(e["bytes"] for e in listed["entries"])
            assert listed is None or listed == alone  # the base changes nothing in it
            return checked is not None
        finally:
            for made in (out, source):
                shutil.rmtree(made, ignore_errors=True)

    def hold_bytes(self, data, bases=()):
        """Do the same for bytes."""
        paths = [self.place / "a.bcap", *(self.place / f"base{i}.bcap" for i in range(len(bases)))]
        for path, content in zip(paths, (data, *bases), strict=True):
            path.write_bytes(content)
        return self.hold(paths[0], paths[1:])


@pytest.fixture
def verdicts(capsys, tmp_path):
    return Verdicts(capsys, tmp_path)


def damaged(data, rng, others, count):
    """Cut, lengthened, with flipped bits, and with other contents under good checksums."""
    for size in (0, 7, 20, len(data) // 2, len(data) - 1):
        yield data[:size]
    yield data + b"\0"
    for _ in range(count):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(changed)
        yield fuzz.mutate(data, rng, others, "repaired")


@pytest.mark.parametrize("name", ALL)
def test_golden_updates(verdicts, name):
    data, bases, error = ALL[name]
    stored = FILES | {"cut": golden_updates.sealed(golden_updates.base()[:-1])}
    sound = verdicts.hold_bytes(data, [stored[b] for b in bases])
    assert not (sound and error)


@pytest.mark.parametrize("count", [3, pytest.param(150, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", [*GOLDEN, "base"])
def test_damaged_updates(verdicts, name, count):
    rng = random.Random(f"{name} {count}")  # noqa: S311 (no secret)
    bases = [FILES[b] for b in GOLDEN[name].bases] if name in GOLDEN else []
    for data in damaged(FILES[name], rng, list(FILES.values()), count):
        verdicts.hold_bytes(data, bases)


@pytest.mark.parametrize("count", [3, pytest.param(150, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", ["all", "second"])
def test_damaged_bases(verdicts, name, count):
    """The base that an update names is another version of the file: cut, changed, or sound and different."""
    rng = random.Random(f"{name} {count}")  # noqa: S311 (no secret)
    first, *rest = (FILES[b] for b in GOLDEN[name].bases)
    for data in damaged(first, rng, list(FILES.values()), count):
        assert data == first or not verdicts.hold_bytes(FILES[name], [data, *rest])
        contents = container.parse(FILES[name])
        moved = replace(contents, base=replace(contents.base, sha256=golden_updates.sha256(data)))
        verdicts.hold_bytes(container.serialize(moved), [data, *rest])


@pytest.mark.parametrize("name", GOLDEN)
def test_other_bases(verdicts, name):
    """None, one too few or too many, the wrong ones, the file itself, and the right ones in any order."""
    bases = [FILES[b] for b in GOLDEN[name].bases]
    whole = verdicts.hold_bytes(FILES[name], bases)
    assert verdicts.hold_bytes(FILES[name], bases[::-1]) == whole
    assert verdicts.hold_bytes(FILES[name], [*bases, bases[0]]) == whole  # one given twice is one
    for others in ([], bases[1:], [*bases, FILES["other"]], [FILES["other"]], [FILES[name]], [*bases, FILES[name]]):
        assert not verdicts.hold_bytes(FILES[name], others)


@pytest.mark.parametrize("place", ["side file", "code", "source", "config", "name", "unused"])
def test_what_lies_beside_units(verdicts, place):
    """Damage that no decoded value shows."""
    contents = container.parse(FILES["all"])
    section = {
        "side file": replace(golden_updates.stored("tokenizer.json", b"x"), data=b"\1rubbish"),
        "code": replace(golden_updates.stored("x.py", b"x", container.CODE), data=b"\2rubbish"),
        "source": golden_updates.stored("source_tensors.json", b'{"x": {"unit": "none"}}'),
        "config": golden_updates.stored("config.json", b"["),
        "name": golden_updates.stored("NEW.json", b"{}"),
        "unused": golden_updates.stored("model.safetensors", b""),
    }[place]
    kept = tuple(f for f in contents.files if f.name != section.name)
    data = container.serialize(replace(contents, files=(*kept, section)))
    assert not verdicts.hold_bytes(data, [FILES["base"]])


@pytest.fixture(scope="module")
def real(model_directory, texts, tmp_path_factory):
    """A fitted base and an update of it."""
    place = tmp_path_factory.mktemp("real")
    options = {"calibration": texts["calib"], "evaluation": texts["val"], **SMALL}
    bytecap.fit(model_directory("rotary"), 21_000, output=place / "base.bcap", **options)
    changed = place / "changed"
    shutil.copytree(model_directory("rotary"), changed)
    spoil(changed / "model.safetensors")
    bytecap.fit(changed, 9_000, base=place / "base.bcap", output=place / "update.bcap", **options)
    return (place / "update.bcap").read_bytes(), (place / "base.bcap").read_bytes()


def spoil(path):
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    torch.manual_seed(0)
    save({n: t + 0.01 * torch.randn_like(t) for n, t in load(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_real_update(verdicts, real, count):
    rng, (update, base) = random.Random(count), real  # noqa: S311 (no secret)
    assert verdicts.hold_bytes(update, [base])
    assert not verdicts.hold_bytes(update)
    assert not verdicts.hold_bytes(base, [update])
    for data in damaged(update, rng, [base], count):
        assert data == update or not verdicts.hold_bytes(data, [base]) or data[:8] == update[:8]
    for data in damaged(base, rng, [update], count // 2):
        assert data == base or not verdicts.hold_bytes(update, [data])


CHANGES = (lambda d: d[: len(d) // 2], lambda _: b"", lambda d: d + b"x", lambda _: b"[]")


def test_hub_directories(run, tmp_path, model_directory, texts):
    """The verdict of `check` on a directory holds for `unpack` and `load` of it, whole and damaged."""
    options = {"calibration": texts["calib"], "evaluation": texts["val"], **SMALL}
    source = tmp_path / "hub"
    bytecap.fit(model_directory("rotary"), 60_000, layout="hub", method="uniform", output=source, **options)
    for name in (None, *sorted(p.name for p in source.iterdir())):
        for change in CHANGES[: None if name else 1]:
            place = tmp_path / "w"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(source, place)
            if name:
                (place / name).write_bytes(change((place / name).read_bytes()))
            checked = run("check", place)[0] == 0
            written = run("unpack", place, "-o", tmp_path / "out")[0] == 0
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            assert checked == written, name
            try:
                loaded = bool(bytecap.load(place / hub.FILE))
            except errors.BytecapError:
                loaded = False
            assert loaded or not checked, name
            assert checked or name
