"""`eval` and `generate`: a directory, a hub id, `demo` or an artifact behind one door."""

from __future__ import annotations

from pathlib import Path

from bytecap.errors import ArtifactError
from bytecap.format import container
from bytecap.format.decoder import side_files
from bytecap.model.checkpoint import Model, demo_directory, find_units, freeze, load_model
from bytecap.model.from_artifact import load_model as load_artifact
from bytecap.model.inputs import facts, vocabulary_of
from bytecap.model.sources import Paths, as_paths, check_model, encoder, window_limit
from bytecap.model.texts import check_known, load_text
from bytecap.model.tokenization import is_there, read_tokenizer
from bytecap.progress import Reporter, Silent
from bytecap.types import Score


def open_model(model: Path | str) -> Model:
    """A model from a directory, hub id, `demo`, or artifact file."""
    path = Path(model)
    if not path.is_file() or path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".gguf"}:
        return load_model(model)
    contents = container.read(path)
    module = freeze(load_artifact(path))
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
    check_model(opened)
    known, length = vocabulary_of(opened.module), window_limit(opened, window)
    read = [load_text(path, encode, window=length, limit=tokens, vocabulary=known) for path in paths]
    for note in opened.notes:
        reporter.note(note)
    scores = []
    for text in read:
        with reporter.step(text.name, text.tokens) as advance:
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

    from bytecap.model.forward import logits_of

    opened = open_model(path)
    if not is_there(opened.files):
        raise ArtifactError(f"{path} holds no tokenizer (written with --no-tokenizer), so it cannot read a prompt")
    tokenizer = read_tokenizer(opened.files)
    ids, _ = next(encoder(opened.files)([prompt]))
    check_known(ids, vocabulary_of(opened.module), "the prompt")
    start, limit = len(ids), window_limit(opened, 1 << 30)
    generator = torch.Generator().manual_seed(seed)
    ends = facts(opened.files).ends
    with torch.no_grad():
        for _ in range(tokens):
            logits = logits_of(opened.module(torch.tensor([ids[-limit:]])))[0, -1].float()
            if temperature <= 0:
                ids.append(int(logits.argmax()))
            else:
                ids.append(int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)))
            if ids[-1] in ends:
                ids.pop()
                break
    text: str = tokenizer.decode(ids[start:])
    return text
