"""Find out how a language model is fed: its first token, its length, its ids, and whether it is causal.

transformers knows these, under whatever name a config gives them and in whatever part of a nested one; ids are held
against the rows that the embedding really has. One short pass shows whether a prediction changes with tokens behind it:
models that see both ways can be built as language models, and what they score means nothing.

>>> facts({"config.json": b'{"text_config": {"n_positions": 64, "bos_token_id": 5}}'}).positions
64
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bytecap.errors import BytecapError, CheckpointError, UsageError
from bytecap.model.bounds import hurried
from bytecap.model.building import check_config, quiet
from bytecap.system import allocator

if TYPE_CHECKING:
    from torch import Tensor, nn

_POSITIONS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx",
    "context_length", "max_target_positions",
)  # fmt: skip
_TRIAL = 24  # tokens of the pass that tests causality
_LEAK = 1e-3  # of the logits' spread: what earlier predictions may change with later tokens, by rounding


@dataclass(frozen=True)
class Facts:
    """The inputs of a language model, as its config describes them.

    Attributes:
        first: token put in front of every document, or None.
        positions: most tokens of one pass, or None where there is no limit.
        encoder_decoder: whether it is an encoder with a decoder.
        kind: model type, for messages.
    """

    first: int | None
    positions: int | None
    encoder_decoder: bool
    kind: str


def facts(files: Mapping[str, bytes], where: str = "") -> Facts:
    """Read the facts from a model's side files.

    Args:
        files: by name.
        where: directory of the files, for messages; left out of them where they are in a file.

    Raises:
        CheckpointError: the config's first token or length is no such number.
    """
    raw = _object(files, "config.json")
    config = _library_config(raw, f"{where}/config.json" if where else "config.json")
    text = config.get_text_config(decoder=True) if config is not None else None

    def value(name: str) -> Any:
        if text is not None and getattr(text, name, None) is not None:
            return getattr(text, name)
        nested = raw.get("text_config")
        return raw.get(name, nested.get(name) if isinstance(nested, dict) else None)

    first = value("bos_token_id")
    if first is not None and (type(first) is not int or first < 0):
        raise CheckpointError(f"config.json gives bos_token_id {str(first)[:40]!r}, which is no token")
    lengths = [n for n in map(value, _POSITIONS) if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return Facts(
        first, lengths[0] if lengths else None,
        bool(getattr(config, "is_encoder_decoder", raw.get("is_encoder_decoder", False))),
        str(raw.get("model_type", "")),
    )  # fmt: skip


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return a side file's JSON object; empty where there is none."""
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{name} is not valid JSON: {exc}") from exc
    return found if isinstance(found, dict) else {}


def _library_config(raw: Mapping[str, Any], said: str) -> Any:
    """Return the config as transformers completes it, without running anything; None for kinds it does not know.

    Raises:
        CheckpointError: it asks for absurd counts, or takes minutes.
    """
    check_config(raw, said)
    with hurried(CheckpointError(f"{said} takes minutes to be read")):
        try:
            from transformers import AutoConfig

            quiet()
            return type(AutoConfig.for_model(raw["model_type"])).from_dict(dict(raw))
        except Exception:  # noqa: BLE001 (any config of any class: what it says by itself is left)
            return None


def refuse_encoder_decoder(files: Mapping[str, bytes], name: str) -> None:
    """Refuse models whose text goes through an encoder first.

    Raises:
        CheckpointError: this is one.
    """
    found = facts(files, name)
    if found.encoder_decoder:
        raise CheckpointError(
            f"{name} is an encoder-decoder ({found.kind}), not a causal language model: bytecap scores a text by "
            "predicting its next token; fit it as a module with a loss of your own"
        )


def vocabulary_of(module: nn.Module) -> int | None:
    """Return the number of ids that a model can read and predict; None if it shows neither embedding nor head."""
    sizes = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            table = getattr(module, getter)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        weight: Any = getattr(table, "weight", None)
        if getattr(weight, "ndim", 0) == 2:
            kind = "nf" if hasattr(table, "nf") else ""
            sizes.append(int(weight.shape[1 if kind else 0]))
    return min(sizes, default=None)


@contextmanager
def run_as_configured(name: str) -> Iterator[None]:
    """Say in one line that a config makes its model fail, where a pass of it raises what is no error of ours.

    Raises:
        CheckpointError: the pass failed, and not for lack of memory.
    """
    try:
        yield
    except Exception as exc:
        if isinstance(exc, BytecapError) or allocator.is_shortage(exc):
            raise
        first = next((line for line in str(exc).splitlines() if line.strip()), "no reason given")
        raise CheckpointError(
            f"the model of {name} cannot be run as its config.json describes it ({type(exc).__name__}: {first}): "
            "correct config.json"
        ) from exc


def check_causal(
    module: nn.Module, name: str, size: int | None, positions: int | None = None, *, ids: Tensor | None = None
) -> None:
    """Refuse a module whose predictions change with later tokens.

    Args:
        module: `module(ids)` gives logits (batch, length, vocabulary).
        name: for messages.
        size: ids it knows.
        positions: most tokens of a pass.
        ids: (1, length), to try in place of random ones: a module may take one length only.

    Raises:
        CheckpointError: it sees the next token. UsageError: its logits are not finite.
    """
    import torch

    if ids is None:
        length = max(2, min(_TRIAL, positions or _TRIAL))
        ids = torch.randint(max(2, size or 2), (1, length), generator=torch.Generator().manual_seed(0))
    if sees_later(module, ids, size, name):
        raise CheckpointError(
            f"{name} ({type(module).__name__}) is no causal language model: its predictions change with the tokens "
            "that come after, so bits per byte would mean nothing; fit it as a module with a loss of your own"
        )


def sees_later(module: nn.Module, ids: Tensor, size: int | None, name: str = "the module") -> bool:
    """Return whether predictions for the first half of ids (1, length) change with those of the second.

    Args:
        module: `module(ids)` gives logits (batch, length, vocabulary).
        ids: tokens; fewer than two tell nothing.
        size: ids it knows.
        name: for messages.

    Raises:
        UsageError: its logits are not finite.
    """
    import torch

    length = ids.shape[1]
    half, other = length // 2, ids.clone()
    if half == 0:
        return False
    step = 1 + torch.arange(length - half, device=ids.device) % max(1, (size or 2) - 1)
    other[0, half:] = (ids[0, half:] + step) % max(2, size or 2)
    with torch.no_grad():
        one, two = (x[0, :half].float() for x in _logits(module, (ids, other), name))
    spread = float(one.std()) or 1.0
    return float((one - two).abs().max()) > _LEAK * spread


def _logits(module: nn.Module, inputs: Sequence[Tensor], name: str) -> Iterator[Tensor]:
    """Yield the logits of several passes."""
    import torch

    from bytecap.model import streaming

    streamed = streaming.of(module)
    if streamed is None:
        device = next(module.parameters()).device
        outputs: Iterator[Any] = (module(ids.to(device)) for ids in inputs)
    else:
        device = streamed.device
        runs = [partial(_run, ids.to(device)) for ids in inputs]
        outputs = (end() for (end,) in streaming.sweep([streamed], runs))
    for found in outputs:
        logits = found if isinstance(found, torch.Tensor) else found.logits
        if not isinstance(logits, torch.Tensor) or not bool(torch.isfinite(logits).all()):
            raise UsageError(f"{name} gives logits that are not finite, before anything was changed")
        yield logits


def _run(ids: Tensor, module: nn.Module) -> Any:
    return module(ids)
