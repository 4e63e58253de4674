"""Where softmax layers look when a question is asked: the attention weight on what tells the answer.

Legend: B rows, H heads, G key heads, N questions' tokens, Q questions, K head dim, S slots.

A model that misses a needle with weight on it misread it; one without weight on it has lost it among
the other keys, which is how attention fades with length.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnlab.cache import KVCache
from attnlab.model.attention import SoftmaxMixer
from attnlab.model.hybrid import HybridLM
from attnlab.retrieval.batch import ABSENT, Batch


@contextmanager
def watched(model: HybridLM, batch: Batch) -> Iterator[list[Tensor]]:
    """Context that collects `[B, H, Q]` a softmax layer, of the pass over the questions' tokens.

    They are the weights on the position that tells each question's first answer, float32 on the CPU;
    NaN where there is none.
    """
    found: list[Tensor] = []
    mixers = [m for m in model.modules() if isinstance(m, SoftmaxMixer)]
    originals = [mixer._attend for mixer in mixers]

    def watch(original: Any) -> Any:
        def attend(query: Tensor, key: Tensor, value: Tensor, place: Any, cache: Any) -> Tensor:
            output = original(query, key, value, place, cache)
            if isinstance(cache, KVCache) and query.shape[2] == batch.tail_len:
                found.append(_weights(query, cache.keys, batch))
            return output

        return attend

    for mixer, original in zip(mixers, originals, strict=True):
        mixer._attend = watch(original)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        for mixer in mixers:
            del mixer._attend


def _weights(query: Tensor, keys: Tensor, batch: Batch) -> Tensor:
    """Weights `[B, H, Q]` of queries `[B, H, N, K]` at the questions on slots of keys `[B, G, S, K]`."""
    length = batch.input_ids.shape[1]
    place = (batch.asked - (length - batch.tail_len)).clamp(min=0)  # [B, Q]
    absent = batch.distance[:, :, 0] == ABSENT
    told = (batch.asked - batch.distance[:, :, 0]).masked_fill(absent, 0)
    slots = torch.arange(length, device=query.device)
    group = query.shape[1] // keys.shape[1]
    weights = query.new_zeros(*query.shape[:2], place.shape[1], dtype=torch.float32)
    for row in range(query.shape[0]):
        later = slots > batch.asked[row][:, None]  # [Q, S]
        for head in range(query.shape[1]):  # one at a time: S is long
            asking = query[row, head, place[row]].float()  # [Q, K]
            scores = asking @ keys[row, head // group, :length].float().T  # [Q, S]
            scores = (scores * query.shape[3] ** -0.5).masked_fill(later, float("-inf"))
            own = scores.gather(1, told[row][:, None])[:, 0]
            weights[row, head] = (own - scores.logsumexp(1)).exp()
    return weights.masked_fill(absent[:, None], float("nan")).cpu()
