"""How the states that chunks leave become the states that enter later chunks: three exchanges.

Legend: W ranks, C chunks, m chunks of a rank (M of the rank that has the most), H heads, K key dim,
V value dim.

Every chunk leaves a state E_j, and P_i = sum over j < i of A_ij E_j enters chunk i, where A is known
on the host (`PackPlan.combination`). This is a linear map, so the gradients go through its
transpose: D_j = sum over i > j of A_ij F_i. Hence one exchange serves both directions.

- `Gather` is LASP+ (MiniMax-01, arXiv 2501.08313, section 3.2.2): one all-gather each way.
- `Serial` is LASP (arXiv 2404.02882): one message from chunk to chunk, each after the last.
- `Pruned` sends between each two ranks only the heads whose weight is above `epsilon`; what
  enters chunk i is off by at most epsilon times the sum of the norms of the E_j left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attnlab.distributed.comm import Group, Pending
from attnlab.distributed.pack import UNREACHED, PackPlan


class Exchange(Protocol):
    """How states cross, and how their gradients do."""

    def start(self, own: Tensor, *, backward: bool) -> Pending:
        """`[m, H, K, V]` that enter the rank's chunks, from those that its chunks leave.

        Backward: gradients of the states left, from those of the states that entered.
        """


@dataclass
class Gather:
    """All ranks' states to all ranks, and a product with the host's matrix."""

    plan: PackPlan
    group: Group
    log_decay: Sequence[float]

    def start(self, own: Tensor, *, backward: bool) -> Pending:
        """Ranks with less chunks than others send zeros for them."""
        chunks = self.plan.chunks(self.group.rank)
        weights = _weights(self.plan, self.log_decay, chunks, backward)  # [m, C, H]
        if not self.plan.crosses_ranks:
            return Pending([], lambda: _combine(weights[:, list(chunks)], own))
        missing = self.plan.max_chunks - own.shape[0]
        zeros = own.new_zeros(missing, *own.shape[1:])
        gathering = self.group.all_gather(torch.cat([own, zeros]) if missing else own)
        none = self.plan.num_chunks  # stands for those zeros
        slots = torch.full((self.plan.world_size, self.plan.max_chunks), none)
        for rank in range(self.plan.world_size):
            owned = self.plan.chunks(rank)
            slots[rank, : len(owned)] = torch.tensor(owned)
        padded = torch.cat([weights, torch.zeros_like(weights[:, :1])], 1)  # [m, C+1, H]
        placed = padded[:, slots.flatten()]  # [m, W M, H]
        return Pending([], lambda: _combine(placed, gathering.wait().flatten(0, 1)))


@dataclass
class Serial:
    """A chain over the chunks: each adds its own state to the decayed one that it received."""

    plan: PackPlan
    group: Group
    log_decay: Sequence[float]

    def start(self, own: Tensor, *, backward: bool) -> Pending:
        """Nothing can be sent before it is this rank's turn."""
        return Pending([], lambda: self._take_turns(own, backward))

    def _take_turns(self, own: Tensor, backward: bool) -> Tensor:
        """Chunk by chunk along the chain."""
        owned = self.plan.chunks(self.group.rank)
        result = torch.zeros_like(own)
        carried: Tensor | None = None  # between chunks of this rank that follow each other
        sent = []
        for chunk in reversed(owned) if backward else owned:
            slot = owned.index(chunk)
            carried = self._receive(chunk, own[slot], carried, backward)
            result[slot], after = self._pass(chunk, own[slot], carried, backward)
            carried, work = self._send(chunk, after, backward)
            sent += [work] if work is not None else []
        for work in sent:
            work.wait()
        return result

    def _receive(self, chunk: int, like: Tensor, carried: Tensor | None, backward: bool) -> Tensor:
        """The state that comes to a chunk along the chain: zero at its start."""
        before = chunk + 1 if backward else chunk - 1
        if not self._linked(before, chunk):
            return torch.zeros_like(like)
        peer = self.plan.owners[before]
        if peer == self.group.rank:
            assert carried is not None
            return carried
        buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        return self.group.exchange([], [(peer, buffer)]).wait()

    def _pass(self, chunk: int, own: Tensor, came: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
        """What a chunk gets of the chain, and what it hands on."""
        lo, hi = self.plan.span(chunk)
        uses = self.plan.continues(chunk)
        whole = lo == hi or (uses and self.plan.last_fragment(chunk).start == lo)
        g = torch.tensor(self.log_decay, dtype=torch.float64)
        decay = torch.exp(g * (hi - lo)).to(own)[:, None, None]  # [H, 1, 1]
        passed = float(whole) * decay * came
        return (
            (came, float(uses) * own + passed) if backward else (float(uses) * came, own + passed)
        )

    def _send(self, chunk: int, state: Tensor, backward: bool) -> tuple[Tensor, Pending | None]:
        after = chunk - 1 if backward else chunk + 1
        if not self._linked(chunk, after) or self.plan.owners[after] == self.group.rank:
            return state, None
        peer = self.plan.owners[after]
        return state, self.group.exchange([(peer, state.contiguous())], [])

    def _linked(self, one: int, other: int) -> bool:
        """Whether a document runs across the edge between two neighbouring chunks."""
        left, right = sorted((one, other))
        if left < 0 or right >= self.plan.num_chunks:
            return False
        later = self.plan.distances[right:, : left + 1]
        return bool((later != UNREACHED).any())


@dataclass
class Pruned:
    """Point-to-point messages of the heads that still matter at their distance."""

    plan: PackPlan
    group: Group
    log_decay: Sequence[float]
    epsilon: float

    def start(self, own: Tensor, *, backward: bool) -> Pending:
        """Post all messages: to each other rank the heads whose weight there is above epsilon."""
        rank, buffers, sends, receives = self.group.rank, [], [], []
        for peer in range(self.plan.world_size):
            if peer == rank:
                continue
            outgoing = self._rows(peer, rank, backward)
            if outgoing:
                slots, heads = (
                    torch.tensor(x, device=own.device) for x in zip(*outgoing, strict=True)
                )
                sends.append((peer, own[slots, heads]))  # [rows, K, V]
            incoming = len(self._rows(rank, peer, backward))
            buffers.append(own.new_empty(incoming, *own.shape[2:]))
            if incoming:
                receives.append((peer, buffers[-1]))
        works = self.group.exchange(sends, receives)

        def received() -> Tensor:
            works.wait()
            states = torch.cat([own.new_empty(0, *own.shape[2:]), *buffers])
            return self._add_up(own, states, backward)

        return Pending([], received)

    def _add_up(self, own: Tensor, states: Tensor, backward: bool) -> Tensor:
        """Own states and those that came, `[rows, K, V]`, with their weights."""
        rank = self.group.rank
        chunks = self.plan.chunks(rank)
        weights = self._kept(chunks, backward)  # [m, C, H]
        total = _combine(weights[:, list(chunks)], own)
        peers = [peer for peer in range(self.plan.world_size) if peer != rank]
        rows = [(p, *row) for p in peers for row in self._rows(rank, p, backward)]
        if not rows or not chunks:
            return total
        senders = torch.tensor([self.plan.chunks(peer)[slot] for peer, slot, _ in rows])
        heads = torch.tensor([head for _, _, head in rows])
        share = weights[:, senders, heads].to(own)[..., None, None]  # [m, rows, 1, 1]
        return total.index_add(1, heads.to(own.device), share * states)

    def _kept(self, chunks: Sequence[int], backward: bool) -> Tensor:
        weights = _weights(self.plan, self.log_decay, chunks, backward)
        return torch.where(weights > self.epsilon, weights, 0.0)

    def _rows(self, to_rank: int, from_rank: int, backward: bool) -> list[tuple[int, int]]:
        """Chunk (as a number among the sender's) and head of each state of one message."""
        kept = self._kept(self.plan.chunks(to_rank), backward)  # [m', C, H]
        used = kept[:, list(self.plan.chunks(from_rank))].any(0)  # [m, H]
        return [(slot, head) for slot, head in used.nonzero().tolist()]


def _combine(weights: Tensor, states: Tensor) -> Tensor:
    """Sums `[m, H, K, V]` of states `[j, H, K, V]` with weights `[m, j, H]`."""
    return torch.einsum("ijh,jhkv->ihkv", weights.to(states), states)


def _weights(
    plan: PackPlan, log_decay: Sequence[float], chunks: Sequence[int], backward: bool
) -> Tensor:
    """Of the given chunks, the weights of all: rows of A, or of its transpose, `[m, C, H]`."""
    take = plan.absorption if backward else plan.combination
    return take(log_decay, chunks)
