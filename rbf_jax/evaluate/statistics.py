"""What a count of successes says."""

import math
from collections.abc import Sequence
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
    z, share = _quantile(confidence), successes / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((middle + side * half) / (1 + z**2 / total) for side in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # as rounding may pass 0, 1 or the share


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean difference of two proportions on the same examples: a model's accuracy minus another's.

    Wald's interval after half an example was added to each of the four outcomes (both, neither, one, the other):
    ``m -+ z sqrt((s - m^2) / (N + 2))`` with ``m = sum(d) / (N + 2)`` and ``s = (sum(d^2) + 1) / (N + 2)``. On the same
    examples it is narrower than what two separate intervals say, and unlike Wald's it is sound for few of them.

    Args:
        differences: d of each example, 1, 0 or -1; or between, where they are means over redraws of the noise.
        confidence: in (0, 1).

    Returns:
        Lower and upper end, in [-1, 1].

    Raises:
        ValueError: a number out of range, or no example.

    Reference: Agresti and Min, Statistics in Medicine 2005.
    """
    check_count(len(differences), "the number of differences")
    if not all(-1 <= each <= 1 for each in differences):
        raise ValueError(f"differences must be from -1 to 1, got {min(differences)} to {max(differences)}")
    total = len(differences) + 2
    mean, square = math.fsum(differences) / total, (math.fsum(each**2 for each in differences) + 1) / total
    half = _quantile(confidence) * math.sqrt((square - mean**2) / total)
    return max(-1.0, mean - half), min(1.0, mean + half)


def _quantile(confidence: float) -> float:
    """How many standard errors lie on either side."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
