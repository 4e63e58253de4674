"""The gate passes right results at lengths of many windows, and fails each planted defect."""

from dataclasses import replace

import pytest
import torch

from attnlab import functional, minimax_log_decay, testing
from attnlab.problem import Problem
from bench import calls, gate
from bench.inputs import Source
from bench.rows import Point
from tests.test_rows import POINT

T = 5000


def lightning_case(dtype=torch.float32):
    problem = Problem(
        op="lightning_attention",
        batch=1,
        heads=2,
        kv_heads=2,
        q_len=T,
        kv_len=T,
        key_dim=32,
        value_dim=48,
        dtype=dtype,
        device="cpu",
    )
    inputs = testing.make_inputs(problem, with_state=False)
    inputs = replace(inputs, log_decay=minimax_log_decay(2, 0, 80), grad_state=None)
    leaves = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    output = functional.lightning_attention(*leaves, inputs.log_decay, backend="torch").output
    grads = torch.autograd.grad(output, leaves, inputs.grad_output)
    plain = replace(inputs, **{n: getattr(inputs, n).detach() for n in ("query", "key", "value")})
    names = ("grad_query", "grad_key", "grad_value")
    return plain, {"output": output.detach()} | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_lightning_results_pass(dtype):
    inputs, results = lightning_case(dtype)
    assert gate.check_lightning(inputs, results).worst.ratio <= 1


@pytest.mark.parametrize("name", ["output", "grad_query", "grad_key", "grad_value"])
@pytest.mark.parametrize("where", ["first", "segment", "last"])
def test_a_wrong_lightning_row_is_seen_and_named(name, where):
    inputs, results = lightning_case()
    row = {"first": 0, "segment": T // 2, "last": T - 1}[where]
    results[name] = results[name].clone()
    results[name][:, :, row] *= 1.001
    verdict = gate.check_lightning(inputs, results)
    assert verdict.worst.ratio > 1 and verdict.name == name


def test_a_state_dropped_long_before_a_window_is_seen():
    inputs, _ = lightning_case()
    half = T // 2 // 64 * 64
    parts = [
        functional.lightning_attention(
            *(x[:, :, s] for x in (inputs.query, inputs.key, inputs.value)), inputs.log_decay
        ).output
        for s in (slice(0, half), slice(half, T))
    ]
    assert gate.check_lightning(inputs, {"output": torch.cat(parts, 2)}).worst.ratio > 1


def test_streamed_states_are_the_states_of_the_op():
    inputs, _ = lightning_case()
    k, v, g = inputs.key, inputs.value, inputs.log_decay
    (early, _), (exact, plain) = gate.stream_states(k, v, g, [100, T])
    expected = functional.lightning_state(k.double(), v.double(), g)
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain.double(), expected, rtol=1e-4, atol=1e-4)
    first = functional.lightning_state(k[:, :, :100].double(), v[:, :, :100].double(), g)
    torch.testing.assert_close(early, first, rtol=1e-9, atol=1e-9)
    ((back, _),) = gate.stream_states(k, v, g, [70], reverse=True)
    tail = (x[:, :, -70:].flip(2).double() for x in (k, v))
    torch.testing.assert_close(back, functional.lightning_state(*tail, g), rtol=1e-9, atol=1e-9)


def test_windows_lie_at_both_ends_and_between():
    assert gate.window_spans(100) == [(0, 100)]
    for num_tokens in (1000, 5000, 1 << 20):
        spans = gate.window_spans(num_tokens)
        assert spans[0][0] == 0 and spans[-1][1] == num_tokens
        assert all(start % gate.CHUNK == 0 and stop - start >= gate.WINDOW for start, stop in spans)
    assert len(spans) == 9


def softmax_case():
    problem = Problem(
        op="softmax_attention",
        batch=1,
        heads=2,
        kv_heads=2,
        q_len=500,
        kv_len=500,
        key_dim=32,
        value_dim=32,
        dtype=torch.float32,
        device="cpu",
    )
    inputs = testing.make_inputs(problem)
    return inputs, testing.run_softmax(inputs, is_causal=True, backend="sdpa")


def test_right_softmax_results_pass():
    inputs, results = softmax_case()
    assert gate.check_softmax(inputs, results).worst.ratio <= 1


@pytest.mark.parametrize("name", ["output", "grad_query", "grad_key", "grad_value"])
def test_a_wrong_last_softmax_row_is_seen_and_named(name):
    inputs, results = softmax_case()
    results[name] = results[name].clone()
    results[name][:, :, -1] *= 1.001
    verdict = gate.check_softmax(inputs, results)
    assert verdict.worst.ratio > 1 and verdict.name == name


@pytest.mark.parametrize("op, backend", [("lightning", "torch"), ("softmax", "sdpa")])
@pytest.mark.parametrize("pass_", calls.PASSES)
def test_every_pass_of_a_point_is_ready_to_run_and_right(op, backend, pass_):
    point = replace(POINT, op=op, backend=backend, pass_=pass_, q_len=700)
    call = calls.prepare(point, Source("random"), "cpu")
    assert call.check().worst.ratio <= 1
    call.run()
    assert call.input_bytes > 0


@pytest.mark.parametrize("op, backend", [("lightning", "torch"), ("softmax", "sdpa")])
@pytest.mark.parametrize("pass_", calls.PASSES)
def test_a_backend_that_is_wrong_fails_the_gate(op, backend, pass_, monkeypatch):
    name = calls.OPS[op].get(pass_, calls.OPS[op][None])
    right = getattr(functional, name)

    def wrong(*args, **flags):
        result = right(*args, **flags)
        if flags["backend"] == "reference":  # the oracle's own call
            return result
        return (
            result._replace(output=result.output * 1.01)
            if isinstance(result, tuple)
            else result * 1.01
        )

    monkeypatch.setattr(functional, name, wrong)
    point: Point = replace(POINT, op=op, backend=backend, pass_=pass_, q_len=700)
    assert calls.prepare(point, Source("random"), "cpu").check().worst.ratio > 1


ROOM_FOR_4M = 90 << 30  # bytes: 16 heads of 4M tokens are four tensors of 16 GiB, beside windows


@pytest.mark.parametrize(
    "backend, device, q_len",
    [("torch", "cpu", 4 << 10), pytest.param("triton", "cuda", 4 << 20, marks=pytest.mark.gpu)],
)
def test_heads_that_wrap_around_and_a_stale_last_block_fail(backend, device, q_len):
    # At 16 x 4M x 128 an offset of 32 bits wraps every 4 heads.
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if torch.cuda.get_device_properties().total_memory < ROOM_FOR_4M:
            pytest.skip("needs 90 GiB of GPU memory")
    shape = {"heads": 16, "kv_heads": 16, "q_len": q_len, "head_dim": 128, "value_dim": 128}
    dtype = "bfloat16" if device == "cuda" else "float32"
    point = replace(POINT, op="lightning", backend=backend, pass_="fwd", dtype=dtype, **shape)
    call = calls.prepare(point, Source("random"), device)
    results = call.compute()
    assert call.judge(results).worst.ratio <= 1
    output = results["output"]
    last = output[:, :, -64:].clone()
    output[:, :, -64:] = output[:, :, -128:-64]
    assert call.judge(results).worst.ratio > 1
    output[:, :, -64:] = last
    assert call.judge(results).worst.ratio <= 1
    for head in range(4, 16):
        output[:, head] = output[:, head % 4]
    assert call.judge(results).worst.ratio > 1


@pytest.mark.parametrize("q_len", [2048, 16384, 131072])
def test_a_softmax_step_over_text_passes_at_every_length(q_len):
    """Its values have a mean, so that errors of float32 sums add up along the cache."""
    facts = {"op": "softmax", "backend": "sdpa", "pass_": "decode", "layer": None}
    call = calls.prepare(replace(POINT, q_len=q_len, **facts), Source("text", None, 0), "cpu")
    assert call.judge(call.compute()).worst.ratio <= 1
