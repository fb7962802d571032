"""Recodings: other coders in a section's place, real bytes on every base, judged against coarser steps."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bytecap.format.coders import Shared, run
from bytecap.format.coders.binary import CODER as BINARY
from bytecap.format.coders.binary import binarize
from bytecap.model.evaluation import ByWindow
from bytecap.progress import Silent
from bytecap.quantization.overlays import UnitProblem, overlays
from bytecap.report.curves import page
from bytecap.system.threads import NESTED, in_threads
from bytecap.types import Unit
from bytecap_lab.rd_curves import byte_returns, plans, trial
from bytecap_lab.rd_curves.choose import recode
from bytecap_lab.rd_curves.paths import recodings, shared_block
from bytecap_lab.rd_curves.paths import signs as signs_path
from bytecap_lab.rd_curves.paths.signs import signs
from bytecap_lab.rd_curves.points import MeasuredPick
from bytecap_lab.rd_curves.report import verdict
from bytecap_lab.rd_curves.trial import COARSER, STEP, OverlayCandidate, known
from conftest import BUDGET, SMALL


@pytest.fixture(scope="module")
def priced(model_directory, texts, tmp_path_factory):
    """Function: (figures, notes) of all recodings of a tiny model on a base."""
    made = {}

    def get(base, **changes):
        key = (base, *sorted(changes.items()))
        if key not in made:
            reporter, options = Silent(), {"paths": sorted(recodings()), "points": 4, **changes}
            found = byte_returns(
                model_directory("rotary"), BUDGET, tmp_path_factory.mktemp("recoded"), base=base, point_tokens=300,
                calibration=texts["calib"], evaluation=texts["val"], reporter=reporter, **options, **SMALL,
            )  # fmt: skip
            made[key] = found, reporter.notes
        return made[key]

    return get


def candidate(unit, size, gain, shared=""):
    return OverlayCandidate("p", unit, 0, "", size, gain, 0.0, gain, 0, 1.0, -1, shared)


class TestNames:
    def test_coarser_steps_come_with_recodings_only(self):
        assert known(["ternary"]) == [STEP, COARSER, "ternary"]
        assert known(["rows"]) == [STEP, "rows"]
        assert known(None) == [STEP, COARSER, *sorted(overlays()), *sorted(recodings())]
        assert len(known(None)) >= 12


class TestChoice:
    def test_one_object_for_a_scope(self):
        """The object that serves all units best on average, though another is better for one of them."""
        units = {
            "a": [candidate("a", 0, -1.0, "file: 4"), candidate("a", 0, -0.5, "file: 8")],
            "b": [candidate("b", 0, -1.0, "file: 4"), candidate("b", 0, -3.0, "file: 8")],
        }
        found = recode(units, {"a": 10, "b": 10}, 0.0, 1.0)
        assert {o.list for o in found.values()} == {"file: 4"}

    def test_bytes_are_priced_at_the_slope(self):
        units = {"a": [candidate("a", -10, -1.0), candidate("a", 10, 1.0)]}
        assert recode(units, {"a": 10}, 0.05, 1.0)["a"].bytes == 10
        assert recode(units, {"a": 10}, 0.15, 1.0)["a"].bytes == -10

    def test_something_is_always_recoded(self):
        assert list(recode({"a": [candidate("a", 1, -9.0)]}, {"a": 100}, 1.0, 0.01)) == ["a"]


class TestVerdict:
    def judge(self, spent, gain):
        tokens = np.full(4, 10.0)
        base = ByWindow(np.array([4.0, 5, 6, 5]), np.zeros(4), np.zeros(4), tokens, tokens)

        def measured(size, kl):
            return MeasuredPick({"u": size}, 0, 1.0, base.kl - np.array(kl), np.zeros(4))

        steps = [measured(100, [1.0, 1.1, 0.9, 1.0]), measured(-100, [-2.0, -2.1, -1.9, -2.0])]
        return verdict("p", [measured(spent, gain)], steps, base)

    def test_bytes_given_back_are_held_against_coarser_steps(self):
        found = self.judge(-50, [-0.5, -0.4, -0.6, -0.5])
        assert found["verdict"] == "earns"
        assert found["advantage_nats"] == pytest.approx((-2.0 + 4.0) / 40)
        assert self.judge(-50, [-1.5, -1.6, -1.4, -1.5])["verdict"] == "does not earn"


@pytest.mark.parametrize("levels", [2, 3])
def test_error_feedback_serves_signs(levels):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    hessian = (inputs.T @ inputs).double() / 400 + 0.01 * torch.eye(24).double()
    weight = torch.randn(16, 24, generator=generator)
    problem = UnitProblem(Unit("a", (16, 24), "F32"), weight, hessian, torch.ones(16).double())

    def cost(matrix):
        return problem.distortion(
            torch.from_numpy(run([BINARY.decode(BINARY.encode(matrix), (16, 24), "F32", Shared())])[0])
        )

    assert cost(signs(problem, levels)) < 0.8 * cost(binarize(weight.numpy(), levels))


def test_work_that_opens_pools_has_few_workers(monkeypatch):
    opened = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setattr(
        "bytecap.system.threads.ThreadPoolExecutor", lambda n: opened.append(n) or ThreadPoolExecutor(min(n, 2))
    )
    items = list(range(100))
    for more in ({}, {"most": None}, {"most": NESTED}, {"most": 1}):  # the last one works here, in no thread
        assert in_threads(lambda x: -x, items, **more) == [-x for x in items]
    assert opened == [64, 64, NESTED]


def test_layers_and_recodings_take_few_workers(monkeypatch):
    seen, base = [], SimpleNamespace(problems={}, round=lambda *_: [])
    for module in (trial, signs_path, shared_block):
        monkeypatch.setattr(module, "in_threads", lambda _, items, *, most: seen.append(most) or items)
    trial._try(base, "lowrank", {})
    for name in ("binary", "shared_block"):
        recodings()[name].code(base, {})
    assert seen == [NESTED] * 3


@pytest.mark.slow
class TestCurves:
    @pytest.mark.parametrize("base", ["grid", pytest.param("golf", marks=pytest.mark.nightly)])
    def test_every_recoding_has_points_or_a_reason(self, priced, base):
        found, notes = priced(base)
        assert list(found["paths"]) == [STEP, COARSER, *sorted(recodings())]
        for name, path in found["paths"].items():
            assert bool(path["whole"]) != ("reason" in path), name
            assert path["kind"] == ("step" if name in (STEP, COARSER) else "recoding")
            for p in path["whole"]:
                assert p["bytes"] == sum(p["units"].values()) + p["list_bytes"]
        without = {n for n, p in found["paths"].items() if "reason" in p}
        assert without == (set() if base == "grid" else {"trellis"})
        assert sum("cannot act on this base" in n for n in notes) == len(without)
        assert all(p["bytes"] < 0 and p["kl_recovered"] < 0 for p in found["paths"][COARSER]["whole"][1:])
        text = page(found)
        assert all(found["paths"][n]["reason"] in text for n in without)

    def test_shared_objects_are_charged_once(self, priced):
        found, _ = priced("grid")
        sizes = {p["list_bytes"] for p in found["paths"]["file_codebook"]["whole"]}
        assert len(sizes) == 1  # the same codewords, however many units use them
        assert min(sizes) > 0
        assert all(p["list_bytes"] == 0 for p in found["paths"]["codebook"]["whole"])
        assert max(len(p["units"]) for p in found["paths"]["file_codebook"]["whole"]) > 1

    def test_what_shares_a_block_stores_next_to_nothing(self, priced):
        found, _ = priced("grid")
        path = found["paths"]["shared_block"]
        assert path["skipped_units"] == 15 - 7
        at_base = {u["unit"]: u["section_bytes"] for u in path["units"]}
        plain = min(u["points"][0]["bytes"] + at_base[u["unit"]] for u in path["units"])
        assert plain == 0
        assert path["whole"][-1]["bytes"] < 0

    @pytest.mark.nightly
    def test_a_brief_run_has_every_path_and_few_points(self, priced):
        found, _ = priced("golf", paths=None)
        assert list(found["paths"]) == known(None)
        assert sum(bool(p["whole"]) for p in found["paths"].values()) >= 10
        for name in recodings():
            assert len(found["paths"][name]["whole"]) <= len(plans.BRIEF.shares)
            assert all(len(u["points"]) <= recodings()[name].brief for u in found["paths"][name]["units"])

    def test_few_matrices_of_a_role(self, priced):
        found, _ = priced("golf", paths=("rows", "ternary"), units=1)
        assert len(found["units_tried"]) == 8  # seven roles in blocks, and the table
        for path in found["paths"].values():
            assert {n for p in path["whole"] for n in p["units"]} <= set(found["units_tried"])
