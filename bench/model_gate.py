"""The accuracy gate of a model's points: is what is timed the model that it says?

Our logits are computed a second time, with other backends and in other pieces (of a prompt), or all
in one pass (of decoding steps); gradients with the ops' definitions, in float32 too where the model
is of 16 bits; transformers' logits are compared with ours. Two computations in one dtype differ
by its rounding, and where two experts are almost equally good a rounding may choose the other one,
which shows in a single token: so the median over tokens (for gradients, over parameters) is judged.

Legend: B rows, T tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from attnlab.model import HybridLM
from attnlab.testing import Accuracy
from bench.gate import Verdict

KEPT = 8  # last tokens whose logits are compared
PIECE = 1000  # tokens of a piece in the second computation: no multiple of any tile
# Median relative rms difference. Some hundred roundings add up on the way through eight layers:
# 2^-24 each in float32 (measured: 1e-6), 2^-9 in bfloat16 (measured: 1e-2), 2^-12 in float16. A state or a position
# that is off by one token changes logits by a third and more.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def verdict_of(name: str, actual: list[Tensor], expected: list[Tensor], dtype: str) -> Verdict:
    """Judge pairs of vectors by the median of their relative rms differences."""
    pairs = zip(actual, expected, strict=True)
    found = torch.stack([_difference(a.double(), b.double()) for a, b in pairs])
    middle, largest = found.median().item(), found.max().item()
    ratio = middle / TOLERANCES[getattr(torch, dtype)]
    return Verdict(Accuracy(ratio, middle, largest), name)


def verdict_beside(
    name: str, actual: list[Tensor], plain: list[Tensor], exact: list[Tensor]
) -> Verdict:
    """Judge vectors by their differences from exact ones: twice those of plain ones are allowed.

    For gradients in 16 bits, where how far roundings carry depends on the model.
    """
    found, allowed = (
        torch.stack([_difference(a.double(), b.double()) for a, b in zip(x, exact, strict=True)])
        for x in (actual, plain)
    )
    middle = found.median().item()
    return Verdict(
        Accuracy(middle / (2 * allowed.median().item()), middle, found.max().item()), name
    )


def judge_logits(actual: Tensor, expected: Tensor, dtype: str) -> Verdict:
    """Judge logits `[B, T, V]`, token by token."""
    return verdict_of("logits", [*actual.flatten(0, 1)], [*expected.flatten(0, 1)], dtype)


@contextmanager
def other_backends(model: HybridLM, lightning: str, softmax: str) -> Iterator[None]:
    """The model with backends by name, and with the ops' own choice again afterwards."""
    model.use_backend(lightning, softmax)
    try:
        yield
    finally:
        model.use_backend()


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean().sqrt() / b.square().mean().sqrt()
