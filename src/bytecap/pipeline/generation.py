"""Generate text that continues a prompt or answers in a conversation, piece by piece as it is made.

Keys and values of what has been read are kept where the model can, so that a token costs one position. When the
model's positions are used up, the older half of the text is forgotten and the rest read again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecap.errors import ArtifactError, UsageError
from bytecap.format.updates import Bases
from bytecap.model import tokenizer as door
from bytecap.model.checkpoint import Model
from bytecap.model.inputs import run_as_configured, vocabulary_of
from bytecap.model.sources import encoder, window_limit
from bytecap.model.texts import check_known
from bytecap.model.tokenization import is_there, read_tokenizer
from bytecap.pipeline.chat_templates import conversation, json_of, special_tokens
from bytecap.pipeline.score import open_model

if TYPE_CHECKING:
    from torch import Tensor

_CONTEXT = 8  # tokens
_UNFINISHED = "\ufffd"  # what bytes of a character that is not complete decode to


@dataclass(frozen=True)
class Sampling:
    """The rules by which the next token is drawn.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: draw among so many of the likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability; 1 for all.
        seed: of the draws.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UsageError: a number is outside its range.
        """
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"the temperature {self.temperature} is not 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is not above 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} is below 0")


def draw(logits: Tensor, how: Sampling, generator: Any) -> int:
    """Draw a token from logits (vocabulary)."""
    import torch

    if how.temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(logits.float().cpu() / how.temperature, -1)
    if how.top_k or how.top_p < 1:
        ordered, places = chances.sort(descending=True, stable=True)
        kept = torch.ones_like(ordered, dtype=torch.bool)
        kept[how.top_k or len(kept) :] = False
        kept &= ordered.cumsum(-1) - ordered < how.top_p  # the first that reaches it is in
        chances = torch.zeros_like(chances).scatter(0, places, ordered * kept)
    return int(torch.multinomial(chances, 1, generator=generator))


def generate(
    model: Model | Path | str,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
    tokens: int = 64,
    sampling: Sampling | None = None,
    device: str = "auto",
    base: Bases = None,
    resident: str = "decoded",
) -> Iterator[str]:
    """Yield pieces of text that continue a prompt, until the model ends it or `tokens` are made.

    Args:
        model: artifact file, directory, hub id, `demo`, or a loaded `Model`.
        prompt: text to continue, or what a user says.
        chat: put the prompt into the model's chat template.
        system: instruction in front of a conversation.
        tokens: most tokens to add.
        sampling: how they are drawn.
        device: `auto`, `cpu` or `cuda`.
        base: the file that an artifact is an update of.
        resident: `decoded`, or `coded`: an artifact's blocks are decoded whenever they run.

    Raises:
        ArtifactError: there is no tokenizer, no chat template, or the template cannot be rendered.
        UsageError: the prompt holds no token, or `system` is given without `chat`.
    """
    from bytecap.pipeline.stages import choose_device

    target = choose_device(device)
    if system is not None and not chat:
        raise UsageError("a system text is part of a conversation: give it with --chat")
    opened = model if isinstance(model, Model) else open_model(model, base=base, device=target, resident=resident)
    if not is_there(opened.files):
        raise ArtifactError(f"{opened.name} holds no tokenizer (written with --no-tokenizer): it cannot read a prompt")
    encode = encoder(opened.files)
    tokenizer = read_tokenizer(opened.files)
    if chat:
        said = [{"role": "system", "content": system}] if system is not None else []
        text = conversation(opened.files, opened.name, [*said, {"role": "user", "content": prompt}])
        ids = door.encode(tokenizer, [text])[0].ids
    else:
        ids, _ = next(encode([prompt]))
    check_known(ids, vocabulary_of(opened.module), "the prompt")
    if not ids:
        raise UsageError("the prompt holds no token: give some text to continue")
    return pieces(tokenizer, continued(opened, ids, tokens, sampling or Sampling(), target), ids[-_CONTEXT:])


def continued(model: Model, ids: Sequence[int], tokens: int, how: Sampling, device: str) -> Iterator[int]:
    """Yield the token ids that follow `ids`, without the one that ends the text."""
    import torch

    from bytecap.model.forward import logits_of

    module, limit = model.module.to(device), window_limit(model, 1 << 30)
    keeps = "past_key_values" in inspect.signature(module.forward).parameters
    generator, ends = torch.Generator().manual_seed(how.seed), ends_of(model.files)
    past: Any = None
    fresh = known = list(ids)[-limit:]
    for _ in range(tokens):
        with torch.no_grad(), run_as_configured(model.name):
            read = torch.tensor([fresh], device=device)
            out = module(read, past_key_values=past, use_cache=True) if keeps else module(read)
            token = draw(logits_of(out)[0, -1], how, generator)
        if token in ends:
            return
        yield token
        known = [*known, token]
        past = getattr(out, "past_key_values", None)
        if len(known) > limit:
            past, known = None, known[-max(1, limit // 2) :]
        fresh = known if past is None else [token]


def pieces(tokenizer: Any, ids: Iterator[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Yield the texts of tokens; a character of several tokens comes with its last one.

    A piece is decoded behind the tokens of the one `before` it: decoders treat the beginning of a text differently.
    """
    shown, waiting = list(before), list[int]()
    for token in ids:
        waiting.append(token)
        text = _behind(tokenizer, shown, waiting)
        if text and not text.endswith(_UNFINISHED):
            yield text
            shown, waiting = waiting, []
    if waiting and (text := _behind(tokenizer, shown, waiting)):
        yield text


def _behind(tokenizer: Any, shown: list[int], waiting: list[int]) -> str:
    """Return the text that the waiting tokens add to that of the shown ones."""
    return door.decode(tokenizer, [*shown, *waiting])[len(door.decode(tokenizer, shown)) :]


def ends_of(files: Mapping[str, bytes]) -> frozenset[int]:
    """Return every token that ends a text: of the config, the generation config, and the tokenizer."""
    config, generation = json_of(files, "config.json"), json_of(files, "generation_config.json")
    nested = config.get("text_config")
    found: set[int] = set()
    for source in (config, generation, nested if isinstance(nested, dict) else {}):
        ends = source.get("eos_token_id")
        found |= {i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int}
    name = special_tokens(files).get("eos_token")
    if name is not None and is_there(files):
        known = read_tokenizer(files).token_to_id(name)
        found |= {known} if known is not None else set()
    return frozenset(found)
