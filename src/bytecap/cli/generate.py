"""`bytecap generate` continues a prompt, or answers it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bytecap.cli.common import Bases, Device, Json, Resident, print_json
from bytecap.errors import UsageError

_BREAKS = "\n\t"


def generate(
    model: Annotated[
        str,
        typer.Argument(help="A .bcap file, model directory, hub id, or `demo`.", metavar="ARTIFACT"),
    ],
    text: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads it from standard input.", metavar="PROMPT")
    ] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The same.", show_default="PROMPT")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the model's chat template, and print the answer alone.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="Instruction in front, with --chat.", show_default="none")
    ] = None,
    tokens: Annotated[int, typer.Option("-n", "--tokens", help="Most tokens to add.", min=0)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens that together have this probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many of the likeliest tokens; 0 for all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    base: Bases = None,
    device: Device = "auto",
    resident: Resident = "decoded",
    as_json: Json = False,
) -> None:
    """Continue a prompt with the model in an artifact, until the model ends the text."""
    from bytecap.pipeline.generation import Sampling
    from bytecap.pipeline.generation import generate as run

    if (text is None) == (prompt is None):
        raise UsageError("give the text to continue once: bytecap generate ARTIFACT PROMPT, or -p PROMPT")
    asked = str(text if prompt is None else prompt)
    if asked == "-":
        asked = sys.stdin.read()
    sampling = Sampling(temperature, top_k, top_p, seed)
    made = run(
        model, asked, chat=chat, system=system, tokens=tokens, sampling=sampling, device=device, resident=resident,
        base=base,
    )  # fmt: skip
    if as_json:
        print_json({"prompt": asked, "text": "".join(made)})
        return
    if not chat:
        sys.stdout.write(_shown(asked))
    for piece in made:
        sys.stdout.write(_shown(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")


def _shown(text: str) -> str:
    """Return text without control sequences, which a model may produce like any other text."""
    return "".join(c if c.isprintable() or c in _BREAKS else repr(c)[1:-1] for c in text)
