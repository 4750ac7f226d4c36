"""Training losses."""

import jax
import jax.numpy as jnp

from rbf_jax.types import Array


def smoothed_labels(labels: Array, classes: int) -> Array:
    """One-hot labels clipped to [0.1 / (classes - 1), 0.9], as the released code smooths them; rows sum to 1.

    Args:
        labels: int32 ``(B,)``.
        classes: at least 2.

    Returns:
        ``(B, classes)``.
    """
    return jnp.clip(jax.nn.one_hot(labels, classes), 0.1 / (classes - 1), 0.9)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean over the batch of ``-sum_i t_i log softmax_i(z)``; logits and targets ``(B, classes)``."""
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))
