"""One way to call our model and transformers': prefill a prompt, step on from a context.

Legend: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnlab.cache import KVCache, ModelCache, StateCache
from attnlab.inference.generate import decode_step
from attnlab.inference.graph import GraphedStep, can_capture
from attnlab.model import HybridLM

CHUNK = 1 << 17  # tokens of a prompt in one pass: bounds what is held beside the cache
FILL = 4096  # tokens that a context is made from; longer ones repeat their keys and values


class Context(Protocol):
    """A context of some tokens, from which one can step on, again and again."""

    def rewind(self) -> None:
        """Go back to the length of the context; states stay where the steps have brought them."""

    def restore(self) -> None:
        """Go back to the context as it was made, states included."""

    def step(self, tokens: Tensor) -> Tensor:
        """Logits `[B, V]` behind one more token a row, `tokens` `[B]`."""


class Engine(Protocol):
    """A model to measure."""

    def prefill(self, ids: Tensor, keep: int) -> Tensor:
        """Logits `[B, keep, V]` of the last tokens of `ids` `[B, T]`, through a new cache."""

    def context(self, ids: Tensor, length: int, room: int) -> Context:
        """A context of `length` tokens, made from `ids`, with room for `room` more."""


def chunks(stop: int, size: int, start: int = 0) -> list[slice]:
    """Slices of `size` tokens (the last one may be shorter) from `start` to `stop`."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


class Ours:
    """attnlab's model."""

    def __init__(self, model: HybridLM) -> None:
        self.model = model

    def prefill(self, ids: Tensor, keep: int) -> Tensor:
        """As described at `Engine`, in chunks."""
        cache = self.model.new_cache(*ids.shape)
        return extend(self.model, cache, ids, chunks(ids.shape[1], CHUNK), keep)

    def context(self, ids: Tensor, length: int, room: int) -> "OurContext":
        """As described at `Engine`."""
        return OurContext(self.model, ids, length, room)


def extend(
    model: HybridLM, cache: ModelCache, ids: Tensor, parts: list[slice], keep: int
) -> Tensor:
    """Logits `[B, keep, V]` behind the given parts of `ids`, which the cache has stored then."""
    logits = [model(ids[:, part], cache=cache, logits_to_keep=keep).logits for part in parts]
    return torch.cat(logits, 1)[:, -keep:]


def stepper(model: HybridLM, cache: ModelCache) -> Callable[[Tensor], Tensor]:
    """Decoding steps `[B]` to `[B, V]`, replayed from a CUDA graph where that can be."""
    graphed = can_capture(model, cache.batch)
    return GraphedStep(model, cache) if graphed else partial(decode_step, model, cache)


class OurContext:
    """A cache of ours, and steps from it."""

    def __init__(self, model: HybridLM, ids: Tensor, length: int, room: int) -> None:
        self.length = length
        self.cache = model.new_cache(ids.shape[0], length + room)
        extend(model, self.cache, ids, chunks(ids.shape[1], CHUNK), 1)
        for layer in self.cache.layers:
            if isinstance(layer, KVCache):
                for x in (layer.keys, layer.values):
                    x[:, :, :length] = repeated(x[:, :, : ids.shape[1]], length)
        self.saved = states(self.cache)
        self.rewind()
        self.step = stepper(model, self.cache)

    def rewind(self) -> None:
        """As described at `Context`."""
        set_length(self.cache, self.length)

    def restore(self) -> None:
        """As described at `Context`."""
        restore_states(self.cache, self.saved)
        self.rewind()


class Theirs:
    """transformers' model, called as its `generate` calls it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def prefill(self, ids: Tensor, keep: int) -> Tensor:
        """As described at `Engine`; in one pass, for it continues a cache token by token."""
        return self.model(ids, use_cache=True, logits_to_keep=keep).logits

    def context(self, ids: Tensor, length: int, room: int) -> "TheirContext":
        """As described at `Engine`; their cache grows by itself."""
        return TheirContext(self.model, ids, length)


class TheirContext:
    """A cache of theirs, and steps from it."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, ids: Tensor, length: int) -> None:
        self.model, self.length = model, length
        self.cache: Any = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        self.full = [x for x in self.cache.layers if getattr(x, "keys", None) is not None]
        self.full = [x for x in self.full if x.keys.numel()]
        self.saved_kv = [(repeated(x.keys, length), repeated(x.values, length)) for x in self.full]
        self.saved_states = list(self.cache.linear_cache)
        self.rewind()

    def rewind(self) -> None:
        """As described at `Context`."""
        self.position = self.length
        for layer, (keys, values) in zip(self.full, self.saved_kv, strict=True):
            layer.keys, layer.values = keys, values

    def restore(self) -> None:
        """As described at `Context`; a step replaces their states and writes into none."""
        self.cache.linear_cache[:] = self.saved_states
        self.rewind()

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """As described at `Context`; positions are given, as they can't tell them from the cache."""
        positions = torch.full_like(tokens[:, None], self.position)
        self.position += 1
        flags = {"past_key_values": self.cache, "use_cache": True, "position_ids": positions}
        return self.model(tokens[:, None], **flags).logits[:, -1]


def repeated(x: Tensor, length: int) -> Tensor:
    """`[B, H, length, D]`: the tokens of `[B, H, T, D]` over and over."""
    return x[:, :, torch.arange(length, device=x.device) % x.shape[2]]


def set_length(cache: ModelCache, length: int) -> None:
    """Let every row hold its first `length` tokens."""
    cache.lengths.fill_(length)
    cache.host_lengths = [length] * cache.batch


def states(cache: ModelCache) -> list[Tensor]:
    """Copies of the lightning layers' states."""
    return [layer.state.clone() for layer in cache.layers if isinstance(layer, StateCache)]


def restore_states(cache: ModelCache, saved: list[Tensor]) -> None:
    """Put copies back that `states` made."""
    layers = [layer for layer in cache.layers if isinstance(layer, StateCache)]
    for layer, state in zip(layers, saved, strict=True):
        layer.state.copy_(state)
