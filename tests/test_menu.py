"""Overlays chosen by the allocator: on a weak base they are taken and pay, on the strong one nothing is lost."""

import numpy as np
import pytest
import torch

import bytecap
from bytecap import reference
from bytecap.allocation import overlay_menu
from bytecap.allocation.decoded import decode_coded
from bytecap.allocation.overlaid import overlaid, problem_of
from bytecap.allocation.overlay_menu import Choice, solve
from bytecap.allocation.planner import Planner
from bytecap.calibration.metric import Metric
from bytecap.errors import UsageError
from bytecap.format import container
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.ledger import by_overlay
from bytecap.methods.rate_control import allowed_slack
from bytecap.model.checkpoint import load_checkpoint
from bytecap.progress import Silent
from bytecap.quantization.options import Options
from bytecap.quantization.overlays import overlays
from bytecap.quantization.quantizer import prepare
from bytecap.quantization.rules import initial_rules
from bytecap.report.terminal import print_fit, print_ledger
from bytecap.types import Curve, Plan, Point, Unit
from conftest import BUDGET, SMALL, build, save

WEAK = {"feedback": False, "waterfill": False, "row_power": 0.0, "row_class": 0}
LOUD = (5, 21)
MENU = ("columns", "channels")


@pytest.fixture(scope="module")
def loud(tmp_path_factory, tokenizer_json):
    """A tiny model two of whose channels are thirty times as loud as the others wherever a layer reads."""
    module = build("rotary", dtype=torch.float32)
    with torch.no_grad():
        for layer in module.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[list(LOUD)] *= 30
    return save(module, tmp_path_factory.mktemp("loud"), tokenizer_json)


@pytest.fixture(scope="module")
def outcome(loud, texts):
    """Function: (artifact, notes) of the loud model on a base, with a menu, made once for each."""
    made = {}

    def get(base, *names):
        key = (base, names)
        if key not in made:
            reporter = Silent()
            result = bytecap.fit(
                loud, BUDGET, calibration=texts["calib"], evaluation=texts["val"], paths=names,
                options=WEAK if base == "weak" else {}, reporter=reporter, **SMALL,
            )  # fmt: skip
            made[key] = result, reporter.notes
        return made[key]

    return get


@pytest.mark.numeric
@pytest.mark.slow
class TestWeakBase:
    def test_paths_are_taken_and_pay(self, outcome):
        (without, _), (found, notes) = outcome("weak"), outcome("weak", *MENU)
        assert found.report["plan"] == "paths"
        assert found.report["paths"]["columns"]["units"] >= 1
        assert found.report["kl_nats"] < 0.9 * without.report["kl_nats"]
        assert sum("shipping with them" in n and "better" in n for n in notes) == 1
        assert without.report["paths"] == {}

    def test_the_cap_holds_to_the_byte(self, outcome):
        found, _ = outcome("weak", *MENU)
        padding = sum(e.bytes for e in found.ledger() if e.kind == "padding")
        assert len(found.data) <= BUDGET
        assert BUDGET - len(found.data) + padding <= allowed_slack(BUDGET)
        assert found.report["slack_bytes"] == BUDGET - len(found.data)

    def test_the_loud_channels_are_the_protected_ones(self, outcome, loud):
        found, _ = outcome("weak", *MENU)
        original = load_checkpoint(loud).module.state_dict()
        stacks = [u for u in found.contents.units if u.tag == STACK.tag]
        reading = [u for u in stacks if any(p in u.unit.name for p in ("q_proj", "k_proj", "v_proj", "gate", "up"))]
        assert reading
        for u in reading:
            error = (torch.from_numpy(found.tensors()[u.unit.name]) - original[u.unit.name]).abs().mean(0)
            quiet = np.delete(np.arange(len(error)), LOUD)
            assert float(error[list(LOUD)].min()) < 0.3 * float(error[quiet].mean()), u.unit.name

    def test_file_report_and_ledger_agree(self, outcome):
        found, _ = outcome("weak", *MENU)
        entries = container.ledger(container.parse(found.data))
        assert by_overlay(entries) == found.report["paths"]
        assert sum(e.bytes for e in entries) == len(found.data)
        stacks = sum(u.tag == STACK.tag for u in found.contents.units)
        assert sum(x["units"] for x in found.report["paths"].values()) == stacks > 0

    def test_the_second_decoder_reads_the_same(self, outcome):
        found, _ = outcome("weak", *MENU)
        other = reference.decode_file(found.data)
        for name, values in found.tensors().items():
            np.testing.assert_array_equal(other[name], values)


@pytest.mark.slow
def test_what_cannot_apply_is_said_once(loud, texts, monkeypatch):
    path, reporter = overlays()["rows"], Silent()
    settings = type(path).settings
    monkeypatch.setattr(
        type(path), "settings", lambda s, p, base=None: settings(s, p, base) if p.weight.shape[0] < 50 else []
    )
    files = {"calibration": texts["calib"], "evaluation": texts["val"]}
    bytecap.fit(loud, BUDGET, **files, paths=["rows"], options=WEAK, dry_run=True, reporter=reporter, **SMALL)
    assert [n for n in reporter.notes if "cannot apply" in n] == ["overlay rows cannot apply to 5 of 15 matrices"]


@pytest.mark.numeric
@pytest.mark.nightly
class TestStrongBase:
    @pytest.mark.parametrize("names", [("columns",), ("all",)])
    def test_never_worse_beyond_noise(self, outcome, names):
        (without, _), (found, notes) = outcome("strong"), outcome("strong", *names)
        noise = (without.report["kl_stderr"] ** 2 + found.report["kl_stderr"] ** 2) ** 0.5
        assert found.report["kl_nats"] <= without.report["kl_nats"] + 2 * noise
        assert len(found.data) <= BUDGET
        said = [n for n in notes if n.startswith(("overlays (", "no overlay"))]
        assert len(said) == 1
        assert ("shipping with them" in said[0]) == bool(found.report["paths"])


@pytest.mark.numeric
class TestNames:
    def test_unknown_ones_are_refused_before_any_work(self):
        with pytest.raises(UsageError, match="did you mean columns"):
            bytecap.fit("no such model", "1MB", paths=["colums"])
        with pytest.raises(UsageError, match="--method bytecap"):
            bytecap.fit("no such model", "1MB", method="golf", paths=["columns"])

    def test_on_the_command_line(self, refused, tmp_path):
        arguments = ("fit", "demo", "--budget", "600kB", "-o", tmp_path / "a.bcap", "--paths")
        assert "did you mean lowrank" in refused(*arguments, "rows,lowrang")

    def test_the_default_menu_is_empty(self):
        assert overlay_menu.known(None) == overlay_menu.known(()) == ()
        assert overlay_menu.known(["all"]) == tuple(sorted(overlays()))

    def test_all_reaches_the_job_from_the_command_line(self, run, model_directory, texts, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr("bytecap.pipeline.stages._solve", lambda job, *_: seen.append(job.paths) or 1 / 0)
        arguments = ("fit", model_directory("rotary"), "--budget", BUDGET, "-o", tmp_path / "a.bcap")
        arguments += ("--calib", texts["calib"], "--eval", texts["val"])
        for names, expected in (("all", tuple(sorted(overlays()))), ("rows, lowrank", ("rows", "lowrank"))):
            run(*arguments, "--paths", names)
            assert seen.pop() == expected

    @pytest.mark.slow
    def test_one_line_on_the_terminal(self, outcome, capsys):
        found, _ = outcome("weak", *MENU)
        size = found.report["paths"]["columns"]["bytes"]
        print_fit(found.report)
        said = " ".join(capsys.readouterr().out.split())  # lines break where the terminal ends
        assert f"columns on {found.report['paths']['columns']['units']} units, {size:,} bytes" in said
        print_ledger(found.ledger(), "a.bcap", most=len(found.ledger()))  # which owners are largest is close
        assert f"{size:,} bytes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.numeric
class TestSolve:
    def test_a_charge_is_paid_by_those_who_use_it(self):
        def unit(name):
            return Curve(name, (Point(10, 4.0, 0), Point(14, 3.0, 1), Choice(10, 1.0, 0, "p", 1)))

        few, many = [unit("a")], [unit(n) for n in "abcde"]
        assert overlay_menu.chosen(solve(few, 10 + 3, {"p": 4})) == {}
        assert overlay_menu.chosen(solve(few, 10 + 4, {"p": 4})) == {"p": 1}
        plan = solve(many, 50 + 4, {"p": 4, "q": 100})
        assert overlay_menu.chosen(plan) == {"p": 5}
        assert plan.rate <= 50

    def test_without_paths_it_is_the_plain_plan(self):
        curves = [Curve("a", (Point(1, 2.0, 0), Point(2, 1.0, 1)))]
        plan = solve(curves, 2, {})
        assert isinstance(plan, Plan)
        assert (plan.rate, plan.distortion) == (2, 1.0)


def matrix(options):
    """A prepared unit with two loud columns, and its planner."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=g, dtype=torch.float64)
    x[:, list(LOUD)] *= 30
    weight = torch.randn(48, 32, generator=g)
    rows = torch.rand(48, generator=g, dtype=torch.float64) + 0.5
    metric = Metric(x.T @ x / 256, rows / rows.mean())
    item = prepare(Unit("a", (48, 32), "F32"), weight, metric, options)
    return item, Planner.of([item], [], options), metric


@pytest.mark.numeric
@pytest.mark.parametrize("options", [Options(), Options(**WEAK, trellis=False)], ids=["strong", "weak"])
@pytest.mark.parametrize("name", sorted(overlays()))
def test_a_layered_unit_is_what_a_reader_decodes(name, options):
    item, planner, _ = matrix(options)
    problem = problem_of(item)
    ladder = overlays()[name].settings(problem)
    if name == "channels":
        assert not ladder  # not square
        return
    under = overlaid(item, problem, overlays()[name], ladder[len(ladder) // 2], options)
    changed = Planner.of([under], [], options)
    state = changed.settle({"a": 0.5}, initial_rules(options))
    values = changed.decode(state, "a")
    assert state.coded["a"].overlay is not None
    assert state.distortions["a"] == pytest.approx(problem.distortion(torch.from_numpy(values)), rel=1e-9)
    tag, data = changed.encode(state)["a"]
    assert tag == STACK.tag
    assert abs(state.rates["a"] - len(data)) < 40  # an estimate of the base's streams; the layer's bytes are exact
    base = planner.settle({"a": 0.5}, initial_rules(options))
    assert under.same_base == (name == "lowrank" or (name == "groups" and not under.setting.divide))
    assert base.coded["a"].overlay is None
    moved = under.moved(torch.full((48, 32), 0.125))
    torch.testing.assert_close(moved.target, item.weight + 0.125)
    assert torch.equal(moved.problem.hessian, under.problem.hessian)


@pytest.mark.numeric
def test_the_metric_is_whole_even_if_the_base_does_not_see_it():
    for options in (Options(), Options(**WEAK, trellis=False)):
        item, planner, metric = matrix(options)
        found = problem_of(item).hessian
        damped = metric.hessian.clone()
        damped.diagonal().add_(options.damping * damped.diagonal().mean())
        torch.testing.assert_close(found, damped, rtol=1e-4, atol=1e-4 * float(damped.diagonal().max()))
        state = planner.settle({"a": 0.5}, initial_rules(options))
        assert decode_coded(state.coded["a"], state.shared).shape == (48, 32)
