"""Ranks that share a job give the bytes of one process, and end together, with one line, when one of them cannot."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import bytecap
import ranks as several
from bytecap.calibration.probe import probe
from bytecap.model.checkpoint import load_checkpoint
from bytecap.report.plain import finite
from bytecap.system import distributed, watch
from bytecap.system.messages import packed, unpacked
from bytecap.system.ranks import ALONE, owners
from conftest import BUDGET, KINDS, SMALL
from test_probe import windows_of

DEADLY = 120.0  # seconds after which a test ends what hangs


class TestWithoutOthers:
    def test_work_is_divided_by_cost(self):
        costs = [7.0, 1.0, 1.0, 1.0, 4.0, 1.0, 3.0]
        found = owners(costs, 3)
        load = [sum(c for c, r in zip(costs, found, strict=True) if r == rank) for rank in range(3)]
        assert sorted(load) == [5.0, 6.0, 7.0]
        assert owners(costs, 1) == [0] * 7
        assert owners([], 4) == []

    def test_values_come_back_as_they_were(self):
        value = {
            "a": [1, 2.5, None, True, "ü"], "b": b"\x00\xff", "inner": {"x": [], "y": 0.1 + 0.2},
            "arrays": [np.arange(12, dtype=np.int8).reshape(3, 4).T, np.full((), 3.5), np.zeros((0, 3))],
        }  # fmt: skip
        found = unpacked(packed(value))
        arrays, wanted = found.pop("arrays"), value.pop("arrays")
        assert found == value
        for a, b in zip(arrays, wanted, strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
            assert a.shape == b.shape
        arrays[0][0, 0] = 9  # nobody else's memory

    def test_the_only_rank_has_everything(self):
        one = torch.ones(2)
        assert ALONE.first
        assert ALONE.all(3) == [3]
        assert ALONE.from_first(lambda: 4) == 4
        assert ALONE.spread([one], 0, "cpu")[0] is one
        assert ALONE.exchange([[one]], "cpu")[0][0] is one


def _talk(rank):
    """Every way of ranks to hand things over."""
    with distributed.joined("cpu") as ranks:
        assert (ranks.rank, ranks.size) == (rank, 3)
        assert ranks.all({"me": rank, "a": np.full(rank, 7)})[2]["a"].tolist() == [7, 7]
        assert ranks.from_first(lambda: rank) == 0
        made = []
        assert ranks.each([3, 1, 2, 2, 1], lambda i: made.append(i) or 10 * i) == [0, 10, 20, 30, 40]
        assert sorted(i for them in ranks.all(made) for i in them) == [0, 1, 2, 3, 4]
        tensors = [torch.full((2, rank), rank, dtype=torch.bfloat16), torch.tensor(rank / 3, dtype=torch.float64)]
        found = ranks.spread(tensors if rank == 1 else None, 1, "cpu")
        assert [t.tolist() for t in found] == [[[1.0], [1.0]], 1 / 3]
        sent = [[torch.tensor([rank, to]), torch.ones(to, dtype=torch.bool)] if to != 1 else [] for to in range(3)]
        arrived = ranks.exchange(sent, "cpu")
        assert [[t.tolist() for t in ts] for ts in arrived] == [
            [] if rank == 1 else [[source, rank], [True] * rank] for source in range(3)
        ]
        ranks.agree({"the weather": "fine"})


@pytest.mark.slow
def test_ranks_hand_things_over(tmp_path):
    assert several.together(3, _talk, tmp_path) == [(0, "")] * 3


def _differs(rank):
    with distributed.joined("cpu") as ranks:
        ranks.agree({"the weather": "fine", "the sea": "calm" if rank != 1 else "rough"})
        raise AssertionError


def _diverges(rank):
    with distributed.joined("cpu") as ranks:
        ranks.all(1) if rank else ranks.from_first(lambda: 1)


def _fails(rank):
    with distributed.joined("cpu") as ranks:
        if rank == 1:
            raise ValueError("no ink\nleft")
        ranks.all(1)


def line_of(found):
    """The one line that all ranks have printed together; all have failed."""
    assert all(code == 2 for code, _ in found), found
    lines = "".join(text for _, text in found).splitlines()
    assert len(lines) == 1, found
    return lines[0]


def test_ranks_that_differ_are_both_named(tmp_path):
    line = line_of(several.together(2, _differs, tmp_path))
    assert "the sea differs: calm for rank 0 of 2" in line
    assert "rough for rank 1 of 2" in line


def test_ranks_that_went_other_ways_end(tmp_path):
    line = line_of(several.together(2, _diverges, tmp_path))
    assert "another way" in line


def test_an_error_on_one_rank_ends_all_and_is_told_once(tmp_path):
    line = line_of(several.together(2, _fails, tmp_path))
    assert "rank 1 of 2" in line
    assert "no ink left" in line


@pytest.mark.parametrize("other", [0, 1])
def test_another_version_is_refused_and_both_are_named(tmp_path, monkeypatch, other):
    def work(rank):
        if rank == other:
            monkeypatch.setattr(watch, "__version__", "9.9")
            for module in (watch, distributed):
                monkeypatch.setattr(module, "library", lambda: "9.9 0123456789")
        with distributed.joined("cpu"):
            raise AssertionError

    line = line_of(several.together(2, work, tmp_path))
    assert "01234567" in line
    assert line.count("of 2 on ") >= 2


def test_another_kind_of_device_is_refused_before_ranks_talk(tmp_path, monkeypatch):
    def work(rank):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: rank == 0)
        with distributed.joined("auto"):
            raise AssertionError

    line = line_of(several.together(2, work, tmp_path))
    assert "computes on cuda" in line
    assert "on cpu" in line


class TestStatistics:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_sums_are_those_of_one_process(self, model_directory, tmp_path, kind):
        model, windows = load_checkpoint(model_directory(kind)), windows_of(24, 61)
        alone = probe(model.module, model.units, windows, seed=3)

        def work(rank):
            with distributed.joined("cpu") as ranks:
                found = probe(model.module, model.units, windows, seed=3, ranks=ranks)
                (tmp_path / f"found{rank}").write_bytes(pickle.dumps(found))

        assert several.together(2, work, tmp_path) == [(0, "")] * 2
        both = [pickle.loads((tmp_path / f"found{r}").read_bytes()) for r in range(2)]  # noqa: S301 (we wrote it)
        assert set(both[0].uses) | set(both[1].uses) == set(alone.uses)
        assert not set(both[0].uses) & set(both[1].uses)
        assert all(len(found.uses) > 1 for found in both)
        for rank, found in enumerate(both):
            assert found.tokens == alone.tokens
            assert found.owner == both[0].owner
            for name, uses in found.uses.items():
                assert found.owner[name] == rank
                for one, two in zip(uses, alone.uses[name], strict=True):
                    for part in ("moment", "rows", "weight"):
                        assert torch.equal(getattr(one, part), getattr(two, part)), (name, part)
            assert found.diagonal.keys() == alone.diagonal.keys()
            assert all(np.array_equal(found.diagonal[n], d) for n, d in alone.diagonal.items())

    @pytest.mark.slow
    def test_memory_that_ends_on_one_rank_halves_the_batches_of_all(self, model_directory, tmp_path, monkeypatch):
        from bytecap.calibration import divided

        model, windows, said, sizes = load_checkpoint(model_directory("rotary")), windows_of(24, 61), [], []
        whole = divided.passes

        def work(rank):
            def short(sinks, owner, count, ranks, device, run, *others):
                def ending(i):
                    if rank == 1 and len(sizes) == 1:
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    run(i)

                sizes.append(count)
                whole(sinks, owner, count, ranks, device, ending, *others)

            monkeypatch.setattr(divided, "passes", short)
            with distributed.joined("cpu") as ranks:
                found = probe(model.module, model.units, windows, seed=3, note=said.append, ranks=ranks)
                assert found.tokens == 24 * 60
                assert any("out of device memory" in s for s in said), said
                assert sizes[1] > sizes[0]

        assert several.together(2, work, tmp_path) == [(0, "")] * 2


def fit_words(directory, texts, output, *more):
    """A fit of a tiny model on the command line, as `fitted` makes it."""
    return [
        "fit", directory, "--budget", BUDGET, "-o", output, "--calib", texts["calib"], "--eval", texts["val"],
        "--tokens", SMALL["tokens"], "--eval-tokens", SMALL["evaluation_tokens"], "--window", SMALL["window"],
        "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.slow
class TestWholeFits:
    @pytest.mark.parametrize(
        ("count", "kind"),
        [(2, "rotary"), pytest.param(3, "biased", marks=pytest.mark.nightly)],
    )
    def test_the_file_is_that_of_one_process(self, fitted, model_directory, texts, tmp_path, count, kind):
        words = fit_words(model_directory(kind), texts, tmp_path / "a.bcap", "--json")
        (code, said), *others = several.together(count, several.command(words), tmp_path)
        assert code == 0, said
        assert others == [(0, "")] * (count - 1)
        alone = fitted(kind)[0]
        assert (tmp_path / "a.bcap").read_bytes() == alone.data
        report = json.loads(said)
        for key, value in alone.report.items():
            assert key == "seconds" or report[key] == json.loads(json.dumps(finite(value))), key

    def test_a_streamed_model_too(self, fitted, model_directory, texts, tmp_path):
        """Chunks of one block are on every rank; batches and sums of it are divided."""
        words = fit_words(model_directory("rotary"), texts, tmp_path / "a.bcap", "--memory", "100MB")
        (code, said), other = several.together(2, several.command(words), tmp_path)
        assert code == 0, said
        assert other == (0, "")
        assert "the model is streamed" in " ".join(said.split())
        assert (tmp_path / "a.bcap").read_bytes() == fitted()[0].data

    @pytest.mark.nightly
    def test_a_streamed_fit_that_loses_a_rank_leaves_no_work_files_of_others(self, model_directory, texts, tmp_path):
        words = fit_words(model_directory("rotary"), texts, tmp_path / "a.bcap", "--memory", "100MB", "--json")
        pids = several.start(2, several.command(words), tmp_path)
        _wait_for(lambda: len([p for p in tmp_path.glob("bytecap-*/*") if p.stat().st_size]) > 8)
        os.kill(pids[1], signal.SIGKILL)
        assert "rank 1 of 2" in several.finished(pids, tmp_path)[0][1]
        assert len(list(tmp_path.glob("bytecap-*"))) == 1  # of the killed one

    @pytest.mark.nightly
    @pytest.mark.parametrize("count", [1, 2])
    def test_started_by_torchrun(self, fitted, model_directory, texts, tmp_path, count):
        words = fit_words(model_directory("rotary"), texts, tmp_path / "a.bcap", "--json")
        start = ["-m", "torch.distributed.run", "--nproc-per-node", count, "-m", "bytecap"]
        done = subprocess.run(  # noqa: S603 (our own code)
            [sys.executable, *map(str, [*start, *words])], env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1
        assert (tmp_path / "a.bcap").read_bytes() == fitted()[0].data

    @pytest.mark.nightly
    def test_several_budgets_and_a_dry_run(self, fitted, model_directory, texts, tmp_path):
        words = fit_words(model_directory("rotary"), texts, tmp_path / "{budget}.bcap", "--json")
        words[words.index(BUDGET)] = f"{BUDGET},{BUDGET + 2000}"
        found = several.together(2, several.command(words), tmp_path)
        assert [code for code, _ in found] == [0, 0], found
        assert [f["budget_bytes"] for f in json.loads(found[0][1])["fits"]] == [BUDGET, BUDGET + 2000]
        assert (tmp_path / f"{BUDGET}.bcap").read_bytes() == fitted()[0].data
        found = several.together(2, several.command([*words, "--dry-run"]), tmp_path)
        assert [code for code, _ in found] == [0, 0], found


def _wait_for(found):
    """Wait until something is there."""
    end = time.monotonic() + DEADLY
    while not found() and time.monotonic() < end:
        time.sleep(0.02)
    assert found()


@pytest.mark.slow
class TestLostRanks:
    @pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.nightly)])
    def test_a_killed_rank_ends_the_others_and_the_store_goes_on(
        self, fitted, model_directory, texts, tmp_path, victim
    ):  # fmt: skip
        store = tmp_path / "store"
        words = fit_words(model_directory("rotary"), texts, tmp_path / "a.bcap", "--store", store)
        pids = several.start(2, several.command(words), tmp_path)
        _wait_for(lambda: list(store.glob("*.npz")))  # statistics are finished
        os.kill(pids[victim], signal.SIGKILL)
        found = several.finished(pids, tmp_path)
        assert found[victim][0] == -signal.SIGKILL
        code, said = found[1 - victim]
        assert code == 2
        (line,) = [x for x in said.splitlines() if x.startswith("error:")]
        assert f"rank {victim} of 2" in line
        assert "--store" in line
        assert "Traceback" not in said
        assert not (tmp_path / "a.bcap").exists()
        before = {p.name for p in store.iterdir()}
        assert [code for code, _ in several.together(2, several.command([*words, "--json"]), tmp_path)] == [0, 0]
        assert (tmp_path / "a.bcap").read_bytes() == fitted()[0].data
        assert before <= {p.name for p in store.iterdir()}

    def test_the_store_of_several_serves_one(self, model_directory, texts, tmp_path, monkeypatch):
        """Statistics have the same names and bytes whoever makes them."""
        from bytecap.calibration import statistics

        words = fit_words(model_directory("rotary"), texts, tmp_path / "a.bcap", "--store", tmp_path / "store")
        assert [code for code, _ in several.together(2, several.command(words), tmp_path)] == [0, 0]
        monkeypatch.setattr(statistics, "probe", None)
        one = bytecap.fit(
            model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"],
            store=tmp_path / "store", device="cpu", **SMALL,
        )  # fmt: skip
        assert (tmp_path / "a.bcap").read_bytes() == one.data


@pytest.mark.slow
class TestRefusals:
    @pytest.fixture
    def refused(self, model_directory, texts, tmp_path):
        """Function: the line that two ranks refuse a command with, of which rank 1 may get other words."""

        def call(*more, others=None, model=None, other=None):
            first = model or model_directory("rotary")  # built here, where nobody listens

            def words(rank):
                directory = (other if rank == 1 else None) or first
                own = others if rank == 1 and others else more
                return fit_words(directory, texts, tmp_path / "a.bcap", "--json", *own)

            line = line_of(several.together(2, several.command(words), tmp_path))
            assert line.startswith("error: ")
            assert not (tmp_path / "a.bcap").exists()
            return line

        return call

    @pytest.mark.parametrize(
        ("more", "what"),
        [
            (["--method", "golf"], "method golf"),
            pytest.param(["--recover", "2"], "recovery", marks=pytest.mark.nightly),
            pytest.param(["--paths", "outliers"], "overlays", marks=pytest.mark.nightly),
            pytest.param(["--format", "gguf"], "the format gguf", marks=pytest.mark.nightly),
            pytest.param(["--layout", "hub"], "the layout hub", marks=pytest.mark.nightly),
        ],
    )
    def test_what_is_not_divided(self, refused, more, what):
        line = refused(*more)
        assert what in line
        assert "one process" in line

    def test_another_command_than_fit(self, fitted, tmp_path):
        path = tmp_path / "a.bcap"
        path.write_bytes(fitted()[0].data)
        assert "check is not divided" in line_of(several.together(2, several.command(["check", path]), tmp_path))

    def test_a_misspelt_option(self, tmp_path):
        found = several.together(2, several.command(["fit", "demo", "--bugdet", "3MB"]), tmp_path)
        assert "--bugdet" in line_of(found)

    def test_other_options(self, refused):
        line = refused("--seed", "1", others=["--seed", "2"])
        assert "the option seed differs: 1 for rank 0 of 2" in line
        assert "2 for rank 1 of 2" in line

    def test_another_checkpoint_under_the_same_name(self, refused, model_directory, copied, monkeypatch):
        from safetensors.torch import load_file, save_file

        weights = load_file(copied / "model.safetensors")
        name = max(weights, key=lambda n: weights[n].numel())
        save_file(weights | {name: -weights[name]}, copied / "model.safetensors", metadata={"format": "pt"})
        monkeypatch.setattr("bytecap.pipeline.several.named", lambda _: "the same")
        line = refused(model=model_directory("rotary"), other=copied)
        assert "the checkpoint (weights) differs" in line
        assert "rank 1 of 2" in line
