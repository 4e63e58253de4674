"""Multi-query associative recall in the form of zoology's generator, for comparison with its figures.

Legend: B rows, T tokens, n pairs.

Zoology (arXiv 2312.04927, `multiquery_ar.py`): the first 2n tokens are n pairs of distinct keys and
distinct values; every key comes once more in the rest, at an even place g = 0, 1, ... of it with a
chance that falls as (g+1)^(a-1), a = 0.01; its target is its value. What is left is filled with any
token of the vocabulary, keys included, so that it makes sense for T below the vocabulary alone.
"""

import torch

from attnlab.checks import expect
from attnlab.retrieval.batch import Batch
from attnlab.retrieval.symbols import Draw

VOCAB_SIZE = 8192
POWER = 0.01
SETTINGS = ((64, 4), (128, 8), (256, 16), (512, 64))  # T, n of zoology's figure 2


def mqar(
    *,
    rows: int,
    length: int,
    num_pairs: int,
    seed: int,
    vocab_size: int = VOCAB_SIZE,
    device: torch.device | str = "cpu",
) -> Batch:
    """`rows` sequences of `length` tokens with `num_pairs` keys, each asked for once.

    Raises:
        ValueError: for an odd length, one below 4 n, or a vocabulary that isn't larger than it.
    """
    expect(length % 2 == 0 and length >= 4 * num_pairs, f"even and >= {4 * num_pairs}", length)
    expect(vocab_size > length, f"a vocabulary of more than {length} tokens", vocab_size)
    draw, half = Draw(rows, seed, device), vocab_size // 2
    expect(half - 1 >= num_pairs, f"a vocabulary of {2 * num_pairs + 2} tokens", vocab_size)
    keys = draw.distinct(half - 1, num_pairs) + 1  # [B, n], 0 is none
    values = draw.distinct(vocab_size - half, num_pairs) + half
    places = (length - 2 * num_pairs) // 2
    log_chance = (POWER - 1) * torch.arange(1, places + 1, device=draw.device).double().log()
    gumbel = -(-draw.uniform(places).clamp(min=1e-300).log()).log()
    place = (log_chance + gumbel).topk(num_pairs, 1).indices  # drawn without replacement
    asked = 2 * num_pairs + 2 * place  # [B, n]
    ids = draw.integers(vocab_size, length)
    ids[:, : 2 * num_pairs] = torch.stack([keys, values], 2).flatten(1)
    ids.scatter_(1, asked, keys)
    told = 2 * torch.arange(num_pairs, device=draw.device) + 1
    return Batch(
        input_ids=ids,
        asked=asked,
        answers=values[..., None],
        depth=(told / length).float().expand(rows, -1)[..., None],
        distance=(asked - told)[..., None],
        tail_len=length,
    )
