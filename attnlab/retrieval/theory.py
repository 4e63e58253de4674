"""What recall of random pairs to expect of lightning and softmax attention, in closed form.

A key is a random unit vector of K channels, a value one of a codebook of random unit vectors of V
channels; after N writes a stored key asks, and the answer is the entry of the codebook that fits the
output best. The output's product with an entry is normal: of mean `signal` for the right one and 0 for
the others. Token N reads sum_i exp(-s (N-i)) k_i v_i^T of lightning, so that at a distance D = N-i

    signal = exp(-s D),   noise^2 = W (1/V + 1/codebook) / K,

W being the sum of exp(-2 s D) over all other writes: N - 1 without decay. The 1/codebook is of
writes that happen to have the same value. What softmax does is at `softmax_recall`. That the largest
of n normal variables is near sqrt(2 ln n) deviations gives both a horizon in closed form.
"""

import math

import torch

_POINTS = 801  # of the numerical integral, over +-8 deviations
CODEBOOK = 256


def top_one_probability(
    signal: float, noise: float, spread: float, codebook: int = CODEBOOK
) -> float:
    """Chance that the right entry has the largest product of all in the codebook.

    Its product is N(signal, noise^2), those of the others N(0, noise^2 + spread^2), all independent.
    """
    deviation = math.hypot(noise, spread)
    if deviation == 0.0:
        return 1.0 if signal > 0 else 1 / codebook
    x = torch.linspace(-8, 8, _POINTS, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    below = torch.special.log_ndtr((x * noise + signal) / deviation) * (codebook - 1)
    return min(float(torch.trapezoid(density * below.exp(), x)), 1.0)


def writes_squared(slope: float, num_tokens: int, distance: int, write_gap: int = 1) -> float:
    """Sum of exp(-2 slope D) over all writes, D = gap, 2 gap, ..., but the one that is asked for.

    Without decay it is their number.
    """
    count = num_tokens / write_gap
    if slope == 0.0:
        return max(count - 1, 0.0)
    per_write = 2 * slope * write_gap
    total = math.exp(-per_write) * math.expm1(-per_write * count) / math.expm1(-per_write)
    return max(total - math.exp(-2 * slope * distance), 0.0)


def lightning_recall(
    *,
    slope: float,
    num_tokens: int,
    distance: int,
    key_dim: float,
    value_dim: int,
    write_gap: int = 1,
    codebook: int = CODEBOOK,
) -> float:
    """Expected accuracy of a lightning head, asked for what was written `distance` tokens before."""
    signal = math.exp(-slope * distance)
    weight = writes_squared(slope, num_tokens, distance, write_gap)
    noise = math.sqrt(weight / key_dim * (1 / value_dim + 1 / codebook))
    return top_one_probability(signal, noise, signal / math.sqrt(value_dim), codebook)


def softmax_recall(
    *,
    logit_scale: float,
    num_tokens: int,
    key_dim: int,
    value_dim: int,
    codebook: int = CODEBOOK,
) -> float:
    """Expected accuracy of a softmax head among `num_tokens` keys, whatever the distance.

    Logits are logit_scale times products of unit vectors: logit_scale for the matched key, of
    variance logit_scale^2 / K for the others. Its weight is 1 / (1 + (N-1) exp(-b + b^2 / 2K)); the
    others add their mean value and, N being finite, some noise about it.
    """
    others, b = num_tokens - 1, logit_scale
    weight = 1 / (1 + others * math.exp(-b + b * b / (2 * key_dim)))
    if others == 0:
        return 1.0
    uneven = math.exp(b * b / key_dim) / others  # sum of the others' squared shares
    variance = 1 / (codebook * value_dim) + uneven * (1 / value_dim + 1 / codebook)
    noise = (1 - weight) * math.sqrt(variance)
    return top_one_probability(weight, noise, weight / math.sqrt(value_dim), codebook)


def effective_dim(key_dim: int, value_dim: int, codebook: int = CODEBOOK) -> float:
    """K / (1/V + 1/codebook): squared signal over squared noise of a state with a single other write."""
    return key_dim / (1 / value_dim + 1 / codebook)


def capacity(key_dim: int, value_dim: int, codebook: int = CODEBOOK) -> float:
    """Writes without decay up to which recall is likely: effective_dim / (2 ln codebook)."""
    return effective_dim(key_dim, value_dim, codebook) / (2 * math.log(codebook))


def lightning_horizon(
    slope: float, *, key_dim: int, value_dim: int, write_gap: int = 1, codebook: int = CODEBOOK
) -> float:
    """Tokens back to which a decaying head recalls: ln(slope gap effective_dim / ln codebook) / (2 slope).

    0 where the head holds more writes than it can tell apart at any distance. The horizon is largest
    for the slope e ln(codebook) / (gap effective_dim).
    """
    ratio = slope * write_gap * effective_dim(key_dim, value_dim, codebook) / math.log(codebook)
    return math.log(ratio) / (2 * slope) if ratio > 1 else 0.0


def softmax_horizon(
    logit_scale: float, *, key_dim: int, value_dim: int, codebook: int = CODEBOOK
) -> float:
    """Keys among which softmax still finds one: exp(b - b^2 / 2K) sqrt(codebook V / (2 ln codebook))."""
    b = logit_scale
    tolerated = math.sqrt(codebook * value_dim / (2 * math.log(codebook)))
    return math.exp(b - b * b / (2 * key_dim)) * tolerated
