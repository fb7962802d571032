"""Streamed models give what models in memory give: statistics to the last bit, KL, comparisons, files."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import bytecap
from bytecap.allocation import asymmetric_targets, preparation
from bytecap.calibration.probe import probe
from bytecap.calibration.streamed import _Job, probe_streamed
from bytecap.errors import UsageError
from bytecap.model import head, streaming
from bytecap.model.chain import Chain, find_chain, hands_on_alone
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.evaluation import by_window, compare_models
from bytecap.model.inputs import check_causal
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.streamed_checkpoint import Unstreamable, open_streamed
from bytecap.model.texts import Text
from bytecap.pipeline import memory
from bytecap.quantization import stored
from bytecap.system import allocator
from bytecap.system.scratch import Scratch
from conftest import BUDGET, KINDS, SMALL, VOCABULARY
from test_probe import windows_of

WINDOWS = windows_of(5) + windows_of(2, 65, seed=1) + windows_of(1, 13, seed=2)


@pytest.fixture
def pair(model_directory):
    """Function: a model of a family in memory, and streamed."""

    def get(kind="rotary", **changes):
        directory = model_directory(kind, **{"dtype": torch.float32, **changes})
        return load_checkpoint(directory), open_streamed(directory, Scratch())

    return get


def collected(streamed, **told):
    found = {}
    rest = probe_streamed(
        streamed.streamed, streamed.units, WINDOWS, sink=found.__setitem__, scratch=Scratch(), seed=3, **told
    )
    return found, rest


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_a_model_in_memory(pair, kind):
    whole, streamed = pair(kind)
    assert (streamed.units, streamed.files) == (whole.units, whole.files)
    expected = probe(whole.module, whole.units, WINDOWS, seed=3)
    found, rest = collected(streamed)
    assert rest.tokens == expected.tokens
    assert found.keys() == expected.uses.keys()
    for name, uses in expected.uses.items():
        for one, other in zip(uses, found[name], strict=True):
            assert all(torch.equal(getattr(one, k), getattr(other, k)) for k in ("moment", "rows", "weight")), name
    assert rest.diagonal.keys() == expected.diagonal.keys()
    assert all(np.array_equal(rest.diagonal[n], d) for n, d in expected.diagonal.items())


def test_logits_in_pieces_give_the_same_statistics_but_for_what_is_sampled(pair, monkeypatch):
    _, streamed = pair(tie_word_embeddings=False)
    whole, _ = collected(streamed)
    monkeypatch.setitem(head._MOST, "cpu", 7 * VOCABULARY)
    with head.head_pieces(streamed.streamed, 8) as parts:
        assert parts.rows == 7
    pieces, _ = collected(streamed)
    for name, (use,) in pieces.items():
        assert 0.8 < float(use.rows.sum() / whole[name][0].rows.sum()) < 1.25, name


@pytest.mark.slow
def test_batches_are_halved_where_the_device_has_no_room_and_nothing_stays(pair, monkeypatch):
    _, streamed = pair("rotary", num_hidden_layers=3)
    monkeypatch.setattr("bytecap.calibration.streamed._batch_tokens", lambda *_: 128)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    few, rest = collected(streamed)
    monkeypatch.setattr("bytecap.calibration.streamed._batch_tokens", lambda *_: 256)
    block, waiting, said = _Job._block, [], []

    def full(self, number, gradients, *others):
        if len(self.data) < 6 and number == 1:
            waiting.extend(map(weakref.ref, gradients.values()))
            raise torch.OutOfMemoryError
        gc.collect()
        assert not any(ref() is not None for ref in waiting)
        block(self, number, gradients, *others)

    monkeypatch.setattr(_Job, "_block", full)
    again, other = collected(streamed, note=said.append)
    assert waiting
    assert said == ["statistics: out of device memory, 128 tokens a batch from now on"]
    assert other.tokens == rest.tokens
    for name, uses in few.items():
        for one, two in zip(uses, again[name], strict=True):
            assert torch.equal(one.moment, two.moment), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in streamed.module.modules())


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kl_and_comparisons_are_those_of_a_model_in_memory(pair, kind, pieces, monkeypatch):
    if pieces:
        monkeypatch.setitem(head._MOST, "cpu", 7 * VOCABULARY)
    models = pair(kind)
    generator = torch.Generator().manual_seed(0)
    values = {
        u.name: (models[0].tensor(u) + 0.01 * torch.randn(u.shape, generator=generator)).numpy()
        for u in models[0].units
    }
    some = dict(list(values.items())[::2])
    found = [by_window(m.module, copy_of(m.module), {"all": values, "some": some}, WINDOWS) for m in models]
    for label in ("all", "some"):
        np.testing.assert_allclose(found[1][label].kl, found[0][label].kl, rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(found[1][label].nats, found[0][label].nats, rtol=1e-5)
    assert not np.allclose(found[1]["all"].kl, found[1]["some"].kl, rtol=1e-2)
    scores = []
    for m in models:
        coded = copy_of(m.module)
        load_values(coded, values)
        scores.append(compare_models(m.module, coded, Text("text", tuple(WINDOWS))))
    assert scores[1].kl_nats == pytest.approx(scores[0].kl_nats, rel=1e-3)
    assert scores[1].nats_original == pytest.approx(scores[0].nats_original, rel=1e-5)
    assert all(p.is_meta for p in models[1].module.parameters())


def test_tensors_that_a_class_keeps_in_float32_stay_so(pair):
    _, streamed = pair()
    streamed.module._keep_in_fp32_modules_strict = ["norm"]
    copied = streamed.streamed.copy(torch.bfloat16)
    norm = copied.module.get_submodule("model.norm")
    with copied.outside(), copied.block(0) as loaded:
        found = {n: p.dtype for n, p in loaded.named_parameters()}
        norm(torch.ones(1, copied.module.config.hidden_size))
        assert norm.weight.dtype == torch.float32
    assert found["input_layernorm.weight"] == torch.bfloat16  # another name
    assert found["self_attn.q_proj.weight"] == torch.bfloat16


def test_causality_is_checked_and_one_pass_runs_streamed(pair):
    whole, streamed = pair()
    check_causal(streamed.module, "a model", VOCABULARY)
    ids = torch.tensor([[1, 2, 3]])
    found = streaming.run(streamed.module, lambda m: m(ids).logits)
    torch.testing.assert_close(found, whole.module(ids).logits)
    assert streaming.run(whole.module, lambda m: m(ids).logits).shape == found.shape


class Layers(nn.Module):
    """Two lists: one chained, a longer one that is not."""

    def __init__(self, between=False, again=False):
        super().__init__()
        self.chained = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.apart = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.between, self.again = between, again

    def forward(self, x):
        for layer in [*self.chained, *(self.chained if self.again else ())]:
            x = layer(x)
            x = x + 1 if self.between else x
        return x + sum(layer(x) for layer in self.apart)


def test_the_chain_is_where_each_module_is_fed_by_the_one_before():
    assert find_chain(m := Layers(), lambda: m(torch.ones(1, 4))) == Chain("chained", 3, 0)
    assert find_chain(m := Layers(between=True), lambda: m(torch.ones(1, 4))) is None
    assert find_chain(m := Layers(again=True), lambda: m(torch.ones(1, 4))) is None


def test_blocks_that_share_a_tensor_are_no_chain():
    module = Layers()
    module.chained[1].weight = module.chained[0].weight
    assert find_chain(module, lambda: module(torch.ones(1, 4))) is None


class Adding(nn.Module):
    """Blocks in a row, behind which something of what went into them is read again, or not."""

    def __init__(self, read):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.read = read

    def forward(self, x):
        seen = []
        for part in self.parts:
            seen.append(x)
            x = part(x)
        return x if self.read is None else x + seen[self.read]


@pytest.mark.parametrize("read", [None, 0, 1, 2])
def test_what_is_read_again_is_not_let_go_of(read):
    module, x = Adding(read), torch.randn(2, 4)
    chain, before = Chain("parts", 3, 0), x.clone()
    wanted = module(x).detach()
    assert hands_on_alone(module, lambda: module(x.clone()), chain, wanted) == (read is None)
    assert not hands_on_alone(module, lambda: module(x.clone()), chain, wanted + 1)
    assert not hands_on_alone(module, lambda: module(x), chain, wanted)  # its caller's
    assert torch.equal(x, before)
    assert torch.equal(module(x), wanted)


class Latent(nn.Module):
    """Blocks whose first is given a parameter, and tokens as another argument."""

    class Part(nn.Module):
        def forward(self, x, tokens):
            return x.sin() + tokens

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(self.Part() for _ in range(3))
        self.start = nn.Parameter(torch.randn(2, 4))

    def forward(self, tokens):
        x = self.start
        for part in self.parts:
            x = part(x, tokens)
        return x


@torch.no_grad()
def test_what_outlives_a_pass_is_not_let_go_of():
    module, x = Latent(), torch.randn(2, 4)
    wanted, before = module(x), module.start.clone()
    assert not hands_on_alone(module, lambda: module(x), Chain("parts", 3, 0), wanted)
    assert torch.equal(module.start, before)


def test_a_pass_that_waits_lets_go_of_what_its_block_has_read(pair):
    _, streamed = pair()
    lane, ids = streamed.streamed, torch.arange(8)[None]
    assert lane.alone
    wanted = streaming.run(lane.module, lambda m: m(ids).logits)
    one = streaming.Pass(lane, lambda m: m(ids).logits)
    with torch.no_grad():
        with lane.outside():
            handed = lane.chain.taken(*one.advance())
        for number in range(lane.chain.count):
            with lane.block(number):
                following = one.advance()
            assert handed.isnan().all()
            handed = following if isinstance(following, torch.Tensor) else lane.chain.taken(*following)
            assert handed.isfinite().all()
        with lane.outside():
            assert torch.equal(one.advance(), wanted)


def test_a_model_of_one_block_is_not_streamed(model_directory):
    with pytest.raises(Unstreamable, match="no chain"):
        open_streamed(model_directory("rotary", num_hidden_layers=1), Scratch())


@pytest.mark.slow
@pytest.mark.numeric
def test_a_streamed_fit_is_as_good_as_one_in_memory(model_directory, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(asymmetric_targets.ROUND_TOKENS, "cpu", 256)  # no walk along a chain goes in rounds
    files = {"calibration": texts["calib"], "evaluation": texts["val"]}
    directory = model_directory("rotary", num_hidden_layers=4)
    said = bytecap.fit(directory, BUDGET, output=tmp_path / "a.bcap", **files, **SMALL)
    limited = bytecap.fit(directory, BUDGET, output=tmp_path / "b.bcap", memory="1MB", **files, **SMALL)
    assert limited.length == len(limited.data) == (tmp_path / "b.bcap").stat().st_size <= BUDGET
    assert limited.report["kl_nats"] <= 1.01 * said.report["kl_nats"]
    for name in ("cost_without", "cost_with"):
        assert limited.report["targets"][name] == pytest.approx(said.report["targets"][name], rel=1e-3)
    assert sum(e.bytes for e in limited.ledger()) == limited.length
    values = bytecap.load(tmp_path / "b.bcap")
    assert values.keys() == limited.tensors().keys()
    assert limited.load_model() is not None
    assert limited.save(tmp_path / "c.bcap") == limited.length
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["a.bcap", "b.bcap", "c.bcap"]


@pytest.mark.slow
@pytest.mark.parametrize("large", [True, False])
def test_only_large_models_are_searched_on_samples_of_rows(large, model_directory, texts, monkeypatch):
    scaled, inner = [], stored.Sample.scaled
    monkeypatch.setattr(stored.Sample, "scaled", lambda item, coded: scaled.append(item.shape) or inner(item, coded))
    monkeypatch.setattr(stored, "_LEAST_ROWS", 16)
    if large:
        monkeypatch.setattr(preparation, "_LARGE", 0)
    found = bytecap.fit(
        model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"], memory="1MB", **SMALL
    )
    assert found.length <= BUDGET
    assert found.report["slack_bytes"] <= found.report["allowed_slack_bytes"]
    assert bool(scaled) == large
    assert all(16 <= rows <= 64 for rows, _ in scaled)


def test_models_that_fit_are_read_whole():
    assert not memory.needs_streaming(1_000_000_000, "cpu", 17_000_000_000)
    assert memory.needs_streaming(1_100_000_000, "cpu", 17_000_000_000)
    assert memory.needs_streaming(8_000_000_000, "cuda", 141_000_000_000)


def test_free_memory_is_what_linux_and_its_groups_leave(tmp_path):
    assert allocator.available(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\n")
    assert allocator.available(tmp_path) == 5120
    groups = tmp_path / "sys/fs/cgroup"
    groups.mkdir(parents=True)
    for most, expected in (("max", 5120), ("3000", 2000)):
        (groups / "memory.max").write_text(f"{most}\n")
        (groups / "memory.current").write_text("1000\n")
        assert allocator.available(tmp_path) == expected


def test_a_size_that_is_none_is_refused_before_anything_is_read(refused, job):
    assert "cannot read the size 'much'" in refused(*job(), "--memory", "much")


@pytest.mark.slow
def test_a_method_that_is_not_streamed_says_so(run, job):
    code, _, err = run(*job(), "--memory", "1MB")
    assert code == 0, err
    assert "is not streamed: method uniform needs it in memory" in " ".join(err.split())


@pytest.mark.slow
def test_a_chain_that_cannot_be_found_is_said_and_nothing_else_changes(run, job, model_directory, tmp_path):
    directory, files = model_directory("rotary", num_hidden_layers=1), []
    for more in ((), ("--memory", "1MB")):
        files.append(tmp_path / f"{len(more)}.bcap")
        code, _, err = run(*job(directory, output=files[-1]), *more, "--method", "bytecap")
        assert code == 0, err
        assert ("is not streamed: it has no chain of blocks" in " ".join(err.split())) == bool(more)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 60, 250])
def test_a_disk_that_is_full_half_way_is_one_line_and_leaves_nothing(refused, job, tmp_path, monkeypatch, number):
    output, left, write = tmp_path / "out" / "a.bcap", [number], Scratch._write
    output.parent.mkdir()
    output.write_bytes(b"old")

    def full(self, path, parts):
        def some():
            for part in parts:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(28, "No space left on device")
                yield part

        write(self, path, some())

    monkeypatch.setattr(Scratch, "_write", full)
    monkeypatch.setattr(memory, "_room", lambda *_: (0, 0))
    said = refused(*job(output=output), "--memory", "1MB", "--method", "bytecap")
    assert "cannot be written (No space left on device)" in said
    assert left == [-1]
    gc.collect()
    assert [p.name for p in output.parent.iterdir()] == ["a.bcap"]
    assert output.read_bytes() == b"old"


def test_samples_need_a_model_in_memory(pair):
    from bytecap.model.sources import sampled
    from bytecap.progress import Silent

    _, streamed = pair()
    with pytest.raises(UsageError, match="in memory"):
        sampled(streamed, 10, window=8, seed=0, device="cpu", reporter=Silent())


def test_thresholds_of_nested_work_come_back(monkeypatch):
    asked = {}
    library = SimpleNamespace(mallopt=asked.__setitem__)
    monkeypatch.setattr(allocator, "_library", lambda: library)
    monkeypatch.setattr(allocator, "_sparing", True)
    with allocator.no_holes():
        outer = dict(asked)
        with allocator.no_holes(2**20):
            assert set(asked.values()) == {2**20}
        assert asked == outer
    assert min(asked.values()) > 2**20
