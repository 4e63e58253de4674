"""Decoding steps replayed from a CUDA graph: one launch a token in place of some hundred.

Legend: B rows, V vocabulary.

One graph serves a cache until it is full, for contexts are as long as the device says. Where softmax
layers run on the backend "triton", a replay reads the slots in use; other backends read all of them.
"""

import torch
from torch import Tensor

from attnlab.cache import ModelCache
from attnlab.checks import expect
from attnlab.model.grouped import waits_for_device
from attnlab.model.hybrid import HybridLM
from attnlab.model.moe import Experts


class GraphedStep:
    """Logits `[B, V]` of one more token for every row of a cache; called like `decode_step`.

    The first step runs uncaptured, which also prepares all that must not happen in a capture (kernels
    compiled, decays read); the second is captured, and from there on replayed. The logits of a call
    stay valid until the next one.
    """

    def __init__(self, model: HybridLM, cache: ModelCache) -> None:
        """Prepare for steps of `model` with `cache`; nothing is captured yet.

        Raises:
            ValueError: if the step of such a model can't be captured.
        """
        can = can_capture(model, cache.batch)
        expect(can, "a model on a GPU whose steps never wait for it", model.lm_head.weight.device)
        self.model, self.cache = model, cache
        self._token = torch.zeros_like(cache.lengths)[:, None]  # [B, 1]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_prepared = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Store `tokens` `[B]` behind each row; logits `[B, V]` of their successors.

        Raises:
            ValueError: for another shape, or a cache without room; nothing has been written then.
        """
        shape = [self.cache.batch]
        expect(list(tokens.shape) == shape, f"tokens of shape {shape}", list(tokens.shape))
        self.cache.check_room([1] * self.cache.batch)
        self._token.copy_(tokens[:, None])
        if not self._is_prepared:
            self._is_prepared = True
            return self._step()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device_of(self._token), torch.cuda.graph(graph):
                self._logits = self._step()
            self._graph = graph
        self.cache.count_replay()
        self._graph.replay()
        return self._logits

    def _step(self) -> Tensor:
        return self.model(self._token, cache=self.cache).logits[:, -1]


def can_capture(model: HybridLM, batch: int) -> bool:
    """Whether a step of `batch` rows runs on a GPU without waiting for it."""
    if not model.lm_head.weight.is_cuda:
        return False
    slots = batch * model.config.num_experts_per_tok
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    return not any(waits_for_device(slots, x) for module in experts for x in module.parameters())
