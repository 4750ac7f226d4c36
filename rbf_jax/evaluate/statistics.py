"""What a count of successes says."""

from rbf_jax.checks import check_count


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    Args:
        successes: 0 to total.
        total: at least 1.
        confidence: in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: a number out of range.
    """
    from scipy.stats import binomtest  # a second of import time, which `import rbf_jax` shall not cost

    check_count(total, "total")
    interval = binomtest(int(successes), total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
