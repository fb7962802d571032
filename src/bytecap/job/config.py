"""Define `FitConfig`: every option of a fit, once for Python, torch modules, the command line and the lab.

The class is the only list of options. `configured` turns a function that takes a `FitConfig` into one that takes the
options as keyword arguments: its signature and its documentation are made from the class, for type checkers (through
a `ParamSpec`) as well as at run time. The command line builds its `--help` from the same class (`bytecap.cli.options`).

>>> @configured
... def twice(model: str, config: FitConfig) -> tuple[str, int]:
...     '''Show what was asked.'''
...     return model, 2 * config.seed
>>> twice("demo", "3MB", seed=4)
('demo', 8)
>>> twice("demo", "3MB", sede=4)
Traceback (most recent call last):
TypeError: twice() got an unexpected keyword argument 'sede'
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from bytecap.model.defaults import EVALUATION_TOKENS, WINDOW

if TYPE_CHECKING:
    from bytecap.format.codefiles import Code
    from bytecap.job.base import Installed
    from bytecap.job.section import Section
    from bytecap.progress import Reporter
    from bytecap.system.cache import Store
    from bytecap.system.ranks import Ranks


@dataclass(frozen=True)
class FitConfig:
    """The options of a fit: everything but the model.

    Attributes:
        budget: cap on the file: bytes, `3MB` (decimal), `3MiB` (binary), or `3.5bpp` (bits per parameter).
        calibration: what quality is tuned on: text files, documents separated by form feed, or the words `self` and
            `general`, with a weight (`self:2`); three parts samples of the model itself and one part general text by
            default; for a torch module its batches, of which no more are taken than are needed.
        evaluation: what quality is measured on, and nothing is fitted to: text files, embedded general text by default;
            for a torch module batches, by default a fifth of those for calibration.
        method: the method: `bytecap`, a baseline such as `golf` or `uniform`, or FILE.py:CALLABLE, which is run.
        effort: how hard to search for integers, 0 to 3: along a trellis of 8, 32, 128 or 256 states; for the method
            `bytecap` only. By default 2 on a processor and 1 on a GPU, where more states cost more time. Files of
            effort 0 can be read by readers of format 1.1, others need 1.3.
        device: torch device: `auto`, `cpu` or `cuda`.
        seed: seed of every random choice.
        output: file to write.
        dry_run: print floor and predicted quality; write and evaluate nothing.
        tokens: most calibration tokens (predictions of a torch module); 131,072 by default, up to four times as many on
            a GPU where no text is given, since samples of the model are cheap there.
        evaluation_tokens: most evaluation tokens, over all texts.
        window: predicted tokens in a window of text, at most what the model's positions allow.
        tokenizer: keep tokenizer files inside the file.
        config: keep config files inside the file.
        code: source files to keep inside, counted packed, or what `bytecap.pipeline.pack_code.pack` made of them.
        paths: overlays that the allocator may choose from, or `all`; for the method `bytecap` only.
        recover: tune what was coded for so many steps (`600`) or so long (`45s`, `10m`).
        recover_text: what to tune on: text files, or the words `self` and `general`; the calibration texts by default,
            and where none are given samples of the model itself and the general text.
        allow_unused: tensors and files of a checkpoint that are meant to be left out, as names or patterns
            (`model.layers.61.*`); any other that has no place in the model is refused.
        memory: most memory that a fit may use (`24GB`): of the GPU where it runs on one, else of the machine; by
            default what is free. A model that needs more is streamed: one block in memory, the rest in work files
            (docs/scale.md).
        unused: what becomes of units that no gradient reaches on the calibration: `keep` stores them at a safe rate,
            some nine bits a weight, `drop` as coarsely as it likes.
        options: options of the method: for `bytecap`, see `bytecap.quantization.options.Options`.
        format: `bcap`, `gguf` for llama.cpp, or a directory: `mlx`, `compressed-tensors` (docs/runtimes.md); by the
            suffix of `output` if it is not given.
        layout: `file`, or `hub`: a directory that transformers loads and hubs show, config, tokenizer, licence and card
            beside the weights, all within the budget (docs/transformers.md).
        types: types of the format to choose from (GGUF: `q4_k,q6_k`; MLX: `w4g64`), all in its menu by default.
        pure: refuse a tensor that none of the types can hold, instead of another type or 16 bits.
        template: the same model as a GGUF file converted by llama.cpp, for names, metadata and tokenizer.
        emit: GGUF: file to write the types to, as `llama-quantize --tensor-type-file` reads them.
        store: directory of finished steps: a killed run, started again, goes on from there.
        base: a file that the receiver has already: what is written is an update of it, which is read with it
            (docs/updates.md); several files where that one is an update itself.
        loss: of a torch module: `loss(module, batch)`, mean nats of a batch as a scalar tensor. May be left out where
            batches are integer tensors (batch, length) of token ids and forward gives logits, or takes (ids, targets)
            and gives a loss.
        evaluate: of a torch module: `evaluate(module)`, a score of your own, reported for the original and the file.
        predictions: of a torch module: number of predictions that a batch's mean loss is over; by default the size
            of its last integer tensor, else the length of its first one.
        given: sections of parameters that are coded already, see `bytecap_lab.train.export`.
        progress: show progress bars; by default on a terminal and in a notebook.
        reporter: told about progress in place of the bars.
        ranks: processes that share the job, from `bytecap.system.distributed.joined` (docs/scale.md); alone by default.
    """

    budget: int | str
    _: KW_ONLY
    calibration: str | Path | Iterable[Any] | None = None
    evaluation: str | Path | Iterable[Any] | None = None
    method: str = "bytecap"
    effort: int | None = None
    device: str = "auto"
    seed: int = 0
    output: str | Path | None = None
    dry_run: bool = False
    tokens: int | None = None
    evaluation_tokens: int = EVALUATION_TOKENS
    window: int = WINDOW
    tokenizer: bool = True
    config: bool = True
    code: Code | Sequence[str | Path] = ()
    paths: Sequence[str] | None = None
    recover: str | None = None
    recover_text: str | Path | Sequence[str | Path] | None = None
    allow_unused: Sequence[str] | None = None
    memory: int | str | None = None
    unused: str = "keep"
    options: Mapping[str, Any] = field(default_factory=dict)
    format: str | None = None
    layout: str = "file"
    types: Sequence[str] | None = None
    pure: bool = False
    template: Path | str | None = None
    emit: Path | str | None = None
    store: Store | Path | str | None = None
    base: Installed | Path | str | Sequence[Path | str] | None = None
    loss: Callable[..., Any] | None = None
    evaluate: Callable[[Any], float] | None = None
    predictions: Callable[[Any], int] | None = None
    given: Mapping[str, Section] = field(default_factory=dict)
    progress: bool | None = None
    reporter: Reporter | None = None
    ranks: Ranks | None = None


@cache
def documentation() -> dict[str, str]:
    """Return the class's sentences about every option; empty where docstrings are stripped."""
    entries = re.split(r"^        (?=\w+: )", _attributes(), flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, _, text in (e.partition(": ") for e in entries)}


def _attributes() -> str:
    """Return the lines of the class's docstring that describe the options."""
    return (FitConfig.__doc__ or "").partition("Attributes:\n")[2].rstrip()


P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")


class _Configured(Generic[P]):
    """A decorator that lets a function of a `FitConfig` take the config's options as keyword arguments."""

    def __init__(self, make: Callable[P, FitConfig]) -> None:
        self._make = make

    @overload
    def __call__(self, function: Callable[[A, FitConfig], R]) -> Callable[Concatenate[A, P], R]: ...
    @overload
    def __call__(self, function: Callable[[A, B, FitConfig], R]) -> Callable[Concatenate[A, B, P], R]: ...
    def __call__(self, function: Callable[..., R]) -> Callable[..., R]:
        own = list(inspect.signature(function).parameters.values())[:-1]
        options = list(inspect.signature(self._make).parameters.values())
        returns = inspect.signature(function).return_annotation
        signature = inspect.Signature([*own, *options], return_annotation=returns)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            try:
                found = signature.bind(*args, **kwargs).arguments
            except TypeError as exc:
                raise TypeError(f"{function.__name__}() {exc}") from None
            first = [found.pop(p.name) for p in own]
            return function(*first, FitConfig(**found))

        vars(call)["__signature__"] = signature
        own_text = re.sub(r"\n +config: .*", "", function.__doc__ or "").rstrip()
        call.__doc__ = f"{own_text}\n\n    Options:\n{_attributes()}\n"
        return call


configured = _Configured(FitConfig)
