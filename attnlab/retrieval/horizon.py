"""What a trained lightning model should recall at any length, from how it reads short contexts.

Legend: B rows, T tokens, Q questions, H heads, K key dim, V value dim.

The closed form of `attnlab.retrieval.theory` is for random keys of K channels, of which another one
disturbs by 1/K of the squared signal. A trained head has keys of its own: it writes noise weakly and
tells keys apart as well as it has learned. Both are in one number that a short context shows, the
squared product of the question's query with its key over the mean squared product with all other
tokens' keys, each times the size of its value. It takes the place of K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.model.attention import LightningMixer
from attnlab.model.hybrid import HybridLM
from attnlab.retrieval import theory
from attnlab.retrieval.batch import Batch


@dataclass(frozen=True, kw_only=True)
class TrainedHead:
    """A lightning head of a trained model: where it is, its slope, and its `key_dim` as above."""

    layer: int
    head: int
    slope: float
    key_dim: float
    value_dim: int


@torch.no_grad()
def trained_heads(model: HybridLM, batch: Batch) -> list[TrainedHead]:
    """All lightning heads, as they read the questions of a batch with one answer a question."""
    mixers = [m for m in model.modules() if isinstance(m, LightningMixer)]
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(mixer: LightningMixer) -> None:
        original = mixer._attend

        def attend(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
            seen[mixer.layer] = query.float(), key.float(), value.float()
            return original(query, key, value, *rest)  # type: ignore[arg-type]

        mixer._attend = attend  # type: ignore[method-assign, assignment]

    for mixer in mixers:
        watch(mixer)
    try:
        model(batch.input_ids, logits_to_keep=1)
    finally:
        for mixer in mixers:
            del mixer._attend
    return [
        TrainedHead(
            layer=mixer.layer,
            head=head,
            slope=max(-float(g), 0.0),
            key_dim=key_dim,
            value_dim=mixer.head_dim,
        )
        for mixer in mixers
        for head, (g, key_dim) in enumerate(
            zip(mixer.log_decay, _key_dims(*seen[mixer.layer], batch), strict=True)
        )
    ]


def _key_dims(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> list[float]:
    """Squared products with the asked key over the mean of those with the body's others, a head."""
    rows = torch.arange(query.shape[0], device=query.device)[:, None]
    asking = query.transpose(1, 2)[rows, batch.asked].transpose(1, 2)  # [B, H, Q, K]
    told = batch.asked - batch.distance[:, :, 0]  # [B, Q]
    size = value.norm(dim=-1)[:, :, None]  # [B, H, 1, T]
    products = (asking @ key.mT * size).square()  # [B, H, Q, T]
    index = told[:, None, :, None].expand(*products.shape[:3], 1)
    own = products.gather(3, index)[..., 0]  # [B, H, Q]
    body = products[..., : batch.input_ids.shape[1] - batch.tail_len]
    others = (body.sum(3) - own) / (body.shape[3] - 1)
    return (own.mean((0, 2)) / others.mean((0, 2))).tolist()


def predicted_recall(
    heads: list[TrainedHead], *, num_tokens: int, distance: int, codebook: int
) -> float:
    """Chance that the best of the heads recalls a needle, one among `codebook` values."""
    return max(
        theory.lightning_recall(
            slope=head.slope,
            num_tokens=num_tokens,
            distance=distance,
            key_dim=head.key_dim,
            value_dim=head.value_dim,
            codebook=codebook,
        )
        for head in heads
    )
