"""Token shards, byte tables and factories, from the command line and below it."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bytecap
from bytecap.errors import CheckpointError, TextError
from bytecap.model.factory import fill, load_callable, make_module, read_state
from bytecap.model.shards import byte_counts, read_shard, shard_sets, windows

FACTORY = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, dim=64, speaks="logits"):
        super().__init__()
        self.tok_emb = nn.Embedding(96, dim)
        self.fc = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, ids):
        x = self.tok_emb(ids)
        return 0.1 * F.linear(x + self.proj(F.relu(self.fc(x)).square()), self.tok_emb.weight)

class Loss(Net):
    def forward(self, ids, targets):
        return F.cross_entropy(super().forward(ids).flatten(0, 1), targets.flatten())

class Peeking(Net):
    def forward(self, ids):
        x = self.tok_emb(ids)
        return 0.1 * F.linear(x + 0.1 * torch.roll(x, -1, 1), self.tok_emb.weight)

def number():
    return 3

def broken():
    raise ValueError("no weights today")

def empty():
    return nn.Sequential(nn.GELU())

def other():
    net = Net(dim=32)
    net.up, net.fc = net.fc, None
    return net

def nan(module, ids):
    return module(ids).sum() * float("nan")

def vector(module, ids):
    return module(ids).sum(-1)

def usual(module, ids):
    return F.cross_entropy(module(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
"""


def shard(path, tokens, *, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


@pytest.fixture
def place(tmp_path):
    """A directory with a factory, checkpoints, shards and a table."""
    (tmp_path / "net.py").write_text(FACTORY, "utf-8")
    torch.manual_seed(0)
    state = make_module(f"{tmp_path}/net.py:Net").state_dict()
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    rng = np.random.default_rng(0)
    for name, size in (("train_0.bin", 6000), ("train_1.bin", 6000), ("val.bin", 3000)):
        shard(tmp_path / name, rng.integers(1, 96, size))
    np.save(tmp_path / "bytes.npy", np.stack([np.full(96, 2), np.arange(96) % 2, np.arange(96) == 0], 1).astype(int))
    return tmp_path


@pytest.fixture
def command(place):
    """Function: arguments of a `fit` with parts replaced."""

    def build(factory="Net", state="state.pt", **changes):
        options = {"--tokens": "train_*.bin", "--eval-tokens": "val.bin", "--budget": "16000"} | changes
        found = ["fit", "--factory", f"{place}/net.py:{factory}", "-o", place / "net.bcap"]
        found += ["--state", place / state] if state else []
        for name, value in options.items():
            if value is not None:
                found += [name, place / value if value.endswith((".bin", ".npy", ".model", ".txt")) else value]
        return found

    return build


class TestShards:
    def test_tokens(self, place):
        found = windows(read_shard(place / "val.bin"), 512, None, byte_counts(place / "bytes.npy"))
        tokens = read_shard(place / "val.bin")
        assert sum(w.predicted for w in found) == len(tokens) - 1
        assert sum(w.bytes for w in found) == 2 * (len(tokens) - 1) + int((tokens[1:] % 2).sum())

    def test_sets_are_disjoint_and_the_tail_is_held_out(self, place):
        calib = [place / "train_0.bin", place / "train_1.bin"]
        sets = shard_sets(
            calib, [], window=128, tokens=4000, evaluation_tokens=1000, seed=0, vocabulary=96, counts=None
        )
        parts = [{w.tokens for w in part} for part in (sets.statistics, sets.correction, sets.evaluation[0].windows)]
        assert all(parts)
        assert not parts[0] & parts[1]
        assert not parts[2] & (parts[0] | parts[1])
        tail = read_shard(calib[1])[-1001:]
        assert sets.evaluation[0].windows[0].tokens[0] == tail[0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"magic": 7}, "begins with 7, not with 20240520"),
            ({"version": 2}, "has version 2"),
            ({"count": 3001}, "declares 3001 tokens, 7026 bytes, but has 7024"),
            ({"count": -1}, "declares -1 tokens"),
        ],
    )
    def test_damaged(self, tmp_path, change, message):
        path = shard(tmp_path / "bad.bin", np.zeros(3000), **change)
        with pytest.raises(TextError, match=message):
            read_shard(path)

    def test_short(self, tmp_path):
        (tmp_path / "short.bin").write_bytes(bytes(100))
        with pytest.raises(TextError, match="truncated: 100 bytes"):
            read_shard(tmp_path / "short.bin")

    @pytest.mark.parametrize("content", ["a b\n", "1 2\n", "-1\n", "1 0 0 0\n", "1\n1 0\n"])
    def test_tables_that_are_none(self, tmp_path, content):
        (tmp_path / "table.txt").write_text(content, "utf-8")
        with pytest.raises(TextError, match="no table of bytes per token"):
            byte_counts(tmp_path / "table.txt")

    def test_sentencepiece_counts_the_bytes_of_the_text(self, tmp_path):
        sentencepiece = pytest.importorskip("sentencepiece")
        text = ["the quick brown fox jumps over the lazy dog", "a naïve façade: déjà vu", "the dog and the fox"] * 30
        (tmp_path / "text.txt").write_text("\n".join(text), "utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=300, byte_fallback=True,
            model_type="bpe", hard_vocab_limit=False, minloglevel=2, add_dummy_prefix=False, character_coverage=0.98,
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
        counts = byte_counts(tmp_path / "sp.model")
        for line in ("the dog, naïve: ü", "fox over fox"):
            tokens = np.array([model.bos_id(), *model.encode(line)])
            assert counts.of(tokens).sum() == len(line.encode())
        assert counts.control[model.bos_id()]
        assert counts.size[model.bos_id()] == 0
        start = model.piece_to_id("\u2581the")  # its marker stands for no byte behind a control
        assert counts.of(np.array([model.bos_id(), start])).tolist() == [3]
        assert counts.of(np.array([start, start])).tolist() == [4]


class TestCommands:
    @pytest.mark.slow
    def test_fit_eval_inspect(self, place, command, run):
        reports = {}
        for factory, state in (("Net", "state.pt"), ("Loss", "state.safetensors"), ("Net", None)):
            code, out, err = run(*command(factory, state, **{"--bytes-per-token": "bytes.npy"}), "--json")
            assert code == 0, err
            assert (place / "net.bcap").stat().st_size <= 16_000
            reports[factory, state] = json.loads(out)
            shared = ("--tokens", place / "val.bin", "--bytes-per-token", place / "bytes.npy", "--json")
            code, out, err = run("eval", place / "net.bcap", "--factory", f"{place}/net.py:{factory}", *shared)
            assert code == 0, err
            assert json.loads(out)["bpb"] == pytest.approx(reports[factory, state]["bpb_artifact"], rel=1e-5)
        one, two = reports["Net", "state.pt"], reports["Loss", "state.safetensors"]
        assert one["bpb_original"] == pytest.approx(two["bpb_original"], rel=1e-5)
        assert 1 / 3 < one["kl_nats"] / two["kl_nats"] < 3  # three small matrices: the luck of one rounding
        code, out, _ = run("inspect", place / "net.bcap", "--json")
        assert code == 0
        assert {u["unit"] for u in json.loads(out)["units"]} == {"tok_emb.weight", "fc.weight", "proj.weight"}
        arguments = (
            "inspect",
            "--factory",
            f"{place}/net.py:Loss",
            "--budget",
            "16000",
            "--tokens",
            place / "train_0.bin",
        )
        units = {u["unit"]: u for u in json.loads(run(*arguments, "--json")[1])["units"]}
        assert units["tok_emb.weight"]["uses"] == 2
        assert units["fc.weight"]["uses"] == 1
        assert 13_000 < sum(u["planned_bytes"] for u in units.values()) < 16_000
        code, out, _ = run(*arguments)
        assert code == 0
        assert "tok_emb" in out
        assert "2 uses" in out

    @pytest.mark.slow
    def test_several_budgets(self, place, command, run):
        arguments = [str(a) for a in command("Loss", "state.pt")]
        arguments[arguments.index("--budget") + 1] = "14kB,16000"
        arguments[arguments.index("-o") + 1] = f"{place}/net-{{budget}}.bcap"
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        reports = json.loads(out)["fits"]
        assert [r["budget_bytes"] for r in reports] == [14_000, 16_000]
        for report, name in zip(reports, ("14kB", "16000"), strict=True):
            path = place / f"net-{name}.bcap"
            assert path.stat().st_size == report["file_bytes"] <= report["budget_bytes"]
            path.unlink()
        assert run(*command("Loss", "state.pt"))[0] == 0
        assert (place / "net.bcap").stat().st_size == reports[1]["file_bytes"]

    @pytest.mark.slow
    def test_a_loss_of_ones_own(self, command, run):
        code, out, err = run(*command("Net", "state.pt"), "--loss", f"{command()[2].split(':')[0]}:usual", "--json")
        assert code == 0, err
        assert json.loads(out)["kl_nats"] < 0.05

    def test_arguments_of_the_factory(self, place):
        assert make_module(f"{place}/net.py:Net(dim=16)").fc.weight.shape == (32, 16)

    def test_only_a_factory_takes_shards(self, place, refused, job):
        assert "no number" in refused(*job(), "--tokens", place / "val.bin")

    @pytest.mark.parametrize(
        ("factory", "message"),
        [
            ("nothing", "holds no callable 'nothing'"),
            ("Nett", "did you mean Net?"),
            ("number", "returned int, not a torch module"),
            ("broken", "raised ValueError: no weights today"),
            ("empty", "no parameters"),
            ("Net(dim=x)", "values being literals"),
        ],
    )
    def test_factories(self, command, refused, factory, message):
        assert message in refused(*command(factory, "state.pt" if factory != "empty" else None))

    def test_factory_file_missing(self, refused, command, place):
        (place / "net.py").unlink()
        assert "existing file" in refused(*command())

    def test_factory_file_that_fails(self, refused, command, place):
        (place / "net.py").write_text("import nothing_of_this_name", "utf-8")
        assert "raised ModuleNotFoundError" in refused(*command())

    def test_names_and_shapes_that_differ(self, refused, command):
        message = refused(*command("other"))
        assert "only in the module: up.weight" in message
        assert "only in the checkpoint: fc.weight" in message
        assert "tok_emb.weight [96, 32] against [96, 64]" in message

    def test_nearest_names_are_paired(self):
        with pytest.raises(CheckpointError, match=r"nearest names: 0\.weight ~ 0\.weights"):
            fill(torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)), {"0.weights": torch.zeros(2, 2)}, "x.pt")

    def test_pickled_objects_are_refused(self, refused, command, place, tmp_path):
        ran = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return (Path.touch, (ran,))

        torch.save({"w": Evil()}, place / "evil.pt")
        assert "pickled objects" in refused(*command(state="evil.pt"))
        (place / "plain.pt").write_bytes(pickle.dumps(Evil()))
        assert "pickled objects" in refused(*command(state="plain.pt"))
        assert not ran.exists()

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 and so on"])
    def test_checkpoints_that_are_none(self, place, content):
        (place / "bad.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.pt"):
            read_state(place / "bad.pt")

    def test_wrapped_and_prefixed_states(self, place):
        state = torch.load(place / "state.pt", weights_only=True)
        torch.save({"model": {f"_orig_mod.{n}": t for n, t in state.items()}, "step": 3}, place / "wrapped.pt")
        assert set(read_state(place / "wrapped.pt")) == set(state)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"--tokens": "wrong.bin"}, "begins with 7"),
            ({"--tokens": "none_*.bin"}, "no shard matches"),
            ({"--tokens": "none.bin"}, "cannot read the shard"),
            ({"--tokens": "beyond.bin"}, "holds the token 96 at 5, the vocabulary has 96 entries"),
            ({"--tokens": None}, "say what to calibrate on"),
            ({"--eval-tokens": "train_1.bin"}, "for calibration and for evaluation"),
            ({"--bytes-per-token": "none.npy"}, "no such file"),
        ],
    )
    @pytest.mark.parametrize("factory", ["Net", "Loss"])
    def test_shards(self, place, command, refused, changes, message, factory):
        shard(place / "wrong.bin", np.zeros(3000), magic=7)
        shard(place / "beyond.bin", [*range(5), 96, *range(90)] * 20)
        assert message in refused(*command(factory, **changes))

    def test_modules_that_see_later_tokens(self, place, command, refused):
        said = "(Peeking) is no causal language model: its predictions change with the"
        assert said in refused(*command("Peeking"))
        assert said in refused("eval", "--factory", f"{place}/net.py:Peeking", "--tokens", place / "val.bin")

    @pytest.mark.parametrize(("loss", "message"), [("nan", "returned nan"), ("vector", "one number, not a tensor")])
    def test_losses(self, place, command, refused, loss, message):
        assert message in refused(*command(), "--loss", f"{place}/net.py:{loss}")

    def test_help_says_what_is_run(self, run):
        for name in ("fit", "eval", "inspect"):
            assert "The file is run" in " ".join(run(name, "--help")[1].replace("│", " ").split())

    @pytest.mark.slow
    def test_artifact_that_does_not_fit_the_factory(self, place, command, run, refused):
        assert run(*command())[0] == 0
        message = refused(
            "eval", place / "net.bcap", "--factory", f"{place}/net.py:other", "--tokens", place / "val.bin"
        )
        assert "lacks up.weight" in message
        assert bytecap.load(place / "net.bcap")["fc.weight"].shape == (128, 64)

    def test_callables_are_found_by_name(self, place):
        found, arguments = load_callable(f"{place}/net.py:Net(dim=8)")
        assert (found.__name__, arguments) == ("Net", {"dim": 8})
