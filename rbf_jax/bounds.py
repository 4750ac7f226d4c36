"""Claim 1 of the paper: how far a bounded perturbation can move a match score (Eqs. 6-9), and what that is worth.

With ``d = z - mu``, Eq. 6 says ``s(z + delta) - s(z) = -(|delta|^2 / 2 + delta.d) / v``. No bound here uses the
box [0, 1].
"""

import math

import jax
import jax.numpy as jnp

from rbf_jax.checks import check_choice, check_norm_order, check_not_negative, check_one_number, check_positive
from rbf_jax.rbf import VARIANCE_FLOOR, RBFFilters, check_patches, match_scores, safe_sqrt, squared_distances
from rbf_jax.types import Array

RULES = ("cauchy", "hoelder", "exact")


def _lp_norm(differences: Array, p: float) -> Array:
    magnitudes = jnp.abs(differences)
    if p == math.inf:
        return magnitudes.max(-1)
    # Scaled by the largest entry (on which the norm does not depend), so that a power neither overflows nor vanishes.
    # Their sum is then at least 1, but for 0 itself, where its root has no slope.
    largest = jax.lax.stop_gradient(magnitudes.max(-1, keepdims=True))
    total = jnp.sum((magnitudes / jnp.maximum(largest, 1e-30)) ** p, -1)
    return largest[..., 0] * jnp.maximum(total, 0.5) ** (1 / p)


def score_change_bounds(
    filters: RBFFilters,
    patches: Array,
    epsilon: Array | float,
    p: float,
    *,
    rule: str = "hoelder",
    variance_floor: float = VARIANCE_FLOOR,
) -> tuple[Array, Array]:
    """Lower and upper bound of ``s(z + delta, g_j) - s(z, g_j)`` over ``|delta|_p <= epsilon``.

    With ``r = epsilon D^max(0, 1/2 - 1/p)``, the largest l2 norm in the ball, and ``1/p + 1/q = 1``:

    - ``"cauchy"``: ``-(r^2 / 2 + r |d|_2) / v`` and ``r |d|_2 / v``. For p = inf this is Eq. 8
      (``r = epsilon sqrt(D)``) and its upper half Eq. 9.
    - ``"hoelder"``: ``epsilon |d|_q`` in the place of ``r |d|_2``, before the paper's last inequality in Eq. 7;
      never wider.
    - ``"exact"``: the extremes themselves, for p = inf (coordinate by coordinate) and p = 2 (along d).

    Args:
        filters: the K filters.
        patches: float32 ``(..., P, D)`` in [0, 1].
        epsilon: radius of the ball, one number of at least 0.
        p: order of the norm, at least 1; ``math.inf`` for linf.
        rule: one of the three.
        variance_floor: see `rbf.match_scores`.

    Returns:
        Two arrays ``(..., P, K)``: lower <= 0 <= upper.

    Raises:
        ValueError: p below 1, epsilon below 0, an unknown rule, ``"exact"`` for another p, or what `rbf.match_scores`
            raises.

    Reference: Eqs. 6-9.
    """
    check_norm_order(p)
    check_one_number(epsilon, "epsilon")
    check_not_negative(epsilon, "epsilon")
    check_choice(rule, "rule", RULES)
    check_positive(variance_floor, "variance_floor")
    check_patches(filters, patches)
    if rule == "exact" and p not in (2, math.inf):
        raise ValueError(f"rule 'exact' is known for p = 2 and p = inf, got p = {p}")
    variances = jnp.maximum(filters.variances, variance_floor)
    dimension = patches.shape[-1]
    if rule == "cauchy" or (p == 2 and rule == "hoelder"):
        # For p = 2 both rules say the same.
        radius = epsilon * dimension ** max(0.0, 0.5 - 1 / p)
        linear, quadratic = radius * safe_sqrt(squared_distances(filters, patches)), radius**2
        return -(quadratic / 2 + linear) / variances, linear / variances
    if rule == "exact" and p == 2:
        distance = safe_sqrt(squared_distances(filters, patches))
        step = jnp.minimum(distance, epsilon)
        return -(epsilon * distance + epsilon**2 / 2) / variances, (step * distance - step**2 / 2) / variances

    differences = patches[..., None, :] - filters.flat_means
    if rule == "exact":
        # Each coordinate moves away from, or up to, the filter's mean by itself.
        magnitudes = jnp.abs(differences)
        down = -jnp.sum(epsilon * magnitudes + epsilon**2 / 2, -1)
        step = jnp.minimum(magnitudes, epsilon)
        up = jnp.sum(step * magnitudes - step**2 / 2, -1)
        return down / variances, up / variances
    q = math.inf if p == 1 else (1.0 if p == math.inf else p / (p - 1))
    linear = epsilon * _lp_norm(differences, q)
    quadratic = epsilon**2 * dimension ** max(0.0, 1 - 2 / p)
    return -(quadratic / 2 + linear) / variances, linear / variances


def best_filter_is_certain(
    filters: RBFFilters,
    patches: Array,
    epsilon: Array | float,
    p: float,
    *,
    rule: str = "cauchy",
    variance_floor: float = VARIANCE_FLOOR,
) -> Array:
    """Whether each patch's best filter provably stays the best under any perturbation of the ball.

    True where the lower bound of the best score exceeds the upper bound of every other. The mean over patches is what
    Claim 1 is worth at that epsilon.

    Args:
        filters: the K filters.
        patches: float32 ``(..., P, D)`` in [0, 1].
        epsilon: radius of the ball, at least 0.
        p: order of the norm, at least 1.
        rule: see `score_change_bounds`; the default is the paper's.
        variance_floor: see `rbf.match_scores`.

    Returns:
        bool ``(..., P)``; always True for a single filter.

    Raises:
        ValueError: as `score_change_bounds`.
    """
    scores = match_scores(filters, patches, variance_floor=variance_floor)
    lower, upper = score_change_bounds(filters, patches, epsilon, p, rule=rule, variance_floor=variance_floor)
    is_best = scores.argmax(-1)[..., None] == jnp.arange(scores.shape[-1])
    worst_of_best = jnp.where(is_best, scores + lower, -jnp.inf).max(-1)
    best_of_rest = jnp.where(is_best, -jnp.inf, scores + upper).max(-1)
    return worst_of_best > best_of_rest
