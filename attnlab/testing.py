"""How attnlab judges an implementation: inputs, the float64 oracle, and one tolerance.

`assert_as_accurate` allows twice the error of a baseline that works at the same precision in the
plainest way; there is no table of tolerances. Everything here ships with the package, so that an
author of a backend elsewhere can use it.

Legend: B batch, H heads, T tokens, K key dim, V value dim, C = 64 tokens a chunk.
"""

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from attnlab import reference
from attnlab.problem import COUNTED_CHUNK, Problem

FLOAT32_ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call and the gradients that flow back into it; unused ones are None."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None = None
    initial_state: Tensor | None = None
    grad_output: Tensor | None = None
    grad_state: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same call with all tensors in `dtype`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        present = {n: x.to(dtype) for n, x in tensors.items() if x is not None}
        return replace(self, **present)


@dataclass(frozen=True)
class Accuracy:
    """Errors of a result against the oracle.

    `ratio` is the larger of both errors over their budgets (1 is the limit); `rms` and `max` are
    relative to the rms and the largest absolute value of the oracle.
    """

    ratio: float
    rms: float
    max: float


def make_inputs(problem: Problem, *, seed: int = 0, with_state: bool = True) -> Inputs:
    """Seeded normal tensors for a problem; decays from none to exp(-0.4) spread over the heads."""
    generator = torch.Generator().manual_seed(seed)
    p = problem
    state_dtype = torch.promote_types(p.dtype, torch.float32)

    def normal(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=state_dtype).to(p.device, dtype)

    qkv = {
        "query": normal(p.batch, p.heads, p.q_len, p.key_dim),
        "key": normal(p.batch, p.kv_heads, p.kv_len, p.key_dim),
        "value": normal(p.batch, p.kv_heads, p.kv_len, p.value_dim),
        "grad_output": normal(p.batch, p.heads, p.q_len, p.value_dim),
    }
    if not p.is_lightning:
        return Inputs(**qkv)
    slopes = torch.linspace(0.0, 0.4, p.heads) if p.heads != 1 else torch.tensor([0.1])
    num_states = p.num_documents if p.num_documents > 1 else p.batch
    shape = (num_states, p.heads, p.key_dim, p.value_dim)
    return Inputs(
        **qkv,
        log_decay=-slopes.to(p.device),
        initial_state=normal(*shape, dtype=state_dtype) if with_state else None,
        grad_state=normal(*shape, dtype=state_dtype),
    )


def accuracy(actual: Tensor, oracle: Tensor, baseline: Tensor) -> Accuracy:
    """Compare the errors of `actual` and `baseline` against the float64 `oracle`.

    The budget of the maximum and of the rms error is twice the baseline's plus 4 x 2^-23 of the
    oracle's maximum and rms. Where the oracle is infinite the others must be equal to it.

    Raises:
        ValueError: for different shapes, or if a budget is not small beside the oracle, so that
            the case could not tell a right result from zeros.
    """
    if not actual.shape == oracle.shape == baseline.shape:
        shapes = [list(x.shape) for x in (actual, oracle, baseline)]
        raise ValueError(f"expected three equal shapes, got {shapes}")
    a, o, b = (x.detach().double().flatten() for x in (actual, oracle, baseline))
    if o.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0)
    finite = torch.isfinite(o)
    if not torch.equal(a[~finite], o[~finite]):
        return Accuracy(float("inf"), float("inf"), float("inf"))
    a, o, b = a[finite], o[finite], b[finite]
    size_max, size_rms = _max(o), _rms(o)
    budget_max = 2 * _max(b - o) + 4 * FLOAT32_ROUNDING * size_max
    budget_rms = 2 * _rms(b - o) + 4 * FLOAT32_ROUNDING * size_rms
    if not (budget_max < size_max / 4 and budget_rms < size_rms / 4):
        raise ValueError(
            f"the case can't tell right from wrong: expected budgets below a quarter of the "
            f"oracle's maximum {size_max:.3g} and rms {size_rms:.3g}, "
            f"got {budget_max:.3g} and {budget_rms:.3g}"
        )
    error_max, error_rms = _max(a - o), _rms(a - o)
    if not torch.isfinite(a).all():
        return Accuracy(float("inf"), float("inf"), float("inf"))
    ratio = max(error_max / budget_max, error_rms / budget_rms)
    return Accuracy(ratio, error_rms / size_rms, error_max / size_max)


def assert_as_accurate(
    actual: Tensor, oracle: Tensor, baseline: Tensor, name: str = "result"
) -> Accuracy:
    """Raise `AssertionError` unless `accuracy(...)` is within its budget; return it."""
    found = accuracy(actual, oracle, baseline)
    if not found.ratio <= 1:
        raise AssertionError(
            f"{name}: error is {found.ratio:.3g} x its budget "
            f"(rms {found.rms:.3g} and max {found.max:.3g} of the oracle's)"
        )
    return found


def _present(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("expected inputs with decay and gradients, got None")
    return x


def _max(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


Results = dict[str, Tensor]
"""Results of a call by name: output, final_state, grad_query, grad_key, grad_value, ..."""


def lightning_oracle(
    inputs: Inputs, *, cu_seqlens: Tensor | None = None, scale: float = 1.0
) -> Results:
    """Outputs, states and all gradients of the definition in float64."""
    return run_lightning(inputs.to(torch.float64), cu_seqlens=cu_seqlens, scale=scale)


def run_lightning(
    inputs: Inputs,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "reference",
    precision: str = "default",
    decay_grad: bool = False,
) -> Results:
    """Forward and backward of one backend through the public op."""
    from attnlab import functional  # only here: an author's own code may call the rest alone

    names = ["query", "key", "value", "initial_state"] + ["log_decay"] * decay_grad
    tensors = {
        n: getattr(inputs, n).detach()
        for n in [*names, "log_decay"]
        if getattr(inputs, n) is not None
    }
    for name in names:
        if name in tensors:
            tensors[name].requires_grad_()
    flags: dict[str, Any] = {
        "scale": scale,
        "initial_state": tensors.get("initial_state"),
        "return_final_state": True,
        "backend": backend,
        "precision": precision,
    }
    query, key, value, log_decay = (tensors[n] for n in ("query", "key", "value", "log_decay"))
    if cu_seqlens is None:
        result = functional.lightning_attention(query, key, value, log_decay, **flags)
    else:
        result = functional.lightning_attention_varlen(
            query, key, value, log_decay, cu_seqlens, **flags
        )
    output, state = result
    assert state is not None
    tracked = [n for n in names if n in tensors]
    flowing = _present(inputs.grad_output), _present(inputs.grad_state)
    grads = torch.autograd.grad((output, state), [tensors[n] for n in tracked], flowing)
    results = {"output": output.detach(), "final_state": state.detach()}
    return results | {f"grad_{n}": g for n, g in zip(tracked, grads, strict=True)}


def lightning_baseline(
    inputs: Inputs, *, cu_seqlens: Tensor | None = None, scale: float = 1.0
) -> Results:
    """The chunked form with C = 64 and float32 accumulation, document after document.

    For 16-bit inputs each operand of a product is rounded to their dtype once, as a tensor core
    demands it, and so is the result. Each gradient is a scan of the forward's shape:
    dq = scan(do, v, k) forward in time, dk = scan(v, do, q) and dv = scan(k, q, do) backward.
    """
    bounds = [0, inputs.query.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    pieces: list[Results] = []
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        own = slice(n, n + 1) if cu_seqlens is not None else slice(None)
        part = Inputs(
            inputs.query[:, :, start:stop],
            inputs.key[:, :, start:stop],
            inputs.value[:, :, start:stop],
            inputs.log_decay,
            None if inputs.initial_state is None else inputs.initial_state[own],
            None if inputs.grad_output is None else inputs.grad_output[:, :, start:stop],
            None if inputs.grad_state is None else inputs.grad_state[own],
        )
        pieces.append(_baseline_of_document(part, scale))
    by_state = ("final_state", "grad_initial_state")
    return {n: torch.cat([p[n] for p in pieces], 0 if n in by_state else 2) for n in pieces[0]}


def _baseline_of_document(inputs: Inputs, scale: float) -> Results:
    dtype = inputs.query.dtype
    q, k, v = inputs.query.float(), inputs.key.float(), inputs.value.float()
    g = _present(inputs.log_decay)
    state = inputs.initial_state
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    output, final_state = baseline_scan(q, k, v, g, state.float(), dtype)
    results = {"output": (scale * output).to(dtype), "final_state": final_state}
    if inputs.grad_output is None:
        return results
    do = (scale * inputs.grad_output.float()).to(dtype).float()
    last = inputs.grad_state
    last = torch.zeros_like(final_state) if last is None else last.float()
    dq, _ = baseline_scan(do, v, k, g, state.float().mT, dtype)
    back = [x.flip(2) for x in (q, k, v, do)]
    nothing = torch.zeros_like(last)
    dk, _ = baseline_scan(back[2], back[3], back[0], g, nothing.mT, dtype)
    dv, through = baseline_scan(back[1], back[0], back[3], g, nothing, dtype)
    # What flows back through the final state reaches token j with exp(g (T-1-j)).
    until = torch.arange(q.shape[2] - 1, -1, -1, device=q.device)
    weight = reference.decay_mask(g, until, q.dtype)[:, :, None]  # [H, T, 1]
    rounded = last.to(dtype).float()
    results["grad_query"] = dq.to(dtype)
    results["grad_key"] = (dk.flip(2) + weight * (v @ rounded.mT)).to(dtype)
    results["grad_value"] = (dv.flip(2) + weight * (k @ rounded)).to(dtype)
    if inputs.initial_state is not None:
        whole = torch.exp(g * q.shape[2])[:, None, None]
        results["grad_initial_state"] = torch.exp(g)[:, None, None] * through + whole * last
    return results


def baseline_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    operand_dtype: torch.dtype,
    chunk: int = COUNTED_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Output and final state of float32 tensors, operands rounded to `operand_dtype`, unscaled."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(operand_dtype).float()

    outputs = [q.new_zeros(*q.shape[:3], v.shape[3])[:, :, :0]]
    for start in range(0, q.shape[2], chunk):
        qc, kc, vc = (x[:, :, start : start + chunk] for x in (q, k, v))
        i = torch.arange(qc.shape[2], device=q.device)
        scores = (qc @ kc.mT) * reference.decay_mask(log_decay, i[:, None] - i, qc.dtype)
        since = reference.decay_mask(log_decay, i + 1, qc.dtype)[:, :, None]
        until = reference.decay_mask(log_decay, len(i) - 1 - i, qc.dtype)[:, :, None]
        outputs.append(rounded(scores) @ vc + since * (qc @ rounded(state)))
        decay = torch.exp(log_decay * len(i))[:, None, None]
        state = decay * state + rounded(kc * until).mT @ vc
    return torch.cat(outputs, 2), state


def softmax_oracle(inputs: Inputs, **flags: Any) -> Results:
    """Output, logsumexp and gradients of the definition in float64."""
    return run_softmax(inputs.to(torch.float64), **flags)


def run_softmax(
    inputs: Inputs,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    with_lse: bool = False,
    backend: str = "reference",
) -> Results:
    """Forward and backward of one backend through the public op; a logsumexp also has a gradient."""
    from attnlab import functional

    q, k, v = (x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    flags: dict[str, Any] = {
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": True,
        "backend": backend,
    }
    if with_lse:
        output, lse = functional.softmax_attention_with_lse(q, k, v, **flags)
        # Its gradient is that of a sum over the rows that see a key.
        seen = torch.isfinite(lse)
        loss = (output * _present(inputs.grad_output)).sum() + lse.masked_fill(~seen, 0.0).sum()
        results = {"output": output.detach(), "lse": lse.detach()}
    else:
        output = functional.softmax_attention(q, k, v, **flags)
        loss = (output * _present(inputs.grad_output)).sum()
        results = {"output": output.detach()}
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    return results | {"grad_query": dq, "grad_key": dk, "grad_value": dv}


def softmax_baseline(
    inputs: Inputs,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    with_lse: bool = False,
) -> Results:
    """Materialised attention with float32 accumulation and operands rounded to the inputs' dtype."""
    dtype = inputs.query.dtype

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    groups = inputs.query.shape[1] // inputs.key.shape[1]
    q, do = inputs.query.float(), _present(inputs.grad_output)
    k, v = (x.float().repeat_interleave(groups, 1) for x in (inputs.key, inputs.value))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    scores = _scores(q, k, factor, attn_mask, is_causal)
    highest = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = torch.exp(scores - highest)
    # Normalised by the sum of the weights that the product uses, so that they add up to 1.
    total = rounded(weights).sum(-1, keepdim=True)
    seen = total > 0
    lse = torch.where(seen, highest + torch.log(total), -torch.inf).squeeze(-1)
    total = total.masked_fill(~seen, 1.0)
    output = (rounded(weights) @ v / total).to(dtype)
    weights = weights / total
    # rowsum(dP P) = rowsum(dO O), as in a flash backward.
    delta = (do.float() * output.float()).sum(-1, keepdim=True)
    if with_lse:
        delta = delta - 1.0
    grad_scores = rounded(weights * (do.float() @ v.mT - delta))
    grads = factor * grad_scores @ k, factor * grad_scores.mT @ q, rounded(weights).mT @ do.float()
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2).to(dtype) for x in grads[1:])
    results = {"output": output, "lse": lse} if with_lse else {"output": output}
    return results | {"grad_query": grads[0].to(dtype), "grad_key": dk, "grad_value": dv}


def _scores(
    q: Tensor, k: Tensor, scale: float, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    scores = scale * (q @ k.mT)
    if attn_mask is not None:
        added = attn_mask.dtype != torch.bool
        scores = scores + attn_mask if added else scores.masked_fill(~attn_mask, -torch.inf)
    if is_causal:
        seen = reference.causal_mask(q.shape[2], k.shape[2], q.device)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores
