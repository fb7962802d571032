"""Shared objects: round trips, what they cost, who uses them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import bytecap
import golden_codebooks
import golden_shared
from bytecap import reference
from bytecap.format import container
from bytecap.format.coders import Objects
from bytecap.format.coders.codebook import CODER as CODEBOOK
from bytecap.format.coders.codebook import Codebook, published_bits
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.container import Contents, UnitSection
from bytecap.format.decoder import decode_units
from bytecap.format.entropy.frequencies import integer_frequencies
from bytecap.format.ledger import by_unit, total
from bytecap.format.overlays.channels import BOTH
from bytecap.format.overlays.channels import CODER as CHANNELS
from bytecap.format.overlays.lowrank import CODED
from bytecap.format.overlays.lowrank import CODER as LOWRANK
from bytecap.format.wire.indices import SharedTable, by_use
from bytecap.format.wire.shared_objects import (
    describe,
    load_objects,
    share_lists,
    write_codebook,
    write_list,
    write_table,
)
from bytecap.methods.baselines import kmeans, shared_codewords
from bytecap.methods.baselines.sampled_curves import Material
from bytecap.pipeline import stages as pipeline
from bytecap.quantization.overlays import Problem
from bytecap.quantization.overlays.lowrank import PATH, Rank
from bytecap.types import Unit
from golden_parts import unit

SHAPE = (40, 24)
SMALL = {"tokens": 256, "evaluation_tokens": 128, "window": 32}


def material(name="w", rows=48, cols=48, seed=0, spread=1.0):
    weight = spread * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return Material(Unit(name, (rows, cols), "F32", linear=True), weight, 0.5, torch.ones(cols), torch.ones(rows))


def both(contents):
    """Values by both decoders, which must agree."""
    data = container.serialize(contents)
    ours, theirs = decode_units(container.parse(data)), reference.decode_file(data)
    assert {n: v.tobytes() for n, v in ours.items()} == {n: v.tobytes() for n, v in theirs.items()}
    assert total(container.ledger(contents)) == len(data)
    return ours, data


def file(sections, shape=SHAPE, objects=()):
    units = tuple(UnitSection(Unit(f"u{i}", shape, "F32"), 6, data) for i, data in enumerate(sections))
    return Contents(units, b"", (), {}, objects=tuple(objects))


def test_a_shared_codebook_gives_the_values_of_own_ones_for_fewer_bytes():
    books = [golden_codebooks.book(SHAPE, 40, 2, seed=s) for s in range(6)]
    words = books[0].words
    own = [CODEBOOK.encode(Codebook(words, b.indices), SHAPE, coded=False) for b in books]
    common = [CODEBOOK.encode_shared(b.indices, words.shape, 0, 1.0, coded=False) for b in books]
    first, large = both(file(own))
    second, small = both(file(common, objects=[write_codebook(words, byte=False)]))
    assert all(first[n].tobytes() == second[n].tobytes() for n in first)
    book = 2 * words.size
    assert 5 * book - 64 < len(large) - len(small) < 5 * book
    assert total(e for e in container.ledger(container.parse(small)) if e.unit == "(shared) codebook 0") == 4 + book
    assert (large[9], small[9]) == (1, 2)


def test_the_ledger_owns_every_shared_byte():
    for _, data in golden_shared.valid():
        contents = container.parse(data)
        lines = {line.unit: line.bytes for line in by_unit(container.ledger(contents))}
        for number, section in enumerate(contents.objects):
            assert lines[f"(shared) {describe(section)[0]} {number}"] == len(section)
        assert data[9] == 2


def test_a_shared_table_is_taken_where_it_is_smaller():
    books = [golden_codebooks.book((60, 60), 40, 2, seed=s) for s in range(4)]
    order, _ = by_use(np.concatenate([b.indices for b in books]), 40)
    place = np.argsort(order)
    found = [place[b.indices] for b in books]
    freq = integer_frequencies(np.append(np.bincount(np.concatenate(found).reshape(-1), minlength=40), 0.0))
    table = SharedTable(1, freq, 0)
    objects = [write_codebook(books[0].words[order], byte=True), write_table(freq)]
    own = [CODEBOOK.encode_shared(i, (40, 2), 0, 1.0) for i in found]
    common = [CODEBOOK.encode_shared(i, (40, 2), 0, 1.0, table=table) for i in found]
    assert all(len(c) < len(o) for c, o in zip(common, own, strict=True))
    first, _ = both(file(own, (60, 60), objects[:1]))
    second, _ = both(file(common, (60, 60), objects))
    assert all(first[n].tobytes() == second[n].tobytes() for n in first)


def test_rows_of_one_tensor_and_columns_of_its_partner_share_a_list():
    few = np.flatnonzero(np.random.default_rng(0).random(96) < 0.2)
    k, make = len(few), lambda n: np.ones(n, np.float16)
    stacks = {
        f"t{i}": ((96, 96), STACK.encode((2, golden_shared.constant(1.0)[1]), [(37, CHANNELS.encode(
            BOTH, few, make(k * (96 - k) + k * 96), (96, 96)))])) for i in range(4)
    }  # fmt: skip
    changed, objects = share_lists(stacks)
    assert objects == (write_list(few, 96),)
    assert load_objects(objects).get(0, "list")[1].tolist() == few.tolist()
    units = {False: stacks, True: {n: ((96, 96), d) for n, d in changed.items()}}
    files = [
        Contents(tuple(unit(n, s, 5, d) for n, (s, d) in found.items()), b"", (), {}, objects=objects if share else ())
        for share, found in units.items()
    ]
    (first, large), (second, small) = map(both, files)
    assert all(first[n].tobytes() == second[n].tobytes() for n in first)
    assert len(small) < len(large)
    assert share_lists(dict(list(stacks.items())[:1])) == ({"t0": stacks["t0"][1]}, ())


def test_an_object_is_refused_where_no_unit_uses_it():
    objects = Objects((("list", None), ("table", None)))
    objects.get(1, "table")
    with pytest.raises(bytecap.errors.CorruptError, match="no unit uses the shared object 0"):
        objects.check_used()


def test_coded_factors_of_a_low_rank_are_smaller_and_come_back():
    r = np.random.default_rng(1)
    left, right = (np.clip(np.round(r.normal(0, 0.6, (2, n))), -7, 7).astype(int) for n in (300, 1500))
    data = LOWRANK.encode(left, right, np.ones(2, np.float32), 4)
    assert data[2] == CODED
    assert len(data) < 0.6 * (3 + 8 + 2 * 1800 * 4 / 8)
    contents = Contents(
        (unit("a", (300, 1500), 5, STACK.encode(golden_shared.constant(0.0), [(35, data)])),), b"", (), {}
    )
    values, stored = both(contents)
    np.testing.assert_array_equal(values["a"], (left.T @ right).astype(np.float32))
    assert stored[9] == 2


def test_coded_factors_fill_the_ladder_between_plain_ones():
    m = material(rows=160, cols=160)
    problem = Problem(m.unit, m.weight, torch.eye(160).double(), torch.ones(160).double())
    settings = [Rank(8, 3, coded=True), Rank(8, 4), Rank(8, 4, coded=True), Rank(8, 5, coded=True), Rank(8, 6)]
    assert set(settings) <= set(PATH.settings(problem))
    found = [PATH.after(problem, torch.zeros(160, 160), s) for s in settings]
    sizes, errors = [len(f.data) for f in found], [problem.distortion(f.values) for f in found]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert found[0].data[2] == CODED


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [False, True])
def test_a_system_decodes_as_it_promises(decoder):
    from bytecap.methods.baselines import cluscomp, reallm
    from bytecap.methods.baselines.sampled_curves import option

    materials = [material("a", seed=1), material("b", 96, 24, seed=2, spread=0.01)]
    make = shared_codewords.autoencoder if decoder else shared_codewords.book
    system = make(materials, 64, 2, byte=True, seed=0)
    assert load_objects(system.objects()).items[0][1].tobytes() == system.words.numpy().tobytes()
    family = reallm.ReALLM(option({}, reallm.OPTIONS, "reallm"), 0, system=system)
    setting = reallm.pack_setting(float(shared_codewords.BASE + 1), 1, decoder=False)
    plain = cluscomp.ClusComp(option({}, cluscomp.OPTIONS, "cluscomp"), 0, system=system)
    cases = [(family, setting)] if decoder else [(family, setting), (plain, shared_codewords.BASE + 1.0)]
    for family, number in cases:
        found = {m.unit.name: family.encode(m, number) for m in materials}
        sections = {m.unit.name: family.section(m, found[m.unit.name].kept) for m in materials}
        units = tuple(UnitSection(m.unit, sections[m.unit.name].tag, sections[m.unit.name].data) for m in materials)
        values, _ = both(Contents(units, b"", (), {}, objects=system.objects()))
        for m in materials:
            one = found[m.unit.name]
            assert m.distortion(torch.from_numpy(values[m.unit.name])) == pytest.approx(one.distortion, rel=1e-3)
            assert abs(len(sections[m.unit.name].data) - one.size) <= 24
            assert one.distortion < 0.2 * m.distortion(torch.zeros_like(m.weight))


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("method", ["cluscomp", "reallm"])
def test_what_is_shared_is_charged_and_both_accountings_work(model_directory, texts, method, monkeypatch):
    def solve(_plain, systems, curves, _room):
        return systems[-1], curves(systems[-1]), [1.0] + [0.9] * len(systems)

    monkeypatch.setattr(shared_codewords, "solve", solve)
    monkeypatch.setattr(shared_codewords, "_EPOCHS", 10)
    monkeypatch.setattr(shared_codewords, "_MOST", 128)
    for accounting in ("published", "coded"):
        result = bytecap.fit(
            model_directory("rotary"), 32_000, calibration=texts["calib"], evaluation=texts["val"], method=method,
            options={"accounting": accounting, "recover": 2}, **SMALL,
        )  # fmt: skip
        assert len(result.data) <= 32_000
        assert result.contents.objects
        assert sum(e.bytes for e in result.ledger()) == len(result.data)
        theirs = reference.decode_file(result.data)
        assert all(theirs[n].tobytes() == v.tobytes() for n, v in result.tensors().items())


@pytest.mark.parametrize(("n", "g"), [(16, 1), (64, 2), (256, 4)])
def test_published_packing_is_its_formula_within_eight_bytes_a_tensor(n, g):
    for m in (material(rows=64, cols=64), material(rows=30, cols=100, seed=3)):
        words, index = kmeans.quantize(kmeans.vectors_of(m.weight, g), n, torch.Generator().manual_seed(0))
        shape = m.unit.matrix_shape
        own = CODEBOOK.encode(Codebook(words.numpy(), index.numpy()), shape, coded=False)
        assert 0 <= len(own) - published_bits(shape, n, g) / 8 <= 8
        common = CODEBOOK.encode_shared(index.numpy(), (n, g), 0, 1.0, coded=False)
        assert 0 <= len(common) - (published_bits(shape, n, g) - 16 * n * g) / 8 <= 8


def test_the_pipeline_shares_lists_of_any_method():
    from bytecap.job import Outcome, Section

    few = np.flatnonzero(np.random.default_rng(0).random(200) < 0.3)
    layer = (32, bytecap.format.overlays.columns.CODER.encode(few, np.ones((len(few), 2), np.float16), 200))
    data = STACK.encode(golden_shared.constant(1.0), [layer])
    units = [Unit(n, (2, 200), "F32") for n in "abcd"]
    model = replace_units(units)
    outcome = Outcome({u.name: Section(5, data) for u in units}, b"", 0.0, 0.0, 0.0, "x")
    shorter = pipeline._with_lists(outcome, model)
    assert len(shorter.objects) == 1
    assert all(len(s.data) < len(data) for s in shorter.sections.values())
    assert pipeline._with_lists(replace(outcome, sections={"a": Section(5, data)}), model).objects == ()


def replace_units(units):
    class Model:
        pass

    model = Model()
    model.units = units
    return model


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "bound"), [("cluscomp", 0.53), ("reallm", 0.53)])
def test_the_embedded_model_at_600_kilobytes(method, bound):
    result = bytecap.fit("demo", 600_000, method=method, tokens=4096)
    assert 0.99 * 600_000 < len(result.data) <= 600_000
    assert result.report["kl_nats"] < bound
    assert method != "cluscomp" or result.contents.objects
