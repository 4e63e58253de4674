"""A process group whose messages are counted, and whose calls all return something to wait for.

Legend: W ranks of the group.

Only collectives that gloo and NCCL both have are used, with equal sizes or explicit splits. A group
of one rank sends nothing. Every rank of a group has to make the same calls in the same order; what
is skipped is skipped by all, for a reason that all can see.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnlab.checks import expect
from attnlab.distributed.pack import PackPlan

# torch 2.13 renamed two collectives.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_MAX_AGREED = 4096  # plans that a group remembers


@dataclass(frozen=True, kw_only=True)
class Event:
    """One call: a collective counts as one message, point-to-point sends are counted singly."""

    op: str
    group: str
    messages: int
    sent_bytes: int
    received_bytes: int


@dataclass
class Ledger:
    """The calls of a rank's groups, in the order in which they were made."""

    events: list[Event] = field(default_factory=list)

    def total(self, op: str | None = None, group: str | None = None) -> Event:
        """Sums over the calls of an op and a group, or of all."""
        found = [e for e in self.events if op in (None, e.op) and group in (None, e.group)]
        return Event(
            op=op or "all",
            group=group or "all",
            messages=sum(e.messages for e in found),
            sent_bytes=sum(e.sent_bytes for e in found),
            received_bytes=sum(e.received_bytes for e in found),
        )


class Pending:
    """A result on its way; `wait` returns it, and makes the current CUDA stream wait for it."""

    def __init__(self, works: Sequence[dist.Work], result: Callable[[], Tensor]) -> None:
        """Keep what is running, and how to read the result off afterwards."""
        self._works, self._result = list(works), result

    def wait(self) -> Tensor:
        """The result; may be called more than once."""
        for work in self._works:
            work.wait()
        self._works = []
        return self._result()


class Group:
    """Ranks that talk to each other, numbered from 0 in the group's order."""

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        *,
        name: str = "world",
        ledger: Ledger | None = None,
    ) -> None:
        """Wrap a process group; None for a single process without torch.distributed."""
        self.process_group, self.name, self.ledger = process_group, name, ledger
        self.size = 1 if process_group is None else process_group.size()
        self.rank = 0 if process_group is None else process_group.rank()
        self._agreed: set[int] = set()  # fingerprints of plans

    @property
    def device(self) -> torch.device:
        """Where tensors have to lie that the group sends."""
        nccl = self.process_group is not None and dist.get_backend(self.process_group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def all_gather(self, x: Tensor) -> Pending:
        """All ranks' tensors of one shape, `[W, *x.shape]`."""
        x = x.contiguous()
        if self.size == 1:
            return Pending([], _keeping(x[None]))
        gathered = x.new_empty(self.size, *x.shape)
        work = _all_gather(
            gathered.flatten(0, 1) if x.ndim else gathered,
            x if x.ndim else x[None],
            group=self.process_group,
            async_op=True,
        )
        self._count("all_gather", 1, x.nbytes, (self.size - 1) * x.nbytes)
        return Pending([work], _keeping(gathered, x))

    def reduce_scatter(self, x: Tensor) -> Pending:
        """Of `[W, ...]`, the sum over the ranks of this rank's row."""
        x = x.contiguous()
        expect(x.shape[0] == self.size, f"a row for each of {self.size} ranks", x.shape[0])
        if self.size == 1:
            return Pending([], _keeping(x[0]))
        own = x.new_empty(x.shape[1:])
        work = _reduce_scatter(own, x.flatten(0, 1), group=self.process_group, async_op=True)
        moved = (self.size - 1) * own.nbytes
        self._count("reduce_scatter", 1, moved, moved)
        return Pending([work], _keeping(own, x))

    def all_reduce(self, x: Tensor) -> Pending:
        """The sum over the ranks, in a new tensor."""
        total = x.clone()
        if self.size == 1:
            return Pending([], lambda: total)
        work = dist.all_reduce(total, group=self.process_group, async_op=True)
        self._count("all_reduce", 1, x.nbytes, x.nbytes)
        return Pending([work], lambda: total)

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending:
        """Rows for each rank, in their order, against rows from each: `[sum(received), ...]`.

        `sent` and `received` are the numbers of rows for and from each rank, host integers.
        """
        x = x.contiguous()
        expect(sum(sent) == x.shape[0], f"splits of the {x.shape[0]} rows", list(sent))
        if self.size == 1:
            return Pending([], _keeping(x))
        rows = x.new_empty(sum(received), *x.shape[1:])
        work = dist.all_to_all_single(
            rows, x, list(received), list(sent), group=self.process_group, async_op=True
        )
        row_bytes = x[:1].nbytes if x.shape[0] else rows[:1].nbytes
        out, into = sum(sent) - sent[self.rank], sum(received) - received[self.rank]
        self._count("all_to_all", 1, out * row_bytes, into * row_bytes)
        return Pending([work], _keeping(rows, x))

    def gather_number(self, number: int) -> list[int]:
        """All ranks' int64, on the host: for checks, and counted as one."""
        if self.size == 1:
            return [number]
        own = torch.tensor([number], device=self.device)
        found = own.new_empty(self.size)
        _all_gather(found, own, group=self.process_group)
        self._count("check", 1, own.nbytes, (self.size - 1) * own.nbytes)
        return found.tolist()

    def agree_on(self, plan: PackPlan) -> None:
        """Note that all ranks have this plan, which has to be noted on all of them."""
        if len(self._agreed) >= _MAX_AGREED:
            self._agreed.clear()
        self._agreed.add(plan.fingerprint)

    def check_plan(self, plan: PackPlan) -> None:
        """Raise the same `ValueError` on all ranks unless all have this plan.

        They ask each other about a plan once; so that all ask at the same time, all have to have
        met the same plans before.
        """
        if plan.fingerprint not in self._agreed:
            check_agreement(self, plan.fingerprint, "cu_seqlens and chunks")
            self.agree_on(plan)

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending:
        """Point-to-point messages, contiguous and not empty; `receives` holds what to fill.

        The result is the first buffer, or an empty tensor.
        """
        ops = [self._p2p(dist.isend, x, peer) for peer, x in sends]
        ops += [self._p2p(dist.irecv, x, peer) for peer, x in receives]
        works = dist.batch_isend_irecv(ops) if ops else []
        if ops:
            sent, received = (sum(x.nbytes for _, x in side) for side in (sends, receives))
            self._count("p2p", len(sends), sent, received)
        buffers = [x for _, x in receives]
        kept = [x for _, x in sends]
        return Pending(works, _keeping(buffers[0] if buffers else torch.empty(0), *kept))

    def _p2p(self, op: Callable, x: Tensor, peer: int) -> dist.P2POp:
        assert peer != self.rank and x.numel() and x.is_contiguous()
        assert self.process_group is not None
        rank = dist.get_global_rank(self.process_group, peer)
        return dist.P2POp(op, x, rank, self.process_group)

    def _count(self, op: str, messages: int, sent: int, received: int) -> None:
        if self.ledger is not None:
            event = Event(
                op=op,
                group=self.name,
                messages=messages,
                sent_bytes=sent,
                received_bytes=received,
            )
            self.ledger.events.append(event)


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """Sum over the ranks, with gradients: every rank's use of it counts, so they are summed too."""
    return _SumOverRanks.apply(x, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_reduce(x.detach()).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grad).wait(), None


def check_agreement(group: Group, value: object, what: str, *, parts: int = 1) -> None:
    """Raise the same `ValueError` on all ranks unless `value` prints the same on all of them.

    With `parts`, only the ranks of each of so many equal parts of the group have to agree.
    """
    digest = hashlib.sha256(repr(value).encode()).digest()
    numbers = group.gather_number(int.from_bytes(digest[:8], "little") >> 1)  # not negative
    each = group.size // parts
    odd = [rank for rank, x in enumerate(numbers) if x != numbers[rank // each * each]]
    expect(not odd, f"the same {what} on all ranks of {group.name}", f"others on ranks {odd[:8]}")


def _keeping(result: Tensor, *inputs: Tensor) -> Callable[[], Tensor]:
    """Reads `result`, and keeps what it is made from alive until then.

    The stream that waits need not be the one that started: memory is given back behind the former.
    """

    def read() -> Tensor:
        if result.is_cuda:
            for x in (result, *inputs):
                x.record_stream(torch.cuda.current_stream(x.device))
        return result

    return read
