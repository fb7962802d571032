"""mlx-lm's own tools on our calibration windows: `convert -q`, `dynamic_quant` and DWQ, each read back by mlx.

`dynamic_quant` gets our windows in place of the text it would download. DWQ (distilled weight quantization: scales and
biases of a converted model are trained to the original's outputs) runs in mlx-lm's own loop, with its own loss and
optimizer and by its published defaults: `SAMPLES` samples in batches of four, Adam at 1e-6, temperature 2, group 64.
Its samples are our windows again and again, and the windows that our fit judges by validate. Differences from
`mlx_lm.dwq`: samples are sorted by length within every round of the windows, not over all of them, which would fill
batches with copies of one window; and activations are float32, because quantized products take mlx twenty times as
long on a processor. A layer's weights are therefore written as `scale * code + bias`, which is the same function. The
matrix products of mlx's wheel are slow there as well; an OpenBLAS loaded before it (`LD_PRELOAD`) makes them 15 times
as fast.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytecap.job import Job
from bytecap.runtimes.directory.contents import compact

SAMPLES, BATCH, LONGEST = 2048, 4, 1025  # defaults of `mlx_lm.dwq`
RATE = 1e-6


def mlx_values(
    job: Job, source: Path, seed: int, *, bits: int = 0, target: float = 0, low: int = 0, high: int = 0,
    distil: bool = False, rate: float = RATE, samples: int = SAMPLES,
) -> tuple[int, dict[str, np.ndarray]]:  # fmt: skip
    """Bytes of a directory that mlx-lm makes of a model, and its units' decoded values.

    Args:
        job: tokens to calibrate on.
        source: the model's directory.
        seed: of mlx-lm's random numbers.
        bits: of `convert`; the other arguments are not used then, but for DWQ.
        target: bits a weight that `dynamic_quant` aims at.
        low: bits of its layers.
        high: bits of those it gives more.
        distil: DWQ behind it.
        rate: learning rate of DWQ.
        samples: samples of DWQ.
    """
    mx, utils = (importlib.import_module(n) for n in ("mlx.core", "mlx_lm.utils"))
    loaded, config = utils.load_model(source)
    predicate = dynamic(loaded, job, seed, target=target, low=low, high=high) if target else None
    original = copy.deepcopy(loaded) if distil else None
    loaded, config = utils.quantize_model(loaded, config, 64, low or bits, quant_predicate=predicate)
    if original is not None:
        distilled(loaded, original, job, seed, rate=rate, samples=samples)
    values = {}
    for path, module in layers(loaded):
        scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
        found = mx.dequantize(module.weight, scales, biases, module.group_size, module.bits)
        values[f"{path}.weight"] = np.array(found)
    for unit in job.model.units:
        values.setdefault(unit.name, job.model.tensor(unit).numpy())
    with tempfile.TemporaryDirectory() as where:
        utils.save_model(where, loaded)
        utils.save_config(copy.deepcopy(config), Path(where) / "config.json")
        size = sum((Path(where) / n).stat().st_size for n in ("model.safetensors", "config.json"))
    return size + sum(len(compact(n, f)) for n, f in job.model.files.items() if n != "config.json"), values


def dynamic(loaded: Any, job: Job, seed: int, *, target: float, low: int, high: int) -> Any:
    """Predicate of mlx-lm's `dynamic_quant`, which gives some layers more bits."""
    mx, tool = importlib.import_module("mlx.core"), importlib.import_module("mlx_lm.quant.dynamic_quant")
    mx.random.seed(seed)
    longest = max(len(w.tokens) for w in job.sets.statistics)
    rows = [np.asarray(w.tokens) for w in job.sets.statistics if len(w.tokens) == longest]
    data = mx.array(np.stack(rows))
    found = dict(tool.estimate_sensitivities(loaded, data, low, 64, high, 64))
    threshold = tool.estimate_threshold(loaded, found, target, low, 64, high, 64)
    more = {"bits": high, "group_size": 64}
    return lambda path, m: hasattr(m, "to_quantized") and (more if found[path] > threshold else True)


def distilled(quantized: Any, original: Any, job: Job, seed: int, *, rate: float, samples: int) -> None:
    """Train a converted model's scales and biases by mlx-lm's DWQ; they come back in the type they had."""
    mx, optimizers, tool = (importlib.import_module(n) for n in ("mlx.core", "mlx.optimizers", "mlx_lm.quant.dwq"))
    original.set_dtype(mx.float32)
    student = dense(quantized)
    train, valid = (
        sorted(([int(t) for t in w.tokens] for w in s), key=len) for s in (job.sets.statistics, job.sets.correction)
    )
    rounds = train * -(-samples // len(train))
    teacher = Teacher(original)
    tool.dwq_quantize(
        student, lambda batch, *_, **__: teacher(batch), optimizers.Adam(learning_rate=rate, bias_correction=True),
        in_order(rounds[:samples]), in_order(valid), BATCH, LONGEST, seed,
    )  # fmt: skip
    for (_, mine), (_, theirs) in zip(layers(quantized), layers(student), strict=True):
        mine.scales, mine.biases = (x.astype(mine.scales.dtype) for x in (theirs.scales, theirs.biases))
    mx.eval(quantized.parameters())


def layers(model: Any) -> list[tuple[str, Any]]:
    """Every quantized layer by its path."""
    nn, tree = importlib.import_module("mlx.nn"), importlib.import_module("mlx.utils").tree_flatten
    return [(p, m) for p, m in tree(model.leaf_modules(), is_leaf=nn.Module.is_module) if hasattr(m, "bits")]


def dense(quantized: Any) -> Any:
    """A copy in float32 whose quantized layers multiply by `scale * code + bias`, with gradients by plain products."""
    mx, nn = importlib.import_module("mlx.core"), importlib.import_module("mlx.nn")

    def weight(layer: Any) -> Any:
        by_group = layer.codes * layer.scales[..., None] + layer.biases[..., None]
        return by_group.reshape(len(by_group), -1).astype(mx.float32)

    class Linear(nn.QuantizedLinear):  # type: ignore[misc, name-defined]
        def __call__(self, x: Any) -> Any:
            found = x @ weight(self).T
            return found + self.bias if "bias" in self else found

    class Embedding(nn.QuantizedEmbedding):  # type: ignore[misc, name-defined]
        def __call__(self, x: Any) -> Any:
            return weight(self)[x]

        def as_linear(self, x: Any) -> Any:
            return x @ weight(self).T

    student = copy.deepcopy(quantized)
    for _, layer in layers(student):
        ones = mx.ones(layer.scales.shape)
        codes = mx.dequantize(layer.weight, ones, mx.zeros_like(ones), layer.group_size, layer.bits)
        layer.codes = codes.reshape(*ones.shape, -1)
        layer.__class__ = Embedding if isinstance(layer, nn.QuantizedEmbedding) else Linear
    student.set_dtype(mx.float32)
    for (_, mine), (_, theirs) in zip(layers(student), layers(quantized), strict=True):
        mine.scales, mine.biases = theirs.scales, theirs.biases  # in the type that is stored
    student.freeze()
    return student


class Teacher:
    """The original's logits by batch, computed once a window: what follows a token changes nothing before it."""

    def __init__(self, original: Any) -> None:
        self.original, self.kept = original, dict[tuple[int, ...], Any]()

    def __call__(self, batch: Any) -> Any:
        """Logits of a batch (rows, tokens), zero behind the end of a shorter window."""
        mx, rows = importlib.import_module("mlx.core"), np.array(batch)
        found = []
        for row in rows:
            tokens = tuple(int(t) for t in np.trim_zeros(row, "b"))
            if tokens not in self.kept:
                self.kept[tokens] = self.original(mx.array([tokens]))[0]
                mx.eval(self.kept[tokens])
            logits = self.kept[tokens]
            found.append(mx.pad(logits, ((0, len(row) - len(tokens)), (0, 0))))
        return mx.stack(found)


def in_order(samples: Sequence[Iterable[int]]) -> Any:
    """mlx-lm's data set of samples of tokens, whose batches are made in the order given."""
    base = importlib.import_module("mlx_lm.tuner.datasets").CacheDataset

    class InOrder(base):  # type: ignore[misc, valid-type]
        def itemlen(self, idx: int) -> int:
            del idx
            return 0

        def __getitem__(self, idx: int) -> tuple[list[int], int]:
            return list(samples[idx]), 0

    return InOrder(samples)
