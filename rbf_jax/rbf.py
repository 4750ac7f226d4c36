"""RBF filters and their match scores (Eq. 2 of the paper)."""

import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.checks import check_choice, check_positive, is_concrete, value_range
from rbf_jax.files import read_npz, write_npz
from rbf_jax.patches import patch_grid
from rbf_jax.types import Array

VARIANCE_FLOOR = 1e-12
CONSTANTS = ("none", "eq9", "eq2")


class RBFFilters(NamedTuple):
    """A density of image patches: K isotropic Gaussians.

    Attributes:
        means: float32 ``(K, h, w, C)`` in [0, 1], the templates.
        variances: float32 ``(K,)``, at least 0: the *total* variance of each, the mean of ``|z - mu|^2`` over its
            patches (Eq. 3 squared), summed over the D dimensions of a patch.
    """

    means: Array
    variances: Array

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a filter, pixels."""
        return self.means.shape[1], self.means.shape[2]

    @property
    def flat_means(self) -> Array:
        """The means as ``(K, D)``, D ordered (row, col, channel)."""
        return self.means.reshape(self.means.shape[0], -1)


def check_filters(filters: RBFFilters, channels: int | None = None) -> None:
    """Raises ValueError unless the filters have the right shapes, dtype and ranges, and that many channels."""
    means, variances = filters
    if means.ndim != 4 or 0 in means.shape:
        raise ValueError(f"filter means must have shape (K, h, w, C) and not be empty, got {means.shape}")
    if variances.shape != means.shape[:1]:
        raise ValueError(f"filter variances must have shape ({means.shape[0]},), got {variances.shape}")
    if means.dtype != jnp.float32 or variances.dtype != jnp.float32:
        raise ValueError(f"filters must be float32, got means {means.dtype} and variances {variances.dtype}")
    if channels is not None and means.shape[3] != channels:
        raise ValueError(f"filters of {means.shape[3]} channels do not fit images of {channels}")
    for value, name, most in ((means, "means", 1.0), (variances, "variances", 3.4e38)):
        if is_concrete(value):
            low, high = value_range(value)
            if not (low >= 0 and high <= most):
                allowed = "lie in [0, 1]" if most == 1 else "be finite and at least 0"
                raise ValueError(f"filter {name} must {allowed}, got values from {low} to {high}")


def check_patches(filters: RBFFilters, patches: Array) -> None:
    """Raises ValueError unless the filters are in order and the patches are float32 ``(..., D)`` of their size."""
    check_filters(filters)
    if patches.dtype != jnp.float32:
        raise ValueError(f"patches must be float32 in [0, 1], got {patches.dtype}")
    if patches.shape[-1] != filters.flat_means.shape[-1]:
        raise ValueError(f"patches of D = {patches.shape[-1]} do not fit filters of {filters.means.shape[1:]}")


def tile_images(images_shape: tuple[int, ...], size: tuple[int, int], filters: int) -> int:
    """How many images to treat at once so that their maps of P x K scores fit a fixed memory.

    On CPU that is what the caches hold (5 MiB, measured to be fastest); an accelerator wants longer tiles (256 MiB).
    """
    rows, cols = patch_grid(images_shape, size)
    budget = 5 * 2**18 if jax.default_backend() == "cpu" else 2**26
    return min(max(1, budget // (rows * cols * filters)), images_shape[0])


def _brightness(values: Array) -> Array:
    """Mean over the last axis, exact where all values are the same: a plain mean of 27 ones may round to 1 + 2**-23."""
    first = values[..., :1]
    return first + jnp.mean(values - first, -1, keepdims=True)


def squared_distances(filters: RBFFilters, patches: Array) -> Array:
    """``|z - mu_j|^2`` of patches ``(..., P, D)`` to each filter, ``(..., P, K)``, float32, at least 0.

    ``|z|^2 - 2 z.mu + |mu|^2`` by one matmul would cancel, and a filter of tiny variance magnifies what is left: such
    filters are flat patches (black, white, sky). So the mean brightness is split off: with ``z = m + r``, ``mu = n +
    q``, ``|z - mu|^2 = D (m - n)^2 + |r|^2 - 2 r.q + |q|^2``, where only the small residuals pass through the matmul
    (their norms folded in as extra columns). An exactly black or white patch is at distance 0 from a black or white
    filter.
    """
    means = filters.flat_means
    patch_means, filter_means = _brightness(patches), _brightness(means)
    r, q = patches - patch_means, means - filter_means
    left = jnp.concatenate([r, jnp.sum(r * r, -1, keepdims=True), jnp.ones_like(patch_means)], -1)
    right = jnp.concatenate([-2 * q, jnp.ones_like(filter_means), jnp.sum(q * q, -1, keepdims=True)], -1)
    texture = jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(texture, 0) + means.shape[-1] * (patch_means - filter_means[:, 0]) ** 2


def peak_scores(filters: RBFFilters, *, variance_floor: float = VARIANCE_FLOOR, constant: str = "none") -> Array:
    """Each filter's score at its own mean, ``(K,)``: the normaliser of `match_scores`, with the same options.

    Raises:
        ValueError: an unknown constant, or a floor out of range.
    """
    check_choice(constant, "constant", CONSTANTS)
    check_positive(variance_floor, "variance_floor")
    log_variance = jnp.log(jnp.maximum(filters.variances, variance_floor))
    if constant == "none":
        return -0.5 * log_variance
    if constant == "eq9":
        return -0.5 * (math.log(2 * math.pi) + log_variance)
    return -0.5 * (math.log(2 * math.pi) + 0.5 * log_variance)


@jax.custom_jvp
def ratio(numerator: Array, denominator: Array) -> Array:
    """A quotient whose gradient divides twice by the denominator, where JAX's divides by its square.

    The square leaves float32 for a variance of 1e-20, and for the sum of weights at beta1 = 86.64, about e^43.
    """
    return numerator / denominator


@ratio.defjvp
def _ratio_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    value = ratio(*primals)
    return value, (tangents[0] - value * tangents[1]) / primals[1]


def safe_sqrt(values: Array) -> Array:
    """Square root with slope 0 instead of infinity at 0, where the gradient would become NaN."""
    positive = values > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, values, 1)), 0)


def match_scores(
    filters: RBFFilters, patches: Array, *, variance_floor: float = VARIANCE_FLOOR, constant: str = "none"
) -> Array:
    """Match score of every patch with every filter.

    ``s(z, g_j) = -|z - mu_j|^2 / (2 v_j) + c_j`` with ``v_j = max(variance_j, variance_floor)``, always in float32.

    A filter whose patches are all alike has variance 0 (the all-black patch of MNIST): the floor alone decides how high
    it scores at exactly that patch (13.8 at 1e-12, 23.0 at 1e-20 without constant) and that it scores next to nothing
    anywhere else. The stored variance is not changed. Of a textured patch the distance is known to about 1e-7 only, so
    that such a filter should be flat, as they are in photographs and digits.

    Args:
        filters: the K filters.
        patches: float32 ``(..., P, D)`` in [0, 1].
        variance_floor: lowest variance used, above 0.
        constant: ``"none"``: ``c = -log(v)/2``, the authors' code; ``"eq9"``: ``-log(2 pi v)/2``, a normal density in
            one dimension, Eq. 9; ``"eq2"``: ``-log(2 pi sqrt(v))/2``, Eq. 2 to the letter.

    Returns:
        Scores ``(..., P, K)``.

    Raises:
        ValueError: a wrong shape or dtype, filters out of range, an unknown constant, or a floor not above 0.

    Reference: Eq. 2, Nandy et al., IJCNN 2020.
    """
    check_patches(filters, patches)
    peak = peak_scores(filters, variance_floor=variance_floor, constant=constant)
    variances = jnp.maximum(filters.variances, variance_floor)
    return peak - squared_distances(filters, patches) * ratio(jnp.full_like(variances, 0.5), variances)


def save(path: str | os.PathLike[str], filters: RBFFilters) -> None:
    """Writes filters as ``.npz`` with ``means (K, h, w, C)`` and ``variances (K,)``; never leaves half a file.

    Raises:
        ValueError: filters of other shapes, or out of range.
        OSError: the file cannot be written.
    """
    check_filters(filters)
    write_npz(path, {"means": np.asarray(filters.means), "variances": np.asarray(filters.variances)})


def load(path: str | os.PathLike[str]) -> RBFFilters:
    """Reads filters written by `save` (or the authors', stored in the same shape; float64 is cast to float32).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a filter file, or filters out of range.
    """
    kind = "a filter file (.npz with 'means' (K, h, w, C) and 'variances' (K,))"
    stored = read_npz(path, kind, "Fit the filters again")
    try:
        means, variances = (jnp.asarray(stored[key], jnp.float32) for key in ("means", "variances"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not {kind}: {error}") from error
    filters = RBFFilters(means, variances)
    try:
        check_filters(filters)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return filters
