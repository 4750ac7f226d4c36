"""What every attack does: arguments checked and spread over the examples, the best iterate kept, results counted."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_images, check_key, check_labels, check_not_negative
from rbf_jax.types import Array, AttackResult, Key, Norm


def spread_arguments(
    keys: Key, images: Array, labels: Array, epsilon: Array | float, targets: Array | None
) -> tuple[Key, Array]:
    """Checks an attack's arguments; returns one key and one epsilon for each example.

    Raises:
        ValueError: a wrong shape, dtype or range.
    """
    check_images(images)
    batch = images.shape[0]
    check_labels(labels, batch)
    if targets is not None:
        check_labels(targets, batch, name="targets")
    check_key(keys)
    check_not_negative(epsilon, "epsilon")
    if keys.shape not in ((), (batch,)):
        raise ValueError(f"keys must be a single key or one for each of {batch} images, got shape {keys.shape}")
    if jnp.shape(epsilon) not in ((), (batch,)):
        raise ValueError(f"epsilon must be a number or one for each of {batch} images, got shape {jnp.shape(epsilon)}")
    keys = keys if keys.shape else jax.random.split(keys, batch)
    return keys, jnp.broadcast_to(jnp.asarray(epsilon, jnp.float32), (batch,))


def fold_in(keys: Key, number: Array | int) -> Key:
    """The same number folded into every key, ``(B,)``."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def into_ball(norm: Norm, images: Array, moved: Array, epsilon: Array) -> Array:
    """The moved images, projected into each example's ball and then clipped to the box."""
    return jnp.clip(images + norm.project(moved - images, epsilon), 0, 1)


def is_misled(logits: Array, labels: Array, targets: Array | None) -> Array:
    """Where the prediction is not the label, or is the target; bool ``(B,)``. Logits with a NaN predict nothing."""
    predicted = logits.argmax(-1)
    misled = predicted != labels if targets is None else predicted == targets
    return misled & ~jnp.isnan(logits).any(-1)


class Best(NamedTuple):
    """The best iterate so far of each example: a success before a failure, then the higher loss.

    Attributes:
        images: ``(B, H, W, C)``.
        success: bool ``(B,)``.
        loss: ``(B,)``.
    """

    images: Array
    success: Array
    loss: Array


def no_best(images: Array) -> Best:
    """Before the first iterate: the images themselves, which anything replaces."""
    return Best(images, jnp.zeros(images.shape[:1], bool), jnp.full(images.shape[:1], -jnp.inf))


def better(best: Best, images: Array, logits: Array, loss: Array, labels: Array, targets: Array | None) -> Best:
    """The better of the best so far and an iterate with its logits and loss."""
    success = is_misled(logits, labels, targets)
    wins = (success & ~best.success) | ((success == best.success) & (loss > best.loss))
    return Best(
        jnp.where(per_example(wins, images), images, best.images),
        success | best.success,
        jnp.where(wins, loss, best.loss),
    )


def result(
    norm: Norm, images: Array, adversarial: Array, success: Array, forwards: int, backwards: int
) -> AttackResult:
    """Packs a result; every example of these attacks takes the same number of passes."""
    counts = jnp.zeros_like(success, jnp.int32)
    return AttackResult(
        adversarial, success, norm.distance(adversarial - images), counts + forwards, counts + backwards
    )
