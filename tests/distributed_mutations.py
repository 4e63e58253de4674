"""Planted defects: each is a set of patches under which a test has to fail."""

import contextlib
from unittest import mock

import torch
from torch.distributed.fsdp import FSDPModule

from attnlab.distributed import blocks, moe, parallel, ring, routing, states
from attnlab.distributed.comm import Group, Pending
from attnlab.distributed.pack import PackPlan


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

    def kept(slots, table, *rest):
        return torch.cat([original(half, table // 2, *rest) for half in slots.tensor_split(2)])

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
