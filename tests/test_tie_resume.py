"""`tie` that was killed goes on from its store to the bytes of an undisturbed run."""

import pytest

from bytecap.recovery import checkpointing, kl_passes
from bytecap_lab.layer_tying import tie as convert
from bytecap_lab.layer_tying.uptrain import Trainer

SEARCHES = {None: 2, "greedy": 3, "dlt": 3}  # and blocks that are left


class Killed(BaseException):
    """Stands for SIGKILL where the moment matters."""


@pytest.fixture
def tie(four, texts, tmp_path, monkeypatch):
    """Function: bytes of the weights, the report, and the moves made; dies before move `killed`."""
    monkeypatch.setattr(checkpointing, "SECONDS", 0.0)
    monkeypatch.setitem(kl_passes._TOKENS, "cpu", 256)  # of a move: what is counted here is moves
    iterate = Trainer.iterate

    def run(search=None, killed=None, store="store", seed=0, rate=1e-3):
        made = []

        def counted(self, *args):
            if len(made) == killed:
                raise Killed
            made.append(1)
            return iterate(self, *args)

        monkeypatch.setattr(Trainer, "iterate", counted)
        output = tmp_path / "out"

        def work():
            return convert(
                four, SEARCHES[search], output, rank=2, train=texts["calib"], steps="6", search=search,
                search_steps="12", seed=seed, rate=rate, store=store and tmp_path / store,
            )  # fmt: skip

        if killed is not None:
            with pytest.raises(Killed):
                work()
            assert not (output / "model.safetensors").exists()
            return None
        report = work()
        del report["uptraining"]["seconds"]
        data = (output / "model.safetensors").read_bytes()
        (output / "model.safetensors").unlink()
        return data, report, len(made)

    return run


@pytest.mark.slow
class TestGoingOn:
    @pytest.mark.parametrize(("search", "deaths"), [(None, (0, 1, 3, 1)), ("greedy", (1, 5, 7)), ("dlt", (1, 6, 5, 3))])
    def test_to_the_bytes_of_an_undisturbed_run(self, tie, search, deaths):
        """Dies again and again, each time some moves after where it went on from."""
        data, report, whole = tie(search, store=None)
        for moves in deaths:
            tie(search, killed=moves)
        again, found, made = tie(search)
        assert again == data
        assert found == report
        assert made <= whole - sum(deaths) + 2 * len(deaths)  # moves since the last state are made again
        assert tie(search)[::2] == (data, 0)  # and a finished run makes none

    def test_after_divergence(self, tie):
        data, report, moves = tie(store=None, rate=30.0)
        assert report["uptraining"]["diverged"]
        tie(killed=moves - 1, rate=30.0)
        again, found, _ = tie(rate=30.0)
        assert again == data
        assert found == report

    @pytest.mark.parametrize("search", [None, pytest.param("dlt", marks=pytest.mark.nightly)])
    def test_spoiled_entries_are_not_trusted(self, tie, search, tmp_path):
        data, _, whole = tie(search, store=None)
        tie(search, killed=whole - 2)
        entries = sorted((tmp_path / "store").iterdir())
        assert len(entries) == (1 if search is None else 2)
        for number, path in enumerate(entries):
            kept = bytearray(path.read_bytes())
            kept[len(kept) // 2] ^= 1
            path.write_bytes(kept[:-1] if number else kept)
        assert tie(search)[::2] == (data, whole)

    @pytest.mark.parametrize(("search", "entries"), [(None, 1), pytest.param("dlt", 2, marks=pytest.mark.nightly)])
    def test_other_runs_find_what_is_theirs_alone(self, tie, tmp_path, search, entries):
        tie(search, killed=14 if search else 3)
        for changes in ({"seed": 1}, {"rate": 2e-3}):
            assert tie(search, **changes) == tie(search, store=None, **changes)
        assert len(list((tmp_path / "store").iterdir())) == 3 * entries
