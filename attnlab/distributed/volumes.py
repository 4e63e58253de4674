"""Bytes that a rank receives, and messages that it sends: the formulas that the counts are held to.

What ranks ask each other once a plan, 8 bytes a rank, is left out.

Legend: W ranks, m chunks of a rank, n tokens of a rank, d hidden size, k experts a token.
"""

from collections.abc import Sequence


def state_bytes(heads: int, key_dim: int, value_dim: int, itemsize: int = 4) -> int:
    """A chunk's state, float32 by default."""
    return heads * key_dim * value_dim * itemsize


def key_value_bytes(tokens: int, kv_heads: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """A rank's keys and values."""
    return tokens * kv_heads * (key_dim + value_dim) * itemsize


def gather_bytes(ranks: int, chunks: int, state: int) -> int:
    """LASP+, each way: (W - 1) m S."""
    return (ranks - 1) * chunks * state


def ring_bytes(hops: int, key_value: int, gradient: int) -> tuple[int, int]:
    """Ring attention with h hops, forward h KV and backward h KV + (h + 1) dKV, 0 with none.

    `gradient` are the bytes of the float32 gradients of the keys and values.
    """
    home = hops + 1 if hops else 0
    return hops * key_value, hops * key_value + home * gradient


def uneven_ring_bytes(
    lengths: Sequence[int], rank: int, hops: int, key_value: int, gradient: int
) -> int:
    """`ring_bytes`, both passes of a rank, where ranks have `lengths` of tokens.

    `key_value` and `gradient` are bytes a token. What comes by is that of the h ranks before, and
    the rank's own gradients come home.
    """
    passing = sum(lengths[rank - step] for step in range(1, hops + 1))
    home = lengths[rank] if hops else 0
    return passing * (2 * key_value + gradient) + home * gradient


def ring_messages(hops: int) -> int:
    """Messages that a rank sends forward and backward: 3 h + 1, 0 without hops."""
    return 3 * hops + 1 if hops else 0


def dispatch_bytes(tokens: int, chosen: int, hidden: int, itemsize: int, ep: int) -> float:
    """Rows to the ranks of their experts, where all experts are chosen alike: n k d s (1 - 1/EP)."""
    return tokens * chosen * hidden * itemsize * (1 - 1 / ep)


def expert_gather_bytes(rows: int, hidden: int, itemsize: int, etp: int) -> int:
    """Rows over the ranks that share an expert, R of each: (ETP - 1) R d s.

    All of them send as many as the one that has most, R, in an all-gather and a reduce-scatter alike.
    """
    return (etp - 1) * rows * hidden * itemsize


def expert_count_bytes(experts: int, groups: int, ep: int, etp: int) -> tuple[int, int]:
    """Counts of rows in int64 that precede the groups, over ep and over etp; forward alone.

    Each rank hears its own experts' rows from ep, and what the ranks of etp heard.
    """
    whole = 8 * groups * experts
    return (ep - 1) * whole // ep, (etp - 1) * whole


def halo_bytes(tokens: int, channels: int, itemsize: int) -> int:
    """A convolution's tokens from before a rank's chunks that lie on other ranks, forward."""
    return tokens * channels * itemsize
