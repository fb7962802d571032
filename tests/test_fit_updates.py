"""`fit --base`: the difference to a file that the receiver has, under the cap, and all commands that read it."""

import hashlib
import json

import numpy as np
import pytest
import torch

import bytecap
from bytecap import errors, reference
from bytecap.allocation import differences
from bytecap.format import container, ledger, updates
from bytecap.format.coders.grid import CODER as GRID
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.decoder import decode_units
from bytecap.methods.rate_control import allowed_slack
from conftest import SMALL, build, save

pytestmark = pytest.mark.slow
UPDATE = 3_000


@pytest.fixture(scope="module")
def tuned(once, tokenizer_json):
    """Directory of the tiny model with every tensor moved a little, as fine-tuning moves it."""

    def make(directory):
        module, noise = build("rotary", dtype=torch.float32), torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in module.parameters():
                size = 0.3 * p.abs().mean() if p.ndim < 2 else 0.3 * p.std()
                p.add_(size * torch.randn(p.shape, generator=noise) * (torch.rand(p.shape, generator=noise) < 0.1))
        return save(module.to(torch.bfloat16), directory / "tuned", tokenizer_json)

    return once(("tuned",), make)


@pytest.fixture(scope="module")
def base(fitted):
    """Path of the file that the receiver has."""
    return fitted("rotary")[1]


@pytest.fixture(scope="module")
def updated(once, tuned, base, texts):
    """(artifact, path) of an update."""

    def make(directory):
        path = directory / "update.bcap"
        result = bytecap.fit(
            tuned, UPDATE, base=base, calibration=texts["calib"], evaluation=texts["val"], output=path, **SMALL
        )  # fmt: skip
        return result, path

    return once(("updated",), make)


def test_the_file_meets_the_cap_and_names_its_base(updated, base):
    result, path = updated
    assert path.read_bytes() == result.data
    assert UPDATE - allowed_slack(UPDATE) <= len(result.data) <= UPDATE
    sha256 = hashlib.sha256(base.read_bytes()).hexdigest()
    contents = container.read(path)
    assert contents.base.sha256 == sha256
    assert not contents.files, "side files equal to the base's are not stored"
    assert result.report["base"] == {"file": str(base), "sha256": sha256, "changed_units": len(contents.units)}
    assert ledger.total(result.ledger()) == len(result.data)


def test_what_is_read_back_is_what_was_scored_in_both_decoders(updated, base):
    result, path = updated
    loaded, second = bytecap.load(path, base), reference.decode_file(path.read_bytes(), [base.read_bytes()])
    assert list(loaded) == list(result.tensors()) == list(second)
    for name, values in loaded.items():
        np.testing.assert_array_equal(values, result.tensors()[name])
        np.testing.assert_array_equal(values, second[name])
    live = bytecap.load_model(path, base).state_dict()
    for name, tensor in result.load_model().state_dict().items():
        assert torch.equal(tensor, live[name])


def test_it_is_nearer_to_the_model_than_its_base_is(updated, tuned, base, texts):
    from bytecap.model.checkpoint import load_checkpoint
    from bytecap.model.evaluation import kl_to
    from bytecap.model.quantized_copy import copy_of, load_values
    from bytecap.model.sources import load_sets
    from bytecap.progress import Silent

    model = load_checkpoint(tuned)
    sets = load_sets(model, [texts["calib"]], [texts["val"]], reporter=Silent(), **SMALL)
    copy = copy_of(model.module)
    load_values(copy, decode_units(container.read(base), aliases=False))
    before = kl_to(model.module, copy, sets.evaluation[0].windows, device="cpu")[0]
    assert updated[0].report["kl_nats"] < 0.7 * before


def test_an_update_of_few_bits_is_rounded_by_descent(tuned, base, texts, monkeypatch):
    monkeypatch.setattr(differences, "_SPARSE", 100.0)  # the tiny model has too few weights for an update of few bits
    monkeypatch.setattr(differences, "_FEW", 100.0)
    result = bytecap.fit(tuned, UPDATE, base=base, calibration=texts["calib"], evaluation=texts["val"], **SMALL)
    assert UPDATE - allowed_slack(UPDATE) <= len(result.data) <= UPDATE
    layers = [STACK.parts(u.data)[1] for u in result.contents.units if len(u.unit.shape) > 1]
    assert {layer[2][0] for layer in layers} == {GRID.tag}, "no column is dependent"
    second = reference.decode_file(result.data, [base.read_bytes()])
    for name, values in result.tensors().items():
        np.testing.assert_array_equal(values, second[name])


def test_a_model_that_the_base_holds_exactly_costs_its_frame(model_directory, tmp_path, texts):
    directory = model_directory("rotary")
    whole, update = tmp_path / "whole.bcap", tmp_path / "update.bcap"
    kept = {"calibration": texts["calib"], "evaluation": texts["val"], **SMALL}
    assert bytecap.fit(directory, "16bpp", output=whole, **kept).report["lossless"]
    result = bytecap.fit(directory, UPDATE, base=whole, output=update, **kept)
    assert result.report["lossless"]
    assert len(result.data) < 200
    assert not container.read(update).units
    assert {n: v.tobytes() for n, v in bytecap.load(update, whole).items()} == {
        n: v.tobytes() for n, v in bytecap.load(whole).items()
    }


def test_units_that_did_not_change_cost_nothing_on_a_lossless_base(model_directory, tokenizer_json, tmp_path, texts):
    module = build("rotary")
    whole, update = tmp_path / "whole.bcap", tmp_path / "update.bcap"
    kept = {"calibration": texts["calib"], "evaluation": texts["val"], **SMALL}
    bytecap.fit(model_directory("rotary"), "16bpp", output=whole, **kept)
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        module.get_parameter(name).mul_(1.25)
    changed = save(module.to(torch.bfloat16), tmp_path / "changed", tokenizer_json)
    result = bytecap.fit(changed, 900, base=whole, output=update, **kept)
    assert [u.unit.name for u in container.read(update).units] == [name]
    assert not result.report["lossless"]
    bytecap.fit(changed, 20_000, base=whole, output=update, **kept)
    assert [u.unit.name for u in container.read(update).units] == [name], "and without any loss"
    np.testing.assert_array_equal(bytecap.load(update, whole)[name], module.get_parameter(name).detach().float())


def test_an_update_of_an_update(updated, base, tuned, model_directory, tmp_path, texts):
    path, kept = tmp_path / "back.bcap", {"calibration": texts["calib"], "evaluation": texts["val"], **SMALL}
    result = bytecap.fit(model_directory("rotary"), 4_000, base=[base, updated[1]], output=path, **kept)
    assert container.read(path).base.sha256 == hashlib.sha256(updated[0].data).hexdigest()
    found = bytecap.load(path, [updated[1], base])
    for name, values in result.tensors().items():
        np.testing.assert_array_equal(values, found[name])
    with pytest.raises(errors.BaseError, match="is an update of"):
        bytecap.fit(tuned, UPDATE, base=updated[1], **kept)


def test_the_commands_take_the_base(updated, base, run, refused, tmp_path, texts):
    path = updated[1]
    sha256 = hashlib.sha256(base.read_bytes()).hexdigest()
    for command in (("check",), ("unpack", "-o", tmp_path / "no"), ("generate", "-p", "a"), ("eval",)):
        line = refused(command[0], path, *command[1:])
        assert f"SHA-256 {sha256}" in line
        assert "--base" in line
    assert not (tmp_path / "no").exists()
    code, out, _ = run("check", path, "--base", base, "--json")
    assert (code, json.loads(out)["units"]) == (0, len(updates.units_of(container.read(base))))
    code, out, _ = run("ledger", path, "--json")
    assert (code, json.loads(out)["file_bytes"]) == (0, path.stat().st_size)
    assert run("ledger", path, "--base", base)[0] == 0
    assert run("unpack", path, "--base", base, "-o", tmp_path / "out", "--dtype", "float32")[0] == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    code, out, _ = run("eval", path, "--base", base, "--text", texts["val"], "--window", 64, "--json")
    again = json.loads(run("eval", tmp_path / "out", "--text", texts["val"], "--window", 64, "--json")[1])
    assert (code, json.loads(out)["nats_per_token"]) == (0, pytest.approx(again["nats_per_token"], abs=1e-6))
    code, out, _ = run("generate", path, "--base", base, "-p", "The", "-n", 3, "--json")
    assert (code, json.loads(out)["prompt"]) == (0, "The")


def test_what_does_not_fit_is_refused_before_any_work(updated, base, job, refused, model_directory):
    on = ["--base", base, "--method", "bytecap"]
    wider = model_directory("rotary", intermediate_size=96)
    line = refused(*job(wider, budget=UPDATE), *on)
    assert "is no base for" in line
    assert "model.layers.0.mlp.down_proj.weight is [" in line
    line = refused(*job(model_directory("biased"), budget=UPDATE), *on)
    assert "is missing in the base" in line
    for more in (("--method", "golf"), ("--paths", "rows"), ("--format", "gguf", "-o", "x.gguf")):
        assert "base" in refused(*job(budget=UPDATE), *on, *more)
    assert "update" in refused(*job(budget=UPDATE), "--method", "bytecap", "--base", updated[1])
    assert "no update" in refused("check", base, "--base", updated[1])
    assert "--base" in refused(*job(budget=UPDATE, output=base), *on)
    assert "floor" in refused(*job(budget=60), *on)
    assert base.read_bytes()[:8] == container.MAGIC


def test_dry_runs_stores_and_several_budgets(tuned, base, texts, tmp_path, run):
    arguments = [
        "fit", tuned, "--base", base, "--calib", texts["calib"], "--eval", texts["val"], "--tokens", 2000,
        "--eval-tokens", 1000, "--window", 128,
    ]  # fmt: skip
    code, out, err = run(*arguments, "--budget", UPDATE, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["predicted_delta_nats"] > 0
    sizes = []
    kept = ["--store", tmp_path / "store", "--report", tmp_path / "r-{budget}.html", "--json"]
    for _ in range(2):
        code, out, err = run(*arguments, "--budget", "2500,4000", "-o", tmp_path / "u-{budget}.bcap", *kept)
        assert code == 0, err
        sizes.append([hashlib.sha256((tmp_path / f"u-{b}.bcap").read_bytes()).digest() for b in (2500, 4000)])
        assert all((tmp_path / f"r-{b}.html").stat().st_size > 1000 for b in (2500, 4000))
    assert sizes[0] == sizes[1]
    less, more = (f["kl_nats"] for f in json.loads(out)["fits"])
    assert more < less


def test_every_changed_matrix_is_a_difference(updated):
    tags = {u.tag for u in container.read(updated[1]).units}
    assert tags == {STACK.tag}


def test_recovery_moves_the_difference(updated, tuned, base, texts, tmp_path):
    path = tmp_path / "recovered.bcap"
    result = bytecap.fit(
        tuned, UPDATE, base=base, calibration=texts["calib"], evaluation=texts["val"], output=path, recover="12",
        **SMALL,
    )  # fmt: skip
    assert len(result.data) <= UPDATE
    assert [s["stage"] for s in result.report["recovery"]["stages"]] == ["integers", "values"]
    for name, values in bytecap.load(path, base).items():
        np.testing.assert_array_equal(values, result.tensors()[name])
    assert result.report["kl_nats"] <= 1.05 * updated[0].report["kl_nats"]
