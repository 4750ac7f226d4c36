"""Objectives that an attack maximises, from logits ``(B, classes)``, labels and targets ``(B,)`` to ``(B,)``."""

from typing import Protocol

import jax
import jax.numpy as jnp

from rbf_jax.types import Array


class Loss(Protocol):
    """An objective, higher where the model is more misled."""

    def __call__(self, logits: Array, labels: Array, targets: Array | None, /) -> Array:
        """One value for each example, ``(B,)``."""
        ...


def pick(values: Array, labels: Array) -> Array:
    """Each row's entry of its label, ``(B, classes)`` -> ``(B,)``."""
    return jnp.take_along_axis(values, labels[:, None], -1)[:, 0]


def best_other(logits: Array, labels: Array) -> Array:
    """The largest logit among all classes but the label's, ``(B,)``."""
    own = labels[:, None] == jnp.arange(logits.shape[-1])
    return jnp.where(own, -jnp.inf, logits).max(-1)


def cross_entropy(logits: Array, labels: Array, targets: Array | None) -> Array:
    """``-log softmax_y``, or ``log softmax_t`` towards a target."""
    log_softmax = jax.nn.log_softmax(logits)
    return -pick(log_softmax, labels) if targets is None else pick(log_softmax, targets)


def margin(logits: Array, labels: Array, targets: Array | None) -> Array:
    """``max_{i != y} z_i - z_y``, or ``z_t - max_{i != t} z_i``: above 0 exactly where the attack has succeeded."""
    if targets is None:
        return best_other(logits, labels) - pick(logits, labels)
    return pick(logits, targets) - best_other(logits, targets)
