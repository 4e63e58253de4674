"""Wilson's interval of a share."""

import math

from attnlab.checks import expect

Z95 = 1.959964


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of the chance of success after `correct` of `n` trials (Wilson 1927).

    Raises:
        ValueError: unless 0 <= correct <= n and n >= 1.
    """
    expect(n >= 1 and 0 <= correct <= n, "0 <= correct <= n, n >= 1", (correct, n))
    share, z2 = correct / n, Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
