"""Score a model, and a coded model against its original, on tokens that nothing was fitted to.

Reported always together: bits per byte (what users are scored on), KL to the original (the honest distortion:
shrunk weights can improve the loss on foreign text without being closer to the original), the share of equal
top-1 predictions, and the original at its best temperature. Standard errors are over windows, and paired for
differences.

bits per byte = nats per token / ln 2 * tokens / bytes, with the bytes of the original text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bytecap.model import streaming
from bytecap.model.batches import Batch, Look, is_batches, rows_of_batches
from bytecap.model.divided_scores import batches_apart, variants_apart
from bytecap.model.forward import Progress, batches, logits_of, longest_first, pass_tokens
from bytecap.model.predicted import device_of, predicted
from bytecap.model.quantized_copy import Values
from bytecap.model.temperature import TEMPERATURES, best_temperature
from bytecap.model.texts import Text, Window
from bytecap.model.uncertainty import ratio_stderr
from bytecap.progress import Advance
from bytecap.system.ranks import ALONE, Ranks
from bytecap.types import Score

FloatArray = npt.NDArray[np.float64]
_TOGETHER = {"cpu": 2**20, "cuda": 2**26}  # logits of which log probabilities are made at once


@dataclass(frozen=True)
class Comparison:
    """A coded model against its original on one text (or the unweighted mean over several).

    All `nats` and `kl` figures are per token; `stderr` fields are standard errors over windows; `windows` holds what
    they were made from (None in a mean over texts).
    """

    name: str
    tokens: int
    bytes: int
    nats_original: float
    nats_artifact: float
    nats_temperature: float
    temperature: float
    bpb_original: float
    bpb_artifact: float
    bpb_stderr: float
    delta_nats: float
    delta_stderr: float
    kl_nats: float
    kl_stderr: float
    same_top1: float
    windows: ByWindow | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON, without the windows."""
        return {k: v for k, v in self.__dict__.items() if k != "windows"}


def _some_rows(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield a few rows of logits (n, vocabulary) and others at a time: what is made of them is as large as they are."""
    rows = max(1, _TOGETHER[logits.device.type] // logits.shape[1])
    return zip(*(t.split(rows) for t in (logits, *others)), strict=True)


def _token_losses(logp: Tensor, labels: Tensor) -> Tensor:
    return -logp.gather(1, labels[:, None])[:, 0]


def _by_window(mask: Tensor, values: Tensor) -> Tensor:
    """Sum the values (n,) of the n tokens in a mask (batch, length) to float64 (batch,), in the same order anywhere."""
    whole = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    whole[mask] = values.double()
    return whole.sum(1)


def paired_stderr(one: Sequence[Comparison], other: Sequence[Comparison], what: str) -> float:
    """Return the standard error of the difference of two means over texts, window by window; NaN if there is none.

    Args:
        one: one for each text.
        other: of another model on the same windows.
        what: `kl` or `nats`.
    """
    errors = [
        ratio_stderr(getattr(a.windows, what) - getattr(b.windows, what), a.windows.tokens)
        for a, b in zip(one, other, strict=True)
        if a.windows is not None and b.windows is not None
    ]
    return math.sqrt(sum(e * e for e in errors)) / len(errors) if len(errors) == len(one) > 0 else float("nan")


def _losses_and_kl(logp: Tensor, logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, some rows at a time, losses (n,) of logits (n, vocabulary), and the KL (n,) of `logp` to them."""
    for p, some, own in _some_rows(logp, logits, labels):
        q = torch.log_softmax(some.float(), -1)
        yield _token_losses(q, own), q.sub_(p).neg_().mul_(p.exp()).sum(-1)


@torch.no_grad()
def evaluate(module: nn.Module, text: Text, *, device: str = "cpu", progress: Progress | None = None) -> Score:
    """Score one model on one text."""
    if is_batches(text.windows):
        return _score_batches(module, text, device, progress)
    if streaming.of(module) is not None:
        return _score_streamed(module, text, device, progress)
    losses, counts, sizes = [], [], []
    for ids, mask, windows in _batches(text.windows, module):
        logits = logits_of(module(ids[:, :-1].to(device))).float()
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(device), reduction="none")
        losses += (loss * mask.to(device)).double().sum(1).tolist()
        counts += mask.sum(1).tolist()
        sizes += [w.bytes for w in windows]
        if progress is not None:
            progress(int(mask.sum()))
    total, tokens, size = np.array(losses), np.array(counts), np.array(sizes)
    return _score(text.name, total, tokens, size)


def _score(name: str, total: FloatArray, tokens: FloatArray, size: FloatArray) -> Score:
    """Return a score from sums over windows."""
    return Score(
        name, int(tokens.sum()), int(size.sum()), float(total.sum() / tokens.sum()), _bpb(total, size),
        ratio_stderr(total / math.log(2), size),
    )  # fmt: skip


def _bpb(nats: FloatArray, size: FloatArray) -> float:
    """Return bits per byte; NaN if bytes were not counted."""
    return float(nats.sum() / math.log(2) / size.sum()) if size.any() else math.nan


def _score_streamed(module: nn.Module, text: Text, device: str, progress: Progress | None) -> Score:
    """Score a streamed model, each block of which is read once for some thousands of tokens."""
    losses, counts, sizes = [], [], []
    data = list(_batches(text.windows, module))
    found = predicted(module, module, {}, [(ids, mask) for ids, mask, _ in data], device)
    for (ids, mask, windows), pieces in zip(data, found, strict=True):
        flat = mask.to(device)
        labels, parts = ids[:, 1:].to(device)[flat], list[Tensor]()
        for (one,) in pieces:
            logp = torch.log_softmax(one().float(), -1)
            own, labels = labels[: len(logp)], labels[len(logp) :]
            parts.append(_token_losses(logp, own))
        losses += _by_window(flat, torch.cat(parts)).tolist()
        counts += mask.sum(1).tolist()
        sizes += [w.bytes for w in windows]
        if progress is not None:
            progress(int(mask.sum()))
    return _score(text.name, *(np.array(x, dtype=float) for x in (losses, counts, sizes)))


def _score_batches(module: nn.Module, text: Text, device: str, progress: Progress | None) -> Score:
    losses = []
    for batch in text.windows:
        assert isinstance(batch, Batch)  # noqa: S101 (a text holds one kind)
        losses.append(Look.at(module, batch, device).loss * batch.count)
        if progress is not None:
            progress(batch.count)
    tokens, size = (np.array(x, dtype=float) for x in zip(*((w.predicted, w.bytes) for w in text.windows), strict=True))
    return _score(text.name, np.array(losses), tokens, size)


def _batches(windows: Sequence[Window], module: nn.Module) -> Any:
    """Yield batches with the windows they hold, in the order in which `batches` sorts them."""
    order = longest_first(windows)
    at = 0
    for ids, mask in batches(windows, pass_tokens(module, device_of(module))):
        yield ids, mask, order[at : at + len(ids)]
        at += len(ids)


@torch.no_grad()
def compare_models(
    original: nn.Module,
    coded: nn.Module,
    text: Text,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Score a coded model against its original on the same tokens, which `ranks` share."""
    return compare_texts(original, coded, [text], device=device, progress=progress, ranks=ranks)[0]


@torch.no_grad()
def compare_texts(
    original: nn.Module,
    coded: nn.Module,
    texts: Sequence[Text],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> list[Comparison]:
    """Score a coded model against its original on several texts; streamed models are read once for all of them."""
    if any(is_batches(t.windows) for t in texts):
        return [_compare_batches(original, coded, t, device, progress) for t in texts]
    data = [list(_batches(t.windows, original)) for t in texts]
    every = list(chain.from_iterable(data))
    found = iter(list(batches_apart(ranks, every, lambda some: _compared(original, coded, some, device, progress))))
    return [_joined(t.name, islice(found, len(own))) for t, own in zip(texts, data, strict=True)]


def _joined(name: str, found: Iterable[tuple[list[list[float]], list[list[float]], int]]) -> Comparison:
    """Sum up a text's batches."""
    sums: list[list[float]] = []
    temperature, same = np.zeros(len(TEMPERATURES)), 0
    for rows, tempered, equal in found:
        sums += rows
        for losses in tempered:
            temperature += losses
        same += equal
    return _summary(name, np.array(sums), temperature, same)


def _compared(
    original: nn.Module, coded: nn.Module, data: Sequence[Any], device: str, progress: Progress | None
) -> Iterator[tuple[list[list[float]], list[list[float]], int]]:
    """Yield, for every batch: sums by window, losses at every temperature by piece, and equal predictions."""
    found = predicted(original, coded, {"": {}}, [(ids, mask) for ids, mask, _ in data], device)
    for (ids, mask, windows), pieces in zip(data, found, strict=True):
        flat = mask.to(device)
        labels = ids[:, 1:].to(device)[flat]
        parts: list[tuple[Tensor, ...]] = []
        tempered: list[list[float]] = []
        same = 0
        for one, other in pieces:
            for x, y in _some_rows(one().float(), other().float()):
                p, q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
                own, labels = labels[: len(p)], labels[len(p) :]
                tempered.append([float(nn.functional.cross_entropy(x / t, own, reduction="sum")) for t in TEMPERATURES])
                same += int((x.argmax(-1) == q.argmax(-1)).sum())
                kl = (p - q).mul_(p.exp()).sum(-1)
                parts.append((_token_losses(p, own), _token_losses(q, own), kl))
        grouped = [_by_window(flat, torch.cat(c)) for c in zip(*parts, strict=True)]
        rows = [[float(g[i]) for g in grouped] + [float(mask[i].sum()), float(w.bytes)] for i, w in enumerate(windows)]
        if progress is not None:
            progress(int(mask.sum()))
        yield rows, tempered, same


def _compare_batches(
    original: nn.Module, coded: nn.Module, text: Text, device: str, progress: Progress | None
) -> Comparison:
    """Compare by each batch's own loss; figures that need predictions are NaN where the loss holds none."""
    sums, temperature, same = [], np.zeros(len(TEMPERATURES)), 0.0
    for batch in text.windows:
        assert isinstance(batch, Batch)  # noqa: S101 (a text holds one kind)
        p, q, n = Look.at(original, batch, device), Look.at(coded, batch, device), batch.count
        kl = p.kl(q) if p.seen else math.nan
        sums.append([p.loss * n, q.loss * n, kl * n, n, batch.bytes])
        temperature += [p.tempered(t) * n for t in TEMPERATURES]
        same += p.same(q) * n
        if progress is not None:
            progress(n)
    return _summary(text.name, np.array(sums, dtype=float), temperature, same)


def _summary(name: str, sums: np.ndarray[Any, Any], temperature: np.ndarray[Any, Any], same: float) -> Comparison:
    nats_p, nats_q, kl, tokens, size = sums.T
    n = tokens.sum()
    best, nats_best = best_temperature(temperature / n)
    return Comparison(
        name=name, tokens=int(n), bytes=int(size.sum()),
        nats_original=float(nats_p.sum() / n), nats_artifact=float(nats_q.sum() / n),
        nats_temperature=nats_best, temperature=best,
        bpb_original=_bpb(nats_p, size), bpb_artifact=_bpb(nats_q, size),
        bpb_stderr=ratio_stderr((nats_q - nats_p) / math.log(2), size),
        delta_nats=float((nats_q - nats_p).sum() / n), delta_stderr=ratio_stderr(nats_q - nats_p, tokens),
        kl_nats=float(kl.sum() / n), kl_stderr=ratio_stderr(kl, tokens), same_top1=same / float(n),
        windows=ByWindow(kl, nats_q, nats_p, tokens, size),
    )  # fmt: skip


def kl_to(
    original: nn.Module, coded: nn.Module, windows: Sequence[Window], *, device: str = "cpu", ranks: Ranks = ALONE
) -> tuple[float, float]:
    """Return the KL to the original in nats per token and its standard error, on plain windows."""
    return kl_each(original, coded, {"": {}}, windows, device=device, ranks=ranks)[""]


def kl_each(
    original: nn.Module,
    quantized_copy: nn.Module,
    variants: Mapping[str, Values],
    windows: Sequence[Window],
    *,
    device: str = "cpu",
    advance: Advance | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, tuple[float, float]]:
    """Return KL to the original in nats per token, and its standard error, for several variants; see `by_window`."""
    found = by_window(original, quantized_copy, variants, windows, device=device, advance=advance, ranks=ranks)
    return {k: (float(v.kl.sum() / v.tokens.sum()), ratio_stderr(v.kl, v.tokens)) for k, v in found.items()}


@dataclass(frozen=True)
class ByWindow:
    """Sums over the predicted tokens of every window, each array of shape (windows,), longest windows first.

    Attributes:
        kl: KL to the original, nats.
        nats: negative log-likelihood.
        original: negative log-likelihood of the original.
        tokens: predicted tokens.
        bytes: UTF-8 bytes they stand for.
    """

    kl: FloatArray
    nats: FloatArray
    original: FloatArray
    tokens: FloatArray
    bytes: FloatArray


@torch.no_grad()
def by_window(
    original: nn.Module,
    quantized_copy: nn.Module,
    variants: Mapping[str, Values],
    windows: Sequence[Window],
    *,
    device: str = "cpu",
    advance: Advance | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, ByWindow]:
    """Score several variants of one model window by window, for paired comparisons.

    Batch by batch, so that the original is run once whatever the number of variants.

    Args:
        original: untouched model.
        quantized_copy: the model variants are made of; restored afterwards.
        variants: by name, the values put into the copy.
        windows: plain windows.
        device: torch device.
        advance: called with the share of a variant that is done.
        ranks: processes that share the batches, or the variants where there are fewer batches than processes.
    """
    if is_batches(windows):
        scores = rows_of_batches(original, quantized_copy, variants, windows, device, advance)
        return {label: ByWindow(*np.array(rows, dtype=float).T) for label, rows in scores.items()}
    data = list(_batches(windows, original))

    def scored(some: Sequence[Any], labels: Mapping[str, Values] = variants) -> Iterator[list[list[float]]]:
        return _scored(original, quantized_copy, labels, some, device, advance, sum(w.predicted for w in windows))

    if len(data) >= ranks.size or len(variants) < 2:
        found = list(batches_apart(ranks, data, scored))
    else:
        found = variants_apart(ranks, variants, len(data), lambda own: list(scored(data, own)))
    columns = [np.array(list(chain(*c)), dtype=float) for c in zip(*found, strict=True)]
    tokens = np.array([n for _, mask, _ in data for n in mask.sum(1).tolist()], dtype=float)
    sizes = np.array([w.bytes for _, _, members in data for w in members], dtype=float)
    return {
        label: ByWindow(kl, nats, columns[0], tokens, sizes)
        for label, nats, kl in zip(variants, columns[1::2], columns[2::2], strict=True)
    }


def _scored(
    original: nn.Module,
    quantized_copy: nn.Module,
    variants: Mapping[str, Values],
    data: Sequence[Any],
    device: str,
    advance: Advance | None,
    total: int,
) -> Iterator[list[list[float]]]:
    """Yield, for every batch, sums by window: losses of the original, and of every variant its losses and its KL."""
    found = predicted(original, quantized_copy, variants, [(ids, mask) for ids, mask, _ in data], device)
    for (ids, mask, _), pieces in zip(data, found, strict=True):
        flat = mask.to(device)
        labels = ids[:, 1:].to(device)[flat]
        parts: list[list[Tensor]] = []
        for one, *others in pieces:
            p = torch.log_softmax(one().float(), -1)
            own, labels = labels[: len(p)], labels[len(p) :]
            part = [_token_losses(p, own)]
            for other in others:
                part += [torch.cat(c) for c in zip(*_losses_and_kl(p, other(), own), strict=True)]
                if advance is not None:
                    advance(len(p) / total)
            parts.append(part)
            del p
        yield [_by_window(flat, torch.cat(c)).tolist() for c in zip(*parts, strict=True)]
