"""Score models on task files of lm-evaluation-harness, question by question, so that scores can be paired.

A score is a mean over questions: accuracies as the task defines them, and for the metric `perplexity` the mean log
likelihood of an answer in nats, of which the harness would take the exponential. Task files may name functions, which
the harness runs, as it runs their templates (SECURITY.md). Omitted: metrics that are no means over questions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytecap.errors import UsageError
from bytecap.model.checkpoint import Model
from bytecap.model.tokenization import is_there, read_tokenizer
from bytecap.pipeline.chat_templates import special_tokens
from bytecap.system.atomic import read_regular

Scores = dict[str, list[float]]  # by task and metric: a value for every question
_NAME = re.compile(r"^task:\s*['\"]?([\w.-]+)['\"]?\s*(?:#.*)?$", re.MULTILINE)


def names_of(paths: Sequence[str]) -> list[str]:
    """Return the names of the tasks that files define.

    Raises:
        UsageError: the harness is missing, or a file is or defines no task.
    """
    try:
        import lm_eval
    except ModuleNotFoundError as exc:
        raise UsageError("--tasks needs lm-evaluation-harness: pip install 'bytecap[lm-eval]'") from exc
    del lm_eval
    found = []
    for path in paths:
        try:
            match = _NAME.search(read_regular(Path(path)).decode("utf-8"))
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(f"cannot read the task file {path}") from exc
        if match is None:
            raise UsageError(f"{path} defines no task: it has no line `task: NAME`")
        found.append(match[1])
    return found


def task_scores(module: Any, model: Model, paths: Sequence[str], device: str) -> Scores:
    """Score a module on tasks.

    Args:
        module: language model of transformers.
        model: whose tokenizer it uses.
        paths: task files.
        device: `cpu` or `cuda`.

    Raises:
        UsageError: there is no tokenizer, or a task cannot be run.
    """
    import transformers

    names = names_of(paths)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if not is_there(model.files):
        raise UsageError(f"{model.name} has no tokenizer: tasks are texts")
    plain: Any = transformers.PreTrainedTokenizerFast
    tokenizer = plain(tokenizer_object=read_tokenizer(model.files), **special_tokens(model.files))
    first = 0 if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None else None
    try:
        harness = HFLM(pretrained=module.to(device), tokenizer=tokenizer, device=device, prefix_token_id=first)
        manager = TaskManager(include_path=sorted({str(Path(p).parent) for p in paths}), include_defaults=False)
        found = simple_evaluate(harness, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as exc:
        raise UsageError(f"the harness cannot run {', '.join(names)}: {type(exc).__name__}: {exc}") from exc
    return _by_question(found["samples"])


def _by_question(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Scores:
    """Return the values of every metric in the order of the questions."""
    scores: Scores = {}
    for task, answers in sorted(samples.items()):
        ordered = sorted(answers, key=lambda a: int(a["doc_id"]))
        for metric in sorted({m for a in ordered for m in a.get("metrics", ())}):
            values = [a.get(metric) for a in ordered]
            if all(isinstance(v, int | float | np.number) for v in values):
                scores[f"{task} {metric}"] = [float(v) for v in values if v is not None]
    return scores


def figures(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return mean, standard error, and the paired difference to the original, of every score of a run.

    >>> found = figures({"tasks": {"t acc": [1.0, 0.0]}, "tasks_original": {"t acc": [1.0, 1.0]}})["t acc"]
    >>> found["mean"], found["stderr"], found["original"], found["difference"]["mean"], found["questions"]
    (0.5, 0.5, 1.0, -0.5, 2)
    """
    found: dict[str, dict[str, Any]] = {}
    original = record.get("tasks_original", {})
    for name, values in record.get("tasks", {}).items():
        found[name] = {"questions": len(values), **_figure(values)}
        if len(original.get(name, ())) == len(values):
            found[name]["original"] = _figure(original[name])["mean"]
            found[name]["difference"] = _figure(np.subtract(values, original[name]))
    return found


def _figure(values: Any) -> dict[str, float]:
    """Return mean and standard error over questions."""
    sample = np.asarray(values, np.float64)
    stderr = float(sample.std(ddof=1)) / math.sqrt(len(sample)) if len(sample) > 1 else math.nan
    return {"mean": float(sample.mean()) if len(sample) else math.nan, "stderr": stderr}
