"""What each rank runs for the tests of `attnlab.distributed`, and the packs that they run on."""

import contextlib
import os
import time
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from attnlab.distributed import blocks, halo, lasp, moe, parallel, ring, routing, states
from attnlab.distributed.checkpoint import export_model, load_sharded, save_sharded
from attnlab.distributed.comm import Group, Ledger, Pending, check_agreement
from attnlab.distributed.mesh import Layout, Meshes
from attnlab.distributed.pack import PackPlan
from attnlab.distributed.parallel import (
    Context,
    ParallelLM,
    gather_state,
    gradient_norm,
    shard_parameters,
)
from attnlab.distributed.timing import VirtualTime
from attnlab.distributed.trainer import ParallelTrainer
from attnlab.model.hybrid import HybridLM
from attnlab.model.moe import balancing_loss

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
            results.append((output.detach(), *grads, ledger.events))
    return results


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
            results.append((output.detach(), *grads, ledger.events))
    return results


def run_convolution(rank, size, jobs):
    """Output and gradients of this rank for each job: (x, weight, grad, plan)."""
    results = []
    for x, weight, grad, plan in jobs:
        group, ledger = world(size)
        leaves = [plan.shard(x, rank).requires_grad_(), weight.clone().requires_grad_()]
        output = halo.short_convolution(*leaves, plan, group)
        grads = differentiate(output, leaves, plan.shard(grad, rank))
        results.append((output.detach(), *grads, ledger.events))
    return results


def run_agreement(rank, size, plans_by_rank):
    """The error of this rank where plans differ."""
    group, _ = world(size)
    try:
        check_agreement(group, plans_by_rank[rank].fingerprint(), "cu_seqlens")
    except ValueError as error:
        return str(error)
    return None


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


def run_training(rank, size, config, layout, packs, steps, mutation=None):
    """Losses and gradient norms of a few steps, and the parameters behind them, gathered."""
    with mutated(mutation):
        return train_for(size, config, layout, packs, steps)


def train_for(size, config, layout, packs, steps):
    model, optimizer = start_training(size, config, layout)
    log = [train_step(model, optimizer, packs) for _ in range(steps)]
    return log, gather_state(model)


def start_training(size, config, layout):
    torch.manual_seed(0)
    lm = HybridLM(config, dtype=torch.float64)
    lm.use_backend(lightning="torch")
    meshes = Meshes(Layout(world_size=size, **layout), "cpu")
    model = shard_parameters(ParallelLM(lm.train(), Context(meshes)))
    return model, adamw(model)


def train_step(model, optimizer, packs):
    """Loss and gradient norm of one step over all packs."""
    meshes = model.context.meshes
    dp, cp = meshes.group("dp"), meshes.group("cp")
    num_targets = sum(int((targets >= 0).sum()) for _, targets, _ in packs)
    total = torch.zeros((), dtype=torch.float64)
    for ids, targets, cu in packs[dp.rank :: dp.size]:
        plan = PackPlan.contiguous(cu, cp.size)
        share = int((targets >= 0).sum()) / num_targets
        local = plan.shard(ids, cp.rank, 1), plan.shard(targets, cp.rank)
        total += model.backward(*local, plan, num_targets=num_targets, share=share)
    norm = gradient_norm(model)
    optimizer.step()
    optimizer.zero_grad()
    loss = meshes.group("world").all_reduce(total).wait() / num_targets
    return loss.item(), norm.item()


def run_resumed(rank, size, config, layout, packs, steps, folder, exported=None):
    """Go on from the checkpoint in a folder for some steps, and leave one; the first step, and a log."""
    model, optimizer = start_training(size, config, layout)
    start = load_sharded(model, optimizer, folder)
    log = [train_step(model, optimizer, packs) for _ in range(steps)]
    save_sharded(model, optimizer, folder, start + steps, keep=1)
    if exported is not None:
        export_model(model, exported)
    return start, log, gather_state(model)


def run_logits(rank, size, config, layout, ids, cu):
    """Logits of this rank in evaluation mode, without gradients."""
    model, _ = start_training(size, config, layout)
    plan = PackPlan.zigzag(cu, model.context.group("cp").size)
    model.eval()
    with torch.no_grad():
        return model(plan.shard(ids, model.context.group("cp").rank, 1), plan)[0]


def run_recomputed(rank, size, config, layout, packs):
    """A step's loss and gradient norm, layers kept and layers computed again."""
    found = []
    for again in (False, True):
        model, optimizer = start_training(size, config, layout)
        model.lm.gradient_checkpointing = again
        found.append(train_step(model, optimizer, packs))
    return found


def run_wrong_resume(rank, size, config, layout, folder):
    """The error of this rank."""
    model, optimizer = start_training(size, config, layout)
    try:
        load_sharded(model, optimizer, folder)
    except ValueError as error:
        return str(error)
    return None


def run_trainer(rank, size, config, layout, packs, dtype, zigzag):
    """Losses and norms of two steps in float32 masters, or the error of this rank."""
    torch.manual_seed(0)
    lm = HybridLM(config, dtype=torch.float32).use_backend(lightning="torch")
    meshes = Meshes(Layout(world_size=size, **layout), "cpu")
    trainer = ParallelTrainer(lm, meshes, dtype=dtype, zigzag=zigzag)
    try:
        return [[x.item() for x in trainer.step(packs, learning_rate=1e-3)] for _ in range(2)]
    except ValueError as error:
        return str(error)


EPSILON = 1e-3  # large: AdamW makes a full step of a gradient that is but a rounding


def adamw(model):
    """AdamW, experts in a group of their own: they lie on another mesh."""
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    others = [p for n, p in model.named_parameters() if ".experts." not in n]
    return torch.optim.AdamW([{"params": others}, {"params": experts}], lr=1e-2, eps=EPSILON)


@contextlib.contextmanager
def mutated(name):
    """The code with a planted defect."""
    patches = MUTATIONS[name]() if name else []
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _weights_with(change):
    def patched():
        original = states._weights

        def weights(plan, log_decay, chunks, backward):
            return change(original, plan, log_decay, chunks, backward)

        return [mock.patch.object(states, "_weights", weights)]

    return patched


def _only_neighbours(original, plan, log_decay, chunks, backward):
    weights = original(plan, log_decay, chunks, backward)
    number = torch.arange(plan.num_chunks)
    apart = (torch.tensor(chunks)[:, None] - number).abs()
    return weights * (apart == 1)[..., None]


def _one_decay_more(original, plan, log_decay, chunks, backward):
    weights = original(plan, log_decay, chunks, backward)
    return weights * torch.exp(torch.tensor(log_decay, dtype=torch.float64))


def _not_transposed(original, plan, log_decay, chunks, backward):
    return original(plan, log_decay, chunks, False)


def _resets_ignored():
    def distances(plan):
        bounds = torch.tensor(plan.bounds)
        number = torch.arange(plan.num_chunks)
        earlier = number[None, :] < number[:, None]
        return torch.where(earlier, bounds[:-1, None] - bounds[None, 1:], -1)

    return [mock.patch.object(PackPlan, "distances", property(distances))]


def _edge_gate_missing():
    """A document that ends exactly at a chunk's edge is taken to go on behind it."""
    original = PackPlan.distances.func

    def distances(plan):
        found = original(plan).clone()
        for i in range(1, plan.num_chunks):
            lo, hi = plan.span(i)
            if lo < hi and lo in plan.cu_seqlens:
                found[i, i - 1] = 0
        return found

    def continues(plan, chunk):
        lo, hi = plan.span(chunk)
        return 0 < lo < hi

    return [
        mock.patch.object(PackPlan, "distances", property(distances)),
        mock.patch.object(PackPlan, "continues", continues),
    ]


def _ring_too_short():
    return [mock.patch.object(PackPlan, "hops", 1)]


def _gradients_stay_away():
    original = ring._Travelling.pass_on

    def pass_on(self, group, incoming, distance=1):
        coming = original(self, group, incoming, distance)
        kept = self.flat
        return coming if distance > 0 else ring.Pending([], lambda: (coming.wait(), kept)[1])

    return [mock.patch.object(ring._Travelling, "pass_on", pass_on)]


def _one_query_head_a_key_head():
    original = blocks.TorchBlock.backward

    def backward(self, *arguments):
        dq, dk, dv = original(self, *arguments)
        return dq, dk / 2, dv / 2

    return [mock.patch.object(blocks.TorchBlock, "backward", backward)]


def _parts_not_rescaled():
    def merge(output, lse, new, new_lse):
        return output + new.to(output), torch.logaddexp(lse, new_lse.to(lse))

    return [mock.patch.object(ring, "merge", merge)]


def _rectangles_over_documents():
    original = PackPlan.document_start
    return [
        mock.patch.object(PackPlan, "document_start", lambda plan, t: max(original(plan, t) - 1, 0))
    ]


LASP_MUTATIONS = {
    "hops beyond the neighbour dropped": _weights_with(_only_neighbours),
    "one decay step too many": _weights_with(_one_decay_more),
    "A instead of its transpose": _weights_with(_not_transposed),
    "resets ignored": _resets_ignored,
    "no gate at a document's end": _edge_gate_missing,
}

RING_MUTATIONS = {
    "the ring stops too early": _ring_too_short,
    "gradients of keys not returned": _gradients_stay_away,
    "half of a key head's queries counted": _one_query_head_a_key_head,
    "parts merged without rescaling": _parts_not_rescaled,
    "keys of the document before are seen": _rectangles_over_documents,
}


def _splits_swapped():
    original = moe._plan

    def plan(*arguments):
        found = original(*arguments)
        found.sent, found.received = found.received, found.sent
        return found

    return [mock.patch.object(moe, "_plan", plan)]


def _drops_by_group():
    original = routing._kept

    def kept(experts, table, rank, factor):
        halves = experts.tensor_split(2)
        return torch.cat([original(half, table // 2, rank, factor) for half in halves])

    return [mock.patch.object(routing, "_kept", kept)]


def _expert_gradients_too_large():
    original = moe.grouped_linear

    def linear(x, weight, offsets):
        return original(x, 2 * weight - weight.detach(), offsets)

    return [mock.patch.object(moe, "grouped_linear", linear)]


def _rows_left_by_rank():
    original = moe._plan

    def plan(*arguments):
        found = original(*arguments)
        found.order = found.order.sort().values
        return found

    return [mock.patch.object(moe, "_plan", plan)]


def _partial_sums_not_summed():
    def reduce_scatter(self, x):
        return Pending([], lambda: x[self.rank].clone())

    return [mock.patch.object(Group, "reduce_scatter", reduce_scatter)]


MOE_MUTATIONS = {
    "splits swapped": _splits_swapped,
    "drops decided in each group": _drops_by_group,
    "gradients of experts too large": _expert_gradients_too_large,
    "rows not sorted by expert": _rows_left_by_rank,
    "partial sums not summed": _partial_sums_not_summed,
}


def _positions_from_the_chunk():
    def positions(plan, rank):
        return torch.arange(plan.local_len(rank))

    return [mock.patch.object(PackPlan, "document_positions", positions)]


def _gradients_averaged():
    def factor(self, value):
        return None

    return [mock.patch.object(FSDPModule, "set_gradient_divide_factor", factor)]


def _balance_on_every_rank():
    original = parallel.balancing_loss
    return [mock.patch.object(parallel, "balancing_loss", lambda *loads: 2 * original(*loads))]


MODEL_MUTATIONS = {
    "positions count from the chunk": _positions_from_the_chunk,
    "gradients averaged over ranks": _gradients_averaged,
    "balance counted on every rank": _balance_on_every_rank,
}
MUTATIONS = MODEL_MUTATIONS | MOE_MUTATIONS | LASP_MUTATIONS | RING_MUTATIONS
