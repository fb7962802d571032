"""Methods cluscomp and reallm: the cap, refusals, recovery."""

import numpy as np
import pytest
import torch

import bytecap
from bytecap import reference
from bytecap.errors import BudgetError, UsageError
from bytecap.methods.baselines import cluscomp, reallm, shared_codewords
from bytecap.methods.baselines.sampled_curves import Material, option
from bytecap.recovery.blocks import Part, blocks
from bytecap.types import Unit

BUDGET = 20_000
SMALL = {"tokens": 256, "evaluation_tokens": 128, "window": 32}


def material(rows=24, cols=40, seed=0):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return Material(Unit("w", (rows, cols), "F32", linear=True), weight, 0.5, torch.ones(cols), torch.ones(rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accounting", "method"),
    [
        pytest.param("published", "cluscomp", marks=pytest.mark.numeric), ("published", "reallm"),
        pytest.param("coded", "reallm", marks=pytest.mark.numeric), ("coded", "cluscomp"),
    ],
)  # fmt: skip
def test_the_cap_is_met_and_both_decoders_agree(model_directory, texts, method, accounting, monkeypatch):
    monkeypatch.setattr(shared_codewords, "_EPOCHS", 10)
    monkeypatch.setattr(shared_codewords, "_MOST", 128)
    options = {"accounting": accounting, "recover": 3}
    result = bytecap.fit(
        model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"], method=method,
        options=options, **SMALL,
    )  # fmt: skip
    assert 0.8 * BUDGET < len(result.data) <= BUDGET
    assert np.isfinite(result.report["predicted_delta_nats"])
    tag = 6 if method == "cluscomp" else 7
    assert tag in {u.tag for u in result.contents.units}
    assert sum(e.bytes for e in result.ledger()) == len(result.data)
    theirs = reference.decode_file(result.data)
    assert all(theirs[n].tobytes() == v.tobytes() for n, v in result.tensors().items())


@pytest.mark.parametrize("method", ["cluscomp", "reallm"])
def test_a_hopeless_budget_names_its_floor(model_directory, texts, method):
    given = {"calibration": texts["calib"], "evaluation": texts["val"], "method": method, **SMALL}
    with pytest.raises(BudgetError, match=f"that {method} reaches") as caught:
        bytecap.fit(model_directory("rotary"), 6_000, options={"n": 256, "g": 1}, **given)
    assert caught.value.floor > 6_000


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("cluscomp", {"n": 65536, "g": 4}, "larger than its tensor"),
        ("cluscomp", {"n": 70_000, "g": 1}, "1 to 65536 codewords"),
        ("cluscomp", {"n": 4, "g": 17}, "not 4 of 17"),
        ("reallm", {"n": 65536, "g": 4}, "larger than its tensor"),
        ("reallm", {"rank": 5000}, "rank 5000 is above the dimension"),
        ("reallm", {"rank": -1}, "rank -1"),
        ("cluscomp", {"accounting": "ideal"}, "published or coded, not 'ideal'"),
        ("cluscomp", {"rank": 1}, "no option 'rank'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(model_directory, texts, method, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        bytecap.fit(
            model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"], method=method,
            options=options, **SMALL,
        )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [0.5, 2.0, 4.0, 12.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (24, 40), (64, 128)])
def test_codebooks_are_never_chosen_larger_than_their_tensor(rate, shape):
    m = material(*shape)
    for s in cluscomp.settings(m, rate, option({}, cluscomp.OPTIONS, "cluscomp")):
        cluscomp.check(m, s.n, s.g)
    if min(shape) > 1:
        family = reallm.ReALLM(option({}, reallm.OPTIONS, "reallm"), 0)
        for p in family.curve(m, rate).points:
            s, rank, _ = reallm.unpack_setting(p.setting)
            cluscomp.check(m, s.n, s.g)
            reallm.check_rank(m, rank)


def test_settings_survive_their_number():
    for s in (cluscomp.CodebookSetting(1, 1), cluscomp.CodebookSetting(65536, 16), cluscomp.CodebookSetting(37, 3)):
        assert cluscomp.CodebookSetting.of(s.number) == s
        for rank, decoder in ((0, False), (512, True)):
            assert reallm.unpack_setting(reallm.pack_setting(s.number, rank, decoder=decoder)) == (s, rank, decoder)


@pytest.mark.numeric
@pytest.mark.parametrize("accounting", ["published", "coded"])
def test_predicted_sizes_and_distortions_are_those_of_the_section(accounting):
    from bytecap.format.coders import Shared, coder, run

    m = material(64, 48)
    plain = cluscomp.ClusComp(option({"accounting": accounting}, cluscomp.OPTIONS, "cluscomp"), 0)
    latent = reallm.ReALLM(option({"accounting": accounting}, reallm.OPTIONS, "reallm"), 0)
    number = cluscomp.CodebookSetting(64, 2).number
    cases = [(plain, number)]
    cases += [(latent, reallm.pack_setting(number, r, decoder=d)) for r in (0, 2) for d in (False, True)]
    for family, setting in cases:
        found = family.encode(m, setting)
        section = family.section(m, found.kept)
        assert abs(len(section.data) - found.size) <= 16
        values = run([coder(section.tag).decode(section.data, (64, 48), "F32", Shared())])[0]
        assert m.distortion(torch.from_numpy(values)) == pytest.approx(found.distortion, rel=1e-4)


@pytest.mark.numeric
def test_a_trained_decoder_is_no_worse_than_none():
    m = material(64, 64)
    m = Material(m.unit, m.weight + m.weight.roll(1, 1), m.price, m.columns, m.rows)  # neighbours that depend
    family = reallm.ReALLM(option({}, reallm.OPTIONS, "reallm"), 0)
    number = cluscomp.CodebookSetting(16, 2).number
    plain, decoded = (family.encode(m, reallm.pack_setting(number, 0, decoder=d)) for d in (False, True))
    assert decoded.distortion < plain.distortion


def test_blocks_are_the_list_with_most_weights():
    inner = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    module = torch.nn.ModuleDict({"few": torch.nn.ModuleList([torch.nn.Linear(2, 2)]), "many": inner})
    names = ["few.0.weight", *(f"many.{i}.weight" for i in range(3))]
    assert [n for n, _ in blocks(module, names)] == ["many.0.", "many.1.", "many.2."]
    assert blocks(torch.nn.Linear(2, 2), ["weight"]) == []


def test_a_part_gives_its_weight_in_stored_layout():
    matrix = torch.arange(6.0).reshape(2, 3)
    part = Part(Unit("w", (3, 2), "F32", transposed=True), [], lambda: matrix)
    assert torch.equal(part.stored(), matrix.T)


@pytest.mark.numeric
@pytest.mark.slow
def test_recovery_brings_block_outputs_closer(model_directory, texts):
    given = {"calibration": texts["calib"], "evaluation": texts["val"], "method": "cluscomp", **SMALL}
    found = [
        bytecap.fit(model_directory("rotary"), 12_000, options={"recover": steps, "g": 1}, **given) for steps in (0, 20)
    ]
    assert len(found[0].data) == pytest.approx(len(found[1].data), abs=64)  # checksums apart, codes do not change
    assert any(not np.array_equal(v, found[1].tensors()[n]) for n, v in found[0].tensors().items())


@pytest.mark.numeric
@pytest.mark.nightly
@pytest.mark.parametrize("method", ["cluscomp", "reallm"])
def test_the_embedded_model(method):
    result = bytecap.fit("demo", 600_000, method=method, tokens=4096, evaluation_tokens=2048)
    assert 0.99 * 600_000 < len(result.data) <= 600_000
    assert result.report["kl_nats"] < 0.8
