"""The balls: distance, directions, projections and uniform sampling for each norm.

Where `Norm.confine` projects first and then clips to the box [0, 1], clipping only shortens the perturbation, as the
clean image lies in the box; in l1, where that would waste much of the ball, the projection is onto both at once.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rbf_jax.types import Array, Key, Norm

ROUNDING = 2**-25
"""By how much adding a delta to an image moves a pixel at most."""


def per_example(values: Array, like: Array) -> Array:
    """``(B,)`` -> ``(B, 1, ...)``, to be broadcast against ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _flat(deltas: Array) -> Array:
    return deltas.reshape(deltas.shape[0], -1)


def _steepest(direction: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    def steepest(gradients: Array, images: Array, epsilon: Array) -> Array:
        return per_example(epsilon, gradients) * direction(gradients, images)

    return steepest


def _then_clip(project: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    def confine(images: Array, moved: Array, epsilon: Array) -> Array:
        return jnp.clip(images + project(moved - images, epsilon), 0, 1)

    return confine


# linf


def _linf_distance(deltas: Array) -> Array:
    return jnp.abs(_flat(deltas)).max(-1)


def _linf_direction(gradients: Array, images: Array) -> Array:
    del images
    return jnp.sign(gradients)


def _linf_project(deltas: Array, epsilon: Array) -> Array:
    radius = per_example(epsilon, deltas)
    return jnp.clip(deltas, -radius, radius)


def _linf_sample(keys: Key, shape: tuple[int, ...], epsilon: Array) -> Array:
    uniform = jax.vmap(lambda key: jax.random.uniform(key, shape[1:], jnp.float32, -1.0, 1.0))(keys)
    return uniform * per_example(epsilon, uniform)


# l2


def _l2_distance(deltas: Array) -> Array:
    # About the largest entry: squares of gradients below 1e-19 would vanish in float32.
    flat = jnp.abs(_flat(deltas))
    largest = jnp.maximum(flat.max(-1, keepdims=True), 1e-30)
    return largest[:, 0] * jnp.sqrt(jnp.sum((flat / largest) ** 2, -1))


def _l2_direction(gradients: Array, images: Array) -> Array:
    del images
    length = _l2_distance(gradients)
    return gradients / per_example(jnp.where(length > 0, length, 1), gradients)


def _l2_project(deltas: Array, epsilon: Array) -> Array:
    length = _l2_distance(deltas)
    # If all pixels are rounded outwards, by this much in all.
    room = ROUNDING * math.sqrt(_flat(deltas).shape[-1])
    radius = jnp.maximum(epsilon - room, 0)
    factor = jnp.where(length > radius, radius / jnp.maximum(length, 1e-30), 1)
    return deltas * per_example(factor, deltas)


def _l2_sample(keys: Key, shape: tuple[int, ...], epsilon: Array) -> Array:
    def one(key: Key) -> Array:
        direction_key, radius_key = jax.random.split(key)
        normal = jax.random.normal(direction_key, shape[1:], jnp.float32)
        radius = jax.random.uniform(radius_key, (), jnp.float32) ** (1 / math.prod(shape[1:]))
        return radius * normal / jnp.linalg.norm(normal.ravel())

    unit = jax.vmap(one)(keys)
    return unit * per_example(epsilon, unit)


# l1


def _l1_distance(deltas: Array) -> Array:
    return jnp.abs(_flat(deltas)).sum(-1)


def l1_unit(gradients: Array) -> Array:
    """The gradients scaled to l1 length 1; 0 where they are 0."""
    # In two divisions: a sum of gradients near float32's least would vanish.
    for distance in (_linf_distance, _l1_distance):
        length = distance(gradients)
        gradients = gradients / per_example(jnp.where(length > 0, length, 1), gradients)
    return gradients


def open_gradient(gradients: Array, images: Array) -> Array:
    """The gradients without the entries along which the box [0, 1] blocks the way."""
    return jnp.where(((images <= 0) & (gradients < 0)) | ((images >= 1) & (gradients > 0)), 0, gradients)


def sparse(share: float) -> Callable[[Array, Array], Array]:
    """The direction of sparse l1 descent (SLIDE): the signs of the largest open gradients, scaled to l1 length 1.

    Args:
        share: of the entries that are kept (at least one), in (0, 1]; the published attack keeps 0.01.

    Raises:
        ValueError: share out of range.

    Reference: Tramer and Boneh, NeurIPS 2019.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")

    def direction(gradients: Array, images: Array) -> Array:
        size = jnp.abs(_flat(open_gradient(gradients, images)))
        least = jax.lax.top_k(size, max(1, round(share * size.shape[-1])))[0][:, -1:]
        kept = ((size >= least) & (size > 0)).reshape(gradients.shape)
        count = jnp.maximum(_flat(kept).sum(-1).astype(jnp.float32), 1)
        return jnp.where(kept, jnp.sign(gradients), 0) / per_example(count, gradients)

    return direction


def dense(gradients: Array, images: Array) -> Array:
    """A direction for l1: all open gradients, scaled to l1 length 1."""
    return l1_unit(open_gradient(gradients, images))


def _l1_steepest(gradients: Array, images: Array, epsilon: Array) -> Array:
    """Fills pixels up to the box, the largest gradient first, until the ball is used up."""
    flat = _flat(gradients)
    room = jnp.where(flat == 0, 0, jnp.where(flat > 0, 1 - _flat(images), _flat(images)))
    order = jnp.argsort(-jnp.abs(flat), -1)
    filled = jnp.take_along_axis(room, order, -1)
    before = jnp.cumsum(filled, -1) - filled
    taken = jnp.clip(epsilon[:, None] - before, 0, filled)
    taken = jnp.take_along_axis(taken, jnp.argsort(order, -1), -1)
    return (jnp.sign(flat) * taken).reshape(gradients.shape)


BISECTIONS = 40
SUMMING = 3e-7
"""Relative error of a float32 sum of thousands of pixels."""


def _l1_soften(deltas: Array, limits: Array, epsilon: Array, most: Array) -> Array:
    """``sign(d) clip(s - (max|d| - |d|), 0, limit)`` with the largest s <= max|d| of l1 length at most epsilon.

    That is the nearest point with ``|z|_1 <= epsilon`` and ``|z_i| <= limit_i``, of the signs of d. The length grows
    piecewise linearly in s: bisection finds the piece, and its line then the s. (Counted from the largest entry, not
    from 0 as a threshold is: of large deltas little would be left in float32.)

    Args:
        deltas: ``(B, ...)``.
        limits: as the deltas, at least 0.
        epsilon: ``(B,)``.
        most: ``(B,)``, an upper bound of s.
    """
    flat, limits, radius = _flat(deltas), _flat(limits), epsilon[:, None]
    size = jnp.abs(flat)
    top = size.max(-1, keepdims=True)
    below = top - size

    def soft(reach: Array) -> Array:
        return jnp.clip(reach - below, 0, limits)

    def length(reach: Array) -> Array:
        return soft(reach).sum(-1, keepdims=True)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        outside = length(middle) > radius
        return jnp.where(outside, low, middle), jnp.where(outside, middle, high)

    high = jnp.minimum(top, most[:, None])
    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(top), high))
    middle = 0.5 * (low + high)
    growing = (middle > below) & (middle - below < limits)
    count = jnp.maximum(growing.astype(jnp.float32).sum(-1, keepdims=True), 1)
    reach = jnp.clip(low + (radius - length(low)) / count, low, high)
    whole = jnp.minimum(size, limits)
    kept = jnp.where(whole.sum(-1, keepdims=True) <= radius, whole, soft(reach))
    # Room for the rounding of each pixel that moves, and for that of the sum.
    found = kept.sum(-1, keepdims=True)
    allowed = radius * (1 - SUMMING) - ROUNDING * (kept > 0).astype(jnp.float32).sum(-1, keepdims=True)
    kept = kept * jnp.where(found > allowed, jnp.maximum(allowed, 0) / jnp.maximum(found, 1e-30), 1)
    return (jnp.sign(flat) * kept).reshape(deltas.shape)


def _l1_project(deltas: Array, epsilon: Array) -> Array:
    return _l1_soften(deltas, jnp.full_like(deltas, jnp.inf), epsilon, most=epsilon)


def _l1_confine(images: Array, moved: Array, epsilon: Array) -> Array:
    deltas = moved - images
    limits = jnp.where(deltas > 0, 1 - images, images)
    return jnp.clip(images + _l1_soften(deltas, limits, epsilon, most=jnp.full_like(epsilon, jnp.inf)), 0, 1)


def _l1_sample(keys: Key, shape: tuple[int, ...], epsilon: Array) -> Array:
    def one(key: Key) -> Array:
        laplace_key, rest_key = jax.random.split(key)
        laplace = jax.random.laplace(laplace_key, shape[1:], jnp.float32)
        return laplace / (jnp.abs(laplace).sum() + jax.random.exponential(rest_key, (), jnp.float32))

    unit = jax.vmap(one)(keys)
    return unit * per_example(epsilon, unit)


Linf = Norm(
    "linf",
    _linf_distance,
    _linf_direction,
    _steepest(_linf_direction),
    _linf_project,
    _then_clip(_linf_project),
    _linf_sample,
)
"""``max_i |delta_i|``; the steepest direction is the gradient's sign."""

L2 = Norm("l2", _l2_distance, _l2_direction, _steepest(_l2_direction), _l2_project, _then_clip(_l2_project), _l2_sample)
"""``sqrt(sum_i delta_i^2)``; the steepest direction is the gradient itself, scaled to length 1.

The projection stops ``2**-25 sqrt(D)`` short of epsilon: room for the rounding of image plus delta.
"""

L1 = Norm("l1", _l1_distance, sparse(0.01), _l1_steepest, _l1_project, _l1_confine, _l1_sample)
"""``sum_i |delta_i|``; steps are `sparse`, the steepest delta fills one pixel after the other.

The projection is the Euclidean one; it stops ``2**-25`` for each pixel that moves and 3 parts in ten million short of
epsilon: room for rounding.
"""
