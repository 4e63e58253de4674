"""What a point on ranks runs, and how right each rank's part is.

Legend: H heads, G key heads, T tokens of a sequence, L of this rank, K key dim, V value dim.

Lightning attention runs by LASP+ on contiguous chunks, softmax by ring attention on zigzag chunks,
which cost all ranks alike. Every rank makes its own part of the inputs and judges its own part of the
results, by `bench.gate`'s means: windows of lightning attention from states that the gate streams from
rank to rank itself, and rows of softmax attention over all their keys.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from attnlab.distributed.comm import Group
from attnlab.distributed.lasp import lasp_attention
from attnlab.distributed.pack import PackPlan, Span
from attnlab.distributed.ring import ring_attention
from attnlab.testing import Inputs, accuracy, softmax_baseline, softmax_oracle
from bench import calls
from bench.gate import ROWS, Pair, Results, Verdict, check_lightning, stream_states, zero_states
from bench.inputs import Source
from bench.rows import Point

METHODS = {"lightning": "lasp+", "softmax": "ring"}


def prepare(point: Point, source: Source, group: Group, device: str) -> calls.Call:
    """This rank's part of a point's inputs, and the call on them."""
    make = PackPlan.contiguous if point.op == "lightning" else PackPlan.zigzag
    spread = make((0, point.q_len), group.size)
    names = ("query", "key", "value", "grad_output")[: 3 if point.pass_ == "fwd" else 4]
    heads = {"key": point.kv_heads, "value": point.kv_heads}
    tensors = [
        _part(name, heads.get(name, point.heads), point, source, spread, group.rank, device)
        for name in names
    ]
    inputs = Inputs(
        *tensors[:3],
        log_decay=calls.log_decay_of(point, device),
        grad_output=tensors[3] if len(tensors) == 4 else None,
    )
    return (_lightning if point.op == "lightning" else _softmax)(point, inputs, spread, group)


def _part(
    name: str,
    heads: int,
    point: Point,
    source: Source,
    spread: PackPlan,
    rank: int,
    device: str,
) -> Tensor:
    """`[1, heads, L, D]`, made where it is needed."""
    dim = point.value_dim if name in ("value", "grad_output") else point.head_dim
    dtype, parts = getattr(torch, point.dtype), []
    for chunk in spread.chunks(rank):
        span = spread.span(chunk)
        shape = (1, heads, span.length, dim)
        parts += source.tensors((name,), shape, dtype, device, start=span.start)
    return torch.cat(parts, 2)


def _call(
    point: Point,
    inputs: Inputs,
    forward: Callable[..., Tensor],
    judge: Callable[[Results], Verdict],
    checked_grad: Tensor | None,
) -> calls.Call:
    """The timed call, and one that is checked, whose gradient of the output may be another."""
    leaves = tuple(x.detach().clone() for x in (inputs.query, inputs.key, inputs.value))
    size = sum(x.nbytes for x in (*leaves, inputs.grad_output) if x is not None)
    if point.pass_ == "fwd":
        return calls.Call(
            lambda: forward(*leaves), lambda: {"output": forward(*leaves)}, judge, size
        )
    for x in leaves:
        x.requires_grad_()
    graph: list[Tensor] = []  # which a backward alone walks again and again

    def run() -> tuple[Tensor, ...]:
        if point.pass_ == "bwd":
            graph.extend([] if graph else [forward(*leaves)])
            return torch.autograd.grad(graph[0], leaves, inputs.grad_output, retain_graph=True)
        return torch.autograd.grad(forward(*leaves), leaves, inputs.grad_output)

    def compute() -> Results:
        output = forward(*leaves)
        grads = torch.autograd.grad(output, leaves, checked_grad)
        names = "grad_query", "grad_key", "grad_value"
        return dict(zip(names, grads, strict=True)) | {"output": output.detach()}

    return calls.Call(run, compute, judge, size)


def _lightning(point: Point, inputs: Inputs, spread: PackPlan, group: Group) -> calls.Call:
    log_decay = inputs.log_decay
    assert log_decay is not None

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The states first: what is added to 16-bit results of the op would be rounded twice.
        flags = {"precision": point.precision, "overlap": False}
        return lasp_attention(q, k, v, log_decay, spread, group, **flags)

    def judge(results: Results) -> Verdict:
        past = entering(inputs.key, inputs.value, log_decay, group)
        future = None
        if inputs.grad_output is not None:
            backwards = inputs.query, inputs.grad_output, log_decay, group
            future = entering(*backwards, reverse=True)
        return check_lightning(inputs, results, past=past, future=future)

    return _call(point, inputs, forward, judge, inputs.grad_output)


def entering(
    key: Tensor, value: Tensor, log_decay: Tensor, group: Group, *, reverse: bool = False
) -> Pair:
    """States that the ranks before this one leave (behind it, if reversed): the gate's own, in turn."""
    pair = own = zero_states(key, value)
    for turn in reversed(range(group.size)) if reverse else range(group.size):
        if turn == group.rank:
            own = pair
            flags = {"reverse": reverse, "begin": pair}
            (pair,) = stream_states(key, value, log_decay, [key.shape[2]], **flags)
        pair = tuple(x.contiguous() for x in pair)
        for x in pair:
            dist.broadcast(x, src=turn)
    return own


def _softmax(point: Point, inputs: Inputs, spread: PackPlan, group: Group) -> calls.Call:
    """Ring attention, of which the last rows of every chunk are checked.

    For the check the output has a gradient in these rows alone, so that the definition gives the
    gradients of all keys, on all ranks, from a few rows.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, spread, group)

    spans = [spread.span(chunk) for chunk in range(spread.num_chunks)]
    ends = [Span(max(s.start, s.stop - ROWS), s.stop) for s in spans]
    checked = torch.zeros(point.q_len, dtype=torch.bool, device=inputs.query.device)
    for end in ends:
        checked[slice(*end)] = True
    grad = inputs.grad_output
    if grad is not None:
        grad = grad * spread.shard(checked, group.rank)[:, None]
    judged = replace(inputs, grad_output=grad)
    return _call(
        point, inputs, forward, lambda found: check_ring(judged, found, spread, ends, group), grad
    )


def check_ring(
    inputs: Inputs, results: Results, spread: PackPlan, ends: list[Span], group: Group
) -> Verdict:
    """Judge this rank's rows among `ends`, and the gradients of all its keys from those of all rows."""
    q, k, v = (whole(x, spread, group) for x in (inputs.query, inputs.key, inputs.value))
    grad = inputs.grad_output
    do = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3])
    do = do if grad is None else whole(grad, spread, group)
    rows_found: dict[str, list[tuple[Tensor, ...]]] = {"output": [], "grad_query": []}
    wide = [torch.zeros_like(x, dtype=torch.float64) for x in (k, v)]
    plain = [torch.zeros_like(x, dtype=torch.float32) for x in (k, v)]
    for chunk, (start, stop) in enumerate(ends):
        inside = slice(start, stop)
        part = Inputs(q[:, :, inside], k[:, :, :stop], v[:, :, :stop], grad_output=do[:, :, inside])
        oracle, baseline = (
            softmax_oracle(part, is_causal=True),
            softmax_baseline(part, is_causal=True),
        )
        for i, name in enumerate(("grad_key", "grad_value")):
            wide[i][:, :, :stop] += oracle[name]
            plain[i][:, :, :stop] += baseline[name]
        if spread.owners[chunk] == group.rank:
            own = slice(*spread.local(chunk, Span(start, stop)))
            for name in rows_found.keys() & results.keys():
                triple = results[name][:, :, own], oracle[name], baseline[name]
                rows_found[name].append(triple)
    joined = {
        n: [torch.cat(x, 2) for x in zip(*t, strict=True)] for n, t in rows_found.items() if t
    }
    for i, name in enumerate(("grad_key", "grad_value")):
        if name in results:
            own_part = [spread.shard(x[i], group.rank, 2) for x in (wide, plain)]
            rounded = own_part[1].to(results[name].dtype)
            joined[name] = [results[name], own_part[0], rounded]
    return Verdict.of({name: accuracy(*triple) for name, triple in joined.items()})


def whole(x: Tensor, spread: PackPlan, group: Group) -> Tensor:
    """All tokens `[1, H, T, D]` from every rank's `[1, H, L, D]`."""
    lengths = [spread.local_len(rank) for rank in range(group.size)]
    padded = F.pad(x, (0, 0, 0, max(lengths) - x.shape[2]))
    parts = group.all_gather(padded).wait()
    return spread.join([p[:, :, :n] for p, n in zip(parts, lengths, strict=True)], 2)
