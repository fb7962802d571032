"""`eval` and `generate`: a directory, a hub id, `demo` or an artifact behind one door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bytecap.errors import ArtifactError
from bytecap.format import container
from bytecap.format.decoder import side_files
from bytecap.model.checkpoint import Model, demo_directory, find_units, load_model
from bytecap.model.from_artifact import load_model as load_artifact
from bytecap.model.sources import Paths, as_paths, encoder, window_limit
from bytecap.model.texts import load_text
from bytecap.progress import Reporter, Silent
from bytecap.types import Score


def open_model(model: Path | str) -> Model:
    """A model from a directory, hub id, `demo`, or artifact file."""
    path = Path(model)
    if not path.is_file() or path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors"}:
        return load_model(model)
    contents = container.read(path)
    module = load_artifact(path)
    return Model(module, find_units(module), side_files(contents), str(model))


def score(
    model: Path | str,
    texts: Paths = None,
    *,
    window: int = 512,
    tokens: int | None = None,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> list[Score]:
    """Bits per byte on every text.

    Args:
        model: directory, hub id, `demo` or artifact file.
        texts: text files; the embedded evaluation text if None.
        window: predicted tokens in a window.
        tokens: most tokens per text.
        device: `auto`, `cpu` or `cuda`.
        reporter: told about progress.
    """
    from bytecap.model.evaluation import evaluate
    from bytecap.pipeline.fit import choose_device

    reporter = reporter or Silent()
    target = choose_device(device)
    opened = open_model(model)
    opened.module.to(target)
    encode = encoder(opened.files)
    paths = as_paths(texts)
    if not paths:
        reporter.note("warning: no --text given: the embedded SQLite documentation is scored")
        paths = [demo_directory() / "val.txt"]
    scores = []
    for path in paths:
        text = load_text(path, encode, window=window_limit(opened, window), limit=tokens)
        with reporter.step(path.name, text.tokens) as advance:
            scores.append(evaluate(opened.module, text, device=target, progress=advance))
    return scores


def continue_prompt(path: Path | str, prompt: str, *, tokens: int, temperature: float, seed: int) -> str:
    """Text that continues a prompt.

    Args:
        path: artifact file (or anything `open_model` reads).
        prompt: UTF-8 text.
        tokens: number of tokens to add.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
    """
    import torch
    from tokenizers import Tokenizer

    from bytecap.model.forward import logits_of

    opened = open_model(path)
    if "tokenizer.json" not in opened.files:
        raise ArtifactError(f"{path} holds no tokenizer (written with --no-tokenizer), so it cannot read a prompt")
    tokenizer: Any = Tokenizer.from_str(opened.files["tokenizer.json"].decode())
    ids, _ = next(encoder(opened.files)([prompt]))
    start, limit = len(ids), window_limit(opened, 1 << 30)
    generator = torch.Generator().manual_seed(seed)
    end = opened.config().get("eos_token_id")
    with torch.no_grad():
        for _ in range(tokens):
            logits = logits_of(opened.module(torch.tensor([ids[-limit:]])))[0, -1].float()
            if temperature <= 0:
                ids.append(int(logits.argmax()))
            else:
                ids.append(int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)))
            if ids[-1] == end:
                ids.pop()
                break
    text: str = tokenizer.decode(ids[start:])
    return text
