import pytest
import torch

import attnlab
from attnlab import registry
from attnlab.problem import Problem
from attnlab.registry import BackendUnavailable, Impl


def problem(op="lightning_attention", **changes):
    fields = {
        "op": op,
        "batch": 1,
        "heads": 2,
        "kv_heads": 2,
        "q_len": 8,
        "kv_len": 8,
        "key_dim": 32,
        "value_dim": 32,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return Problem(**fields | changes)


def test_a_named_backend_never_falls_back():
    x = torch.randn(1, 2, 8, 32)
    with pytest.raises(BackendUnavailable, match=r"flash.*needs a CUDA device, got cpu"):
        attnlab.softmax_attention(x, x, x, backend="flash")


def test_the_default_is_the_first_that_can_run():
    assert registry.choose("lightning_attention", None, problem()) == "torch"
    assert registry.choose("softmax_attention", None, problem("softmax_attention")) == "sdpa"


def test_a_block_chooses_for_the_ops_that_have_the_backend():
    with attnlab.use_backend("reference"):
        assert registry.choose("lightning_attention", None, problem()) == "reference"
    with attnlab.use_backend("sdpa"):
        assert registry.choose("lightning_attention", None, problem()) == "torch"
    assert registry.choose("lightning_attention", None, problem()) == "torch"


def test_a_block_that_raises_restores_the_choice():
    with pytest.raises(KeyError), attnlab.use_backend("reference"):
        raise KeyError
    assert registry.choose("lightning_attention", None, problem()) == "torch"


def test_a_peer_is_never_chosen_without_its_name(monkeypatch):
    impl = Impl(
        op="peer_only",
        backend="peer",
        load=lambda: print,
        why_not=lambda p: None,
        measurement_only=True,
    )
    monkeypatch.setattr(registry, "_impls", {"peer_only": {"peer": impl}})
    with pytest.raises(BackendUnavailable):
        registry.choose("peer_only", None, problem("peer_only"))
    assert registry.choose("peer_only", "peer", problem("peer_only")) == "peer"


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"expected a backend among triton, cuda, torch, reference, .*got 'cutlass'",
    ):
        registry.check_backend_name("cutlass")
    with pytest.raises(
        ValueError, match=r"expected an op among lightning_attention.*got 'attention'"
    ):
        attnlab.list_backends("attention")


def test_registering_twice_is_an_error():
    impl = Impl(
        op="lightning_attention", backend="torch", load=lambda: print, why_not=lambda p: None
    )
    with pytest.raises(ValueError, match="registered already"):
        registry.register(impl)


def test_counted_work_of_lightning_is_linear_and_of_softmax_quadratic():
    one, two = problem(q_len=1000, kv_len=1000), problem(q_len=2000, kv_len=2000)
    assert two.flops() == 2 * one.flops()
    assert one.flops() == 2 * 1000 * (4 * 64 * 32 + 4 * 32 * 32)
    assert one.flops("bwd") == 2 * 1000 * (10 * 64 * 32 + 10 * 32 * 32)
    soft = problem("softmax_attention", q_len=1000, kv_len=1000)
    assert soft.flops() == 2 * (1000 * 1001 // 2) * 4 * 32
    assert problem("softmax_attention", q_len=2, kv_len=5).visible_pairs() == 9
    assert problem("softmax_attention", q_len=5, kv_len=2).visible_pairs() == 3


def test_minimal_traffic_reads_and_writes_each_tensor_once():
    tensor = 2 * 8 * 32 * 4
    assert problem().min_bytes() == 4 * tensor
    assert problem().min_bytes("bwd") == 7 * tensor
    assert problem("softmax_attention").min_bytes("bwd") == 8 * tensor
    decode = problem("lightning_decode_", q_len=1, kv_len=1)
    assert decode.min_bytes() == 4 * 2 * 32 * 4 + 2 * 2 * 32 * 32 * 4
