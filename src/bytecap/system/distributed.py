"""Join the processes that `torchrun` has started, over torch.distributed: NCCL between GPUs, gloo between processors.

    torchrun --nproc-per-node 4 -m bytecap fit MODEL --budget 3bpp -o FILE

Each rank has one GPU, chosen by making it the only one that the process sees: every thread and library of the process
then means that one by "cuda". Values travel by gloo, in pieces through the GPU where they are large; tensors of a GPU
stay there. Nothing is added up on the way: sums are made by the receivers in the order of one process.

Omitted: going on with fewer ranks. A rank that is lost ends the job (`bytecap.system.watch`); with `--store` the same
command goes on from what was finished.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from bytecap._version import __version__
from bytecap.errors import RankError, UsageError
from bytecap.system.cache import library
from bytecap.system.messages import packed, unpacked
from bytecap.system.ranks import ALONE, Ranks, owners, started
from bytecap.system.watch import Tell, Watch, say

_Found = TypeVar("_Found")
_JOIN = timedelta(minutes=10)  # for all processes to start
_WAIT = timedelta(days=7)  # of one rank for another: who is lost is found out otherwise
_LARGE = 2**20  # bytes of a value that go through the GPU, where there is one


@contextlib.contextmanager
def joined(device: str = "auto", tell: Tell = say) -> Iterator[Ranks]:
    """Join the other ranks inside a `with` block; the only rank where there are no others.

    An error that leaves the block on any rank ends all of them, and is told once.

    Args:
        device: `auto`, `cuda` or `cpu`: whether a GPU is wanted.
        tell: prints the one line of an error, given with the rank that met it; returns the exit code.

    Raises:
        UsageError: a rank runs another version.
        SystemExit: the job has failed; what there is to say has been said.
    """
    if not started():
        yield ALONE
        return
    rank, size = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE"))
    store = next(iter(rendezvous("env://", timeout=_JOIN)))[0]
    watch = Watch(rank, size, tell, _JOIN)
    with watch.ending():
        _same_version(watch)
        if device != "cpu":
            _own_gpu(int(os.environ.get("LOCAL_RANK", rank)))
        cuda = device != "cpu" and torch.cuda.is_available()
        _same_device(watch, "cuda" if cuda else "cpu")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=_WAIT
        )  # fmt: skip
        if cuda:  # all ranks have to begin together; later some only send to one another
            _collective(dist.broadcast, torch.zeros(1, device="cuda"), 0)
        found = _Joined(watch, "cuda" if cuda else "cpu")
        with warnings.catch_warnings():
            if rank:  # rank 0 is warned of the same
                warnings.simplefilter("ignore")
            yield found
            found.all("the end")
        watch.over()
        dist.destroy_process_group()


def _own_gpu(local: int) -> None:
    """Let the process see one GPU only, before CUDA is first used."""
    if torch.cuda.is_initialized():
        torch.cuda.set_device(local)
        return
    listed = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    if listed and local >= len(listed):
        raise UsageError(
            f"this host has {len(listed)} GPUs (CUDA_VISIBLE_DEVICES), too few for rank {local} on it: start as many "
            "processes as there are, or use --device cpu"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = listed[local] if listed else str(local)


def _same_version(watch: Watch) -> None:
    """Refuse other versions, before anything that they may do otherwise."""
    for other, place in enumerate(watch.places):
        if place["library"] != library():
            raise UsageError(
                f"{watch.who(watch.rank)} runs bytecap {__version__} ({library().split()[1][:8]}), {watch.who(other)} "
                f"{place['version']} ({place['library'].split()[1][:8]}): install the same on every host"
            )


def _same_device(watch: Watch, device: str) -> None:
    """Refuse ranks that compute on different kinds of devices, which could not even talk to one another."""
    found = watch.told("device", device)
    for other, theirs in enumerate(found):
        if theirs != found[0]:
            raise UsageError(
                f"{watch.who(0)} computes on {found[0]}, {watch.who(other)} on {theirs}: start as many processes on a "
                "host as it has GPUs, or use --device cpu"
            )


class _Joined(Ranks):
    """One of several ranks.

    Args:
        watch: over this rank and the others.
        through: torch device that large values go through.
    """

    def __init__(self, watch: Watch, through: str) -> None:
        self.rank, self.size, self._who, self._through = watch.rank, watch.size, watch.who, through
        self._last = watch.last
        self.on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def at_end(self, call: Callable[[], Any]) -> None:
        """See `Ranks`."""
        self._last.append(call)

    def each(
        self,
        costs: Sequence[float],
        work: Callable[[int], _Found],
        *,
        sent: Callable[[_Found], Any] = lambda x: x,
        read: Callable[[Any], _Found] = lambda x: x,
    ) -> list[_Found]:
        """See `Ranks`."""
        owner = owners(costs, self.size)
        mine = {i: work(i) for i, r in enumerate(owner) if r == self.rank}
        values = [iter(v) for v in self.all([sent(f) for f in mine.values()])]
        arrived = [next(values[r]) for r in owner]
        return [mine[i] if i in mine else read(v) for i, v in enumerate(arrived)]

    def all(self, value: Any) -> list[Any]:
        """See `Ranks`."""
        own = packed(value)
        sizes = self._sizes("all", len(own))
        return [
            value if r == self.rank else unpacked(data)
            for r, data in ((r, self._bytes(own, r, n)) for r, n in enumerate(sizes))
        ]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """See `Ranks`."""
        return self._value("from_first", make() if self.first else None, 0)

    def agree(self, about: Mapping[str, Any]) -> None:
        """See `Ranks`."""
        found = self.all(dict(about))
        for name in about:
            for other, theirs in enumerate(found):
                if theirs.get(name) != found[0].get(name):
                    raise UsageError(
                        f"{name} differs: {found[0].get(name)} for {self._who(0)}, {theirs.get(name)} for "
                        f"{self._who(other)}; start all ranks with the same command, files and packages"
                    )

    def spread(self, tensors: Sequence[Tensor] | None, source: int, device: str) -> list[Tensor]:
        """See `Ranks`."""
        forms = None if tensors is None else [[str(t.dtype).partition(".")[2], list(t.shape)] for t in tensors]
        found = self._value("spread", forms, source)
        own = iter(tensors or ())
        out = []
        for dtype, shape in found:
            tensor = next(own).to(device) if source == self.rank else torch.empty(
                shape, dtype=getattr(torch, dtype), device=device
            )  # fmt: skip
            flat = tensor.contiguous()
            if flat.numel():
                _collective(dist.broadcast, flat.view(-1).view(torch.uint8), source)
            out.append(flat)
        return out

    def exchange(self, outgoing: Sequence[Sequence[Tensor]], device: str) -> list[list[Tensor]]:
        """See `Ranks`."""
        forms = [[[str(t.dtype).partition(".")[2], list(t.shape)] for t in tensors] for tensors in outgoing]
        wanted = [theirs[self.rank] for theirs in self.all(forms)]
        sent = [_flat(tensors, device) for tensors in outgoing]
        arrived = [
            torch.empty(sum(_length(*f) for f in fs), dtype=torch.uint8, device=device) for fs in wanted
        ]  # fmt: skip
        arrived[self.rank] = sent[self.rank]
        # to whom the distance is the same at the same time
        operations = []
        for away in range(1, self.size):
            to, source = (self.rank + away) % self.size, (self.rank - away) % self.size
            if len(sent[to]):
                operations.append(dist.P2POp(dist.isend, sent[to], to))
            if len(arrived[source]):
                operations.append(dist.P2POp(dist.irecv, arrived[source], source))
        if operations:
            for request in _collective(dist.batch_isend_irecv, operations):
                _collective(request.wait)
        return [_cut(flat, fs) for flat, fs in zip(arrived, wanted, strict=True)]

    def _sizes(self, call: str, size: int) -> list[int]:
        """Return the size that every rank gives; refuse ranks that are elsewhere in the program."""
        own = torch.tensor([zlib.crc32(call.encode()), size])
        found = [torch.zeros_like(own) for _ in range(self.size)]
        _collective(dist.all_gather, found, own)
        for other, (theirs, _) in enumerate(f.tolist() for f in found):
            if theirs != int(own[0]):
                raise RankError(f"{self._who(other)} has gone another way than {self._who(self.rank)}")
        return [int(f[1]) for f in found]

    def _bytes(self, own: bytes, source: int, size: int) -> bytearray:
        """Return the bytes of one rank."""
        data = bytearray(own if source == self.rank else size)
        if not size:
            return data
        flat = torch.frombuffer(data, dtype=torch.uint8)
        if size < _LARGE or self._through == "cpu":
            _collective(dist.broadcast, flat, source)
            return data
        there = flat.to(self._through) if source == self.rank else torch.empty_like(flat, device=self._through)
        _collective(dist.broadcast, there, source)
        if source != self.rank:
            flat.copy_(there)
        return data

    def _value(self, call: str, own: Any, source: int) -> Any:
        """Return the value of one rank; what others give is not looked at."""
        data = packed(own) if source == self.rank else b""
        arrived = self._bytes(data, source, self._sizes(call, len(data))[source])
        return own if source == self.rank else unpacked(arrived)


def _length(dtype: str, shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel() * getattr(torch, dtype).itemsize)


def _flat(tensors: Sequence[Tensor], device: str) -> Tensor:
    """Return tensors as bytes on a device."""
    parts = [t.detach().contiguous().view(-1).view(torch.uint8).to(device) for t in tensors if t.numel()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


def _cut(flat: Tensor, forms: Sequence[tuple[str, list[int]]]) -> list[Tensor]:
    """Return the tensors that `_flat` was given."""
    found, at = [], 0
    for dtype, shape in forms:
        part, at = flat[at : at + _length(dtype, shape)], at + _length(dtype, shape)
        found.append(part.clone().view(getattr(torch, dtype)).reshape(shape))  # a copy begins where its type may
    return found


def _collective(call: Callable[..., Any], *args: Any) -> Any:
    """Do what all ranks have to do.

    Raises:
        RankError: one of them is gone.
    """
    try:
        return call(*args)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as exc:  # ValueError: the group has been torn down
        raise RankError(f"another rank is gone ({' '.join(str(exc).split())[:200]})") from exc
