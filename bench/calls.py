"""What a point runs: its inputs, the call that is timed, what it needs, and its accuracy check."""

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from attnlab import functional, reference, registry
from attnlab.decay import minimax_log_decay
from attnlab.problem import Problem
from attnlab.testing import Inputs, accuracy, baseline_scan, softmax_baseline, softmax_oracle
from bench.gate import Results, Verdict, check_lightning, check_softmax
from bench.inputs import Source
from bench.rows import Point, Row

PASSES = ("fwd", "bwd", "fwd+bwd", "decode")
OPS = {
    "lightning": {"decode": "lightning_decode_", None: "lightning_attention"},
    "softmax": {"decode": "softmax_decode", None: "softmax_attention"},
}
# Float32 copies of the scores that the materialised form holds at once: forward, with gradients.
SCORES_HELD = {"fwd": 3, "bwd": 6, "fwd+bwd": 6}
# Backends whose kernels take [B, T, H, D] in memory and would copy anything else before they start.
TOKENS_BEFORE_HEADS = ("fla", "fla-fused")
STATE_TOKENS = 4096  # context that a decode state is made from: older tokens have decayed


def problem_of(point: Point, device: str) -> Problem:
    """The point as a call of its op."""
    decode = point.pass_ == "decode"
    op = OPS[point.op].get(point.pass_, OPS[point.op][None])
    return Problem(
        op=op,
        batch=point.batch,
        heads=point.heads,
        kv_heads=point.kv_heads,
        q_len=1 if decode else point.q_len,
        kv_len=1 if decode and point.op == "lightning" else point.q_len,
        key_dim=point.head_dim,
        value_dim=point.value_dim,
        dtype=getattr(torch, point.dtype),
        device=device,
        requires_grad=point.pass_ in ("bwd", "fwd+bwd"),
        is_causal=True,
        precision=point.precision,
    )


def why_not(point: Point, device: str) -> str | None:
    """Why the point's backend can't run it, or None."""
    problem = problem_of(point, device)
    return registry.why_not(problem.op, point.backend, problem)


def needed_bytes(point: Point) -> int:
    """Closed form of a point's peak memory: tensors in and out, and scores where materialised."""
    itemsize = getattr(torch, point.dtype).itemsize
    query = point.batch * point.heads * point.q_len
    kv = point.batch * point.kv_heads * point.q_len * (point.head_dim + point.value_dim)
    if point.pass_ == "decode":
        state = 4 * point.batch * point.heads * point.head_dim * point.value_dim
        return 5 * state if point.op == "lightning" else kv * itemsize  # with the step's own
    tensors = query * (point.head_dim + point.value_dim) + kv
    if point.pass_ != "fwd":
        tensors *= 2
    scores = 0
    if point.backend == "reference":
        scores = SCORES_HELD[point.pass_] * query * point.q_len
        scores *= 8 if point.op == "lightning" else max(4, itemsize)
    return tensors * itemsize + scores


@dataclass
class Call:
    """A point made ready: `run` is what is timed; `judge` says how right `compute`'s results are.

    `compute` does what `run` does and keeps the results; `input_bytes` are those of the tensors;
    `notes` are fields of the row that `compute` finds out.
    """

    run: Callable[[], object]
    compute: Callable[[], Results]
    judge: Callable[[Results], Verdict]
    input_bytes: int
    notes: Row = field(default_factory=dict)

    def check(self) -> Verdict:
        """Compute and judge."""
        return self.judge(self.compute())


def prepare(point: Point, source: Source, device: str) -> Call:
    """Make the inputs of a point on the device, and the call on them."""
    if point.pass_ == "decode":
        return (
            _lightning_decode(point, source, device)
            if point.op == "lightning"
            else (_softmax_decode(point, source, device))
        )
    names = ("query", "key", "value", "grad_output")[: 3 if point.pass_ == "fwd" else 4]
    shapes = {"key": point.kv_heads, "value": point.kv_heads}
    tensors = [_tensor(n, shapes.get(n, point.heads), point, source, device) for n in names]
    inputs = Inputs(*tensors[:3], grad_output=tensors[3] if len(tensors) == 4 else None)
    inputs = replace(inputs, log_decay=log_decay_of(point, device))
    forward = _forward(point, inputs)
    check = check_lightning if point.op == "lightning" else check_softmax
    size = _bytes(*tensors)
    if point.pass_ == "fwd":
        return Call(forward, lambda: {"output": forward()}, partial(check, inputs), size)
    leaves = inputs.query, inputs.key, inputs.value
    detached = replace(
        inputs, query=leaves[0].detach(), key=leaves[1].detach(), value=leaves[2].detach()
    )
    for x in leaves:
        x.requires_grad_()

    def backward(output: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, inputs.grad_output, retain_graph=keep)

    def compute() -> Results:
        output = forward()
        results = zip(("grad_query", "grad_key", "grad_value"), backward(output), strict=True)
        return dict(results) | {"output": output.detach()}

    # The graph that a backward alone walks again and again is made at its first run.
    graph: list[Tensor] = []

    def backward_alone() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(forward())
        return backward(graph[0], keep=True)

    run = backward_alone if point.pass_ == "bwd" else lambda: backward(forward())
    return Call(run, compute, partial(check, detached), size)


def _tensor(name: str, heads: int, point: Point, source: Source, device: str) -> Tensor:
    dim = point.value_dim if name in ("value", "grad_output") else point.head_dim
    shape = (point.batch, heads, point.q_len, dim)
    x = source.tensors((name,), shape, getattr(torch, point.dtype), device)[0]
    if point.backend not in TOKENS_BEFORE_HEADS:
        return x
    laid_out = x.new_empty(point.batch, point.q_len, heads, dim).transpose(1, 2)
    return laid_out.copy_(x)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def log_decay_of(point: Point, device: str) -> Tensor | None:
    """Decays `[H]` of the point's layer; None for softmax."""
    if point.op == "softmax":
        return None
    layer, num_layers = (int(x) for x in point.layer.split("/"))
    return minimax_log_decay(point.heads, layer, num_layers).to(device)


def _forward(point: Point, inputs: Inputs) -> Callable[[], Tensor]:
    q, k, v = inputs.query, inputs.key, inputs.value
    if point.op == "lightning":
        flags = {"backend": point.backend, "precision": point.precision}
        return lambda: functional.lightning_attention(q, k, v, inputs.log_decay, **flags).output
    grouped = point.heads != point.kv_heads
    return lambda: functional.softmax_attention(
        q, k, v, is_causal=True, enable_gqa=grouped, backend=point.backend
    )


def _lightning_decode(point: Point, source: Source, device: str) -> Call:
    context = replace(point, q_len=min(point.q_len, STATE_TOKENS))
    q, k, v = (_tensor(n, point.heads, context, source, device) for n in ("query", "key", "value"))
    g = log_decay_of(point, device)
    state = reference.lightning_state(k, v, g)
    step = [x[:, :, -1:].contiguous() for x in (q, k, v)]
    del q, k, v
    flags = {"backend": point.backend, "precision": point.precision}

    def run() -> Tensor:
        return functional.lightning_decode_(*step, g, state, **flags)

    def compute() -> Results:
        before = state.clone()
        return {"output": run(), "state": state, "before": before}

    def judge(results: Results) -> Verdict:
        before = results["before"]
        wide = [x.double() for x in (*step, g)]
        oracle = reference.lightning_recurrence(*wide, initial_state=before.double())
        plain = baseline_scan(*(x.float() for x in step), g, before, step[0].dtype)
        output = results["output"]
        pairs = {
            "output": accuracy(output, oracle[0], plain[0].to(output.dtype)),
            "state": accuracy(results["state"], oracle[1], plain[1]),
        }
        return Verdict.of(pairs)

    return Call(run, compute, judge, _bytes(*step, state))


def _softmax_decode(point: Point, source: Source, device: str) -> Call:
    k, v = (_tensor(n, point.kv_heads, point, source, device) for n in ("key", "value"))
    q = _tensor("query", point.heads, replace(point, q_len=1), source, device)
    lengths = torch.full((point.batch,), point.q_len, device=device)
    flags = {"span": point.q_len, "backend": point.backend}

    def run() -> Tensor:
        return functional.softmax_decode(q, k, v, lengths, **flags)

    def judge(results: Results) -> Verdict:
        """Head by head: in float64, with gradients, a cache takes eight times its own memory."""
        exact, plain = [], []
        for queries, keys, values in zip(
            q.chunk(point.kv_heads, 1), k.split(1, 1), v.split(1, 1), strict=True
        ):
            nothing = torch.zeros_like(queries[..., :1]).expand(*queries.shape[:3], v.shape[3])
            part = Inputs(queries, keys, values, grad_output=nothing)
            exact.append(softmax_oracle(part, is_causal=True)["output"])
            plain.append(softmax_baseline(part, is_causal=True)["output"])
        found = accuracy(results["output"], torch.cat(exact, 1), torch.cat(plain, 1))
        return Verdict.of({"output": found})

    return Call(run, lambda: {"output": run()}, judge, _bytes(q, k, v))


def release_memory(device: str) -> None:
    """Give back to the system what earlier points left."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
