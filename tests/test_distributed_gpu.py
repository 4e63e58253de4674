"""Sequence parallelism on GPUs with NCCL: the fused kernels of each rank beside float64 on a CPU.

On one GPU the world has one rank, whose pack lies in chunks that exchange states all the same.
"""

import pytest
import torch
from distributed_cases import run_experts_on_gpus, run_lasp, run_on_gpus, run_ring
from distributed_world import World

from attnlab.distributed.pack import PackPlan
from attnlab.functional import lightning_attention_varlen, softmax_attention_varlen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, DIM = 4, 64
LOG_DECAY = torch.tensor([0.9999, 0.999, 0.99, 0.9]).log()
TOLERANCE = 2e-2  # of the largest value: bfloat16 operands, outputs and partial outputs


@pytest.fixture(scope="module")
def gpus():
    world = World(torch.cuda.device_count(), backend="nccl", timeout=300)
    yield world
    world.close()


def plan_for(size):
    """Two chunks a rank, a document over several of them, and short ones."""
    return PackPlan.zigzag((0, 700, 703, 1900, 2048), size)


def tensors_for(plan, kv_heads):
    generator = torch.Generator().manual_seed(5)
    heads = HEADS, kv_heads, kv_heads, HEADS
    return [
        torch.randn(1, h, plan.num_tokens, DIM, generator=generator).bfloat16() / DIM**0.25
        for h in heads
    ]


def check(plan, answers, op, tensors):
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    output = op(*leaves)
    wanted = output, *torch.autograd.grad(output, leaves, tensors[3].double())
    for rank, (results,) in enumerate(answers):
        for part, whole in zip(results[:4], wanted, strict=True):
            error = (part.double() - plan.shard(whole.detach(), rank, 2)).abs().max()
            assert error < TOLERANCE * whole.abs().max()


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "initial state"])
def test_lightning_attention_over_gpus_is_that_of_one_process(gpus, overlap):
    plan = plan_for(gpus.size)
    tensors, bounds = tensors_for(plan, HEADS), torch.tensor(plan.cu_seqlens)
    job = tensors, LOG_DECAY, plan, {"overlap": overlap}
    answers = gpus.call(run_on_gpus, run_lasp, [job])

    def op(*qkv):
        return lightning_attention_varlen(*qkv, LOG_DECAY, bounds, backend="reference").output

    check(plan, answers, op, tensors)


@pytest.mark.parametrize("kernel", ["flash", "torch"])
def test_ring_attention_over_gpus_is_that_of_one_process(gpus, kernel):
    plan = plan_for(gpus.size)
    tensors, bounds = tensors_for(plan, HEADS // 2), torch.tensor(plan.cu_seqlens)
    answers = gpus.call(run_on_gpus, run_ring, [(tensors, plan, {"kernel": kernel})])

    def op(*qkv):
        flags = {"is_causal": True, "enable_gqa": True, "backend": "reference"}
        return softmax_attention_varlen(*qkv, bounds, bounds, **flags)

    check(plan, answers, op, tensors)


def test_groups_of_tokens_on_streams_of_their_own_change_nothing(gpus):
    layouts = [{"dp": gpus.size, "ep": gpus.size}, {"dp": gpus.size, "etp": gpus.size}]
    for layout in layouts:
        for whole, *cut in gpus.call(run_experts_on_gpus, layout, (1, 2, 4) * 10):
            for parts in cut:
                for part, wanted in zip(parts, whole, strict=True):
                    assert (part - wanted).abs().max() < TOLERANCE * wanted.abs().max()
