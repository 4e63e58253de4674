"""Calls that the tests of planned kernels make, whichever backend they are of."""

import torch

from attnlab import testing
from attnlab.problem import Problem
from attnlab.testing import assert_as_accurate

MODES = [("single", None), ("halo", 3), ("two-pass", 3), ("two-pass", 5)]


def inputs_of(device, *, B=1, H=3, T=200, dims=(64, 64), dtype=torch.bfloat16, documents=1):
    """Random tensors of a call with gradients and an initial state."""
    problem = Problem(
        op="lightning_attention",
        batch=B,
        heads=H,
        kv_heads=H,
        q_len=T,
        kv_len=T,
        key_dim=dims[0],
        value_dim=dims[1],
        dtype=dtype,
        device=device,
        num_documents=documents,
    )
    return testing.make_inputs(problem)


def assert_right(backend, inputs, **flags):
    """Results of a scaled call, those of the oracle, and their accuracies, all of them within it."""
    actual = testing.run_lightning(inputs, scale=0.5, backend=backend, **flags)
    oracle = testing.lightning_oracle(inputs, scale=0.5)
    baseline = testing.lightning_baseline(inputs, scale=0.5)
    found = {n: assert_as_accurate(actual[n], oracle[n], baseline[n], n) for n in oracle}
    return actual, oracle, found
