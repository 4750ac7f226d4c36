"""Randomized smoothing: l2 radii within which a smoothed model provably keeps its class, for any base model f.

The smoothed model is ``g(x) = argmax_c P(f(x + e) = c)`` with ``e ~ N(0, sigma^2 I)``, not clipped to the box [0, 1].
Where ``P(f(x + e) = c) >= p > 1/2``, g is c in the whole l2 ball of radius ``sigma Phi^-1(p)`` around x.

f may be randomised itself; the probability is then over its noise as well. The bounds below need independent samples,
so that each sample gives f a key of its own: f takes ``(B,)`` keys, as every LogitsFn does, and must draw each image's
noise from that image's key alone.

Reference: Cohen, Rosenfeld and Kolter, Certified Adversarial Robustness via Randomized Smoothing, ICML 2019.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax import parallel
from rbf_jax.checks import (
    check_count,
    check_fraction,
    check_images,
    check_logits,
    check_positive,
    check_single_key,
)
from rbf_jax.types import Array, Key, LogitsFn, as_it_is

ABSTAIN = -1
"""The label where nothing can be said."""


class Certificate(NamedTuple):
    """What is known of the smoothed model around one image.

    Attributes:
        label: its class there, or `ABSTAIN`.
        radius: of the l2 ball in which it keeps that class, 0.0 where it abstains.
        counts: int32 ``(classes,)``, how often f said each class on the n samples.
    """

    label: int
    radius: float
    counts: np.ndarray


def _check(key: Key, image: Array, sigma: float, alpha: float, batch_size: int) -> None:
    check_single_key(key)
    if not isinstance(image, jax.Array | np.ndarray) or image.ndim != 3:
        raise ValueError(f"image must be one array (H, W, C), got {getattr(image, 'shape', type(image).__name__)}")
    check_images(image[None], "image")
    check_positive(sigma, "sigma")
    check_fraction(alpha, "alpha")
    check_count(batch_size, "batch_size")


@functools.partial(jax.jit, static_argnames="batch_size")
def _count(logits_fn: LogitsFn, key: Key, image: Array, sigma: Array, n: Array, *, batch_size: int) -> Array:
    """How often f says each class, ``(classes,)``, on samples 0 to n - 1; the last batch's surplus is not counted."""

    def one_sample(row: Array) -> tuple[Key, Array]:
        noise_key, model_key = jax.random.split(jax.random.fold_in(key, row))
        return model_key, image + sigma * jax.random.normal(noise_key, image.shape, jnp.float32)

    def one_batch(batch: Array | int) -> Array:
        rows = batch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        logits = logits_fn(*jax.vmap(one_sample)(rows))
        check_logits(logits, batch_size)
        counted = (rows < n) & ~jnp.isnan(logits).any(-1)
        said = logits.argmax(-1)[:, None] == jnp.arange(logits.shape[-1])
        return (said & counted[:, None]).sum(0, dtype=jnp.int32)

    devices, classes = parallel.count(), jax.eval_shape(one_batch, 0).shape

    def on_device(number: Array) -> Array:
        def turn(at: Array | int, counts: Array) -> Array:
            return counts + one_batch(at * devices + number[0])

        # How many batches there are is traced: n0 and n share one program.
        turns = -(-n // (batch_size * devices))
        return jax.lax.fori_loop(0, turns, turn, jnp.zeros(classes, jnp.int32))[None]

    return parallel.per_device(on_device)(jnp.arange(devices)).sum(0)


def _sample(key: Key, logits_fn: LogitsFn, image: Array, sigma: float, n: int, batch_size: int) -> np.ndarray:
    counts = _count(logits_fn, key, jnp.asarray(image), jnp.float32(sigma), jnp.int32(n), batch_size=batch_size)
    return parallel.fetch(counts)


def certified_radius(count: int, n: int, alpha: float, sigma: float) -> float:
    """Radius that a class's count among n samples certifies: ``sigma Phi^-1(p)``, p its probability's lower bound.

    ``p = Beta^-1(alpha; count, n - count + 1)``, one-sided Clopper-Pearson: P(count or more | p) = alpha.

    Args:
        count: samples on which f said the class, 0 to n.
        n: samples, the uncounted ones (NaN) included.
        alpha: probability that the bound may be wrong, in (0, 1).
        sigma: standard deviation of the noise, above 0.

    Returns:
        The l2 radius; 0.0, for abstain, where p <= 1/2.

    Raises:
        ValueError: a number out of range.

    Reference: Theorem 1 and Section 3.2.2.
    """
    from scipy.special import betaincinv, ndtri  # `import rbf_jax` shall not pay for it

    check_count(n, "n")
    check_count(count, "count", 0)
    if count > n:
        raise ValueError(f"count must be at most n = {n}, got {count}")
    check_fraction(alpha, "alpha")
    check_positive(sigma, "sigma")
    lower = betaincinv(count, n - count + 1, alpha)  # 0 or NaN at count = 0
    return float(sigma * ndtri(lower)) if lower > 0.5 else 0.0


def certify(
    key: Key,
    logits_fn: LogitsFn,
    image: Array,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 50_000,
    alpha: float = 1e-3,
    batch_size: int = 100,
) -> Certificate:
    """CERTIFY: the smoothed model's class at an image, and an l2 radius within which it provably keeps it.

    n0 samples pick the class, n fresh ones bound its probability. Except with probability alpha over these draws,
    ``g(x + delta) = label`` for every ``|delta|_2 <= radius``, also outside the box, unless it abstains. The theorem is
    one of exact arithmetic; float32 rounding is not accounted for.

    Args:
        key: a single key. Sample i of a phase takes ``fold_in(the phase's key, i)``, so the counts do not depend on
            ``batch_size``, up to the rounding of logits.
        logits_fn: f, for no recompilation between images a ``jax.tree_util.Partial``. A randomised one, as a defence's
            ``draw``, gets one key for each sample, ``(B,)``: samples that shared its noise would not be independent,
            and the bound would not hold. Logits with a NaN count for no class.
        image: float32 ``(H, W, C)`` in [0, 1].
        sigma: standard deviation of the noise, above 0. Neither it, n0 nor n cost a recompilation.
        n0: samples that pick the class, at least 1.
        n: samples that bound its probability, at least 1.
        alpha: probability that the certificate may be wrong, in (0, 1).
        batch_size: samples at a time on each device.

    Returns:
        The certificate.

    Raises:
        ValueError: an argument out of range, or not a single key or image.

    Reference: CERTIFY, Section 3.2.2.
    """
    _check(key, image, sigma, alpha, batch_size)
    check_count(n0, "n0")
    check_count(n, "n")
    pick_key, bound_key = jax.random.split(key)
    logits_fn = as_it_is(logits_fn)
    label = int(_sample(pick_key, logits_fn, image, sigma, n0, batch_size).argmax())
    counts = _sample(bound_key, logits_fn, image, sigma, n, batch_size)
    radius = certified_radius(int(counts[label]), n, alpha, sigma)
    return Certificate(label if radius > 0 else ABSTAIN, radius, counts)


def predict(
    key: Key,
    logits_fn: LogitsFn,
    image: Array,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 1e-3,
    batch_size: int = 100,
) -> int:
    """PREDICT: the smoothed model's class at an image, or `ABSTAIN`.

    Abstains unless a two-sided binomial test tells the two most frequent classes apart, ``2 P(X >= n_A) <= alpha`` for
    ``X ~ Binomial(n_A + n_B, 1/2)``. Except with probability alpha the class is g(x), unless it abstains.

    Args:
        key: a single key; sample i takes ``fold_in(key, i)``.
        logits_fn: f, see `certify`.
        image: float32 ``(H, W, C)`` in [0, 1].
        sigma: standard deviation of the noise, above 0.
        n: samples, at least 1.
        alpha: probability that the class may be wrong, in (0, 1).
        batch_size: samples at a time on each device.

    Returns:
        The class, or `ABSTAIN`.

    Raises:
        ValueError: an argument out of range, or not a single key or image.

    Reference: PREDICT, Section 3.2.1.
    """
    _check(key, image, sigma, alpha, batch_size)
    check_count(n, "n")
    return predicted_class(_sample(key, as_it_is(logits_fn), image, sigma, n, batch_size), alpha)


def predicted_class(counts: Array, alpha: float) -> int:
    """What `predict` says on these counts: the most frequent class, or `ABSTAIN`.

    Args:
        counts: int ``(classes,)``, on how many samples f said each class, as in `Certificate`.
        alpha: probability that the class may be wrong, in (0, 1).

    Raises:
        ValueError: alpha out of range.
    """
    from scipy.special import bdtrc  # `import rbf_jax` shall not pay for it

    check_fraction(alpha, "alpha")
    label = int(np.argmax(counts))
    top, second = int(counts[label]), int(np.delete(counts, label).max(initial=0))
    return label if 2 * bdtrc(top - 1, top + second, 0.5) <= alpha else ABSTAIN
