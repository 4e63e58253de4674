"""The accuracy gate: is the output of a call right at the length at which it is timed?

Short of recomputing millions of tokens in float64 with all their scores, windows of tokens are
checked: at the start, at the end, and astride seven places between. What a window needs of the
past is a state, streamed here in float64 independently of the tested backend; what its gradients
need of the future is the like state, streamed from the end. Rows of softmax attention are
recomputed over all their own keys. The tolerance is `attnlab.testing`'s.

Legend: B batch, H heads, T tokens, K key dim, V value dim, W tokens a window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab import reference
from attnlab.testing import (
    Accuracy,
    Inputs,
    accuracy,
    baseline_scan,
    softmax_baseline,
    softmax_oracle,
)

WINDOW = 128
CHUNK = 64
BLOCK = 1 << 14
ROWS = 32
Results = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]  # float64 oracle, float32 baseline


@dataclass(frozen=True)
class Verdict:
    """The worst of the accuracies of a call's results, and whose it is."""

    worst: Accuracy
    name: str

    @classmethod
    def of(cls, found: dict[str, Accuracy]) -> "Verdict":
        """Pick the result with the largest error over its budget."""
        name = max(found, key=lambda n: found[n].ratio)
        return cls(found[name], name)


Span = tuple[int, int]


def window_spans(num_tokens: int) -> list[Span]:
    """Windows [start, stop): the first, seven between, and one that ends with the last token.

    Starts are multiples of the chunk size, those between chosen so that an eighth lies amid each.
    """
    last = max(0, (num_tokens - WINDOW) // CHUNK * CHUNK)
    between = [num_tokens * i // 8 // CHUNK * CHUNK - WINDOW // 2 for i in range(1, 8)]
    starts = sorted({0, last, *(s for s in between if 0 < s < last)})
    return [(s, num_tokens if s == last else s + WINDOW) for s in starts]


def check_lightning(
    inputs: Inputs, results: Results, *, past: Pair | None = None, future: Pair | None = None
) -> Verdict:
    """Judge output (and grad_query, grad_key, grad_value where there) of a call from zero state.

    `past` and `future` are for a call that is a part of a longer one: the states that the tokens
    before it leave, and those that the tokens behind it leave when seen from the end.
    """
    q, k, v, g, do = (
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.log_decay,
        inputs.grad_output,
    )
    found = {}
    spans = window_spans(q.shape[2])
    before = stream_states(k, v, g, [start for start, _ in spans], begin=past)
    found["output"] = _compare(results["output"], (q, k, v), g, spans, before, False)
    if "grad_query" in results:
        transposed = [(a.mT, b.mT) for a, b in before]
        found["grad_query"] = _compare(
            results["grad_query"], (do, v, k), g, spans, transposed, False
        )
        # Seen from the end, the gradients of key and value are scans of the same shape.
        back = [(q.shape[2] - stop, q.shape[2] - start) for start, stop in spans]
        starts = [start for start, _ in back]
        after = stream_states(q, do, g, starts, reverse=True, begin=future)
        transposed = [(a.mT, b.mT) for a, b in after]
        found["grad_key"] = _compare(results["grad_key"], (v, do, q), g, back, transposed, True)
        found["grad_value"] = _compare(results["grad_value"], (k, q, do), g, back, after, True)
    return Verdict.of(found)


def stream_states(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    stops: list[int],
    *,
    reverse: bool = False,
    begin: Pair | None = None,
) -> list[Pair]:
    """States `[B, H, K, V]` after the first `stop` tokens (from the end, if reversed), for each.

    They start from `begin`, by default from zero. The oracle is one float64 product a block of tokens, the baseline the chunked float32 stream
    with operands rounded to the inputs' dtype.
    """
    exact, plain = begin or zero_states(k, v)
    states: dict[int, Pair] = {}
    position = 0
    for stop in sorted(set(stops)):
        while position < stop:
            end = min(position + BLOCK, stop)
            kb, vb = (_take(x, position, end, reverse) for x in (k, v))
            exact = _step(exact, kb.double(), vb.double(), log_decay)
            plain = _chunked_steps(plain, kb, vb, log_decay)
            position = end
        states[stop] = exact, plain
    return [states[stop] for stop in stops]


def zero_states(k: Tensor, v: Tensor) -> Pair:
    """The two states before the first token."""
    shape = (*k.shape[:2], k.shape[3], v.shape[3])
    exact = torch.zeros(shape, dtype=torch.float64, device=k.device)
    return exact, exact.float()


def _take(x: Tensor, start: int, stop: int, reverse: bool) -> Tensor:
    if not reverse:
        return x[:, :, start:stop]
    return x[:, :, x.shape[2] - stop : x.shape[2] - start].flip(2)


def _step(state: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """exp(g n) S + sum over the n tokens of exp(g (n-1-i)) k_i v_i^T."""
    until = torch.arange(k.shape[2] - 1, -1, -1, device=k.device)
    weight = reference.decay_mask(log_decay, until, state.dtype)[:, :, None]
    whole = torch.exp(log_decay.double() * k.shape[2]).to(state.dtype)[:, None, None]
    return whole * state + (k * weight).mT @ v


def _chunked_steps(state: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    whole = k.shape[2] // CHUNK * CHUNK
    if whole:
        until = torch.arange(CHUNK - 1, -1, -1, device=k.device)
        weight = reference.decay_mask(log_decay, until, torch.float32)[:, None, :, None]
        kc, vc = (x[:, :, :whole].unflatten(2, (-1, CHUNK)) for x in (k, v))
        updates = (kc.float() * weight).to(k.dtype).float().mT @ vc.float()  # [B, H, N, K, V]
        decay = torch.exp(log_decay * CHUNK)[:, None, None]
        for n in range(updates.shape[2]):
            state = torch.addcmul(updates[:, :, n], state, decay)
    if whole < k.shape[2]:
        rest = k[:, :, whole:], v[:, :, whole:]
        nothing = rest[0].float()
        state = baseline_scan(nothing, nothing, rest[1].float(), log_decay, state, k.dtype)[1]
    return state


def _compare(
    actual: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    log_decay: Tensor,
    spans: list[Span],
    states: list[Pair],
    reverse: bool,
) -> Accuracy:
    """Accuracy over all windows of a scan that begins each window with its streamed state."""
    parts: list[list[Tensor]] = [[], [], []]
    dtype = actual.dtype
    for (start, stop), (exact, plain) in zip(spans, states, strict=True):
        q, k, v = (_take(x, start, stop, reverse) for x in qkv)
        oracle, _ = baseline_scan_float64(q, k, v, log_decay, exact)
        baseline, _ = baseline_scan(q.float(), k.float(), v.float(), log_decay, plain, dtype)
        parts[0].append(_take(actual, start, stop, reverse))
        parts[1].append(oracle)
        parts[2].append(baseline.to(dtype))
    return accuracy(*(torch.cat(p, 2) for p in parts))


def baseline_scan_float64(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> Pair:
    """The definition in float64 over one window, from its state."""
    wide = (x.double() for x in (q, k, v))
    return reference.lightning_attention(
        *wide, log_decay.double(), initial_state=state, return_final_state=True
    )


def check_softmax(inputs: Inputs, results: Results) -> Verdict:
    """Judge rows of causal output and grad_query, and grad_key, grad_value of the last keys."""
    num_tokens = inputs.query.shape[2]
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    with_grads = "grad_query" in results
    for start in sorted({0, max(0, num_tokens // 2 - ROWS), max(0, num_tokens - ROWS)}):
        stop = min(start + ROWS, num_tokens)
        rows = slice(start, stop)
        # Rows [start, stop) of a causal call see keys [0, stop): bottom right alignment.
        part = Inputs(
            inputs.query[:, :, rows],
            inputs.key[:, :, :stop],
            inputs.value[:, :, :stop],
            grad_output=_rows_or_zeros(inputs, rows),
        )
        oracle = softmax_oracle(part, is_causal=True)
        baseline = softmax_baseline(part, is_causal=True)
        names = ["output"] + ["grad_query"] * with_grads
        for name in names:
            triple = results[name][:, :, rows], oracle[name], baseline[name]
            found.setdefault(name, []).append(triple)
        if with_grads and stop == num_tokens:
            for name in ("grad_key", "grad_value"):
                # Only the last rows see the last keys, so this is their whole gradient.
                triple = (x[name][:, :, start:stop] for x in (results, oracle, baseline))
                found[name] = [tuple(triple)]
    joined = {n: [torch.cat(x, 2) for x in zip(*t, strict=True)] for n, t in found.items()}
    return Verdict.of({name: accuracy(*x) for name, x in joined.items()})


def _rows_or_zeros(inputs: Inputs, rows: slice) -> Tensor:
    if inputs.grad_output is not None:
        return inputs.grad_output[:, :, rows]
    return torch.zeros_like(inputs.query[:, :, rows, :1]).expand(-1, -1, -1, inputs.value.shape[3])
