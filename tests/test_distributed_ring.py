"""Softmax attention around the ring against one process, and its messages against their formulas."""

import pytest
import torch
from distributed_cases import PACKS, plans, run_ring, worst
from distributed_mutations import RING_MUTATIONS

from attnlab.distributed.blocks import KernelBlock, TorchBlock, merge
from attnlab.distributed.comm import Group
from attnlab.distributed.pack import PackPlan
from attnlab.distributed.ring import ring_attention
from attnlab.distributed.volumes import (
    key_value_bytes,
    ring_bytes,
    ring_messages,
    uneven_ring_bytes,
)
from attnlab.functional import softmax_attention_varlen

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 4, 2, 4, 6
TOLERANCE = 1e-12  # sums of float64 in another order


def tensors_for(plan, dtype=torch.float64):
    """Query, key, value and the output's gradient, `[1, H or G, T, D]`."""
    generator = torch.Generator().manual_seed(plan.num_tokens)
    shapes = (HEADS, KEY_DIM), (KV_HEADS, KEY_DIM), (KV_HEADS, VALUE_DIM), (HEADS, VALUE_DIM)
    found = [
        torch.randn(1, heads, plan.num_tokens, dim, generator=generator, dtype=torch.float64)
        for heads, dim in shapes
    ]
    return [x.to(dtype) for x in found]


def oracle(plan, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    bounds = torch.tensor(plan.cu_seqlens)
    flags = {"is_causal": True, "enable_gqa": True, "backend": "reference"}
    output = softmax_attention_varlen(*leaves, bounds, bounds, **flags)
    return output.detach(), *torch.autograd.grad(output, leaves, tensors[3])


def check(world, names, **flags):
    found = [plan for name in names for plan in plans(name, world.size).values()]
    answers = world.call(run_ring, [(tensors_for(plan), plan, flags) for plan in found])
    for number, plan in enumerate(found):
        expected = oracle(plan, tensors_for(plan))
        for rank, results in enumerate(answers):
            assert worst(plan, rank, results[number][:4], expected) < TOLERANCE, (plan, rank)
    return found, answers


@pytest.mark.parametrize("size", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_one_process(worlds, size):
    check(worlds(size), ["one document", "over many ranks"])


def test_torchs_fused_kernel_can_do_the_blocks(worlds):
    check(worlds(4), ["over many ranks", "long and tiny"], kernel="cpu")


@pytest.mark.distributed_full
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_all_packs_are_those_of_one_process(worlds, size):
    check(worlds(size), PACKS)


def test_ranks_without_tokens_and_any_owners_take_part(worlds):
    found = [
        PackPlan.contiguous_with((0, 20), [0, 7, 0, 13]),
        PackPlan((0, 9, 33), (0, 4, 4, 11, 20, 26, 33), (2, 0, 3, 2, 0, 2), 4),
    ]
    answers = worlds(4).call(run_ring, [(tensors_for(plan), plan, {}) for plan in found])
    for number, plan in enumerate(found):
        for rank, results in enumerate(answers):
            expected = oracle(plan, tensors_for(plan))
            assert worst(plan, rank, results[number][:4], expected) < TOLERANCE


@pytest.mark.parametrize(
    "cu, hops",
    [((0, 40), 3), ((0, 12, 25, 31, 40), 1), ((0, 10, 20, 40), 1), ((0, 4, 25, 40), 2)],
)
def test_the_ring_sends_what_its_formula_says(worlds, cu, hops):
    plan = PackPlan.contiguous(cu, 4)
    assert plan.hops == hops
    answers = worlds(4).call(run_ring, [(tensors_for(plan), plan, {})])
    block = key_value_bytes(10, KV_HEADS, KEY_DIM, VALUE_DIM, 8)  # of every rank alike
    for (results,) in answers:
        assert sum(e.messages for e in results[4]) == ring_messages(hops)
        assert sum(e.received_bytes for e in results[4]) == sum(ring_bytes(hops, block, block))
    expected = oracle(plan, tensors_for(plan))
    for rank, (results,) in enumerate(answers):
        assert worst(plan, rank, results[:4], expected) < TOLERANCE


@pytest.mark.parametrize("size", [3, 4])
def test_shares_of_any_lengths_move_what_the_formula_says(worlds, size):
    found, answers = check(worlds(size), ["one document", "over many ranks", "long and tiny"])
    token = key_value_bytes(1, KV_HEADS, KEY_DIM, VALUE_DIM, 8)
    for number, plan in enumerate(found):
        lengths = [plan.local_len(rank) for rank in range(size)]
        for rank, results in enumerate(answers):
            received = sum(e.received_bytes for e in results[number][4])
            assert received == uneven_ring_bytes(lengths, rank, plan.hops, token, token)
    assert {len(plan.owners) for plan in found} == {size, 2 * size}


@pytest.mark.parametrize("plan", [PackPlan.contiguous((0, 3, 48), 4), PackPlan.zigzag((0, 48), 4)])
def test_all_ranks_send_the_same_around_the_ring(worlds, plan):
    orders = [
        results[4] for (results,) in worlds(4).call(run_ring, [(tensors_for(plan), plan, {})])
    ]
    assert len(orders[0]) == 3 * plan.hops + 1
    assert all(order == orders[0] for order in orders)


def test_documents_that_end_at_rank_edges_send_nothing(worlds):
    plan = PackPlan.contiguous((0, 12, 24, 30, 36, 48), 4)
    for (results,) in worlds(4).call(run_ring, [(tensors_for(plan), plan, {})]):
        assert results[4] == []


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precisions_stay_near(worlds, dtype, tolerance):
    plan = PackPlan.contiguous((0, 5, 64), 4)
    tensors = tensors_for(plan, dtype)
    expected = oracle(plan, [x.double() for x in tensors])
    for rank, (results,) in enumerate(worlds(4).call(run_ring, [(tensors, plan, {})])):
        for part, whole in zip(results[:4], expected, strict=True):
            error = (part.double() - plan.shard(whole, rank, 2)).abs().max()
            assert part.dtype == dtype
            assert (
                error < tolerance * whole.abs().max()
            )  # a rounding of the output and of each step


@pytest.mark.parametrize("mutation", RING_MUTATIONS)
def test_a_planted_defect_is_seen(worlds, mutation):
    plan = PackPlan.contiguous((0, 5, 64), 4)
    answers = worlds(4).call(run_ring, [(tensors_for(plan), plan, {})], mutation=mutation)
    expected = oracle(plan, tensors_for(plan))
    errors = [worst(plan, rank, results[:4], expected) for rank, (results,) in enumerate(answers)]
    assert max(errors) > 1e3 * TOLERANCE


def blocks_of(causal, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = (1, 4, 700, 8), (1, 2, 700 if causal else 1100, 8), (1, 4, 700, 8)
    q, k, do = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, torch.randn(k.shape, generator=generator, dtype=torch.float64).to(dtype), do


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "rectangle"])
def test_torchs_kernel_and_the_tiles_agree(causal):
    q, k, v, do = blocks_of(causal)
    tiles, kernel = TorchBlock(), KernelBlock("cpu")
    output, lse = tiles.forward(q, k, v, causal, 0.3)
    other, other_lse = kernel.forward(q, k, v, causal, 0.3)
    torch.testing.assert_close(output, other, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse.double(), other_lse.double(), rtol=0, atol=1e-13)
    grads = tiles.backward(do, q, k, v, output, lse, causal, 0.3)
    others = kernel.backward(do, q, k, v, output, lse, causal, 0.3)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-12)


def test_the_first_block_merges_into_nothing():
    nothing = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf)
    block = torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2)
    for found, wanted in zip(merge(*nothing, *block), block, strict=True):
        assert torch.equal(found, wanted)


def test_wrong_arguments_are_refused_with_words():
    plan = PackPlan.contiguous((0, 8), 1)
    query, key, value, _ = tensors_for(plan)
    with pytest.raises(ValueError, match="expected a kernel among"):
        ring_attention(query, key, value, plan, Group(None), kernel="metal")
    with pytest.raises(ValueError, match="divide the 3 query heads"):
        ring_attention(query[:, :3], key, value, plan, Group(None))
    with pytest.raises(ValueError, match="a group of 2 ranks, got 1"):
        ring_attention(query, key, value, PackPlan.contiguous((0, 8), 2), Group(None))
    with pytest.raises(ValueError, match=r"key \[1, heads, 8, dim\] of this rank"):
        ring_attention(query, key[:, :, 1:], value, plan, Group(None))
