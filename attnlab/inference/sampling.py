"""One token id from the logits of each row.

Legend: B rows, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.checks import expect

_GREEDY_BELOW = torch.finfo(torch.float32).tiny


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ids `[B]` int64 drawn from softmax(logits / temperature), cut by top_k, then by top_p.

    Nothing here waits for a GPU: id i wins a race in which it arrives after E_i / p_i, with E_i
    exponentially distributed, and so is first with probability p_i, whatever the sum of p.

    Args:
        logits: `[B, V]`, any floating dtype; the sums run in float32 at least.
        temperature: 0 takes the largest logit.
        top_k: how many ids stay, at least 1; of equal logits the lower ids stay.
        top_p: in (0, 1]; the fewest ids stay, likeliest first, whose probability reaches it
            (arXiv 1904.09751).
        generator: of logits' device; None is torch's own.

    Raises:
        ValueError: for arguments out of range.
    """
    check_sampling(temperature, top_k, top_p)
    expect(logits.ndim == 2 and logits.shape[1] > 0, "logits [B, V]", list(logits.shape))
    if temperature < _GREEDY_BELOW:
        return logits.argmax(-1)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p is None:
        return _first(scores.softmax(-1), generator)[:, 0]
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        scores[:, top_k:] = -math.inf
    probability = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        before = F.pad(probability.cumsum(-1)[:, :-1], (1, 0))  # [B, V]
        probability = probability.masked_fill(before >= top_p, 0.0)
    return order.gather(-1, _first(probability, generator))[:, 0]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise `ValueError` unless `sample` can work with these."""
    ok = math.isfinite(temperature) and temperature >= 0
    expect(ok, "a temperature of at least 0", temperature)
    expect(top_k is None or top_k >= 1, "top_k of at least 1", top_k)
    expect(top_p is None or 0 < top_p <= 1, "top_p above 0 and at most 1", top_p)


def _first(probability: Tensor, generator: torch.Generator | None) -> Tensor:
    """Winners `[B, 1]` of the race; an id of probability 0 never arrives."""
    wait = torch.empty_like(probability).exponential_(generator=generator)  # never 0
    return (probability / wait).argmax(-1, keepdim=True)
