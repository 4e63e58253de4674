"""The tolerance catches what it must: each planted defect fails, in each precision that can show it."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from attnlab import reference, testing
from attnlab.problem import Problem

CHUNK = 64


def make(dtype, heads=3, T=1000):
    problem = Problem(
        op="lightning_attention",
        batch=1,
        heads=heads,
        kv_heads=heads,
        q_len=T,
        kv_len=T,
        key_dim=32,
        value_dim=32,
        dtype=dtype,
        device="cpu",
        requires_grad=True,
    )
    inputs = testing.make_inputs(problem)
    # Without a decay-free head, whose large outputs would hide what happens in the others.
    return replace(inputs, log_decay=-torch.linspace(0.01, 0.4, heads))


def scan(q, k, v, g, state, *, defect=None):
    """Chunked form in float64 (so that nothing but the defect is wrong), rounded at the end."""
    dtype = q.dtype
    q, k, v, g, state = (x.double() for x in (q, k, v, g, state))
    if defect == "rotated head order":
        g = g.roll(1)
    if defect == "slope 1 % off":
        g = g * 1.01
    outputs = []
    for start in range(0, q.shape[2], CHUNK):
        qc, kc, vc = (x[:, :, start : start + CHUNK] for x in (q, k, v))
        i = torch.arange(qc.shape[2])
        scores = (qc @ kc.mT) * reference.decay_mask(g, i[:, None] - i, torch.float64)
        since = i if defect == "missing decay step" else i + 1
        past = reference.decay_mask(g, since, torch.float64)[:, :, None] * (qc @ state)
        outputs.append(scores @ vc + past)
        until = reference.decay_mask(g, len(i) - 1 - i, torch.float64)[:, :, None]
        state = torch.exp(g * len(i))[:, None, None] * state + (kc * until).mT @ vc
        if defect == "dropped state" and start == 4 * CHUNK:
            state = torch.zeros_like(state)
    output = torch.cat(outputs, 2).to(dtype)
    if defect == "all zeros":
        output = torch.zeros_like(output)
    if defect == "unwritten row":
        output[:, :, -1] = torch.nan
    if defect == "stale row":
        output[:, :, -1] = output[:, :, -2]
    return output, state.float()


DEFECTS = [
    "all zeros",
    "missing decay step",
    "dropped state",
    "rotated head order",
    "slope 1 % off",
    "unwritten row",
    "stale row",
]


def judge(inputs, output):
    alone = replace(inputs, grad_output=None, grad_state=None)
    oracle, _ = reference.lightning_recurrence(
        *(x.double() for x in (inputs.query, inputs.key, inputs.value, inputs.log_decay)),
        initial_state=inputs.initial_state.double(),
    )
    baseline = testing.lightning_baseline(alone)["output"]
    return testing.assert_as_accurate(output, oracle, baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_right_result_passes(dtype):
    inputs = make(dtype)
    args = inputs.query, inputs.key, inputs.value, inputs.log_decay, inputs.initial_state
    judge(inputs, scan(*args)[0])


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_planted_defect_fails(defect, dtype):
    inputs = make(dtype)
    args = inputs.query, inputs.key, inputs.value, inputs.log_decay, inputs.initial_state
    with pytest.raises(AssertionError, match="its budget"):
        judge(inputs, scan(*args, defect=defect)[0])


@pytest.mark.parametrize("transposed", [True, False], ids=["right", "defect"])
def test_a_backward_state_that_is_not_transposed_fails(transposed):
    """dq = scan(do, v, k) starts from S^T: with S itself, shapes fit and values don't."""
    inputs = make(torch.float32)
    oracle = testing.lightning_oracle(inputs)["grad_query"]
    baseline = testing.lightning_baseline(inputs)["grad_query"]
    state = inputs.initial_state.mT if transposed else inputs.initial_state
    actual, _ = scan(inputs.grad_output, inputs.value, inputs.key, inputs.log_decay, state)
    if transposed:
        testing.assert_as_accurate(actual, oracle, baseline)
    else:
        with pytest.raises(AssertionError):
            testing.assert_as_accurate(actual, oracle, baseline)


STRIDE_SCRIPT = """
import sys, torch
from attnlab import testing, functional, reference
from attnlab.problem import Problem
T, D, stride = 65, 32, 2**26
wrap = sys.argv[1] == "wrap"
backend = sys.argv[2]
problem = Problem(op="lightning_attention", batch=1, heads=1, kv_heads=1, q_len=T, kv_len=T,
                  key_dim=D, value_dim=D, dtype=torch.float32, device="cpu")
inputs = testing.make_inputs(problem, with_state=False)
memory = torch.empty(T * stride, dtype=torch.float32)  # 17 GB of addresses, 65 pages touched
far = memory.as_strided((1, 1, T, D), (T * stride, T * stride, stride, 1))
far.copy_(inputs.query)
query = far
if wrap:  # what a kernel reads whose offsets t * stride are 32 bits wide
    rows = [(t * stride + 2**31) % 2**32 - 2**31 for t in range(T)]
    query = torch.stack([memory[r : r + D] if r >= 0 else torch.zeros(D) for r in rows])[None, None]
output = functional.lightning_attention(
    query, inputs.key, inputs.value, inputs.log_decay, backend=backend).output
oracle, _ = reference.lightning_recurrence(
    *(x.double() for x in (inputs.query, inputs.key, inputs.value, inputs.log_decay)))
testing.assert_as_accurate(output, oracle, testing.baseline_scan(
    inputs.query, inputs.key, inputs.value, inputs.log_decay, torch.zeros(1, 1, D, D),
    torch.float32)[0])
"""


def run_stride_script(kind, backend):
    command = [sys.executable, "-c", STRIDE_SCRIPT, kind, backend]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved but not filled")
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_tokens_far_apart_in_memory_are_found(backend):
    result = run_stride_script("right", backend)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved but not filled")
def test_offsets_that_wrap_at_32_bits_fail():
    result = run_stride_script("wrap", "torch")
    assert "AssertionError" in result.stderr and "its budget" in result.stderr


def test_a_case_that_zeros_could_pass_is_refused():
    oracle = torch.ones(10, dtype=torch.float64)
    with pytest.raises(ValueError, match="can't tell right from wrong"):
        testing.assert_as_accurate(torch.zeros(10), oracle, baseline=torch.full((10,), 0.5))
    with pytest.raises(ValueError, match="can't tell right from wrong"):
        testing.assert_as_accurate(torch.zeros(10), torch.zeros(10), torch.zeros(10))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="equal shapes"):
        testing.assert_as_accurate(torch.ones(3), torch.ones(4), torch.ones(3))


def test_one_wrong_element_fails_by_the_maximum_though_the_rms_is_fine():
    oracle = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    baseline = oracle.float()
    actual = oracle.float()
    actual[7] += 1e-5
    found = testing.accuracy(actual, oracle, baseline)
    assert found.ratio > 1 and found.rms < 1e-6


def test_infinities_of_the_oracle_must_be_met():
    oracle = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    assert testing.accuracy(oracle.float(), oracle, oracle.float()).ratio <= 1
    wrong = torch.tensor([1.0, -1e30])
    assert testing.accuracy(wrong, oracle, oracle.float()).ratio == torch.inf


@pytest.mark.parametrize("is_causal", [True, False])
def test_planted_softmax_defects_fail(is_causal):
    problem = Problem(
        op="softmax_attention",
        batch=1,
        heads=4,
        kv_heads=2,
        q_len=65,
        kv_len=90,
        key_dim=32,
        value_dim=32,
        dtype=torch.float32,
        device="cpu",
    )
    inputs = testing.make_inputs(problem)
    oracle = testing.softmax_oracle(inputs, is_causal=is_causal)
    baseline = testing.softmax_baseline(inputs, is_causal=is_causal)
    q, k, v = inputs.query, inputs.key, inputs.value
    flags = {"is_causal": is_causal}
    right = reference.softmax_attention(q, k, v, **flags)
    testing.assert_as_accurate(right, oracle["output"], baseline["output"])
    wrong = {
        "scale": reference.softmax_attention(q, k, v, scale=0.18, **flags),
        "groups": reference.softmax_attention(
            q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), **flags
        ),
        "last key": reference.softmax_attention(q, k[:, :, :-1], v[:, :, :-1], is_causal=False),
    }
    if is_causal:
        top_left = torch.ones(65, 90).tril().bool()
        wrong["alignment"] = reference.softmax_attention(q, k, v, attn_mask=top_left)
    for name, output in wrong.items():
        with pytest.raises(AssertionError):
            testing.assert_as_accurate(output, oracle["output"], baseline["output"], name)
