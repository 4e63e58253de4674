"""Backend "torch": chunked lightning attention in plain PyTorch, fast on a CPU, right on any device.

Legend: B batch, H heads, T tokens, K key dim, V value dim; C tokens a chunk, G chunks a segment.

With positions i, j inside a chunk and S the state that enters it (Lightning Attention-2,
arXiv 2401.04658; decay g <= 0, every exponent below is <= 0):
    o_i = scale * (exp(g (i+1)) q_i S + sum over j <= i of exp(g (i-j)) (q_i . k_j) v_j)
    S  <- exp(g C) S + sum over j of exp(g (C-1-j)) k_j v_j^T
A segment of G chunks fits the CPU's cache, and its products are batched over the chunks; segments
run one after the other in the same buffers. Nothing of size T x T or T x K x V is ever allocated.
For the backward the forward keeps one state a segment; the rest is recomputed, last segment first.
Arithmetic and state are float32 (float64 for float64 inputs). Varlen calls loop over documents.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
_CHUNKS_IN_CACHE = {"cpu": 32, "cuda": 1024}  # batched products a segment, by device type


@dataclass(frozen=True)
class _Segment:
    """Tokens [start, stop) as `num_chunks` chunks of `chunk` tokens, of one document."""

    document: int
    start: int
    stop: int
    num_chunks: int
    chunk: int


def _segments(bounds: list[int], rows: int, device: str) -> Iterator[_Segment]:
    """Cut each document into full segments, a shorter one, and the tokens left over."""
    group = max(1, _CHUNKS_IN_CACHE.get(device, 32) // rows)
    for document, (begin, end) in enumerate(itertools.pairwise(bounds)):
        whole = begin + (end - begin) // CHUNK * CHUNK
        for start in range(begin, whole, group * CHUNK):
            stop = min(start + group * CHUNK, whole)
            yield _Segment(document, start, stop, (stop - start) // CHUNK, CHUNK)
        if whole < end:
            yield _Segment(document, whole, end, 1, end - whole)


def _max_segments(num_tokens: int, num_documents: int, rows: int, device: str) -> int:
    """Bound of the number of segments that needs no document's length."""
    group = max(1, _CHUNKS_IN_CACHE.get(device, 32) // rows)
    return num_tokens // (group * CHUNK) + 2 * num_documents


@dataclass(frozen=True)
class _Decays:
    """Decay factors of a chunk of C tokens, with heads spread over the rows of a batch."""

    mask: Tensor  # [R, C, C], exp(g (i-j)) where j <= i
    query: Tensor  # [R, C, 1], exp(g (i+1))
    key: Tensor  # [R, C, 1], exp(g (C-1-j))
    chunk: Tensor  # [R, 1, 1], exp(g C)

    @classmethod
    def of(cls, log_decay: Tensor, batch: int, chunk: int, dtype: torch.dtype) -> "_Decays":
        g = log_decay.double().repeat(batch)[:, None, None]  # [R, 1, 1]
        i = torch.arange(chunk, device=g.device, dtype=g.dtype)
        distance = i[:, None] - i[None, :]
        mask = torch.where(distance >= 0, torch.exp(g * distance.clamp(min=0)), 0.0)
        query, key = torch.exp(g * (i[:, None] + 1)), torch.exp(g * (chunk - 1 - i[:, None]))
        return cls(*(x.to(dtype) for x in (mask, query, key, torch.exp(g * chunk))))


class _Workspace:
    """Buffers that every segment reuses, and the decay factors of the chunk sizes that occur."""

    def __init__(self, query: Tensor, log_decay: Tensor) -> None:
        self.batch, self.heads = query.shape[:2]
        self.rows = self.batch * self.heads
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.device = query.device
        self._log_decay = log_decay.to(query.device)
        self._buffers: dict[str, Tensor] = {}
        self._decays: dict[int, _Decays] = {}

    def decays(self, chunk: int) -> _Decays:
        if chunk not in self._decays:
            self._decays[chunk] = _Decays.of(self._log_decay, self.batch, chunk, self.dtype)
        return self._decays[chunk]

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Uninitialised tensor that lives until the name is asked for again."""
        size = torch.Size(shape).numel()
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._buffers[name][:size].view(shape)

    def load(self, name: str, x: Tensor, s: _Segment) -> Tensor:
        """Tokens of the segment as `[G, R, C, D]`: a view where memory allows it, else a copy."""
        part = x[:, :, s.start : s.stop]  # [B, H, G C, D]
        if self.rows == 1 and x.dtype == self.dtype and part.is_contiguous():
            return part.view(s.num_chunks, 1, s.chunk, -1)
        chunks = part.unflatten(2, (s.num_chunks, s.chunk)).permute(2, 0, 1, 3, 4)
        buffer = self.buffer(name, *chunks.shape)
        return buffer.copy_(chunks).flatten(1, 2)

    def target(self, name: str, x: Tensor, s: _Segment) -> Tensor:
        """Where to compute the segment of `x`: in place if `load` would give a view."""
        part = x[:, :, s.start : s.stop]
        if self.rows == 1 and x.dtype == self.dtype and part.is_contiguous():
            return part.view(s.num_chunks, 1, s.chunk, -1)
        return self.buffer(name, s.num_chunks, self.rows, s.chunk, x.shape[3])

    def store(self, x: Tensor, target: Tensor, s: _Segment) -> None:
        """Copy `target` to its segment of `x`, unless it lies there already."""
        part = x[:, :, s.start : s.stop]
        if target.data_ptr() == part.data_ptr():
            return
        chunks = part.unflatten(2, (s.num_chunks, s.chunk)).permute(2, 0, 1, 3, 4)
        chunks.copy_(target.unflatten(1, (self.batch, self.heads)))


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Batched product over the chunks and rows: `[G, R, M, N]` written to `out`."""
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _add_bmm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return out


def _enter_states(ws: _Workspace, k_decayed: Tensor, v: Tensor, carry: Tensor) -> Tensor:
    """States `[G+1, R, K, V]` that enter each chunk, and the one that leaves the last."""
    num_chunks, rows, chunk, k_dim = k_decayed.shape
    states = ws.buffer("states", num_chunks + 1, rows, k_dim, v.shape[3])
    states[0] = carry
    _bmm(k_decayed.mT, v, out=states[1:])
    decay = ws.decays(chunk).chunk
    for n in range(num_chunks):
        states[n + 1].addcmul_(states[n], decay)
    return states


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    bounds: list[int],
    scale: float,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ws = _Workspace(query, log_decay)
    output, final_state, saved = _outputs(query, value, initial_state, len(bounds) - 1, save_states)
    carry = final_state  # `[N or B, H, K, V]`; each document updates its rows until they are final
    segments = list(_segments(bounds, ws.rows, query.device.type))
    for index, s in enumerate(segments):
        state = _document_state(carry, s.document, bounds)  # [R, K, V]
        if save_states:
            saved[index] = state
        decays = ws.decays(s.chunk)
        q, k, v = (ws.load(n, x, s) for n, x in (("q", query), ("k", key), ("v", value)))
        k_decayed = torch.mul(k, decays.key, out=ws.buffer("k_decayed", *k.shape))
        states = _enter_states(ws, k_decayed, v, state)
        scores = _bmm(q, k.mT, out=ws.buffer("scores", *q.shape[:3], s.chunk)).mul_(decays.mask)
        o = _bmm(q, states[:-1], out=ws.target("o", output, s)).mul_(decays.query)
        _add_bmm(o, scores, v)
        if scale != 1.0:
            o.mul_(scale)
        ws.store(output, o, s)
        state.copy_(states[-1])
    saved[len(segments) :] = 0  # their number is bounded, not known, beforehand
    return output, final_state, saved


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    saved: Tensor,
    grad_output: Tensor,
    grad_final_state: Tensor,
    bounds: list[int],
    scale: float,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_decay (zeros unless asked for) and initial state."""
    ws = _Workspace(query, log_decay)
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    ]
    grad_state = grad_final_state.to(ws.dtype, copy=True)
    grad_decay = torch.zeros(ws.rows, dtype=torch.float64, device=query.device)
    segments = list(enumerate(_segments(bounds, ws.rows, query.device.type)))
    for index, s in reversed(segments):
        carry = _document_state(grad_state, s.document, bounds)  # [R, K, V]
        decays = ws.decays(s.chunk)
        tensors = {"q": query, "k": key, "v": value, "do": grad_output}
        q, k, v, do = (ws.load(name, x, s) for name, x in tensors.items())
        if scale != 1.0:
            do = torch.mul(do, scale, out=ws.buffer("scaled", *do.shape))
        k_decayed = torch.mul(k, decays.key, out=ws.buffer("k_decayed", *k.shape))
        states = _enter_states(ws, k_decayed, v, saved[index])
        q_decayed = torch.mul(q, decays.query, out=ws.buffer("q_decayed", *q.shape))
        grad_states = _leave_grads(ws, q_decayed, do, carry, decays.chunk)
        scores = _bmm(q, k.mT, out=ws.buffer("scores", *q.shape[:3], s.chunk)).mul_(decays.mask)
        grad_scores = _bmm(do, v.mT, out=ws.buffer("grad_scores", *scores.shape)).mul_(decays.mask)
        dq, dk, dv = (ws.target(f"d{i}", g, s) for i, g in enumerate(grads))
        _add_bmm(_bmm(do, states[:-1].mT, out=dq).mul_(decays.query), grad_scores, k)
        _add_bmm(_bmm(v, grad_states[1:].mT, out=dk).mul_(decays.key), grad_scores.mT, q)
        _add_bmm(_bmm(k_decayed, grad_states[1:], out=dv), scores.mT, do)
        if decay_grad:
            grad_decay += _decay_gradient(q, k, dq, dk, states, grad_states)
        for grad, target in zip(grads, (dq, dk, dv), strict=True):
            ws.store(grad, target, s)
        carry.copy_(grad_states[0])
    per_head = grad_decay.view(-1, ws.heads).sum(0).to(log_decay)
    return grads[0], grads[1], grads[2], per_head, grad_state


def _leave_grads(
    ws: _Workspace, q_decayed: Tensor, do: Tensor, carry: Tensor, decay: Tensor
) -> Tensor:
    """Gradients `[G+1, R, K, V]` of the states that enter each chunk, and of the one that leaves."""
    num_chunks, rows, _, k_dim = q_decayed.shape
    grads = ws.buffer("grad_states", num_chunks + 1, rows, k_dim, do.shape[3])
    grads[-1] = carry
    _bmm(q_decayed.mT, do, out=grads[:-1])
    for n in reversed(range(num_chunks)):
        grads[n].addcmul_(grads[n + 1], decay)
    return grads


def _decay_gradient(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, states: Tensor, grad_states: Tensor
) -> Tensor:
    """Gradient of log_decay from one segment, `[R]` float64.

    A term written at p and read at r carries exp(g (r - p)), so its derivative is (r - p) times its
    share of the loss: reads (q . dq) count with their position, writes (k . dk) against it. Taken
    inside each chunk, positions stay small and nothing cancels over a long sequence.
    """
    chunk = q.shape[2]
    position = torch.arange(chunk, device=q.device, dtype=torch.float64)
    reads = (q * dq).sum(-1).double() - (k * dk).sum(-1).double()  # [G, R, C]
    entering = (states[:-1] * grad_states[:-1]).sum((-1, -2)).double()  # written at position -1
    leaving = (states[1:] * grad_states[1:]).sum((-1, -2)).double()  # read at position C-1
    return ((reads * position).sum(-1) + entering + (chunk - 1) * leaving).sum(0)


def _outputs(
    query: Tensor, value: Tensor, initial_state: Tensor | None, num_documents: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final states holding the initial ones, and room for a state a segment."""
    batch, heads, num_tokens, k_dim = query.shape
    v_dim = value.shape[3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(batch, heads, num_tokens, v_dim)
    # With packed documents B is 1, so one of the two is the number of states.
    state = query.new_zeros(batch * num_documents, heads, k_dim, v_dim, dtype=dtype)
    if initial_state is not None:
        state.copy_(initial_state)
    rows = batch * heads
    count = _max_segments(num_tokens, num_documents, rows, query.device.type) if save else 0
    return output, state, query.new_empty(count, rows, k_dim, v_dim, dtype=dtype)


def _document_state(states: Tensor, document: int, bounds: list[int]) -> Tensor:
    """View `[R, K, V]` of the states that a document (or the batch) owns."""
    own = states[document : document + 1] if len(bounds) > 2 else states
    return own.flatten(0, 1)


def _bounds(query: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    return [0, query.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()


@torch.library.custom_op("attnlab::lightning_chunked", mutates_args=())
def _lightning_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = _bounds(query, cu_seqlens)
    return _forward(query, key, value, log_decay, initial_state, bounds, scale, save_states)


@_lightning_chunked.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return _outputs(query, value, None, num_documents, save_states)


@torch.library.custom_op("attnlab::lightning_chunked_backward", mutates_args=())
def _lightning_chunked_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    saved: Tensor,
    grad_output: Tensor,
    grad_final_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bounds = _bounds(query, cu_seqlens)
    tensors = (query, key, value, log_decay, saved, grad_output, grad_final_state)
    return _backward(*tensors, bounds, scale, decay_grad)


@_lightning_chunked_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    saved: Tensor,
    grad_output: Tensor,
    grad_final_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    grads = [torch.empty_like(x, memory_format=contiguous) for x in (query, key, value, log_decay)]
    grad_state = grad_final_state.new_empty(grad_final_state.shape, dtype=saved.dtype)
    return grads[0], grads[1], grads[2], grads[3], grad_state


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, log_decay, initial_state, cu_seqlens, scale, _ = inputs
    ctx.save_for_backward(query, key, value, log_decay, cu_seqlens, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.scale, ctx.has_state = scale, initial_state is not None


def _autograd_backward(
    ctx: Any, grad_output: Tensor, grad_final_state: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    query, key, value, log_decay, cu_seqlens, saved = ctx.saved_tensors
    dq, dk, dv, dg, dstate = torch.ops.attnlab.lightning_chunked_backward(
        query, key, value, log_decay, saved, grad_output, grad_final_state, cu_seqlens,
        ctx.scale, ctx.needs_input_grad[3],
    )  # fmt: skip
    return dq, dk, dv, dg, dstate if ctx.has_state else None, None, None, None


_lightning_chunked.register_autograd(_autograd_backward, setup_context=_save_for_backward)


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    precision: str = "default",
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, T, V]` and final states (float32, `[B or documents, H, K, V]`) or None.

    Every precision is met, since all products are of float32 operands (or of float64 ones).
    """
    tracked = (query, key, value, log_decay, initial_state)
    save_states = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tracked
    )
    output, state, _ = torch.ops.attnlab.lightning_chunked(
        query, key, value, log_decay, initial_state, cu_seqlens, scale, save_states
    )
    return output, state if return_final_state else None


def lightning_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, cu_seqlens: Tensor, **flags: Any
) -> tuple[Tensor, Tensor | None]:
    """`lightning_attention` over packed documents."""
    return lightning_attention(query, key, value, log_decay, cu_seqlens=cu_seqlens, **flags)
