"""Recovery: what is coded stays what it is, the file never grows, nothing is tuned on what is measured."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import bytecap
from bytecap.allocation.planner import Planner
from bytecap.allocation.vector_unit import VectorUnit
from bytecap.calibration.kl_gradient import gradient
from bytecap.calibration.metric import Metric
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.job import Section
from bytecap.methods.rate_control import allowed_slack, fit_units
from bytecap.progress import Silent
from bytecap.quantization.options import Options
from bytecap.quantization.quantizer import prepare
from bytecap.quantization.rules import initial_rules
from bytecap.recovery import checkpointing, kl_passes, loop, tuning
from bytecap.recovery.parameters import TunedParameters
from bytecap.report.fit import page
from bytecap.types import Unit
from conftest import SMALL

BUDGET = 12_000  # some two bits a weight


@pytest.fixture(scope="module")
def fit(model_directory, texts):
    """Function: a fit of one model, and what it said."""

    def run(model=None, budget=BUDGET, **changes):
        said = Silent()
        found = bytecap.fit(
            model or model_directory("rotary"), budget, calibration=texts["calib"], evaluation=texts["val"],
            reporter=said, **{**SMALL, **changes},
        )  # fmt: skip
        return found, said.notes

    return run


def _own(planner):
    return {p.unit.name: p.weight for p in planner.matrices}


@pytest.fixture(scope="module")
def plain(fit):
    return fit()[0]


@pytest.fixture(scope="module")
def recovered(fit):
    return fit(recover="8")[0]


@pytest.mark.slow
class TestWholeFits:
    @pytest.mark.nightly
    def test_recovery_lowers_the_kl_of_a_trained_model(self, fit, monkeypatch):
        monkeypatch.setitem(kl_passes._TOKENS, "cpu", 512)
        found, notes = fit("demo", 430_000, recover="16", evaluation_tokens=300)
        line = next(n for n in notes if re.search("before, .* after$", n) and "iterations" not in n)
        before, after = (float(x) for x in re.findall(r"[0-9]\.[0-9]+", line))
        assert found.report["predicted_delta_nats"] == pytest.approx(after, abs=1e-4)
        assert after < before
        assert 0 <= 430_000 - len(found.data) <= allowed_slack(430_000)
        assert [s["moves"] for s in found.report["recovery"]["stages"]] == [14, 2]
        assert found.report["without_recovery"]["kl_nats"] != found.report["kl_nats"]
        assert all(found.report["without_recovery"][f"{w}_difference_stderr"] > 0 for w in ("kl", "delta"))

    @pytest.mark.numeric
    def test_never_worse_and_the_same_bytes_twice(self, fit, plain, recovered):
        found, again = fit(recover="8")[0], recovered
        assert found.data == again.data
        assert len(found.data) <= BUDGET
        assert found.report["predicted_delta_nats"] <= plain.report["predicted_delta_nats"]
        assert found.report["without_recovery"]["kl_nats"] == pytest.approx(plain.report["kl_nats"])
        record = found.report["recovery"]
        integers, values = (s["moves"] for s in record["stages"])
        assert [i for _, i, _ in record["curve"]] == [0, integers, integers + values] == [0, integers, 8]
        assert record["curve"][0][2] == record["kl_before"]
        assert record["curve"][1][2] == pytest.approx(record["stages"][0]["kl"])
        seconds = [s for s, _, _ in record["curve"]]
        assert seconds == sorted(seconds)
        drawn = page(found.report, found.ledger())
        assert "<h2>Recovery</h2>" in drawn
        assert all(f"{i} iterations: KL {kl:.4f}" in drawn for _, i, kl in record["curve"])
        assert "<h2>Recovery</h2>" not in page(plain.report, plain.ledger())

    @pytest.mark.numeric
    def test_diverging_ships_what_was_best_and_says_so(self, fit, plain, monkeypatch):
        monkeypatch.setattr(tuning, "RATE", 300.0)
        monkeypatch.setattr(tuning, "VALUES_RATE", 300.0)
        found, notes = fit(recover="12")
        assert any("diverges" in n for n in notes)
        assert any("stored as it was" in n for n in notes)
        assert found.data == plain.data

    def test_batches_are_halved_where_memory_ends(self, fit, monkeypatch):
        sizes = []

        def scarce(*args, batch, **kwargs):
            sizes.append(batch)
            if batch > sizes[0] // 4:
                raise torch.OutOfMemoryError("no more")
            return gradient(*args, batch=batch, **kwargs)

        monkeypatch.setattr(kl_passes, "gradient", scarce)
        _, notes = fit(recover="1")
        assert sizes[:3] == [sizes[0], sizes[0] // 2, sizes[0] // 4]
        assert set(sizes[3:]) <= {sizes[0] // 4}
        assert sum("out of device memory" in n for n in notes) == 2

    def test_products_in_bfloat16_where_a_device_is_fast_in_it(self, fit, monkeypatch):
        kinds = []

        def noted(*args, fast, **kwargs):
            kinds.append(fast)
            if fast and len(kinds) > 2:
                raise RuntimeError("a product has no kernel")
            return gradient(*args, fast=fast, **kwargs)

        monkeypatch.setattr(kl_passes, "gradient", noted)
        monkeypatch.setattr(kl_passes, "is_far_faster", lambda *_: True)
        found, notes = fit(recover="6")
        assert kinds == [True] * 3 + [False] * (len(kinds) - 3)
        assert len(kinds) >= 7
        assert notes.count("recovery multiplies in float32: a product has no kernel") == 1
        assert len(found.data) <= BUDGET

    def test_a_text_read_more_than_once_is_said(self, fit, monkeypatch):
        monkeypatch.setitem(kl_passes._TOKENS, "cpu", 20_000)
        _, notes = fit(recover="1")
        assert any(re.search(r"text of [0-9,]+ tokens was read [0-9.]+ times", n) for n in notes)

    def test_a_killed_run_goes_on_to_the_same_bytes(self, fit, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpointing, "SECONDS", 0.0)
        monkeypatch.setattr(loop, "_A_PART", 1)
        recovered = fit(recover="8")[0]
        moves, move = [], tuning._TuningRun.iterate

        def killed(self, *args):
            if len(moves) == 4:
                raise KeyboardInterrupt
            moves.append(1)
            return move(self, *args)

        monkeypatch.setattr(tuning._TuningRun, "iterate", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(recover="8", store=tmp_path / "two")
        monkeypatch.setattr(tuning._TuningRun, "iterate", lambda self, *args: (moves.append(2), move(self, *args))[1])
        assert fit(recover="8", store=tmp_path / "two")[0].data == recovered.data
        assert moves.count(2) < 8

    def test_a_run_killed_behind_a_batch_that_is_not_finite_goes_on(self, fit, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpointing, "SECONDS", 0.0)
        monkeypatch.setattr(loop, "_A_PART", 1)
        calls, gradients = [], kl_passes.Passes.gradients

        def strange(self, names):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            kl, found = gradients(self, names)
            return (float("nan") if len(calls) == 1 else kl), found

        monkeypatch.setattr(kl_passes.Passes, "gradients", strange)
        with pytest.raises(KeyboardInterrupt):
            fit(recover="8", store=tmp_path / "store")
        monkeypatch.setattr(kl_passes.Passes, "gradients", gradients)
        assert len(fit(recover="8", store=tmp_path / "store")[0].data) <= BUDGET

    def test_a_group_is_walked_from_its_targets_whenever_it_is_coded(self, fit, monkeypatch):
        monkeypatch.setattr(tuning, "_BELOW", 0.0)  # so that the last group is coded again
        seen, code = [], tuning.GroupWalk.code

        def spy(self, tuned, names, units):
            held = tuned.state_dict()
            assert all(units.waits(n) for n in names)
            assert all(torch.equal(held[n].float(), v) for n, v in units.values(names).items())
            seen.append(tuple(names))
            code(self, tuned, names, units)

        monkeypatch.setattr(tuning.GroupWalk, "code", spy)
        fit(recover="8")
        assert len(seen) > len(set(seen))

    def test_a_text_without_recovery_is_refused(self, refused, job, texts):
        assert "--recover-text is read by --recover" in refused(*job(), "--recover-text", texts["calib"])


@pytest.mark.numeric
class TestTunedParameters:
    """A planner over random matrices, and its tuned tensors."""

    @pytest.fixture
    def planned(self, request):
        torch.manual_seed(1)
        options = Options(trellis=getattr(request, "param", True))
        items = []
        for name in "abc":
            inputs = torch.randn(400, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
            metric = Metric(inputs.T @ inputs / 400, torch.rand(64, dtype=torch.float64) + 0.5)
            items.append(prepare(Unit(name, (64, 24), "F32"), torch.randn(64, 24), metric, options))
        values = torch.randn(40).numpy()
        planner = Planner.of(items, [VectorUnit(Unit("v", (40,), "F32"), values, np.ones(40))], options)
        _, state = planner.search(dict.fromkeys("abcv", 1.0), 2000, initial_rules(options), start=2.0)
        state = planner.settle(dict.fromkeys("abcv", 2.0), state.rules)
        return planner, planner.settle(state.steps, state.rules, refit=False)

    @pytest.mark.parametrize("planned", [True, False], indirect=True)
    def test_values_are_those_a_reader_decodes(self, planned):
        planner, state = planned
        values = TunedParameters(planner, state, "cpu").values()
        assert set(values) == set("abcv")
        for name, found in values.items():
            assert np.allclose(found.numpy().reshape(-1), planner.decode(state, name).reshape(-1), atol=1e-5)

    def test_gradients_are_differences(self, planned):
        parameters = TunedParameters(*planned, "cpu")
        torch.manual_seed(2)
        lever = {n: torch.randn(t.shape) for n, t in parameters.values().items()}

        def loss():
            return sum(float((lever[n].double() * t).sum()) for n, t in parameters.values().items())

        found = parameters.gradients(lever, 0.0)
        assert set(found) == {"logs", "offsets", "vector v"}
        for tensor, name, at, step in ((parameters.logs, "logs", 1, 1e-2), (parameters.offsets, "offsets", 2, 8 / 256)):
            before = tensor[at].clone()
            sides = []
            for sign in (1, -1):
                tensor[at] = before + sign * step
                sides.append(loss())
            tensor[at] = before
            assert found[name][at] == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-2)
        assert torch.equal(found["vector v"], lever["v"])

    def test_a_target_bears_the_price_of_its_integer(self, planned):
        parameters = TunedParameters(*planned, "cpu")
        parameters.unfreeze(_own(planned[0]))
        still = {n: torch.zeros_like(t) for n, t in parameters.values().items()}
        free, priced = (parameters.gradients(still, nats)["target a"] for nats in (0.0, 1.0))
        assert not free.any()
        far = parameters.targets()["target a"].abs() > 1.5
        assert (priced[far] * parameters.targets()["target a"][far] > 0).all()  # towards zero when it is taken away

    def test_what_has_not_moved_is_coded_as_it_was(self, planned):
        planner, state = planned
        parameters = TunedParameters(planner, state, "cpu")
        before = {n: t.clone() for n, t in parameters.values().items()}
        parameters.unfreeze(_own(planner))
        assert len(parameters.targets()) == 3
        beyond = parameters.code(parameters.matrices, 0.0)
        assert beyond == pytest.approx(0, abs=2)
        same = [(a == b).float().mean() for a, b in zip(before.values(), parameters.values().values(), strict=True)]
        assert min(same) > 0.97

    def test_coded_twice_it_starts_from_the_same_target(self, planned):
        parameters = TunedParameters(*planned, "cpu")
        parameters.unfreeze(_own(planned[0]))
        parameters.targets()["target c"].mul_(1.1)
        first = parameters.code(["c"], 0.0)
        parameters.code(["c"], 0.3)
        assert parameters.code(["c"], 0.0) == first

    def test_targets_begin_at_the_models_own_values(self, planned):
        planner, state = planned
        aimed = replace(planner, matrices=[replace(p, weight=p.weight + 1) for p in planner.matrices])
        parameters = TunedParameters(aimed, state, "cpu")
        parameters.unfreeze(_own(planner))
        values = parameters.values()
        assert all(torch.allclose(values[n], w, atol=1e-5) for n, w in _own(planner).items())

    def test_a_walk_codes_stage_by_stage_and_moves_what_waits(self, planned):
        planner, _ = planned
        parameters = TunedParameters(*planned, "cpu")
        parameters.unfreeze(_own(planner))
        held, changes = parameters.targets()["target c"], {n: torch.full((64, 24), 0.5) for n in "bc"}
        seen = {}

        def walk(names, units):
            assert names == ["a", "b"]
            seen["a"] = units.round(["a"], {})
            seen["b"] = units.round(["b"], changes)
            assert [n for n in "abc" if units.waits(n)] == ["c"]
            assert torch.allclose(units.times("c", torch.eye(24)), units.values(["c"])["c"], atol=1e-5)
            seen["c"] = units.move({"c": changes["c"]})

        for _ in range(2):  # the second time from the same targets
            parameters.code(["a", "b"], 0.0, walk)
        values, own = parameters.values(), _own(planner)
        assert all(torch.equal(values[n], seen[n][n]) for n in "abc")
        assert parameters.targets()["target c"] is held  # which an optimizer follows
        assert torch.allclose(values["c"], own["c"] + 1.0, atol=1e-5)
        nearer = (values["b"] - own["b"] - 0.5).square().mean()
        assert nearer < (values["b"] - own["b"]).square().mean()

    def test_settled_it_is_what_was_coded(self, planned):
        planner, state = planned
        parameters = TunedParameters(planner, state, "cpu")
        parameters.logs[:] = torch.tensor([0.05, 0.0, -0.05])
        parameters.offsets[1:] += 0.02
        parameters.vectors["v"].mul_(0.99)
        values = parameters.values()
        targets = [p.weight.clone() for p in planner.matrices]
        rounded_for = state.rules.shrink.offset.copy()
        moved, settled = parameters.settle()
        for n, found in values.items():
            assert np.allclose(moved.decode(settled, n).reshape(found.shape), found.numpy(), atol=1e-5)
        assert settled.rate == pytest.approx(state.rate, rel=1e-2)
        assert not torch.equal(moved.matrices[0].weight, targets[0])  # while what it started from stays as it was
        assert all(torch.equal(p.weight, t) for p, t in zip(planner.matrices, targets, strict=True))
        assert (state.rules.shrink.offset == rounded_for).all()

    def test_a_recovered_plan_is_trimmed_at_its_last_matrices_only(self, planned):
        planner, state = planned
        parameters = TunedParameters(planner, state, "cpu")
        before = {n: t.clone() for n, t in parameters.values().items()}
        planner, state = parameters.settle()
        tables = dump_shared(state.shared)

        def size(sections, tables):
            return len(tables) + sum(len(s.data) for s in sections.values())

        whole = size({n: Section(*c) for n, c in planner.encode(state).items()}, tables)
        packed = fit_units(planner, state, tables, size, whole - 40, ["c", "b"])
        assert whole - 40 - allowed_slack(0) <= size(packed.sections, tables) <= whole - 40
        after = {n: planner.decode(packed.state, n).reshape(t.shape) for n, t in before.items()}
        assert np.allclose(after["a"], before["a"], atol=1e-5)
        assert not np.allclose(after["c"], before["c"], atol=1e-5)
        assert fit_units(planner, state, tables, size, whole // 2, ["c", "b"]) is None

    def test_groups_hold_all_matrices_once(self, planned):
        parameters = TunedParameters(*planned, "cpu")
        assert parameters.groups(16) == [["a"], ["b"], ["c"]]
        assert parameters.groups(1) == [["a", "b", "c"]]

    def test_state_comes_back(self, planned):
        planner, state = planned
        parameters = TunedParameters(planner, state, "cpu")
        parameters.unfreeze(_own(planner))
        parameters.targets()["target b"].add_(0.3)
        parameters.code(["a", "b"], 0.01)
        parameters.vectors["v"].add_(0.1)
        parameters.targets()["target c"].add_(0.2)
        kept, values = parameters.state(), parameters.values()
        again = TunedParameters(planner, state, "cpu")
        again.resume(kept)
        assert list(again.targets()) == ["target c"]
        assert all(torch.equal(values[n], t) for n, t in again.values().items())
