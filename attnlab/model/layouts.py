"""Names and shapes of the model's tensors in checkpoint files, and which file holds which.

Legend: E experts, F expert width, D hidden size.

The model holds the weights of a mixture of experts in two parameters, `mlp.experts.gate_up_proj`
`[E, 2F, D]` and `mlp.experts.down_proj` `[E, D, F]`. In a file, by layout:

- "released", as MiniMaxAI publishes MiniMax-Text-01: `block_sparse_moe.experts.{e}.w1.weight` and
  `.w3.weight` `[F, D]`, the halves of gate_up_proj in this order, and `.w2.weight` `[D, F]`; the
  numbers of the shards start at 0.
- "transformers", the parameters of its MiniMax class: the two as they are; shards from 1.

All other names and shapes are the same in both.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

LAYOUTS = ("released", "transformers")
WHOLE = "model.safetensors"
# The released shards hold about as much; a tensor that is larger has a shard of its own.
MAX_SHARD_BYTES = 2**31


class Piece(NamedTuple):
    """A tensor of a file: what `part` indexes of a parameter, all of it where that is empty."""

    name: str
    parameter: str
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]
    num_bytes: int


def pieces(model: nn.Module, layout: str = "released") -> Iterator[Piece]:
    """The tensors of a checkpoint of the model, in order; the model may be on the meta device."""
    if layout not in LAYOUTS:
        raise ValueError(f"expected a layout among {', '.join(LAYOUTS)}, got {layout!r}")
    for parameter, values in model.named_parameters():
        parts = _released(parameter, values) if layout == "released" else [(parameter, ())]
        for name, part in parts:
            piece = values.detach()[part]
            num_bytes = piece.numel() * piece.element_size()
            yield Piece(name, parameter, part, tuple(piece.shape), num_bytes)


def released_names(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor in the released layout: 8,243 for MiniMax-Text-01."""
    return ((piece.name, piece.shape) for piece in pieces(model))


def plan_shards(
    model: nn.Module, *, layout: str = "released", max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[Piece]]:
    """What `save` writes into which file; the model may be on the meta device."""
    shards: list[list[Piece]] = [[]]
    room = max_shard_bytes
    for piece in pieces(model, layout):
        if shards[-1] and piece.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(piece)
        room -= piece.num_bytes
    if len(shards) == 1:
        return {WHOLE: shards[0]}
    first, count = LAYOUTS.index(layout), len(shards)
    return {
        f"model-{first + i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards)
    }


def _released(parameter: str, values: Tensor) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
    """Released names of a parameter's parts, and where in the parameter they lie."""
    stem, dot, leaf = parameter.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
    if leaf == "gate_up_proj":
        half = values.shape[1] // 2
        for e in range(values.shape[0]):
            yield f"{stem}.{e}.w1.weight", (e, slice(0, half))
            yield f"{stem}.{e}.w3.weight", (e, slice(half, None))
    elif leaf == "down_proj":
        for e in range(values.shape[0]):
            yield f"{stem}.{e}.w2.weight", (e,)
    else:
        yield stem + dot + leaf, ()
