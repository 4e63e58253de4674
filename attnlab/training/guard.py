"""What ends a run early: numbers that are not finite, and a user's or a scheduler's signal."""

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NonFiniteError(FloatingPointError):
    """Training met a NaN or an infinity; the message says at which step and in which layer."""


class NonFinite(NamedTuple):
    """Something that is not finite: after how many modules' outputs it came, and what it is."""

    place: int
    what: str


def first_non_finite(model: nn.Module, run: Callable[[], Any]) -> NonFinite | None:
    """What in the model is the first not to be finite while `run` trains it: forward, then backward.

    `run` computes gradients of `model`. The name is that of the innermost module whose output is not
    finite; if all outputs are, that of the last parameter in the model with such a gradient, since
    the backward pass comes there first. None if all is finite.
    """
    found: list[NonFinite] = []
    count = 0

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal count
            count += 1
            if not found and not all(bool(x.isfinite().all()) for x in _floats(output)):
                found.append(NonFinite(count, f"the output of {name}"))

        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        # Compiled layers run no hooks of the modules inside them.
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not bool(_own_part(p.grad).isfinite().all()):
            count += 1
            found.append(NonFinite(count, f"the gradient of {name}"))
        p.grad = None
    return found[0] if found else None


def _own_part(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _floats(part)


class StopSignal:
    """Context in which the first SIGINT or SIGTERM only sets `caught`, so that a step can end.

    A second one does what it always does. Outside the main thread, where Python lets nobody handle
    signals, the context does nothing.
    """

    caught = False

    def __enter__(self) -> "StopSignal":
        """Install the handlers."""
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Put the former handlers back."""
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.caught = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
