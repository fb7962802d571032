"""Read the token sets of a checkpoint's job: texts and samples for statistics, correction, evaluation, and recovery.

Samples of the model are kept in the job's store: they are the only text that takes device time to make.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bytecap.calibration.statistics import model_key
from bytecap.job.config import FitConfig
from bytecap.model.checkpoint import Model
from bytecap.model.sources import (
    CORRECTION_TOKENS,
    as_paths,
    load_sets,
    recovery_texts,
    sampled,
    window_limit,
    with_recovery,
)
from bytecap.model.texts import TokenSets, Window
from bytecap.progress import Reporter
from bytecap.system.cache import Store, digest


def token_sets(
    model: Model,
    config: FitConfig,
    device: str,
    store: Store,
    reporter: Reporter,
    *,
    correction_tokens: int = CORRECTION_TOKENS,
) -> TokenSets:
    """Load the token sets of a checkpoint, with those of recovery where it is asked for.

    Args:
        model: whose tokenizer is used, and which is sampled from.
        config: names texts, numbers of tokens and the seed.
        device: torch device to sample on.
        store: keeps samples.
        reporter: told about texts that stand in, and about progress.
        correction_tokens: most tokens for correction factors, which no statistic sees.
    """
    calibration = as_paths(config.calibration)

    def sampler(tokens: int, firsts: Sequence[int] | None = None) -> tuple[Window, ...]:
        return _sampled_once(model, config, device, store, reporter, tokens, firsts)

    sets = load_sets(
        model, calibration, as_paths(config.evaluation), window=config.window, tokens=config.tokens,
        evaluation_tokens=config.evaluation_tokens, correction_tokens=correction_tokens, seed=config.seed,
        device=device, sampler=sampler, reporter=reporter,
    )  # fmt: skip
    if config.recover is None:
        return sets
    texts = as_paths(config.recover_text) or recovery_texts(model, calibration)
    return with_recovery(
        model, sets, texts, window=config.window, seed=config.seed, device=device, sampler=sampler, reporter=reporter
    )


def _sampled_once(
    model: Model, config: FitConfig, device: str, store: Store, reporter: Reporter, tokens: int,
    firsts: Sequence[int] | None,
) -> tuple[Window, ...]:  # fmt: skip
    """Return windows sampled from the model, from the store where it has them."""
    window, seed = window_limit(model, config.window), config.seed

    def make() -> dict[str, npt.NDArray[np.int64]]:
        found = sampled(model, tokens, window=window, seed=seed, device=device, reporter=reporter, firsts=firsts)
        return {str(i): np.array(w.tokens, np.int64) for i, w in enumerate(found)}

    parts = (tokens, window, seed, device, *([] if firsts is None else [list(firsts)]))
    kept = store.once(lambda: digest("samples", model_key(model), *parts), make)
    return tuple(Window(tuple(kept[str(i)].tolist()), 0) for i in range(len(kept)))
