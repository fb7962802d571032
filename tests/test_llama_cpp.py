"""llama.cpp itself on files of the embedded model: its logits, what was predicted of them, and its tokens."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import bytecap
from bytecap.model.calibration_text import general
from bytecap.model.checkpoint import Model, demo_directory, load_checkpoint
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.runtimes.blocks.encode import encode, prepare
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.blocks.layout import pack
from bytecap.runtimes.gguf.export import describer, values_of, write_plain
from bytecap.runtimes.gguf.export import plain as exact
from bytecap.runtimes.gguf.file import read_units, write
from bytecap.runtimes.gguf.places import layout_of
from bytecap.runtimes.gguf.tokenizer import _RULES
from conftest import SMALL, VOCABULARY, build, save

llama = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
pytestmark = pytest.mark.nightly
WINDOW, WINDOWS = 256, 12
TEXTS = (*((demo_directory() / f"{n}.txt").read_text("utf-8") for n in ("calib", "val")), "\f".join(general(held=True)))
SHARE = 0.02  # of a prediction


def runtime(path: Path, **options: Any) -> Any:
    """llama.cpp with a file, by its defaults if nothing is said."""
    return llama.Llama(str(path), n_ctx=WINDOW, logits_all=True, verbose=False, n_threads=1, **options)


def logs(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL in nats of logarithms of probabilities (tokens, vocabulary)."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference over that of `b`."""
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())


def windows_of(model: Model, count: int) -> list[list[int]]:
    """The first windows of a held-out text as tokens."""
    here = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    ids = here.encode(TEXTS[1]).ids
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


@torch.no_grad()
def by_torch(module: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return module(torch.tensor([ids])).logits[0]


def by_llama(there: Any, ids: list[int]) -> torch.Tensor:
    there.reset()
    there.eval(ids)
    return torch.from_numpy(np.array(there.scores[: len(ids)]))


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_checkpoint(demo_directory())


@pytest.fixture(scope="module")
def plain(demo: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in float32."""
    path = tmp_path_factory.mktemp("plain") / "demo.gguf"
    write_plain(demo, layout_of(demo), path, "F32")
    return path


def test_an_export_has_the_logits_of_the_original(demo: Model, plain: Path) -> None:
    """Against sums in float64, whose distance float32 itself has: 6e-7 to 7e-7 in torch as in llama.cpp."""
    ids = windows_of(demo, 1)[0]
    exact, single = by_torch(copy.deepcopy(demo.module).double(), ids), by_torch(demo.module, ids)
    found = by_llama(runtime(plain, type_k=0, type_v=0, flash_attn=False), ids)
    assert deviation(found, exact) < max(1e-6, 2 * deviation(single, exact))
    assert divergence(logs(exact), logs(found)) < 1e-9


def test_an_export_has_the_predictions_of_the_original_by_default(demo: Model, plain: Path) -> None:
    """Keys and values in float16 are what llama.cpp adds here."""
    ids = windows_of(demo, 1)[0]
    assert divergence(logs(by_torch(demo.module, ids)), logs(by_llama(runtime(plain), ids))) < 2e-6


@dataclass(frozen=True)
class Run:
    """KL and cross entropy in nats: the weights by themselves, and llama.cpp with them; KL between the two."""

    decoded: float
    there: float
    between: float
    loss: float
    loss_there: float

    @property
    def agrees(self) -> bool:
        """Whether llama.cpp's KL is the predicted one but for 2% and what activations of 8 bits cost, and chance."""
        return abs(self.there - self.decoded) < SHARE * self.decoded + 1.5 * self.between


def run(model: Model, path: Path, windows: list[list[int]]) -> Run:
    decoded, there = copy_of(model.module), runtime(path)
    load_values(decoded, read_units(path, layout_of(model), model.units))
    rows = []
    for ids in windows:
        p, d, q = logs(by_torch(model.module, ids)), logs(by_torch(decoded, ids)), logs(by_llama(there, ids))
        at = torch.arange(len(ids) - 1), torch.tensor(ids[1:])
        rows.append((divergence(p, d), divergence(p, q), divergence(d, q), float(-d[at].mean()), float(-q[at].mean())))
    return Run(*(float(x) for x in np.mean(rows, 0)))


@pytest.fixture(scope="module")
def fitted_there(demo: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("fitted") / "demo.gguf"
    texts = {"calibration": demo_directory() / "calib.txt", "evaluation": demo_directory() / "val.txt"}
    found = bytecap.fit(demo, 800_000, format="gguf", output=path, **texts, **SMALL)
    assert set(found.types.values()) <= set(FORMATS)
    return run(demo, path, windows_of(demo, WINDOWS))


def test_the_predicted_kl_is_that_of_llama_cpp(fitted_there: Run) -> None:
    assert fitted_there.between < 3e-3  # as measured on small models: 0.0006 to 0.0016
    assert fitted_there.agrees


def test_the_predicted_perplexity_is_that_of_llama_cpp(fitted_there: Run) -> None:
    ratio = math.exp(fitted_there.loss_there - fitted_there.loss)
    assert abs(ratio - 1) < SHARE + fitted_there.between


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_llama_cpp_reads_every_type_as_it_is_decoded_here(name: str, wide: Model, tmp_path: Path) -> None:
    """Every matrix in one type: 2% of its KL and what activations of 8 bits cost."""
    layout, path = layout_of(wide), tmp_path / "a.gguf"
    tensors = []
    for p in layout.places:
        stored = exact(wide, p)
        if p.matrix and p.name != "token_embd.weight":
            codes = encode(values_of(wide, p), prepare(torch.eye(p.cols)), FORMATS[name])
            stored = replace(stored, type=name, data=pack(codes))
        tensors.append(stored)
    write(path, layout.architecture, describer(wide, layout, None), tensors)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCABULARY, (WINDOW,), generator=generator).tolist() for _ in range(2)]
    found = run(wide, path, ids)
    assert found.between < 5e-4
    assert found.agrees


@pytest.fixture(scope="module")
def wide(tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model whose rows are whole blocks of every type."""
    module = build("rotary", hidden_size=256, intermediate_size=256, initializer_range=0.05)
    return load_checkpoint(save(module, tmp_path_factory.mktemp("wide") / "model", tokenizer_json))


def byte_level(rule: str) -> str:
    """A byte-level BPE tokenizer that splits text by a rule that llama.cpp has a name for."""
    made = Tokenizer(models.BPE())
    if rule == "gpt-2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif rule == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        split = pre_tokenizers.Split(Regex(_RULES[rule][0]), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS[0].splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=900, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    return made.to_str()


def pieces() -> str:
    """A BPE tokenizer over SentencePiece's pieces, with bytes for what has none."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made = Tokenizer(models.BPE(unk_token=names[0], byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        TEXTS[0].splitlines(), trainers.BpeTrainer(vocab_size=1200, special_tokens=names, show_progress=False)
    )
    found = json.loads(made.to_str())
    found["added_tokens"] = found["added_tokens"][:3]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, space]
    return json.dumps(found | {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": steps}})


@pytest.mark.parametrize("kind", [*_RULES, "pieces"])
def test_texts_are_cut_into_the_same_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = pieces() if kind == "pieces" else byte_level(kind)
    here = Tokenizer.from_str(tokenizer)
    module = build("rotary", vocab_size=here.get_vocab_size())
    model = load_checkpoint(save(module, tmp_path / "model", tokenizer))
    write_plain(model, layout_of(model), tmp_path / "a.gguf", "F32")
    there = llama.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False)
    for text in (*TEXTS, "Zoë's ½ of  \uff46ull width,\tand\n\n 漢字 12345 too 🙂  "):
        ids = here.encode(text, add_special_tokens=False).ids
        assert there.tokenize(text.encode(), add_bos=False, special=True) == ids, text[:50]
