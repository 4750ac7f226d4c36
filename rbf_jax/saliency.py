"""The loss around an image: its gradients (Fig. 5 of the paper), and along a line."""

import jax
import jax.numpy as jnp

from rbf_jax.attacks import cross_entropy, exact
from rbf_jax.checks import check_images, check_labels
from rbf_jax.types import Array, Key, LogitsFn


def loss_gradients(key: Key, logits_fn: LogitsFn, images: Array, labels: Array) -> Array:
    """Gradient of the cross-entropy of each image with respect to its pixels, in one step: ``d L(f(x), y) / d x``.

    Args:
        key: for a randomised model.
        logits_fn: the model.
        images: float32 ``(B, H, W, C)`` in [0, 1].
        labels: int32 ``(B,)``.

    Returns:
        Gradients ``(B, H, W, C)``; 0 where one is NaN, at most `attacks.gradients.STEEPEST`.

    Raises:
        ValueError: images or labels out of range.

    Reference: Section IV B.
    """
    check_images(images)
    check_labels(labels, images.shape[0])
    return exact.look(key, logits_fn, cross_entropy, images, labels, None, with_gradient=True).gradient


def losses_along(
    key: Key, logits_fn: LogitsFn, images: Array, labels: Array, directions: Array, distances: Array
) -> Array:
    """Cross-entropy of each image on the line through it: ``L(f(clip(x + t d, 0, 1)), y)``, a cut through its surface.

    Args:
        key: for a randomised model, which meets the same noise at every distance.
        logits_fn: the model.
        images: float32 ``(B, H, W, C)`` in [0, 1].
        labels: int32 ``(B,)``.
        directions: d ``(B, H, W, C)``, of any length.
        distances: t ``(S,)``, in units of the directions.

    Returns:
        Losses ``(S, B)``, at least 0.

    Raises:
        ValueError: images or labels out of range, or directions of another shape than the images.

    Reference: the curvature that gradient masking leaves, Tramèr et al., ICLR 2018 (arXiv:1705.07204), Fig. 1.
    """
    check_images(images)
    check_labels(labels, images.shape[0])
    if directions.shape != images.shape:
        raise ValueError(f"directions must have the images' shape {images.shape}, got {directions.shape}")

    def at(distance: Array) -> Array:
        moved = jnp.clip(images + distance * directions, 0, 1)
        return exact.look(key, logits_fn, cross_entropy, moved, labels, None, with_gradient=False).loss

    return jax.lax.map(at, distances)


def as_picture(gradients: Array, clip: float = 3.0) -> Array:
    """Gradients scaled for the eye, the paper's "scaling and clipping".

    Args:
        gradients: ``(B, H, W, C)``.
        clip: standard deviations of an image's own gradients that are shown as black and white.

    Returns:
        ``(B, H, W, C)`` in [0, 1]; 0.5 is a gradient of 0.
    """
    # Of the largest entry first: the squares of gradients of a sure model would vanish.
    largest = jnp.abs(gradients).max((1, 2, 3), keepdims=True)
    gradients = gradients / jnp.where(largest > 0, largest, 1)
    spread = jnp.maximum(gradients.std((1, 2, 3), keepdims=True), 1e-30)
    return jnp.clip(gradients / (2 * clip * spread) + 0.5, 0, 1)
