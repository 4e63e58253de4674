"""Inputs of a measured call lie in memory as the backend's kernels take them."""

from dataclasses import replace

import pytest
import torch

from bench import calls
from bench.inputs import Source
from bench.rows import Point

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
