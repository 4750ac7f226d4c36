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


def _others(logits: Array, labels: Array) -> Array:
    """The logits with the label's own at minus infinity."""
    own = labels[:, None] == jnp.arange(logits.shape[-1])
    return jnp.where(own, -jnp.inf, logits)


def best_other(logits: Array, labels: Array) -> Array:
    """The largest logit among all classes but the label's, ``(B,)``."""
    return _others(logits, labels).max(-1)


def cross_entropy(logits: Array, labels: Array, targets: Array | None) -> Array:
    """``-log softmax_y``, or ``log softmax_t`` towards a target.

    The first as ``log(1 + sum_{i != y} exp(z_i - z_y))``: the gradient of ``log_softmax`` loses its part in ``z_y``
    where the model is so sure that its probability rounds to 1 (from a margin of 17 on), and points elsewhere.
    """
    if targets is not None:
        return pick(jax.nn.log_softmax(logits), targets)
    gaps = _others(logits, labels) - pick(logits, labels)[:, None]
    return jnp.logaddexp(0, jax.nn.logsumexp(gaps, -1))


def margin(logits: Array, labels: Array, targets: Array | None) -> Array:
    """``max_{i != y} z_i - z_y``, or ``z_t - max_{i != t} z_i``: above 0 the attack has succeeded, below it has not."""
    if targets is None:
        return best_other(logits, labels) - pick(logits, labels)
    return pick(logits, targets) - best_other(logits, targets)


def hinge(confidence: float) -> Loss:
    """``min(margin - confidence, 0)``, the loss of Carlini and Wagner: what is missing of a margin.

    `pgd` on ``hinge(50)`` is what papers call CW in linf.

    Reference: Carlini and Wagner, S&P 2017.
    """

    def loss(logits: Array, labels: Array, targets: Array | None) -> Array:
        return jnp.minimum(margin(logits, labels, targets) - confidence, 0)

    return loss


def dlr(logits: Array, labels: Array, targets: Array | None) -> Array:
    """Difference of logits ratio: the margin in units of the gaps between the largest logits, so free of their scale.

    ``(max_{i != y} z_i - z_y) / (z_pi1 - z_pi3 + 1e-12)``, with ``pi`` the classes by falling logit; towards a target
    ``(z_t - z_y) / (z_pi1 - (z_pi3 + z_pi4) / 2 + 1e-12)``.

    Raises:
        ValueError: fewer than 3 classes, or than 4 with a target.

    Reference: Croce and Hein, ICML 2020.
    """
    least, classes = 3 if targets is None else 4, logits.shape[-1]
    if classes < least:
        raise ValueError(f"dlr needs at least {least} classes, got {classes}: use margin")
    largest = jax.lax.top_k(logits, least)[0]
    if targets is None:
        return margin(logits, labels, None) / (largest[:, 0] - largest[:, 2] + 1e-12)
    gap = pick(logits, targets) - pick(logits, labels)
    return gap / (largest[:, 0] - 0.5 * (largest[:, 2] + largest[:, 3]) + 1e-12)


def likely_classes(logits: Array, labels: Array, count: int) -> Array:
    """The most likely wrong classes by falling logit, int32 ``(B, count)``.

    Raises:
        ValueError: the model has not so many.
    """
    classes = logits.shape[-1]
    if classes <= count:
        told = f"apgd_t or fab_t(classes={classes - 1}), autoattack(classes={classes})"
        raise ValueError(f"classes must be below the model's {classes}, got {count}: name them, as {told}")
    return jax.lax.top_k(_others(logits, labels), count)[1].astype(jnp.int32)
