"""The rules of the EM: how many patches make a step, when a filter begins, and how alpha moves."""

import math
from typing import NamedTuple

from rbf_jax.checks import check_count, check_not_negative, check_positive


class EMConfig(NamedTuple):
    """Rules of the algorithm; the defaults are the released code's for MNIST.

    Attributes:
        size: height and width of a filter, pixels.
        images_per_step: images whose patches make one M-step's statistics, taken in order, wrapping round.
        steps: M-steps in all.
        growth_steps: M-steps during which filters may be added.
        expected_filters: the number of filters around which the growth of alpha slows down (K0).
        new_share: share of the patches that the pooled cluster must exceed to become a filter.
        offset: added to log(alpha) to give the score below which a patch is new.
        variance_floor: lowest variance used in the scores.
    """

    size: tuple[int, int] = (3, 3)
    images_per_step: int = 750
    steps: int = 501
    growth_steps: int = 250
    expected_filters: float = 10.0
    new_share: float = 0.001
    offset: float = -2.5
    variance_floor: float = 1e-20


MNIST = EMConfig()
CIFAR10 = EMConfig(growth_steps=500, expected_filters=175.0)


def check_em_config(config: EMConfig) -> None:
    """Raises ValueError unless every rule is in its range."""
    check_count(config.images_per_step, "images_per_step")
    check_count(config.steps, "steps")
    check_count(config.growth_steps, "growth_steps", least=0)
    check_positive(config.expected_filters, "expected_filters")
    check_not_negative(config.new_share, "new_share")
    if not math.isfinite(config.offset):
        raise ValueError(f"offset must be finite, got {config.offset}")
    check_positive(config.variance_floor, "variance_floor")
