"""`bytecap tie` makes a model with fewer stored blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bytecap.cli.common import EMBEDDED, Device, Json, Model, Seed, print_json, progress
from bytecap.escape import shown
from bytecap.system.cache import blamed


def tie(
    model: Model,
    blocks: Annotated[int, typer.Option("--blocks", help="Blocks that stay; without --search they divide the depth.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    init: Annotated[str, typer.Option(help="How shared blocks start: stepwise, average or lower.")] = "average",
    lora_rank: Annotated[int, typer.Option(help="Rank of every layer's own low-rank parts, 0 for none.")] = 8,
    train: Annotated[
        list[Path] | None, typer.Option("--train", help="Text to uptrain on (repeatable).", show_default=EMBEDDED)
    ] = None,
    steps: Annotated[str, typer.Option(help="Uptraining: so many iterations (600) or so long (45s, 10m).")] = "600",
    search: Annotated[
        str | None, typer.Option(help="Find which layers share: greedy or dlt.", show_default="none: a loop")
    ] = None,
    search_steps: Annotated[
        str | None, typer.Option(help="Iterations or time of the search.", show_default="as --steps")
    ] = None,
    labels: Annotated[float, typer.Option(help="Share of the text's own next tokens in the loss.")] = 0.0,
    rate: Annotated[float, typer.Option(help="First learning rate.")] = 1e-3,
    seed: Seed = 0,
    device: Device = "auto",
    store: Annotated[
        Path | None,
        typer.Option(help="Directory of kept progress: a killed run, started again, goes on.", show_default="none"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert MODEL into one whose layers share --blocks blocks; `fit` and `eval` take the directory as it is."""
    from bytecap_lab.layer_tying import tie as run

    with blamed(store):
        found = run(
            model, blocks, output, init=init, rank=lora_rank, train=train, steps=steps, search=search,
            search_steps=search_steps, labels=labels, rate=rate, seed=seed, device=device, store=store,
            reporter=progress(as_json),
        )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        typer.echo(
            shown(
                f"{output}: {found['unique']} of {found['depth']} blocks, {found['parameters']:,} of "
                f"{found['parameters_before']:,} parameters, KL to the original {found['kl_written']:.4f} nats per "
                "token on held-out tokens of the training text"
            )
        )
