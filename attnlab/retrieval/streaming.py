"""Long prompts through a model, chunk by chunk, with logits of the last tokens alone.

Legend: B rows, T tokens, N last tokens, V vocabulary, D hidden size.

What a chunk leaves behind is in the caches. Of a chunk whose logits nobody wants, a softmax layer that
is the last of the stack needs the keys and values only: a hybrid whose only softmax layer is the last
one reads a prompt in linear time.
"""

from typing import cast

import torch
from torch import Tensor

from attnlab.cache import KVCache, ModelCache
from attnlab.model import placement
from attnlab.model.attention import SoftmaxMixer
from attnlab.model.decoder import DecoderLayer
from attnlab.model.hybrid import HybridLM

CHUNK = 1 << 16  # tokens of all rows in one pass


def tail_logits(model: HybridLM, input_ids: Tensor, tail_len: int) -> Tensor:
    """Logits `[B, N, V]` of the last tokens of `[B, T]` ids, with gradients.

    As `model(input_ids, logits_to_keep=N)`, but ids are taken on trust: nothing waits for the device.
    """
    x, _ = model.model(input_ids, placement.dense(input_ids, None), None)  # [B, T, D]
    return model.lm_head(model.model.norm(x[:, -tail_len:]))


@torch.no_grad()
def streamed_logits(
    model: HybridLM, input_ids: Tensor, tail_len: int, *, chunk: int = CHUNK
) -> Tensor:
    """Logits `[B, N, V]` of the last tokens of `[B, T]` ids, read in chunks of `chunk` tokens in all.

    The model is in eval mode. The memory beside the caches is that of one chunk.

    Raises:
        ValueError: for ids outside the vocabulary.
    """
    placement.check_ids(input_ids, model.config.vocab_size)
    rows, length = input_ids.shape
    cache = model.new_cache(rows, length)
    body, step = length - tail_len, max(chunk // rows, 1)
    for start in range(0, body, step):
        absorb(model, cache, input_ids[:, start : min(start + step, body)])
    return model(input_ids[:, body:], cache=cache).logits


@torch.no_grad()
def absorb(model: HybridLM, cache: ModelCache, input_ids: Tensor) -> None:
    """Let the cache see `[B, T]` more ids, of which no logits are wanted.

    Raises:
        ValueError: if they don't fit; nothing has been written then.
    """
    decoder = model.model
    last = cast(DecoderLayer, decoder.layers[-1])
    place = placement.dense(input_ids, cache)
    angles = decoder._angles(place.positions)
    x = decoder.embed_tokens(input_ids)
    layers = zip(list(decoder.layers)[:-1], cache.layers, strict=False)
    for layer, layer_cache in layers:
        x, _ = layer(x, place, angles, layer_cache, 1.0)
    mixer, last_cache = last.self_attn, cache.layers[-1]
    start = place.start
    if isinstance(mixer, SoftmaxMixer) and isinstance(last_cache, KVCache) and start is not None:
        hidden = last.input_layernorm(x)
        if mixer.conv is not None:
            hidden = mixer.conv(hidden, place, last_cache)
        key = mixer._heads(mixer.k_proj(hidden), mixer.k_norm, angles)  # [B, G, T, K]
        value = mixer._heads(mixer.v_proj(hidden), None, None)
        last_cache.store(key, value, start)
    else:
        last(x, place, angles, last_cache, 1.0)
    assert place.counts is not None
    cache.advance(place.counts, input_ids.shape[1])
