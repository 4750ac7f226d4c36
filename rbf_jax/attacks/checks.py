"""Signs that a model hides its gradients, so that attacks which use them say little about its robustness."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.attacks.adaptive import known_noise
from rbf_jax.attacks.driver import Composed, Iterative, is_misled
from rbf_jax.attacks.gradients import exact
from rbf_jax.attacks.losses import cross_entropy, margin
from rbf_jax.attacks.pgd import pgd
from rbf_jax.attacks.square import square
from rbf_jax.checks import check_images, check_labels, check_norm, check_positive, check_single_key
from rbf_jax.types import Array, Key, LogitsFn, Norm, as_it_is

NOTICEABLE = 0.05
"""The share of the examples from which on they are a sign, if they are two at least."""


class Flag(NamedTuple):
    """A sign of hidden gradients.

    Attributes:
        raised: whether it was seen.
        value: what was measured.
        meaning: what that says, and what to do.
    """

    raised: bool
    value: float
    meaning: str


@jax.jit
def _left(
    attack: Any,
    keys: Key,
    fresh: Key,
    logits_fn: LogitsFn,
    judge: LogitsFn | None,
    images: Array,
    labels: Array,
    misled: Array,
) -> Array:
    result = attack(keys, logits_fn, images, labels)
    if judge is None:
        return (~(result.success | misled)).mean()
    # Under fresh noise: among many looks at a noisy model one is misled by luck.
    return (~is_misled(judge(fresh, result.images), labels, None)).mean()


@functools.partial(jax.jit, static_argnames="with_gradient")
def _look(logits_fn: LogitsFn, keys: Key, images: Array, labels: Array, with_gradient: bool) -> tuple[Array, ...]:
    seen = exact.look(keys, logits_fn, cross_entropy, images, labels, None, with_gradient=with_gradient)
    return seen.logits, seen.gradient, is_misled(seen.logits, labels, None)


def differ(first: Array, second: Array) -> bool:
    """Whether logits of the same images under two keys differ by more than rounding: of a randomised model they do."""
    first, second = np.asarray(first), np.asarray(second)
    size = np.abs(np.where(np.isfinite(first), first, 0)).max()
    return not np.allclose(first, second, rtol=0, atol=1e-3 * size, equal_nan=True)


def masking_checks(
    key: Key,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    norm: Norm,
    epsilon: float,
    large_epsilon: float,
    crafted: Array | None = None,
    judge: LogitsFn | None = None,
    steps: int = 40,
    queries: int = 1000,
) -> dict[str, Flag]:
    """Runs short attacks on a few examples and compares what should be ordered.

    "Some" are at least 5 % of the examples, and at least two.

    - ``zero gradients``: the loss does not change with the image, for some of the examples.
    - ``gradient-free beats gradient-based``: `square` breaks some that `pgd` leaves; with a judge under one draw of the
      noise (`known_noise`), for a search that compares looks under many keeps what was lucky.
    - ``transfer beats white-box``: images crafted on another model do so; only where they are given.
    - ``robust at a large epsilon``: PGD within ``large_epsilon``, where anything can be reached, leaves some.
    - ``more iterations still help``: ten times the steps leave fewer right by some.
    - ``randomness``: logits differ between keys: attacks need `eot`, and scores fresh noise.
    - ``softmax outputs``: the logits are probabilities: losses on them saturate; give the logits.

    Args:
        key: of the attacks.
        logits_fn: the model.
        images: float32 ``(N, H, W, C)`` in [0, 1]; 50 to 200 are enough.
        labels: int32 ``(N,)``.
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius at which the model is said to be robust, above 0.
        large_epsilon: radius at which no model can be (linf: 0.5).
        crafted: images ``(N, H, W, C)`` in that ball, crafted on another model.
        judge: the prediction of a randomised model, that says under fresh noise which images are broken; None for a
            deterministic model.
        steps: of PGD.
        queries: of Square.

    Returns:
        The flags by name. A flag is a reason to look closer; no flag is no proof.

    Raises:
        ValueError: an argument out of range.

    Reference: Athalye et al., ICML 2018; Carlini et al., arXiv:1902.06705; Croce and Hein, ICML 2020.
    """
    check_single_key(key)
    check_images(images)
    check_labels(labels, len(images))
    check_norm(norm)
    check_positive(epsilon, "epsilon")
    check_positive(large_epsilon, "large_epsilon")
    if crafted is not None:
        check_images(crafted, "crafted")
        farthest = float(norm.distance(crafted - images).max()) if crafted.shape == images.shape else math.inf
        if farthest > 1.001 * epsilon:  # a sum in float32 is not exact
            raise ValueError(
                f"crafted must be images of shape {images.shape} within epsilon = {epsilon} of those given, got "
                f"shape {crafted.shape}, distances up to {farthest:.3g}"
            )
    logits_fn, judge = as_it_is(logits_fn), None if judge is None else as_it_is(judge)
    keys = jax.random.split(key, len(images))
    other_keys, fresh = (jax.random.split(jax.random.fold_in(key, number), len(images)) for number in (1, 2))

    logits, gradient, misled = _look(logits_fn, keys, images, labels, with_gradient=True)
    check_labels(labels, *logits.shape)

    def some(share: float) -> bool:
        return share >= max(NOTICEABLE, 2 / len(images)) - 1e-6  # shares are differences in float32

    def left(attack: Iterative | Composed, attacked: LogitsFn = logits_fn) -> float:
        return float(_left(attack, keys, fresh, attacked, judge, images, labels, misled))

    other = _look(logits_fn, other_keys, images, labels, with_gradient=False)[0]
    flat = float(np.mean((np.abs(np.asarray(gradient)) == 0).all((1, 2, 3)) & ~np.asarray(misled)))
    white_box = left(pgd(norm, epsilon=epsilon, steps=steps, loss=margin))
    longer = left(pgd(norm, epsilon=epsilon, steps=10 * steps, loss=margin))
    large = left(pgd(norm, epsilon=large_epsilon, steps=steps, loss=margin))
    still = logits_fn if judge is None else known_noise(logits_fn, jax.random.fold_in(key, 3))
    gradient_free = left(square(norm, epsilon=epsilon, queries=queries), still)
    differs = float(jnp.abs(logits - other).max())
    sums = float(jnp.abs(logits.sum(-1) - 1).max()) if float(logits.min()) >= 0 else float("inf")
    flags = {
        "zero gradients": Flag(
            some(flat), flat, "share of examples whose gradient is 0: attack another form of the model (BPDA)"
        ),
        "gradient-free beats gradient-based": Flag(
            some(white_box - gradient_free),
            white_box - gradient_free,
            "accuracy under PGD minus that under Square: the gradients mislead",
        ),
        "robust at a large epsilon": Flag(
            some(large), large, "accuracy under PGD where every image can be reached: PGD fails"
        ),
        "more iterations still help": Flag(
            some(white_box - longer), white_box - longer, "what ten times the steps take: PGD has not converged"
        ),
        "randomness": Flag(
            differ(logits, other), differs, "largest difference of logits under two keys: use eot, score afresh"
        ),
        "softmax outputs": Flag(sums < 1e-4, sums, "how far the outputs are from probabilities: attack the logits"),
    }
    if crafted is not None:
        scored = (judge, fresh) if judge else (logits_fn, keys)
        moved = np.asarray(_look(*scored, crafted, labels, with_gradient=False)[2])
        # As PGD is counted.
        transferred = 1 - float(np.mean(moved if judge else moved | np.asarray(misled)))
        flags["transfer beats white-box"] = Flag(
            some(white_box - transferred),
            white_box - transferred,
            "accuracy under PGD minus that on images of another model: the gradients mislead",
        )
    return flags
