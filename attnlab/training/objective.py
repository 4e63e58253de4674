"""What training minimises, and how it is measured: token losses, by position too.

Legend: T tokens of a pack.

The loss of an optimiser step is the sum of its token losses divided by the number of its targets,
over all packs (and all ranks, if there are several): a pack with few targets weighs little, and how
the tokens were split changes nothing.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.model.hybrid import HybridLM
from attnlab.training.packing import IGNORED, Pack


def backward(model: HybridLM, pack: Pack, *, num_targets: int) -> Tensor:
    """Add a pack's part of the gradients of the step's loss; returns its sum of token losses.

    `num_targets` counts the targets of the whole step. The router's load-balancing loss of each
    pack weighs as its share of them. The sum is a float32 scalar without a graph.
    """
    output = model(pack.input_ids, cu_seqlens=pack.cu_seqlens)
    total = token_losses(output.logits, pack.targets).sum()
    loss = total / num_targets
    if output.aux_loss is not None:
        share = pack.num_targets / num_targets
        loss = loss + model.config.router_aux_loss_coef * share * output.aux_loss
    loss.backward()
    return total.detach()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, `[T]` float32, 0 where a target is ignored."""
    return F.cross_entropy(
        logits[0].float(), targets, ignore_index=IGNORED, reduction="none"
    )  # [T]


class Octave(NamedTuple):
    """Mean loss of the targets at positions `start` <= p < `stop` of a piece."""

    start: int
    stop: int
    targets: int
    nats: float
    bits_per_byte: float


class Validation(NamedTuple):
    """Mean loss in nats a target, in bits a byte of text, and by octaves of the position."""

    nats: float
    bits_per_byte: float
    by_position: list[Octave]

    @classmethod
    def of(cls, sums: Tensor, *, bits_per_byte_of_a_nat: float) -> "Validation":
        """The means, from `octave_sums` of all packs."""
        nats, counts = sums.tolist()
        octaves = [
            Octave(
                start=2 ** (i - 1) if i else 0,
                stop=2**i,
                targets=int(count),
                nats=total / count,
                bits_per_byte=total / count * bits_per_byte_of_a_nat,
            )
            for i, (total, count) in enumerate(zip(nats, counts, strict=True))
            if count
        ]
        mean = math.fsum(nats) / math.fsum(counts)
        return cls(mean, mean * bits_per_byte_of_a_nat, octaves)

    def record(self) -> dict[str, Any]:
        """The fields of a log line."""
        octaves = [octave._asdict() for octave in self.by_position]
        return {"loss": self.nats, "bits_per_byte": self.bits_per_byte, "by_position": octaves}


@torch.no_grad()
def sum_losses(model: HybridLM, packs: Iterable[Pack]) -> Tensor:
    """`octave_sums` of the packs, of the model in evaluation mode; it is left in training mode."""
    model.eval()
    device = next(model.parameters()).device
    sums = empty_sums(device)
    for pack in packs:
        pack, positions = pack.to(device), pack.positions()
        losses = token_losses(
            model(pack.input_ids, cu_seqlens=pack.cu_seqlens).logits, pack.targets
        )
        sums += octave_sums(losses, pack.targets, positions)
    model.train()
    return sums


def octave_sums(losses: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    """Sums of losses and numbers of targets by octave of their position, `[2, 64]` float64.

    All arguments are `[T]`; octave 0 is position 0, octave i from 2^(i-1) to 2^i.
    """
    octave = positions.double().add(0.5).log2().floor().long().add(1).to(losses.device)  # [T]
    counted = targets != IGNORED
    both = torch.stack([losses.double(), counted.double()])
    return empty_sums(losses.device).index_add_(1, octave, both)


def empty_sums(device: torch.device) -> Tensor:
    """`octave_sums` of no tokens."""
    return torch.zeros(2, 64, dtype=torch.float64, device=device)
