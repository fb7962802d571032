"""`bytecap generate`: continue a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from bytecap.cli.common import Artifact, Json, print_json


def generate(
    path: Artifact,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="Tokens to add.", min=0)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Continue a prompt with the model in an artifact."""
    from bytecap.pipeline.score import continue_prompt

    text = continue_prompt(path, prompt, tokens=tokens, temperature=temperature, seed=seed)
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        typer.echo(prompt + text)
