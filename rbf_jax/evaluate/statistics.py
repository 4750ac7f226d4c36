"""What a count of successes says."""

import math
from statistics import NormalDist

from rbf_jax.checks import check_count


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: the p from which the observed one lies z standard errors away.

    Args:
        successes: 0 to total; a mean over redraws of the noise need not be whole.
        total: at least 1.
        confidence: in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: a number out of range.
    """
    check_count(total, "total")
    if not 0 <= successes <= total:
        raise ValueError(f"successes must be from 0 to the total of {total}, got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1, got {confidence}")
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), successes / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((middle + side * half) / (1 + z**2 / total) for side in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # as rounding may pass 0, 1 or the share
