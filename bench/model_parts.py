"""Where a model's time goes: softmax mixers, lightning mixers, experts, and the rest.

A mixer counts with its projections. On a GPU the modules are timed with events, which don't hold up
the pass; on a CPU with the clock.
"""

import time
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from attnlab.model.attention import LightningMixer, SoftmaxMixer
from attnlab.model.moe import MixtureOfExperts

KINDS = {SoftmaxMixer: "softmax", LightningMixer: "lightning", MixtureOfExperts: "experts"}
PARTS = (*KINDS.values(), "rest")


class PartTimer:
    """Times the parts of all passes of a model while it is entered."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self._model, self._device = model, device
        self._spans: list[tuple[str, Any, Any]] = []

    def __enter__(self) -> Self:
        self._hooks = []
        for module in self._model.modules():
            if (kind := KINDS.get(type(module))) is not None:
                self._hooks.append(module.register_forward_pre_hook(self._begin))
                self._hooks.append(module.register_forward_hook(partial(self._end, kind)))
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop = self._now()
        for hook in self._hooks:
            hook.remove()

    def ms(self) -> dict[str, float]:
        """Milliseconds by part; they add up to the time between entering and leaving."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        found = dict.fromkeys(PARTS, 0.0)
        for kind, start, stop in self._spans:
            found[kind] += self._between(start, stop)
        found["rest"] = self._between(self._start, self._stop) - sum(found.values())
        return found

    def _begin(self, module: nn.Module, arguments: tuple) -> None:
        self._begun = self._now()

    def _end(self, kind: str, module: nn.Module, arguments: tuple, output: object) -> None:
        self._spans.append((kind, self._begun, self._now()))

    def _now(self) -> Any:
        if self._device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, stop: Any) -> float:
        return (stop - start) * 1e3 if self._device == "cpu" else start.elapsed_time(stop)
