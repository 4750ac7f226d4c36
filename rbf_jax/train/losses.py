"""Training losses."""

import jax
import jax.numpy as jnp

from rbf_jax.types import Array


def smoothed_labels(labels: Array, classes: int, smoothing: float = 0.1) -> Array:
    """One-hot labels clipped to [s / (classes - 1), 1 - s], as the released code smooths them; rows sum to 1.

    Args:
        labels: int32 ``(B,)``.
        classes: at least 2.
        smoothing: s, what the true class gives away, in [0, 1 - 1 / classes]; 0 for hard labels.

    Returns:
        ``(B, classes)``.
    """
    return jnp.clip(jax.nn.one_hot(labels, classes, dtype=jnp.float32), smoothing / (classes - 1), 1 - smoothing)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean over the batch of ``-sum_i t_i log softmax_i(z)``; logits and targets ``(B, classes)``."""
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))
