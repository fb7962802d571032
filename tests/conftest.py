"""Shared fixtures: tiny random models of four families, a small tokenizer, short texts, fitted files."""

import functools
import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # what has two threads shares two cores with another worker
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network

import brotli
import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import bytecap
from bytecap.cli import app
from bytecap.model.checkpoint import demo_directory
from bytecap.system.scratch import sweep
from once import Once
from reporting import name_failures
from warm import Warm

settings.register_profile(
    "suite", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fast", settings.get_profile("suite"), max_examples=10)  # for `make fast`
settings.load_profile("suite")

CAPPED = os.environ.get("ATEN_CPU_CAPABILITY") in {"default", "avx2"}
DECODING = ("src/bytecap/format/", "src/bytecap/reference/", "src/bytecap/sizes.py")  # whose doctests count as coverage
FROZEN = [0]  # modules that were imported when what looks for garbage last took them off its list
VOCABULARY = 288
KINDS = ("rotary", "biased", "transposed", "offset")  # families of models below
BUDGET = 21_000
SMALL = {"tokens": 1500, "evaluation_tokens": 500, "window": 64}  # several passes, one for each of three ranks


@pytest.hookimpl(trylast=True)  # after the terminal is there
def pytest_configure(config):
    name_failures(config)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(DECODING):
            item.add_marker("coverage")


def pytest_collection_finish():
    """Modules and tests stay to the end: what looks for garbage need not go through them again and again."""
    gc.freeze()


def pytest_runtest_logfinish():
    """As for modules that tests import, transformers above all: a third of a million objects."""
    if len(sys.modules) > FROZEN[0] + 200:
        FROZEN[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_bfloat16():
    """Processors that `make test` plays by capping instruction sets do not multiply bfloat16 either."""
    with pytest.MonkeyPatch.context() as patch:
        if CAPPED:
            patch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Matrices here are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _memory_is_kept():
    """Keep memory that a fit gives back: the next one asks for it again, a tenth of the time of a tiny one.

    Processes that tests start do give it back.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bytecap.system.allocator._library", lambda: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _work_files_in_memory():
    """A streamed fit makes and removes 2,000 work files, a fifth of its processor time on a disk, where Linux has room.

    Processes that tests start use the disk. What a killed run has left there goes first: it takes memory.
    """
    place = "/dev/shm"  # noqa: S108 (work files have names of their own)
    sweep(Path(place))
    with pytest.MonkeyPatch.context() as patch:
        if os.access(place, os.W_OK) and shutil.disk_usage(place).free > 2**30:
            there = SimpleNamespace(gettempdir=lambda: place, mkdtemp=tempfile.mkdtemp)
            patch.setattr("bytecap.system.scratch.tempfile", there)
        yield


@pytest.fixture(autouse=True, scope="session")
def _brotli_of_the_same_bytes():
    """Tests write the same few side files again and again, and compressing one takes 15 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brotli.compress", functools.lru_cache(512)(brotli.compress))
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Function: a value by key, made by one worker of the run for all (see `once.py`)."""
    here = tmp_path_factory.getbasetemp()
    return Once((here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "once")


@pytest.fixture(scope="session")
def texts(once):
    """Paths of a calibration and an evaluation text, some documents each."""

    def make(directory):
        paths = {}
        for name, size in (("calib", 24_000), ("val", 8_000)):
            content = (demo_directory() / f"{name}.txt").read_text("utf-8")[:size]
            paths[name] = directory / f"{name}.txt"
            paths[name].write_text(content, "utf-8")
        return paths

    return once("texts", make)


@pytest.fixture(scope="session")
def tokenizer_json(texts):
    """A byte-level BPE tokenizer with a few dozen merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(texts["calib"])], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer.to_str(pretty=True)


def _config(kind, **changes):
    import transformers

    common = {
        "vocab_size": changes.pop("vocab_size", VOCABULARY),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    wide = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
    }  # fmt: skip
    if kind == "rotary":
        return transformers.LlamaConfig(**{**common, **wide, "tie_word_embeddings": True, **changes})
    if kind == "biased":
        return transformers.Qwen2Config(**{**common, **wide, "tie_word_embeddings": False, **changes})
    if kind == "transposed":
        return transformers.GPT2Config(
            **common, n_embd=32, n_head=4, n_positions=256, initializer_range=0.15,
            **{"n_layer": 2, "tie_word_embeddings": True, **changes},
        )  # fmt: skip
    return transformers.OPTConfig(
        **{**common, "pad_token_id": 1}, hidden_size=32, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=32, init_std=0.15, dropout=0.0,
        **{"num_hidden_layers": 2, "tie_word_embeddings": True, **changes},
    )  # fmt: skip


def build(kind, *, dtype=torch.float32, seed=0, **changes):
    """A random model of a family, biases and norms random too."""
    import transformers

    torch.manual_seed(seed)
    module = transformers.AutoModelForCausalLM.from_config(_config(kind, **changes))
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return module.to(dtype).eval()


def save(module, directory, tokenizer_json, **options):
    """An ordinary model directory."""
    module.save_pretrained(directory, **options)
    (directory / "tokenizer.json").write_text(tokenizer_json, "utf-8")
    return directory


@pytest.fixture(scope="session")
def model_directory(once, tokenizer_json):
    """Function: directory of a tiny model of a family (see `KINDS`), built once for each set of options."""

    def get(kind="rotary", *, dtype=torch.bfloat16, **changes):
        def make(directory):
            return save(build(kind, dtype=dtype, **changes), directory / kind, tokenizer_json)

        return once(("model", kind, str(dtype), *sorted(changes.items())), make)

    return get


@pytest.fixture(scope="session")
def fitted(once, model_directory, texts):
    """Function: (artifact, path) of a tiny model under `BUDGET`, made once for each set of options."""

    def get(kind="rotary", method="bytecap", budget=BUDGET, **changes):
        def make(directory):
            path = directory / f"{kind}.bcap"
            result = bytecap.fit(
                model_directory(kind, **changes), budget, calibration=texts["calib"], evaluation=texts["val"],
                method=method, output=path, **SMALL,
            )  # fmt: skip
            return result, path

        return once(("fitted", kind, method, budget, *sorted(changes.items())), make)

    return get


@pytest.fixture(scope="session")
def block_code(once):
    """Machine code of the block formats: one worker compiles it, which takes long, and the other reads what it kept."""
    from bytecap.runtimes.blocks.encode import encode, prepare
    from bytecap.runtimes.blocks.ggml import FORMATS

    def make(_):
        encode(torch.ones(4, 256).numpy(), prepare(torch.eye(256)), FORMATS["Q4_0"])

    once("machine code of blocks", make)


@pytest.fixture(scope="session")
def _warm():
    warm = Warm()
    yield warm
    warm.close()


@pytest.fixture
def warm(monkeypatch, _warm):
    """Processes of `bytecap.model.apart` are forked from one that has imported transformers."""
    monkeypatch.setattr("bytecap.model.apart.subprocess", _warm)


@pytest.fixture(scope="session")
def four(model_directory):
    return model_directory("rotary", num_hidden_layers=4)


@pytest.fixture(scope="session")
def made(once, four, texts):
    """Directory of a tied model, its report, and what was said."""
    from bytecap.progress import Silent
    from bytecap_lab.layer_tying import tie as convert

    def make(directory):
        said, target = Silent(), directory / "tied"
        report = convert(four, 2, target, rank=2, train=texts["calib"], steps="4", reporter=said)
        return target, report, said.notes

    return once("tied", make)


@pytest.fixture(scope="session")
def fitted_tied(once, made, texts):
    def make(directory):
        path, files = directory / "tied.bcap", {"calibration": texts["calib"], "evaluation": texts["val"]}
        return bytecap.fit(made[0], BUDGET, output=path, **files, **SMALL), path

    return once("fitted tied", make)


@pytest.fixture
def edited_config():
    """Function: change entries of a directory's config.json in place."""

    def edit(directory, **changes):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    return edit


FAST = ("--method", "uniform", "--tokens", "2000", "--eval-tokens", "1000")


@pytest.fixture
def run(monkeypatch, capsys):
    """Function: (exit code, standard output, standard error) of a command line."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bytecap", *map(str, arguments)])
        capsys.readouterr()
        try:
            app.main()
            code = 0
        except SystemExit as exc:
            code = exc.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def refused(run):
    """Function: the one line a command is refused with; checks exit code, silence on standard output, no traceback."""

    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 2, (out, err)
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        assert "unexpected" not in err
        return err

    return call


@pytest.fixture
def job(model_directory, texts, tmp_path):
    """Function: arguments of a fast `fit` with parts replaced."""

    def arguments(model=None, *, budget=BUDGET, output=None, calib=None, evaluation=None):
        return [
            "fit", model or model_directory("rotary"), "--budget", budget, "-o", output or tmp_path / "out.bcap",
            "--calib", calib or texts["calib"], "--eval", evaluation or texts["val"], *FAST,
        ]  # fmt: skip

    return arguments


@pytest.fixture
def copied(model_directory, tmp_path):
    """A private copy of a tiny model's directory, to be spoiled."""
    import shutil

    return shutil.copytree(model_directory("rotary"), tmp_path / "spoiled")
