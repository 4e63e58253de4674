"""Inputs of a measured call lie in memory as the backend's kernels take them; its check needs little."""

from dataclasses import replace

import pytest
import torch

from bench import calls
from bench.inputs import Source
from bench.rows import Point
from bench.worker import peak_bytes, trace_allocations

POINT = Point(
    suite="ops", op="lightning", backend="torch", pass_="fwd", batch=2, heads=3, kv_heads=3,
    q_len=8, head_dim=4, value_dim=4, dtype="float32", device="cpu", layer="0/80",
    precision="default", input="random",
)  # fmt: skip


@pytest.mark.parametrize("backend", calls.TOKENS_BEFORE_HEADS)
def test_a_peer_that_takes_tokens_before_heads_need_not_copy(backend):
    ours = calls._tensor("query", 3, POINT, Source("random"), "cpu")
    theirs = calls._tensor("query", 3, replace(POINT, backend=backend), Source("random"), "cpu")
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous() and theirs.transpose(1, 2).is_contiguous()


def test_a_long_caches_check_takes_less_memory_than_the_cache():
    point = replace(
        POINT, op="softmax", backend="sdpa", pass_="decode", batch=1, heads=32, kv_heads=16,
        q_len=4096, head_dim=64, value_dim=64,
    )  # fmt: skip
    call = calls.prepare(point, Source("random"), "cpu")
    results = call.compute()
    verdict, sizes = trace_allocations(lambda: call.judge(results))
    assert verdict.worst.ratio <= 1
    assert peak_bytes(sizes) < call.input_bytes
    results["output"][:, 31] *= 1.01
    assert call.judge(results).worst.ratio > 1
