"""Runs that were killed go on from their store and give the bytes of an undisturbed run, whatever is in the store."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bytecap
import crashes
from bytecap.allocation.planner import Planner
from bytecap.errors import OutputError
from bytecap.format.coders import Shared
from bytecap.format.entropy.frequencies import Table, Tables
from bytecap.quantization import Shrink, gaussian_shrink
from bytecap.quantization.rules import Rules, rules_from_json, rules_to_json
from bytecap.system.atomic import replacing, sweep, write_atomically
from bytecap.system.cache import Store, digest
from conftest import BUDGET, SMALL
from forks import child, together

HERE = Path(__file__).parent


class Killed(BaseException):
    """Stands for SIGKILL where the moment matters."""


@pytest.fixture
def fit(model_directory, texts, tmp_path):
    """Function: bytes of a tiny model's file, made with a store."""

    def run(store=tmp_path / "store", budget=BUDGET, **changes):
        return bytecap.fit(
            model_directory("rotary"), budget, calibration=texts["calib"], evaluation=texts["val"], store=store,
            **{**SMALL, **changes},
        ).data  # fmt: skip

    return run


@pytest.fixture
def stored(once, model_directory, texts, tmp_path):
    """The store that the same fit has filled: a copy, where `fit` looks for it."""

    def make(directory):
        bytecap.fit(
            model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"],
            store=directory / "store", **SMALL,
        )  # fmt: skip
        return directory / "store"

    return shutil.copytree(once("filled store", make), tmp_path / "store")


STAGES = (
    "methods.bytecap.prepare", "allocation.plans.factors", "allocation.plans.step_multipliers",
    "allocation.plans.best_of", "methods.bytecap.retarget", "methods.bytecap.pack",
)  # fmt: skip


@pytest.mark.slow
class TestGoingOn:
    def test_killed_before_every_stage_in_turn(self, fit, fitted, monkeypatch):
        """Every attempt dies one stage later than the one before, and all share a store."""

        def die(*_args, **_options):
            raise Killed

        for stage in STAGES:
            with monkeypatch.context() as patch:
                patch.setattr(f"bytecap.{stage}", die)
                with pytest.raises(Killed):
                    fit()
        assert fit() == fitted()[0].data

    def test_nothing_is_measured_again(self, fit, fitted, stored, monkeypatch):
        undisturbed = fitted()[0].data  # made before its measuring functions are taken away
        entries = sorted(stored.iterdir())
        assert len(entries) == 5  # statistics, factors, plan, drift targets, whether these pay
        for name in (
            "calibration.statistics.probe", "allocation.correction.measure", "methods.retargeting.drift_targets",
            "allocation.plans.by_window",
        ):  # fmt: skip
            monkeypatch.setattr(f"bytecap.{name}", None)
        assert fit() == undisturbed

    def test_stored_targets_are_rounded_in_the_companies_of_the_walk(self, fit, monkeypatch):
        """On a GPU the order of sums, and with it the integers, depends on what is rounded together."""
        rounded, inner = [], Planner.round

        def spy(planner, items, *rest):
            rounded.append([p.unit.name for p in items])
            return inner(planner, items, *rest)

        monkeypatch.setattr(Planner, "round", spy)
        first, walked = fit(), rounded.copy()
        rounded.clear()
        assert fit() == first
        assert rounded == walked
        assert max(map(len, walked)) > 1

    def test_spoiled_entries_are_not_trusted(self, fit, fitted, stored):
        entries = sorted(stored.iterdir())
        whole = [p.read_bytes() for p in entries]
        flipped = bytearray(whole[0])
        flipped[len(flipped) // 2] ^= 1
        one, two = (i for i, p in enumerate(entries) if p.suffix == ".npz")
        spoiled = [whole[0] + b"0", whole[1][:-1], b"", bytes(flipped), b"true"]
        spoiled[one], spoiled[two] = whole[two], bytes(whole[two][:-1] + b"?")
        for path, data in zip(entries, spoiled, strict=True):
            path.write_bytes(data)
        assert fit() == fitted()[0].data
        assert [p.read_bytes()[:16] for p in entries] == [w[:16] for w in whole]  # and they are sound again

    def test_another_version_is_not_looked_at(self, fit, fitted, stored, monkeypatch):
        monkeypatch.setattr("bytecap.calibration.statistics.library", lambda: "another")
        assert fit() == fitted()[0].data
        assert len(list(stored.iterdir())) == 10

    @pytest.mark.nightly
    def test_other_jobs_find_what_is_theirs_alone(self, fit, model_directory, texts, tmp_path):
        fit()
        for changes in ({"seed": 1}, {"tokens": 1500}, {"budget": BUDGET + 900}, {"options": {"row_power": 0.5}}):
            plain = bytecap.fit(
                model_directory("rotary"), calibration=texts["calib"], evaluation=texts["val"],
                **{"budget": BUDGET, **SMALL, **changes},
            )  # fmt: skip
            assert fit(**changes) == plain.data, changes
        # statistics: of the first job, the other seed and the other tokens; budget and row steps do not change them
        assert len(list((tmp_path / "store").glob("*.npz"))) == 3 + 5

    def test_paths_and_a_plain_plan_go_on_too(self, fit, monkeypatch, tmp_path):
        def die(*_args, **_options):
            raise Killed

        for number, changes in enumerate(({"paths": ["outliers"]}, {"options": {"allocate": False}})):
            undisturbed = fit(store=None, **changes)
            with monkeypatch.context() as patch:
                patch.setattr("bytecap.methods.bytecap.pack", die)
                with pytest.raises(Killed):
                    fit(store=tmp_path / str(number), **changes)
            assert fit(store=tmp_path / str(number), **changes) == undisturbed

    def test_rules_come_back_as_they_were(self):
        one, two = Table(-1, np.array([3, 8, 3, 2])), Table(0, np.array([15, 1]))
        shared = Shared(Tables({1: one, 2: one, 5: two}), gaussian_shrink().offset)
        found = rules_from_json(rules_to_json(Rules(shared, Shrink(shared.offset / 2))))
        back, shrink = found.shared, found.shrink
        assert {c: (t.low, t.freq.tolist()) for c, t in back.tables.table.items()} == {
            c: (t.low, t.freq.tolist()) for c, t in shared.tables.table.items()
        }
        assert back.tables.table[1] is back.tables.table[2]
        np.testing.assert_array_equal(back.offset, shared.offset)
        np.testing.assert_array_equal(shrink.offset, shared.offset / 2)


class TestFiles:
    STEPS = ("tempfile.mkstemp", "os.fdopen", "os.fstat", "os.fsync", "pathlib.Path.chmod", "pathlib.Path.replace")

    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("step", STEPS)
    def test_killed_around_every_step_of_writing(self, tmp_path, monkeypatch, step, after):
        path = tmp_path / "out.bcap"
        path.write_bytes(b"the old file")
        module, _, name = step.rpartition(".")
        owner = {"tempfile": __import__("tempfile"), "os": os}.get(module) or type(path).__mro__[1]
        real = getattr(owner, name)

        def die(*args, **options):
            if after:
                real(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, die)
            assert child(lambda: write_atomically(b"new" * 5000, path)) == -signal.SIGKILL
        replaced = after and name == "replace"
        assert path.read_bytes() == (b"new" * 5000 if replaced else b"the old file")
        write_atomically(b"newer", path)
        assert [p.name for p in tmp_path.iterdir()] == ["out.bcap"]
        assert path.read_bytes() == b"newer"

    def test_killed_while_the_block_writes(self, tmp_path):
        path = tmp_path / "a"

        def work():
            with replacing(path) as f:
                f.write(b"x" * 100_000)
                f.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        assert child(work) == -signal.SIGKILL
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == 1
        sweep(tmp_path, "a")
        assert not list(tmp_path.iterdir())

    def test_what_a_living_run_writes_is_left_alone(self, tmp_path):
        path = tmp_path / "a"
        with replacing(path) as f:
            f.write(b"one")
            assert child(lambda: write_atomically(b"another", path)) == 0
            assert path.read_bytes() == b"another"
        assert path.read_bytes() == b"one"  # the last one wins
        assert [p.name for p in tmp_path.iterdir()] == ["a"]

    def test_other_files_of_like_names_are_left_alone(self, tmp_path):
        kept = [".a.backup.tmp", ".a.12345678.bytecap.tmp.txt", "a.12345678.bytecap.tmp", ".b.12345678.bytecap.tmp",
                ".a.12345678", ".a.12345678.tmp"]  # fmt: skip
        for name in kept:
            (tmp_path / name).touch()
        (tmp_path / ".a.12345678.bytecap.tmp").touch()
        write_atomically(b"", tmp_path / "a")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "a"])

    def test_an_error_in_the_block_leaves_nothing(self, tmp_path):
        with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a"):
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())


class TestStore:
    @pytest.mark.slow
    def test_four_runs_sharing_one_store(self, tmp_path):
        """Each reads and writes the same few entries all the time; whatever is read is whole."""

        def work(number):
            store, rng = Store(tmp_path), np.random.default_rng(number)
            for _ in range(60):
                name = str(rng.integers(3))
                key, value = digest(name), np.full(int(rng.integers(1, 20_000)), int(name))
                found = store.arrays(key) if rng.random() < 0.5 else store.put_arrays(key, {"a": value})
                assert found is None or (found["a"] == int(name)).all()
                store.put(key, [int(name)] * 500)
                assert store.get(key) in (None, [int(name)] * 500)

        assert all(run == 0 for run in together(4, work))
        assert len(list(tmp_path.iterdir())) == 6

    @pytest.mark.slow
    def test_two_fits_sharing_one_store(self, fit, fitted, tmp_path):
        wanted = fitted()[0].data

        def work(_number):
            assert fit() == wanted

        assert together(2, work) == [0, 0]
        assert len(list((tmp_path / "store").iterdir())) == 5

    def test_what_dead_runs_left_is_swept_when_a_store_is_opened(self, tmp_path):
        (tmp_path / f".{digest('a')}.npz.12345678.bytecap.tmp").touch()
        (tmp_path / ".mine.12345678.bytecap.tmp").touch()
        Store(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [".mine.12345678.bytecap.tmp"]

    @pytest.mark.slow
    def test_arrays_are_written_without_a_copy(self, tmp_path):
        import tracemalloc

        large = np.zeros(2**27, np.uint8)
        tracemalloc.start()
        Store(tmp_path).put_arrays(digest("a"), {"large": large})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**25  # numpy writes pieces of 16 MB

    def test_a_file_is_no_store(self, tmp_path):
        (tmp_path / "a").touch()
        with pytest.raises(OutputError, match=str(tmp_path / "a")):
            Store(tmp_path / "a")


class TestKilled:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("command", "kills", "more"),
        [
            ("fit", 2, ()), pytest.param("fit", 3, ("--memory", "1MB"), marks=pytest.mark.nightly),
            pytest.param(
                "curves", 1, ("--paths", "step,rows", "--points", 4, "--point-tokens", 500), marks=pytest.mark.nightly
            ),
        ],
        ids=["fit", "streamed", "curves"],
    )  # fmt: skip
    def test_at_random_moments(self, fit, model_directory, texts, tmp_path, command, kills, more):
        fit(store=None)  # what it imports and compiles the forks need not
        options = [
            model_directory("rotary"), "--budget", BUDGET, "--tokens", 2000, "--eval-tokens", 1000, "--calib",
            texts["calib"], "--eval", texts["val"], *more,
        ]  # fmt: skip
        found = crashes.Crashes(command, options, tmp_path, seed=0).run(kills=kills, seconds=1e9)
        assert found["kills"] >= kills
        assert found["finished"]
        assert [found[k] for k in crashes.FAULTS] == [0, 0, 0, 0]

    @pytest.mark.nightly
    @pytest.mark.parametrize("command", ["fit", "curves"])
    def test_at_fifty_random_moments_on_the_embedded_model(self, command):
        line = [sys.executable, HERE / "crashes.py", command, "--kills", "50"]
        made = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False)  # noqa: S603
        assert made.returncode == 0, made.stdout + made.stderr
        assert json.loads(made.stdout.splitlines()[-1])["kills"] == 50
