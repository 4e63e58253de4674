"""What each rank runs for the tests of `attnlab.distributed`, and the packs that they run on."""

import os
import time
from collections.abc import Iterable
from unittest import mock

import torch
import torch.distributed as dist
from distributed_mutations import mutated

from attnlab import functional, registry
from attnlab.distributed import halo, lasp, moe, ring, routing
from attnlab.distributed.comm import Event, Group, Ledger, Pending, check_agreement
from attnlab.distributed.mesh import Layout, Meshes
from attnlab.distributed.pack import PackPlan, Span
from attnlab.distributed.timing import VirtualTime
from attnlab.model.moe import balancing_loss
from kernels_cuda import module
from tests.cuda_on_host import HostLoader

PACKS = {
    "one document": (0, 37),
    "ends at rank edges": (0, 16, 32, 48),
    "over many ranks": (0, 3, 41, 44, 64),
    "single tokens": tuple(range(25)),
    "long and tiny": (0, 1, 2, 50, 51, 60),
}


def plans(name: str, size: int) -> dict[str, PackPlan]:
    """A pack's shardings: even, uneven, with empty ranks, one-token chunks, and zigzag."""
    cu = PACKS[name]
    total = cu[-1]
    uneven = [min(1 + rank, total // size) for rank in range(size - 1)]
    empty = [0 if rank % 2 else total // size for rank in range(size - 1)]
    found = {
        "even": PackPlan.contiguous(cu, size),
        "uneven": PackPlan.contiguous_with(cu, [*uneven, total - sum(uneven)]),
        "empty ranks": PackPlan.contiguous_with(cu, [*empty, total - sum(empty)]),
    }
    if total >= 2 * size:
        found["zigzag"] = PackPlan.zigzag(cu, size)
    return found


def worst(
    plan: PackPlan, rank: int, parts: list[torch.Tensor], expected: list[torch.Tensor]
) -> float:
    """Largest error of a rank's output and gradients, which includes its first and last tokens."""
    wanted = [plan.shard(x, rank, 2) for x in expected]
    return largest(a - b for a, b in zip(parts, wanted, strict=True))


def largest(errors: Iterable[torch.Tensor]) -> float:
    """Largest magnitude, infinite where one is not finite: NaN is below no other and above none."""
    found = torch.cat([torch.zeros(1), *(error.flatten() for error in errors)]).abs()
    return found.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()


def simulated_weights(plan, log_decay):
    """Weights by brute force: mark each chunk's state, decay it token by token, drop it at bounds."""
    size = plan.num_chunks
    weights = torch.zeros(size, size, dtype=torch.float64)
    state = torch.zeros(size, dtype=torch.float64)
    for i in range(size):
        lo, hi = plan.span(i)
        if lo < hi and lo not in plan.cu_seqlens:
            weights[i] = state
        for t in range(lo, hi):
            state = state * 0 if t in plan.cu_seqlens else state * torch.exp(log_decay)
        if lo < hi:
            state[i] = 1.0
    return weights


def world(size: int) -> tuple[Group, Ledger]:
    ledger = Ledger()
    return Group(dist.group.WORLD, name="cp", ledger=ledger), ledger


def moved(ledger: Ledger) -> list[Event]:
    """What was sent but for the check of the plan, which each new group makes once."""
    return [e for e in ledger.events if e.op != "check"]


def run_failing(rank, size, how):
    """Rank 1 raises, ends or never answers, while the others wait for it in a collective."""
    if rank == 1 and how == "raises":
        raise ValueError("planted")
    if rank == 1 and how == "ends":
        os._exit(7)
    if rank == 1 and how == "sleeps":
        time.sleep(600)
    dist.all_reduce(torch.ones(1))
    return os.getpid()


def run_empty(rank, size):
    """What memory holds that nothing was written to."""
    return torch.empty(5)


def differentiate(outputs, leaves, grad_output):
    grads = torch.autograd.grad(outputs, leaves, grad_output)
    return [grad.detach() for grad in grads]


def run_lasp(rank, size, jobs, mutation=None):
    """Output, gradients and messages of this rank for each job: (tensors, log_decay, plan, flags)."""
    results = []
    with mutated(mutation):
        for tensors, log_decay, plan, flags in jobs:
            group, ledger = world(size)
            local = [plan.shard(x, rank, 2) for x in tensors]
            leaves = [x.clone().requires_grad_() for x in local[:3]]
            output = lasp.lasp_attention(*leaves, log_decay, plan, group, **flags)
            grads = differentiate(output, leaves, local[3])
            results.append((output.detach(), *grads, moved(ledger)))
    return results


def run_lasp_on_host(rank, size, jobs):
    """`run_lasp` with the CUDA kernels built for the CPU, and the (op, backend) that it reached."""
    reached, resolve = set(), functional.resolve

    def noted(op, backend, problem):
        reached.add((op, registry.choose(op, backend, problem)))
        return resolve(op, backend, problem)

    with (
        mock.patch.object(module, "loader", HostLoader()),
        mock.patch.object(functional, "resolve", noted),
    ):
        return run_lasp(rank, size, jobs), reached


def run_on_gpus(rank, size, run, jobs):
    """`run_lasp` or `run_ring` with the jobs' tensors on this rank's GPU; results on the CPU."""
    moved = [([x.cuda() for x in tensors], *rest) for tensors, *rest in jobs]
    found = run(rank, size, moved)
    return [tuple(x.cpu() if torch.is_tensor(x) else x for x in parts) for parts in found]


class _Noted(torch.autograd.Function):
    """The identity, which notes when its backward runs."""

    @staticmethod
    def forward(ctx, x, notes, word):
        ctx.notes, ctx.word = notes, word
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.notes.append(ctx.word)
        return grad, None, None


def run_traced_lasp(rank, size, tensors, log_decay, plan):
    """Order in which the exchange starts, the rank's own op runs, and the exchange is waited for."""
    notes = []
    op, start, wait = lasp.lightning_attention_varlen, Group.all_gather, Pending.wait

    def noted_op(query, *rest, **flags):
        notes.append("op")
        return op(_Noted.apply(query, notes, "op's backward"), *rest, **flags)

    def noted_start(self, x):
        notes.append("start")
        return start(self, x)

    def noted_wait(self):
        if self._works:
            notes.append("wait")
        return wait(self)

    with (
        mock.patch.object(lasp, "lightning_attention_varlen", noted_op),
        mock.patch.object(Group, "all_gather", noted_start),
        mock.patch.object(Pending, "wait", noted_wait),
    ):
        run_lasp(rank, size, [(tensors, log_decay, plan, {"backend": "torch"})])
    return notes


def run_ring(rank, size, jobs, mutation=None):
    """Output, gradients and messages of this rank for each job: (tensors, plan, flags)."""
    results = []
    with mutated(mutation):
        for tensors, plan, flags in jobs:
            group, ledger = world(size)
            local = [plan.shard(x, rank, 2) for x in tensors]
            leaves = [x.clone().requires_grad_() for x in local[:3]]
            output = ring.ring_attention(*leaves, plan, group, **flags)
            grads = differentiate(output, leaves, local[3])
            results.append((output.detach(), *grads, moved(ledger)))
    return results


def run_convolution(rank, size, jobs):
    """Output and gradients of this rank for each job: (x, weight, grad, plan)."""
    results = []
    for x, weight, grad, plan in jobs:
        group, ledger = world(size)
        leaves = [plan.shard(x, rank).requires_grad_(), weight.clone().requires_grad_()]
        output = halo.short_convolution(*leaves, plan, group)
        grads = differentiate(output, leaves, plan.shard(grad, rank))
        results.append((output.detach(), *grads, moved(ledger)))
    return results


def run_agreement(rank, size, plans_by_rank):
    """The error of this rank where plans differ."""
    group, _ = world(size)
    try:
        check_agreement(group, plans_by_rank[rank].fingerprint, "cu_seqlens")
    except ValueError as error:
        return str(error)
    return None


def _lasp(x, plan, group):
    return lasp.lasp_attention(x, x, x, -torch.ones(1, dtype=x.dtype), plan, group)


def _ring(x, plan, group):
    return ring.ring_attention(x, x, x, plan, group)


def _convolution(x, plan, group):
    return halo.short_convolution(x[0, 0], torch.ones(2, 3, dtype=x.dtype), plan, group)


OPS = {"lasp": _lasp, "ring": _ring, "convolution": _convolution}


def run_op(rank, size, op, plans_by_rank):
    """For each plan of this rank, one after the other: the error, or the sum of the op's output.

    The group's checks come last.
    """
    group, ledger = world(size)
    found = []
    for plan in plans_by_rank[rank]:
        x = torch.ones(1, 1, plan.local_len(rank), 2, dtype=torch.float64)
        try:
            found.append(OPS[op](x, plan, group).sum().item())
        except ValueError as error:
            found.append(str(error))
    return found, sum(e.op == "check" for e in ledger.events)


def run_mesh(rank, size, flags):
    """Rank and size of this rank in each axis of both views."""
    meshes = Meshes(Layout(world_size=size, **flags), "cpu")
    axes = "dp", "cp", "tp", "edp", "ep", "etp"
    return {axis: (meshes.group(axis).rank, meshes.group(axis).size) for axis in axes}


_MESHES = {}


def meshes_of(size, flags, ledger):
    """Meshes of a layout, whose groups are made once, with a ledger of this call's."""
    key = tuple(sorted(flags.items()))
    if key not in _MESHES:
        _MESHES[key] = Meshes(Layout(world_size=size, **flags), "cpu")
        for axis in ("ep", "etp", "world"):
            _MESHES[key].group(axis)
    for group in _MESHES[key]._groups.values():
        group.ledger = ledger
    return _MESHES[key]


def run_moe(rank, size, jobs, mutation=None):
    """Output, gradients, place and messages of this rank for each job.

    A job is (tensors, tokens of each rank, layout, groups, capacity factor); the loss adds the
    balancing loss, once over all ranks.
    """
    results = []
    with mutated(mutation):
        for (x, router, gate_up, down, grad), lengths, layout, num_groups, capacity in jobs:
            ledger = Ledger()
            meshes = meshes_of(size, layout, ledger)
            ep, etp, all_ranks = (meshes.group(axis) for axis in ("ep", "etp", "world"))
            start = sum(lengths[:rank])
            own = slice(start, start + lengths[rank])
            shard = moe.shard_experts(gate_up, down, ep, etp)
            leaves = [x[own].clone(), router.clone(), *shard]
            for leaf in leaves:
                leaf.requires_grad_()
            chosen, load = routing.route(
                leaves[0], leaves[1], 2, all_ranks, capacity_factor=capacity
            )
            experts = moe.ExpertShard(*leaves[2:])
            output = moe.mix_experts(leaves[0], chosen, experts, ep, etp, num_groups=num_groups)
            ledger.events.append("backward")
            loss = (output * grad[own]).sum() + balancing_loss([load], "transformers") / size
            grads = torch.autograd.grad(loss, leaves)
            results.append((output.detach(), *grads, (ep.rank, etp.rank), ledger.events))
    return results


def run_kept(rank, size, jobs):
    """Which slots of this rank have room, for each job: (tokens, router, plan, capacity factor)."""
    group, found = Group(dist.group.WORLD), []
    for x, router, plan, factor in jobs:
        whole = [plan.places(r, Span(0, plan.local_len(r))) for r in range(size)]
        own = plan.shard(x, rank)
        chosen, _ = routing.route(own, router, 2, group, capacity_factor=factor, runs=whole)
        found.append(chosen.kept)
    return found


def run_clock(rank, size, layout, num_tokens, num_groups, rates):
    """End and intervals of the virtual time of this rank, experts chosen in turn."""
    meshes = meshes_of(size, layout, None)
    ep, etp = meshes.group("ep"), meshes.group("etp")
    experts = (torch.arange(2 * num_tokens) % 8).view(num_tokens, 2)
    chosen = routing.Routing(experts, torch.full(experts.shape, 0.5), experts >= 0)
    x, gate_up, down = torch.ones(num_tokens, 4), torch.ones(8, 8, 4), torch.ones(8, 4, 4)
    clock = VirtualTime(*rates)
    shard = moe.shard_experts(gate_up, down, ep, etp)
    moe.mix_experts(x, chosen, shard, ep, etp, num_groups=num_groups, clock=clock)
    return clock.end, clock.intervals


def run_experts_on_gpus(rank, size, layout, groups):
    """Output and gradients, in bfloat16, for each number of groups of tokens."""
    meshes = Meshes(Layout(world_size=size, **layout), "cuda")
    generator = torch.Generator("cuda").manual_seed(rank)
    x, grad = (
        torch.randn(4096, 512, device="cuda", generator=generator).bfloat16() for _ in range(2)
    )
    generator.manual_seed(size)  # the weights are the same on all ranks
    shapes = (8, 512), (8, 1024, 512), (8, 512, 512)
    router, gate_up, down = (
        torch.randn(s, device="cuda", generator=generator).bfloat16() / 23 for s in shapes
    )
    shard = moe.shard_experts(gate_up, down, meshes.group("ep"), meshes.group("etp"))
    results = []
    for number in groups:
        leaves = [y.clone().requires_grad_() for y in (x, *shard)]
        chosen, _ = routing.route(leaves[0], router, 2, meshes.group("world"))
        experts, ranks = moe.ExpertShard(*leaves[1:]), (meshes.group("ep"), meshes.group("etp"))
        output = moe.mix_experts(leaves[0], chosen, experts, *ranks, num_groups=number)
        grads = torch.autograd.grad(output, leaves, grad)
        results.append([y.detach().float().cpu() for y in (output, *grads)])
    return results
