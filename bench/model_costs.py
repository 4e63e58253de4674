"""What a point of suite "model" must compute and move, and the memory that it takes."""

from dataclasses import dataclass

import torch

from attnlab.model import costs
from attnlab.model.config import HybridConfig
from bench import models
from bench.model_engines import CHUNK, FILL
from bench.rows import Point

OPTIMIZER_BYTES = 16  # a parameter: float32 master, gradient and two moments


@dataclass(frozen=True)
class Work:
    """Counted work of a point."""

    point: Point

    def flops(self, pass_: str) -> int:
        """Operations of the point's products; a training step counts three forward passes."""
        point, config = self.point, models.config_of(str(self.point.model))
        if point.pass_ == "decode":
            return point.batch * costs.decode_flops(config, point.q_len)
        forward = costs.prefill_flops(config, point.q_len)
        if point.pass_ == "train":
            other_logits = (point.q_len - 1) * config.vocab_size * config.hidden_size
            forward = 3 * (forward + 2 * other_logits)
        return point.batch * forward

    def min_bytes(self, pass_: str) -> int:
        """Least traffic: weights that are met once, the cache once (states in and out)."""
        point, config = self.point, models.config_of(str(self.point.model))
        dtype = getattr(torch, point.dtype)
        if point.pass_ == "train":
            return costs.num_parameters(config) * (2 * dtype.itemsize + 2 * OPTIMIZER_BYTES)
        tokens = point.batch * (1 if point.pass_ == "decode" else point.q_len)
        weights = _weights_met(config, tokens) * dtype.itemsize
        again = costs.cache_bytes(config, 0, point.batch, dtype) * (point.pass_ == "decode")
        return weights + costs.cache_bytes(config, point.q_len, point.batch, dtype) + again


def needed_bytes(point: Point) -> int:
    """Rough peak memory: weights, cache, and what one layer (in training: all) holds of a pass."""
    config, dtype = models.config_of(str(point.model)), getattr(torch, point.dtype)
    weights = costs.num_parameters(config) * dtype.itemsize
    width = 6 * config.inner_size + 6 * config.hidden_size
    width += config.num_experts_per_tok * (3 * config.intermediate_size + 2 * config.hidden_size)
    if point.pass_ == "train":
        weights += costs.num_parameters(config) * OPTIMIZER_BYTES
        token = config.num_hidden_layers * width * dtype.itemsize + 10 * config.vocab_size
        return weights + point.batch * point.q_len * token
    cache = costs.cache_bytes(config, point.q_len, point.batch, dtype)
    at_once = FILL if point.pass_ == "decode" else CHUNK
    held = point.batch * min(point.q_len, at_once) * width * dtype.itemsize
    return weights * (2 if point.backend == models.PEER else 1) + 2 * cache + held


def _weights_met(config: HybridConfig, num_tokens: int) -> int:
    """Weights that so many tokens meet at least: an embedding each, the experts that they can use."""
    used = min(config.num_local_experts, num_tokens * config.num_experts_per_tok)
    idle = (config.num_local_experts - used) * 3 * config.hidden_size * config.intermediate_size
    embeddings = max(0, config.vocab_size - num_tokens) * config.hidden_size
    return costs.num_parameters(config) - config.num_hidden_layers * idle - embeddings
