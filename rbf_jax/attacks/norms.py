"""The balls: distance, steepest direction, projection and uniform sampling for each norm.

The box [0, 1] is not part of them: attacks clip to it after the projection. As the clean image lies in the box, that
only shortens the perturbation.
"""

import math

import jax
import jax.numpy as jnp

from rbf_jax.types import Array, Key, Norm


def per_example(values: Array, like: Array) -> Array:
    """``(B,)`` -> ``(B, 1, ...)``, to be broadcast against ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _flat(deltas: Array) -> Array:
    return deltas.reshape(deltas.shape[0], -1)


def _linf_distance(deltas: Array) -> Array:
    return jnp.abs(_flat(deltas)).max(-1)


def _linf_project(deltas: Array, epsilon: Array) -> Array:
    radius = per_example(epsilon, deltas)
    return jnp.clip(deltas, -radius, radius)


def _linf_sample(keys: Key, shape: tuple[int, ...], epsilon: Array) -> Array:
    uniform = jax.vmap(lambda key: jax.random.uniform(key, shape[1:], minval=-1.0, maxval=1.0))(keys)
    return uniform * per_example(epsilon, uniform)


def _l2_distance(deltas: Array) -> Array:
    # About the largest entry: squares of gradients below 1e-19 would vanish in float32.
    flat = jnp.abs(_flat(deltas))
    largest = jnp.maximum(flat.max(-1, keepdims=True), 1e-30)
    return largest[:, 0] * jnp.sqrt(jnp.sum((flat / largest) ** 2, -1))


def _l2_direction(gradients: Array) -> Array:
    length = _l2_distance(gradients)
    return gradients / per_example(jnp.where(length > 0, length, 1), gradients)


def _l2_project(deltas: Array, epsilon: Array) -> Array:
    length = _l2_distance(deltas)
    # Adding the delta to an image rounds each pixel by up to 2**-25; if all are rounded outwards, by this much in all.
    room = 2**-25 * math.sqrt(_flat(deltas).shape[-1])
    radius = jnp.maximum(epsilon - room, 0)
    factor = jnp.where(length > radius, radius / jnp.maximum(length, 1e-30), 1)
    return deltas * per_example(factor, deltas)


def _l2_sample(keys: Key, shape: tuple[int, ...], epsilon: Array) -> Array:
    def one(key: Key) -> Array:
        direction_key, radius_key = jax.random.split(key)
        normal = jax.random.normal(direction_key, shape[1:])
        radius = jax.random.uniform(radius_key) ** (1 / math.prod(shape[1:]))
        return radius * normal / jnp.linalg.norm(normal.ravel())

    unit = jax.vmap(one)(keys)
    return unit * per_example(epsilon, unit)


Linf = Norm("linf", _linf_distance, jnp.sign, _linf_project, _linf_sample)
"""``max_i |delta_i|``; the steepest direction is the gradient's sign."""

L2 = Norm("l2", _l2_distance, _l2_direction, _l2_project, _l2_sample)
"""``sqrt(sum_i delta_i^2)``; the steepest direction is the gradient itself, scaled to length 1.

The projection stops ``2**-25 sqrt(D)`` short of epsilon: room for the rounding of image plus delta.
"""
