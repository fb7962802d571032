"""`bytecap fit` puts a model into one file under a cap, or into several under several caps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bytecap.cli.common import (
    BytesPerToken,
    Factory,
    Json,
    Loss,
    State,
    check_inputs,
    check_output,
    needed,
    print_json,
    progress,
    source_file,
    source_of,
)
from bytecap.cli.complaints import complain
from bytecap.cli.options import with_config
from bytecap.errors import UsageError
from bytecap.job.config import FitConfig
from bytecap.model.defaults import EVALUATION_TOKENS, SAMPLED_TOKENS, TOKENS
from bytecap.system.ranks import started


@with_config
def fit(
    config: FitConfig,
    model: Annotated[str | None, typer.Argument(help="Hugging Face directory, hub id, or `demo`.")] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Most calibration tokens; with --factory also shards (repeatable).",
            show_default=f"{TOKENS}; on a GPU without --calib up to {SAMPLED_TOKENS}",
        ),
    ] = None,
    evaluation_tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluation-tokens",
            "--eval-tokens",
            show_default=str(EVALUATION_TOKENS),
            help="Most evaluation tokens; with --factory also shards (repeatable).",
        ),
    ] = None,
    factory: Factory = None,
    state: State = None,
    loss: Loss = None,
    bytes_per_token: BytesPerToken = None,
    code: Annotated[
        list[Path] | None, typer.Option("--code", help="Source file to pack (repeatable).", show_default="none")
    ] = None,
    code_accounting: Annotated[str, typer.Option(help="Which size of the code meets the cap: packed, raw.")] = "packed",
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Page to write (HTML); {budget} in it stands for each of several.", show_default="none"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put MODEL into one file of at most --budget bytes, read it back and measure it."""
    given = _Given(model, tokens, evaluation_tokens, factory, state, loss, bytes_per_token, code)
    if not started():
        _fit(given, config, report, code_accounting, as_json)
        return
    from bytecap.system.distributed import joined

    with joined(config.device, complain) as ranks:
        _fit(given, replace(config, ranks=ranks), report, code_accounting, as_json)


def _fit(given: _Given, config: FitConfig, report: Path | None, code_accounting: str, as_json: bool) -> None:
    """Fit on this rank, and show the outcome on the first one."""
    from bytecap.pipeline import pack_code, several
    from bytecap.pipeline.fit import fit_config
    from bytecap.pipeline.fit_shards import fit_shards

    pages = given.checked(config, report)
    config = replace(config, code=pack_code.pack(given.code or (), code_accounting), reporter=progress(as_json))
    source, config = given.source(config)
    if source is not None:
        several.refuse(config, "a factory's module")
    results = fit_shards(source, config) if source is not None else fit_config(needed(given.model), config)
    if several.ranks_of(config).first:
        _show(results, pages, config.dry_run, as_json)


@dataclass(frozen=True)
class _Given:
    """The inputs of `fit` that are no fields of its config."""

    model: str | None
    tokens: list[str] | None
    evaluation_tokens: list[str] | None
    factory: str | None
    state: Path | None
    loss: str | None
    bytes_per_token: Path | None
    code: list[Path] | None

    def checked(self, config: FitConfig, report: Path | None) -> list[Path]:
        """Refuse outputs that cannot be written or are inputs; returns the pages to write, one for each budget."""
        from bytecap.pipeline.fit import each_budget, outputs_of
        from bytecap.pipeline.formats import is_directory

        if config.output is None and not config.dry_run:
            raise typer.BadParameter("say where to write with -o FILE, or use --dry-run")
        if config.recover_text and (config.recover is None or self.factory is not None):
            raise UsageError("--recover-text is read by --recover, without --factory")
        for each in () if is_directory(config) else each_budget(config):  # directories are checked by their job
            check_output(Path(each.output) if each.output is not None else None)
        each_page = each_budget(replace(config, output=report, emit=None))
        pages = [Path(c.output) for c in each_page if c.output is not None]
        for page in pages:
            check_output(page)
        check_inputs(
            outputs_of(each_budget(config), pages),
            {
                "MODEL": self.model, "--calib": config.calibration, "--eval": config.evaluation, "--code": self.code,
                "--template": config.template, "--recover-text": config.recover_text, "--state": self.state,
                "--bytes-per-token": self.bytes_per_token, "--factory": source_file(self.factory),
                "--loss": source_file(self.loss), "--method": source_file(config.method),
                "--tokens": self.tokens, "--eval-tokens": self.evaluation_tokens,
                "--base": config.base if isinstance(config.base, list) else None,
            },
        )  # fmt: skip
        return pages

    def source(self, config: FitConfig) -> tuple[Any, FitConfig]:
        """The source of a factory's module, or None for a checkpoint; and the config with its tokens."""
        from bytecap.pipeline.fit_shards import limit_only, numbers_and_shards

        if self.factory is None:
            source, most = None, limit_only(self.tokens, "--tokens")
            most_evaluation = limit_only(self.evaluation_tokens, "--eval-tokens")
        else:
            if config.store is not None:
                raise UsageError(
                    "--store is for checkpoints: what a factory's code computes has no name to be kept under"
                )
            found = source_of(self.factory, self.model, self.state, self.loss, self.bytes_per_token)
            source = replace(found, window=config.window)
            most, shards = numbers_and_shards(self.tokens, "--tokens")
            most_evaluation, held = numbers_and_shards(self.evaluation_tokens, "--eval-tokens")
            config = replace(config, calibration=shards, evaluation=held)
        return source, replace(config, tokens=most, evaluation_tokens=most_evaluation or EVALUATION_TOKENS)


def _show(results: list[Any], pages: list[Path], dry_run: bool, as_json: bool) -> None:
    """Write pages, and show the outcome on the terminal or as JSON: one report, or a list for several fits."""
    from bytecap.report.terminal import print_fit

    for result, path in zip(results, pages, strict=False):
        from bytecap.report.fit import page
        from bytecap.system.atomic import write_atomically

        write_atomically(page(result.report, [] if dry_run else result.ledger()).encode(), path)
    if as_json:
        reports = [result.report for result in results]
        print_json(reports[0] if len(reports) == 1 else {"fits": reports})
        return
    for result in results:
        print_fit(result.report)
