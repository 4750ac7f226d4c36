"""Rebuilding images from RBF filters (Section III b, Eq. 4 of the paper).

Every patch becomes a weighted mean of the filters' templates, or of noisy samples of them; the rebuilt patches are
stitched by averaging their overlaps. Nothing here is learned.

The computation is tiled over images and repeated in the backward pass, like flash attention with filters for keys and
values: the (B, P, K) maps of scores and weights, by far the largest arrays, exist for one tile only.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax import parallel
from rbf_jax.checks import (
    check_choice,
    check_count,
    check_images,
    check_key,
    check_not_negative,
    check_one_number,
    check_positive,
    is_concrete,
)
from rbf_jax.patches import extract_patches, stitch_patches
from rbf_jax.rbf import VARIANCE_FLOOR, RBFFilters, check_filters, match_scores, ratio, safe_sqrt, tile_images
from rbf_jax.types import Array, Key, one_for_each

NOISES = ("per_run", "per_patch")
SCALES = ("variance", "sigma", "sqrt_sigma")
MAX_BETA1 = 100.0


class Beta1(NamedTuple):
    """Sharpness of the weights, natural base, in training and in testing."""

    train: float
    test: float


PRESETS = {
    # The released code writes 2^(125 v) in training and 2^(25 v) in testing, its second version 2^(25 v) in both.
    "code": Beta1(125 * math.log(2), 25 * math.log(2)),
    "v2": Beta1(25 * math.log(2), 25 * math.log(2)),
    "paper": Beta1(25.0, 25.0),
}
"""Readings of beta1: the paper says 25 "during testing" and exp, the code 2 to the power."""


def _mix(
    filters: RBFFilters, patches: Array, beta1: Array | float, values: Array, variance_floor: float, constant: str
) -> tuple[Array, Array, Array]:
    """Unnormalised weights ``(..., P, K)``, their sum ``(..., P, 1)`` and the weighted mean of values ``(K, V)``.

    ``exp(beta1 sigmoid(s)) = exp(beta1 / 2) exp(beta1 / 2 tanh(s / 2))``; the first factor cancels. One matmul yields
    the weighted sum and, by a column of ones, the normaliser.
    """
    scores = match_scores(filters, patches, variance_floor=variance_floor, constant=constant)
    raw = jnp.exp(0.5 * beta1 * jnp.tanh(0.5 * scores))
    columns = jnp.concatenate([values, jnp.ones_like(values[:, :1])], -1)
    sums = jnp.matmul(raw, columns, precision=jax.lax.Precision.HIGHEST)
    total = sums[..., -1:]
    return raw, total, ratio(sums[..., :-1], total)


def mixing_weights(
    filters: RBFFilters,
    patches: Array,
    beta1: Array | float,
    *,
    variance_floor: float = VARIANCE_FLOOR,
    constant: str = "none",
) -> Array:
    """The weight of every filter in every patch: ``w_j = exp(beta1 sigmoid(s_j)) / sum_k exp(beta1 sigmoid(s_k))``.

    Args:
        filters: the K filters.
        patches: float32 ``(..., P, D)`` in [0, 1].
        beta1: sharpness, in (0, 100]; natural base.
        variance_floor: see `rbf.match_scores`.
        constant: see `rbf.match_scores`.

    Returns:
        Weights ``(..., P, K)`` that sum to 1.

    Raises:
        ValueError: beta1 out of range, or what `rbf.match_scores` raises.

    Reference: Section III b, step 1.
    """
    check_beta1(beta1)
    raw, total, _ = _mix(filters, patches, beta1, filters.flat_means, variance_floor, constant)
    return ratio(raw, total)


def sample_std(filters: RBFFilters, beta2: Array | float, scale: str = "variance") -> Array:
    """Standard deviation per coordinate of the samples of each filter (Eq. 4).

    With the filter's total variance ``sigma^2``: ``beta2 sigma^2`` for ``"variance"`` (the released code), ``beta2
    sigma`` for ``"sigma"``, ``sqrt(beta2 sigma)`` for ``"sqrt_sigma"`` (Eq. 4 to the letter: ``sigma beta2`` is the
    variance).

    Args:
        filters: the K filters.
        beta2: noise level, at least 0.
        scale: which rule.

    Returns:
        ``(K,)``.

    Raises:
        ValueError: beta2 below 0 or an unknown scale.
    """
    check_choice(scale, "scale", SCALES)
    check_beta2(beta2)
    if scale == "variance":
        return beta2 * filters.variances
    sigma = safe_sqrt(filters.variances)
    return beta2 * sigma if scale == "sigma" else safe_sqrt(beta2 * sigma)


def check_beta1(beta1: Array | float) -> None:
    """Raises ValueError unless 0 < beta1 <= 100: beyond that small gradients leave the range of float32."""
    check_one_number(beta1, "beta1")
    check_positive(beta1, "beta1")
    if is_concrete(beta1) and float(beta1) > MAX_BETA1:
        raise ValueError(f"beta1 must be at most {MAX_BETA1} (float32), got {beta1}")


def check_beta2(beta2: Array | float) -> None:
    """Raises ValueError unless it is one number of at least 0: several would be taken for one of each filter."""
    check_one_number(beta2, "beta2")
    check_not_negative(beta2, "beta2")


def _check(filters: RBFFilters, images: Array, beta1: Array | float) -> None:
    check_images(images)
    check_filters(filters, images.shape[-1])
    check_beta1(beta1)


def _map_tiles(function: Callable[..., Array], filters: RBFFilters, images: Array, *more: Array) -> Array:
    """Applies the function to single images in tiles, forgetting all that is inside for the backward pass."""
    tile = tile_images(images.shape, filters.size, filters.means.shape[0])

    def on_device(*arrays: Array) -> Array:
        return jax.lax.map(lambda xs: jax.checkpoint(function)(*xs), arrays, batch_size=tile)

    # XLA would gather what a loop goes over.
    divisible = images.shape[0] % parallel.count() == 0
    return (parallel.per_device(on_device) if divisible else on_device)(images, *more)


def reconstruct(
    filters: RBFFilters,
    images: Array,
    beta1: Array | float,
    *,
    variance_floor: float = VARIANCE_FLOOR,
    constant: str = "none",
) -> Array:
    """Static reconstruction: every patch becomes ``sum_j w_j mu_j`` (z_j = mu_j in Eq. 4), overlaps are averaged.

    Call it under ``jit``: called eagerly, its loop over tiles is compiled anew each time.

    Args:
        filters: the K filters.
        images: float32 ``(B, H, W, C)`` in [0, 1].
        beta1: sharpness of the weights, in (0, 100], natural base; may be traced. See `PRESETS`.
        variance_floor: see `rbf.match_scores`.
        constant: see `rbf.match_scores`.

    Returns:
        Images ``(B, H, W, C)`` in [0, 1]. Differentiable in images, filters and beta1.

    Raises:
        ValueError: images, filters or beta1 out of range, or shapes that do not belong together. Under ``jit`` values
            cannot be looked at: images of 0 to 255 pass, and what comes out means nothing.

    Reference: Section III b.
    """
    _check(filters, images, beta1)

    def rebuild(image: Array) -> Array:
        patches = extract_patches(image, filters.size)
        mean = _mix(filters, patches, beta1, filters.flat_means, variance_floor, constant)[2]
        return stitch_patches(mean, images.shape[1:], filters.size)

    return _map_tiles(rebuild, filters, images)


def sample_reconstruction(
    key: Key,
    filters: RBFFilters,
    images: Array,
    beta1: Array | float,
    beta2: Array | float,
    *,
    noise: str = "per_run",
    scale: str = "variance",
    draws: int | None = None,
    variance_floor: float = VARIANCE_FLOOR,
    constant: str = "none",
) -> Array:
    """Sampled reconstruction: every patch becomes ``sum_j w_j z_j`` with ``z_j ~ N(mu_j, s_j^2 I)``, clipped to [0, 1].

    ``s_j`` is `sample_std`. What is drawn when is open in the paper:

    - ``noise="per_run"``, the released code: one sample of each filter serves all patches, and with a single key
      all images of the batch. With one key for each example, every example is a run of its own.
    - ``noise="per_patch"``: each patch draws its own samples. Their weighted sum is exactly ``N(sum_j w_j mu_j,
      sum_j w_j^2 s_j^2 I)``, so it is drawn from that, at the cost of one more matmul column.

    Call it under ``jit``, as `reconstruct`; over many devices (``jax.set_mesh``) it must be.

    Args:
        key: one key, or one for each example, ``(B,)``.
        filters: the K filters.
        images: float32 ``(B, H, W, C)`` in [0, 1].
        beta1: sharpness of the weights, in (0, 100], natural base; may be traced.
        beta2: noise level, at least 0; may be traced.
        noise: ``"per_run"`` or ``"per_patch"``.
        scale: ``"variance"``, ``"sigma"`` or ``"sqrt_sigma"``, see `sample_std`.
        draws: None for one draw, or how many: they share one computation of the weights.
        variance_floor: see `rbf.match_scores`.
        constant: see `rbf.match_scores`.

    Returns:
        Images ``(B, H, W, C)`` in [0, 1], or ``(draws, B, H, W, C)``. The gradient in the images is exact: the clip
        zeroes it where it bites.

    Raises:
        ValueError: an argument out of range, as for `reconstruct`.

    Reference: Section III b, Eq. 4.
    """
    _check(filters, images, beta1)
    check_key(key)
    check_choice(noise, "noise", NOISES)
    if draws is not None:
        check_count(draws, "draws")
    if key.shape not in ((), images.shape[:1]):
        raise ValueError(f"key must be a single key or one for each of {images.shape[0]} images, got shape {key.shape}")
    m = 1 if draws is None else draws
    std = sample_std(filters, beta2, scale)
    means = filters.flat_means
    count, width = means.shape

    def samples(key: Key) -> Array:  # (K, m * D)
        normal = jax.random.normal(key, (count, m, width), means.dtype)
        return (means[:, None] + std[:, None, None] * normal).reshape(count, m * width)

    def stitch(patches: Array) -> Array:
        """``(P, m, D)`` -> ``(m, H, W, C)``."""
        return jnp.clip(stitch_patches(patches.swapaxes(0, 1), images.shape[1:], filters.size), 0, 1)

    def mix(image: Array, values: Array) -> tuple[Array, Array, Array]:
        return _mix(filters, extract_patches(image, filters.size), beta1, values, variance_floor, constant)

    def rebuild_per_run(values: Array, image: Array) -> Array:
        return stitch(mix(image, values)[2].reshape(-1, m, width))

    def rebuild_own_run(image: Array, key: Key) -> Array:
        return rebuild_per_run(samples(key), image)

    def rebuild_per_patch(image: Array, key: Key) -> Array:
        raw, total, mean = mix(image, means)
        spread = safe_sqrt(jnp.matmul(jnp.square(ratio(raw, total)), std**2, precision=jax.lax.Precision.HIGHEST))
        return stitch(
            mean[:, None] + spread[:, None, None] * jax.random.normal(key, (mean.shape[0], m, width), mean.dtype)
        )

    if noise == "per_patch":
        result = _map_tiles(rebuild_per_patch, filters, images, one_for_each(key, images.shape[0]))
    elif key.shape:
        result = _map_tiles(rebuild_own_run, filters, images, key)
    else:
        result = _map_tiles(functools.partial(rebuild_per_run, samples(key)), filters, images)
    return result[:, 0] if draws is None else result.swapaxes(0, 1)


def bpda(static: Array, sampled: Array) -> Array:
    """The sampled reconstruction with the gradient of the static one: ``static + stop_gradient(sampled - static)``.

    The paper's adaptive attack: nothing changes in the forward pass, the backward pass takes z_j = mu_j and goes round
    the clip, also where it bites.
    """
    return static + jax.lax.stop_gradient(sampled - static)
