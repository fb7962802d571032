import json
import math
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sentencepiece")
FOLDER = Path(__file__).resolve().parents[1] / "examples" / "parameter_golf"


@pytest.fixture(scope="module")
def example():
    """The example's modules, imported as its scripts import one another."""
    sys.path.insert(0, str(FOLDER))
    names = ("data", "model", "evaluate", "train")
    try:
        yield {n: __import__(n) for n in names}
    finally:
        sys.path.remove(str(FOLDER))
        for n in names:
            sys.modules.pop(n, None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Tokenizer and shards of the embedded texts."""
    return write_shards(tmp_path_factory.mktemp("shards"))


def write_shards(folder, characters=None):
    """Tokenizer and shards of the first `characters` of both embedded texts."""
    demo, texts = resources.files("bytecap") / "data" / "demo", []
    for name in ("calib.txt", "val.txt"):
        texts.append(folder / name)
        texts[-1].write_text((demo / name).read_text("utf-8")[:characters], "utf-8")
    command = [sys.executable, str(FOLDER / "data.py"), "-o", str(folder), "--held-out", "7", *map(str, texts)]
    subprocess.run([*command, "--shard-tokens", "100000"], check=True, capture_output=True)  # noqa: S603
    return folder


@pytest.mark.slow
def test_the_baseline_has_the_challenges_parameters(example):
    state = example["model"].baseline().state_dict()
    assert sum(t.numel() for t in state.values()) == 17_059_912
    assert {"tok_emb.weight", "skip_weights", "blocks.8.attn.c_k.weight", "blocks.0.mlp.proj.weight"} <= set(state)
    assert {"blocks.3.attn.q_gain", "blocks.3.attn_scale", "blocks.3.mlp_scale", "blocks.3.resid_mix"} <= set(state)
    assert state["skip_weights"].shape == (4, 512)
    assert state["blocks.0.attn.c_v.weight"].shape == (256, 512)


@pytest.mark.parametrize("name", ["mini", "mini_looped"])
def test_models_are_causal_and_loss_matches_logits(example, name):
    torch.manual_seed(0)
    model = getattr(example["model"], name)()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    ids = torch.randint(0, 1024, (2, 24))
    logits = model(ids)
    assert logits.abs().max() < 30
    changed = ids.clone()
    changed[:, 16:] = 7
    torch.testing.assert_close(model(changed)[:, :16], logits[:, :16], rtol=1e-4, atol=1e-4)
    assert (model(changed)[:, 16:] - logits[:, 16:]).abs().max() > 1e-2
    expected = -torch.log_softmax(logits, -1).gather(-1, changed[..., None]).mean()
    torch.testing.assert_close(model(ids, changed), expected)


def test_gains_belong_to_single_uses_of_a_shared_block(example):
    model = example["model"].mini_looped()
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ids = torch.randint(0, 1024, (1, 8))
    before = model(ids)
    assert len(model.use_gains) == 4  # two blocks, twice each
    for row in range(4):
        kept = model.use_gains.data[row].clone()
        model.use_gains.data[row] = 0
        assert not torch.allclose(model(ids), before)
        model.use_gains.data[row] = kept
    torch.testing.assert_close(model(ids), before)


def test_counted_bytes_are_the_texts_own(example, shards):
    import sentencepiece

    data = example["data"]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(shards / "tokenizer.model"))
    assert tokenizer.vocab_size() == 1024
    texts = ["plain words", "  indented\n\ttab  and   runs ", "naïve é 日本 \U0001f600", "1234", ""]
    table = data.byte_table(tokenizer)
    for text in texts:
        tokens = data.encode(tokenizer, [text])
        assert data.count_bytes(tokens, table) == len(text.encode())
    everything = data.encode(tokenizer, texts)
    assert data.count_bytes(everything, table) == sum(len(t.encode()) for t in texts)
    assert tokenizer.decode(data.encode(tokenizer, texts[2:3]).tolist()) == texts[2]


def test_shards_are_split_and_disjoint_by_document(example, shards):
    import sentencepiece

    data = example["data"]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(shards / "tokenizer.model"))
    assert len(list(shards.glob("train_*.bin"))) == 2
    found = {}
    for kind in ("train", "val"):
        tokens = data.read_shards(shards, kind)
        starts = np.flatnonzero(tokens == tokenizer.bos_id())
        found[kind] = {tuple(part[1:]) for part in np.split(tokens, starts[1:])}
    assert found["train"]
    assert found["val"]
    assert not found["train"] & found["val"]


def test_broken_shards_are_refused(example, tmp_path):
    data = example["data"]
    path = tmp_path / "val_000000.bin"
    data.write_shard(path, np.arange(9, dtype=np.uint16))
    assert data.read_shard(path).tolist() == list(range(9))
    raw = path.read_bytes()
    for broken in (raw[:-1], raw + b"\0\0", raw[:100], b"\1" + raw[1:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"val_000000\.bin"):
            data.read_shard(path)
    with pytest.raises(ValueError, match="no train"):
        data.read_shards(tmp_path, "train")


def test_uniform_predictions_score_the_vocabulary(example, shards):
    tokens, table = example["evaluate"].held_out(shards)
    model = example["model"].mini()
    torch.nn.init.zeros_(model.tok_emb.weight)
    score = example["evaluate"].evaluate(model, tokens[:3000], table, length=256)
    assert score["tokens"] == 2999
    assert score["loss"] == pytest.approx(math.log(1024), rel=1e-6)
    assert score["bits_per_byte"] == pytest.approx(10 * 2999 / score["bytes"], rel=1e-6)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_steps_are_those_of_torchs_muon(example, monkeypatch, shape):
    """In bfloat16 in every bit; in float32, which a processor takes, singular values end as near to 1."""
    train = example["train"]
    draw = torch.Generator().manual_seed(0)
    first, gradients = torch.randn(shape, generator=draw), torch.randn(3, *shape, generator=draw)
    assert train.orthogonal(first).dtype is torch.float32
    values = torch.linalg.svdvals(train.orthogonal(first))
    assert values.min() > 0.5
    assert values.max() < 1.5
    monkeypatch.setattr(train, "products", lambda _: torch.bfloat16)
    ours, theirs = torch.nn.Parameter(first.clone()), torch.nn.Parameter(first.clone())
    idle = torch.nn.Parameter(first.clone())  # has no gradient
    steps = [
        train.Muon([idle, ours], rate=0.1, decay=0.2, momentum=0.9),
        torch.optim.Muon([idle, theirs], lr=0.1, weight_decay=0.2, momentum=0.9),
    ]
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        for s in steps:
            s.step()
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, first)
    assert torch.equal(idle, first)
    assert idle not in steps[0].state


@pytest.mark.parametrize(
    ("capability", "hip", "native"), [((7, 5), None, False), ((8, 0), None, True), ((0, 0), "6", True)]
)
def test_products_are_in_bfloat16_where_a_gpu_has_it(example, monkeypatch, capability, hip, native):
    monkeypatch.setattr("torch.version.hip", hip)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    assert example["train"].products(torch.device("cuda")) is (torch.bfloat16 if native else torch.float32)
    assert example["train"].products(torch.device("cpu")) is torch.float32


@pytest.mark.slow
def test_training_learns_and_repeats(example, tmp_path, monkeypatch):
    """The script in a process of its own, and called in this one, whose imports are there."""
    scores, shards = [], write_shards(tmp_path, 60_000)
    for run in range(2):
        out = tmp_path / f"{run}.pt"
        command = [str(FOLDER / "train.py"), "--factory", "mini_looped", "--data", str(shards)]
        command += ["--steps", "20", "--batch", "512", "--device", "cpu", "-o", str(out)]
        if run == 0:
            subprocess.run([sys.executable, *command], check=True, capture_output=True)  # noqa: S603
        else:
            monkeypatch.setattr(sys, "argv", command)
            example["train"].main()
        facts = json.loads(out.with_suffix(".json").read_text())
        assert facts["log"][-1]["step"] == 20
        scores.append(facts["loss"])
    assert scores[0] == scores[1]
    assert scores[0] < math.log(1024) - 0.8
    first, second = (torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
