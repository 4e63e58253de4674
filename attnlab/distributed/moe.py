"""Mixture of experts over ranks: experts on ep, their channels on etp, tokens in groups.

Legend: N tokens of this rank, D hidden size, E experts, k experts a token, F expert width, G groups;
S rows that this rank sends in a group, R rows that it receives, P ranks of etp.

MiniMax-01, arXiv 2501.08313, section 3.1. An ep rank owns E / ep experts, an etp rank F / etp of
their channels; every rank has tokens of its own. A group of tokens passes five stages: D sends its
rows to their experts (all-to-all over ep), A gathers them over etp, X computes partial sums of this
rank's channels, R sums and scatters them, Y sends them back. The stages of several groups overlap,
in the order of `streams.moe_schedule`: each process group works off its collectives one by one while
the experts compute (on CUDA streams of their own, `queues`). All row counts are exchanged beforehand,
so nothing else waits for the host. The backward overlaps likewise, in the order of
`streams.moe_backward_schedule`, and reuses the counts.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.checks import expect
from attnlab.distributed.comm import Group
from attnlab.distributed.overlap import Transit, begin
from attnlab.distributed.queues import Queues
from attnlab.distributed.routing import Routing
from attnlab.distributed.streams import Step, moe_schedule
from attnlab.distributed.timing import VirtualTime
from attnlab.model.grouped import grouped_linear
from attnlab.model.slots import gated_silu


class ExpertShard(NamedTuple):
    """This rank's part of the experts: `gate_up` `[E/ep, 2F/etp, D]`, `down` `[E/ep, D, F/etp]`."""

    gate_up: Tensor
    down: Tensor


def shard_experts(gate_up: Tensor, down: Tensor, ep: Group, etp: Group) -> ExpertShard:
    """A rank's part of all experts' weights `[E, 2F, D]`, W_1 above W_3, and `[E, D, F]`.

    Raises:
        ValueError: unless ep divides the experts and etp their width.
    """
    experts, hidden, width = down.shape
    expect(experts % ep.size == 0, f"experts that ep {ep.size} divides", experts)
    expect(width % etp.size == 0, f"a width that etp {etp.size} divides", width)
    own = slice(ep.rank * experts // ep.size, (ep.rank + 1) * experts // ep.size)
    part = slice(etp.rank * width // etp.size, (etp.rank + 1) * width // etp.size)
    halves = gate_up[own].view(-1, 2, width, hidden)[:, :, part]
    return ExpertShard(halves.flatten(1, 2).contiguous(), down[own, :, part].contiguous())


def mix_experts(
    x: Tensor,
    routing: Routing,
    experts: ExpertShard,
    ep: Group,
    etp: Group,
    *,
    num_groups: int = 1,
    lookahead: int = 1,
    clock: VirtualTime | None = None,
) -> Tensor:
    """`[N, D]`: each token's kept experts, weighted; the sums run at least in float32.

    Every rank of ep and etp has to call it with the same numbers of groups; a rank may have no
    tokens. `clock` keeps the time that the stages would take on a machine of its making.
    """
    expect(num_groups >= 1, "at least one group of tokens", num_groups)
    plans = _exchange_counts(routing, experts.down.shape[0], ep, etp, num_groups)
    run = _Run(x, experts, ep, etp, plans)
    queues = Queues(x.device)
    for step in moe_schedule(num_groups, lookahead):
        with queues.on(step):
            getattr(run, _STAGES[step.stage])(step.group)
        if clock is not None:
            _tell(clock, step, plans[step.group], x[:1].nbytes, ep, etp)
    outputs = []
    for group in range(num_groups):
        queues.join(Step("Y", group))
        outputs.append(run.returned(group, routing, x.dtype))
    return torch.cat(outputs)


@dataclass
class _GroupPlan:
    """Where the rows of one group of tokens go; row counts are host integers.

    tokens: `[S]`, the token of each row sent, sorted by expert; places: `[n, k]`, where each slot's
    row is, S for dropped ones. sent and received are rows to and from each ep rank; gathered `[P]`
    rows of each etp rank, padded to the largest of them; order: `[all rows]`, the gathered rows
    sorted by expert; offsets `[E/ep]` int32 are the ends of the experts' runs.
    """

    first: int
    tokens: Tensor
    places: Tensor
    sent: list[int]
    received: list[int]
    gathered: list[int]
    order: Tensor
    offsets: Tensor

    @property
    def padded(self) -> int:
        """Rows of the etp rank that has most."""
        return max(self.gathered)


class _Run:
    """The groups' rows on their way through the stages."""

    def __init__(
        self, x: Tensor, experts: ExpertShard, ep: Group, etp: Group, plans: list[_GroupPlan]
    ) -> None:
        self.x, self.experts, self.ep, self.etp, self.plans = x, experts, ep, etp, plans
        self.moving: dict[Step, Transit] = {}
        self.partial: dict[int, Tensor] = {}

    def dispatch(self, group: int) -> None:
        plan = self.plans[group]
        if self.x.is_cuda:  # the backward lets go of what it indexes by, which this stream reads
            plan.tokens.record_stream(torch.cuda.current_stream())
        rows = self.x[plan.tokens]  # [S, D]
        there = partial(self.ep.all_to_all, sent=plan.sent, received=plan.received)
        back = partial(self.ep.all_to_all, sent=plan.received, received=plan.sent)
        self.moving[Step("D", group)] = begin(rows, there, back)

    def gather(self, group: int) -> None:
        rows = self.moving.pop(Step("D", group)).end()  # [R, D]
        padded = F.pad(rows, (0, 0, 0, self.plans[group].padded - rows.shape[0]))
        step = Step("A", group)
        self.moving[step] = begin(padded, self.etp.all_gather, self.etp.reduce_scatter)

    def compute(self, group: int) -> None:
        plan = self.plans[group]
        gathered = self.moving.pop(Step("A", group)).end()  # [P, padded, D]
        flat = gathered.flatten(0, 1)
        rows = flat[plan.order]
        hidden = gated_silu(grouped_linear(rows, self.experts.gate_up, plan.offsets))
        mixed = grouped_linear(hidden, self.experts.down, plan.offsets)
        partial_sums = torch.zeros_like(flat).index_copy(0, plan.order, mixed)
        self.partial[group] = partial_sums.view(gathered.shape)

    def reduce(self, group: int) -> None:
        sums = self.partial.pop(group)
        step = Step("R", group)
        self.moving[step] = begin(sums, self.etp.reduce_scatter, self.etp.all_gather)

    def send_back(self, group: int) -> None:
        plan = self.plans[group]
        rows = self.moving.pop(Step("R", group)).end()[: sum(plan.received)]  # [R, D]
        there = partial(self.ep.all_to_all, sent=plan.received, received=plan.sent)
        back = partial(self.ep.all_to_all, sent=plan.sent, received=plan.received)
        self.moving[Step("Y", group)] = begin(rows, there, back)

    def returned(self, group: int, routing: Routing, dtype: torch.dtype) -> Tensor:
        """`[n, D]`: the group's tokens, in a fixed order of additions."""
        plan = self.plans[group]
        rows = self.moving.pop(Step("Y", group)).end()  # [S, D]
        own = F.pad(rows, (0, 0, 0, 1))[plan.places]  # [n, k, D], zeros for what was dropped
        weights = routing.weights[plan.first : plan.first + own.shape[0], :, None]
        return (weights * own.to(weights.dtype)).sum(1).to(dtype)


_STAGES = {"D": "dispatch", "A": "gather", "X": "compute", "R": "reduce", "Y": "send_back"}


def _exchange_counts(
    routing: Routing, own_experts: int, ep: Group, etp: Group, num_groups: int
) -> list[_GroupPlan]:
    """Plans of all groups, from one exchange of counts over ep and one over etp."""
    num_experts = own_experts * ep.size
    device = routing.experts.device
    chosen = torch.where(routing.kept, routing.experts, num_experts)  # dropped: no expert's
    parts = chosen.tensor_split(num_groups)
    counts = torch.stack([torch.bincount(p.flatten(), minlength=num_experts + 1) for p in parts])
    by_rank = counts[:, :num_experts].view(num_groups, ep.size, own_experts).transpose(0, 1)
    ones = [1] * ep.size
    mine = ep.all_to_all(by_rank.contiguous(), ones, ones).wait()  # [ep, G, E/ep]
    table = etp.all_gather(mine).wait().cpu()  # [P, ep, G, E/ep], the only wait for the device
    sent = by_rank.sum(2).cpu()  # [ep, G]
    plans, first = [], 0
    for group, part in enumerate(parts):
        received = table[:, :, group]  # [P, ep, E/ep]
        plans.append(_plan(part, first, sent[:, group], received, etp.rank, num_experts, device))
        first += part.shape[0]
    return plans


def _plan(
    chosen: Tensor,
    first: int,
    sent: Tensor,
    received: Tensor,
    etp_rank: int,
    num_experts: int,
    device: torch.device,
) -> _GroupPlan:
    slots = chosen.flatten()
    order = slots.argsort(stable=True)[: int(sent.sum())]
    places = torch.full_like(slots, order.shape[0])
    places[order] = torch.arange(order.shape[0], device=device)
    gathered = received.sum((1, 2))
    own_experts = received.shape[2]
    expert = torch.arange(own_experts).expand(
        received.shape
    )  # rows come by etp rank, ep rank, expert
    of_row = expert.flatten().repeat_interleave(received.flatten())
    start = torch.arange(len(gathered)) * int(gathered.max())
    shift = start - (gathered.cumsum(0) - gathered)  # rows lie behind the padding of ranks before
    row = torch.arange(of_row.shape[0]) + shift.repeat_interleave(gathered)
    return _GroupPlan(
        first=first,
        tokens=order // chosen.shape[1] + first,
        places=places.view(chosen.shape),
        sent=sent.tolist(),
        received=received[etp_rank].sum(1).tolist(),
        gathered=gathered.tolist(),
        order=row[of_row.argsort(stable=True)].to(device),
        offsets=received.sum((0, 1)).cumsum(0).to(device, torch.int32),
    )


def _tell(
    clock: VirtualTime, step: Step, plan: _GroupPlan, row_bytes: int, ep: Group, etp: Group
) -> None:
    """Account for a stage: its rows on their stream."""
    if step.stage == "X":
        clock.compute(step, sum(plan.gathered))
    elif step.stage in "DY":
        sizes = plan.received if step.stage == "D" else plan.sent
        clock.collective(step, ep, (sum(sizes) - sizes[ep.rank]) * row_bytes)
    else:
        clock.collective(step, etp, (etp.size - 1) * plan.padded * row_bytes)
