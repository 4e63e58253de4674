"""The charts and the report of a run, on rows made up here: what is measured, what is predicted."""

import math

import numpy as np

LENGTHS = [2**power for power in range(10, 23)]
PASS_FACTOR = {"fwd": 1.0, "fwd+bwd": 3.4}
# (op, backend): milliseconds a call, a token, a squared token; longest measured length; error
COSTS = {
    ("lightning", "triton"): (0.030, 6.0e-6, 0, 2**22, 2.1e-3),
    ("lightning", "cuda"): (0.022, 7.5e-6, 0, 2**22, 2.0e-3),
    ("lightning", "torch"): (0.400, 6.5e-5, 0, 2**21, 2.4e-3),
    ("lightning", "fla"): (0.080, 9.0e-6, 0, 2**22, 2.3e-3),
    ("softmax", "sdpa"): (0.015, 1.0e-6, 7.0e-9, 2**16, 1.6e-3),
    ("softmax", "flash"): (0.020, 1.0e-6, 7.5e-9, 2**16, 1.7e-3),
    ("softmax", "reference"): (0.060, 5.0e-6, 6.0e-8, 2**14, 1.2e-3),
}
BYTES_PER_TOKEN = 4 * 16 * 128 * 2


def make_row(
    op: str, backend: str, pass_name: str, q_len: int, status: str = "ok", **fields
) -> dict:
    """A row of the schema with everything that is not measured."""
    row = {
        "schema": 1, "run_id": "made-up", "ts_utc": "2026-01-01T00:00:00Z",
        "key": f"{op}-{backend}-{pass_name}-{q_len}", "suite": "ops",
        "op": op, "backend": backend, "pass": pass_name, "batch": 1, "heads": 16, "kv_heads": 16,
        "q_len": q_len, "head_dim": 128, "value_dim": 128, "dtype": "bfloat16",
        "device": "NVIDIA H200", "model": None, "layer": "0/80" if op == "lightning" else None,
        "precision": "default" if op == "lightning" else None, "input": "text",
        "fingerprint": "f00d", "commit": "abc1234",
        "versions": {"torch": "2.13.0", "triton": "3.7.0", "python": "3.12.1"},
        "status": status, "reason": None, "pred_ms": None, "pred_bytes": None, "ms_median": None,
    }  # fmt: skip
    return row | fields


def timed(ms: float, rng: np.random.Generator) -> dict:
    samples = np.sort(ms * (1 + 0.01 * rng.standard_normal(1 if ms > 1000 else 30)))
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return {
        "ms_median": middle, "ms_q1": low, "ms_q3": high, "ms_lo": middle * 0.995,
        "ms_hi": middle * 1.005, "samples": samples.tolist(), "timer": "event",
        "l2_flush": True, "first_call_ms": ms + 300, "point_s": 1.5,
        "ceilings": {"copy_gbps": 4300.0, "matmul_tflops": 788.0},
    }  # fmt: skip


def ops_row(op: str, backend: str, pass_name: str, q_len: int, rng: np.random.Generator) -> dict:
    call, token, pair, last, error = COSTS[op, backend]
    factor = PASS_FACTOR[pass_name]
    ms = factor * (call + token * q_len + pair * q_len**2)
    naive = backend == "reference"
    num_bytes = 2**21 + factor * BYTES_PER_TOKEN * q_len + naive * 64 * q_len**2
    guess = {"pred_ms": 1.1 * ms, "pred_bytes": round(num_bytes)}
    if q_len > last:
        first = q_len == 2 * last
        status = (
            "skipped_dominated" if not first else "out_of_memory" if naive else "skipped_budget"
        )
        reason = (
            f"predicted {ms:.0f} ms, the budget is 500 ms" if first else "a shorter one was skipped"
        )
        return make_row(op, backend, pass_name, q_len, status, reason=reason, **guess)
    floor = factor * (token / 3 * q_len if op == "lightning" else pair / 1.6 * q_len**2)
    limit = "memory" if op == "lightning" or q_len < 2048 else "compute"
    return make_row(op, backend, pass_name, q_len, **guess) | timed(ms, rng) | {
        "tokens_per_s": q_len / ms * 1e3, "floor_ms": floor, "limit": limit,
        "share_of_limit": floor / ms, "peak_bytes": round(num_bytes),
        "error_ratio": 0.5 + 0.02 * math.log2(q_len), "error_rms": error * (1 + 0.1 * rng.random()),
        "error_max": 3 * error,
    }  # fmt: skip


def decode_row(op: str, backend: str, q_len: int, rng: np.random.Generator) -> dict:
    ms = 0.012 if op == "lightning" else 0.014 + 2.2e-6 * q_len
    kept = 2**20 if op == "lightning" else BYTES_PER_TOKEN // 2 * q_len
    measured = {"tokens_per_s": 1e3 / ms, "limit": "memory", "share_of_limit": 0.1 + kept / 1e12,
                "peak_bytes": 2**20 + kept, "error_rms": 2e-3, "error_ratio": 0.7}  # fmt: skip
    return make_row(op, backend, "decode", q_len) | timed(ms, rng) | measured


def make_rows() -> list[dict]:
    """Lightning to 4M; softmax to 64K, then skipped; naive softmax out of memory, then skipped."""
    rng = np.random.default_rng(0)
    rows = [ops_row(*key, p, n, rng) for n in LENGTHS for key in COSTS for p in PASS_FACTOR]
    decoders = [("lightning", "triton"), ("lightning", "cuda"), ("softmax", "sdpa")]
    return rows + [decode_row(*key, n, rng) for n in LENGTHS for key in decoders]
