"""Launches of kernels that were compiled before, without asking Triton again which of them it is.

Triton looks at every argument of every launch for what its code depends on: types, alignments,
constants. That takes longer than a short kernel runs. Here the caller names what can differ.
"""

from typing import Any

import torch
from torch import Tensor

MAX_REMEMBERED = 1024

Kind = tuple[Any, ...]


def kind_of(device: torch.device, *pointers: Tensor | None) -> Kind:
    """What compiled code depends on in its pointers: which there are, their dtypes and alignments."""
    kinds = [None if x is None else (x.dtype, x.data_ptr() % 16) for x in pointers]
    return device, *kinds


class Launcher:
    """Starts a kernel whose constants are its last parameters."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Kind, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple,
        constants: dict[str, Any],
        kind: Kind | None,
        *,
        num_warps: int = 4,
    ) -> None:
        """Launch on torch's current stream.

        `kind` tells apart all that the compiled code depends on besides the constants; with None
        Triton finds out.
        """
        if kind is None:
            self._kernel[grid](*arguments, **constants, num_warps=num_warps)
            return
        key = (num_warps, *kind, *constants.values())
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *constants.values())
            return
        compiled = self._kernel[grid](*arguments, **constants, num_warps=num_warps)
        if len(self._compiled) == MAX_REMEMBERED:
            self._compiled.clear()
        if compiled is not None:  # as it is under the interpreter
            self._compiled[key] = compiled
