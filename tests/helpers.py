"""What tests share: inputs, entry points, and the whole front end once more in plain float64 NumPy.

The reference is written to be read, from the equations alone: windows are cut one by one, distances are sums of squared
differences, the softmax subtracts its maximum, and the gradient is derived by hand.
"""

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from rbf_jax.rbf import RBFFilters

ROOT = Path(__file__).resolve().parents[1]

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles three times as fast, for tests of what is computed and not of how well it is rounded."""

shipped_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
"""Compiles as users do, also under `make test`, which compiles everything else quickly: for tests of rounding."""


def experiment(module: str, config: str, *arguments: str) -> list[str]:
    """The command of an entry point with a configuration, as in ``experiment("reproduce", "mnist.py:smoke")``."""
    return [sys.executable, "-m", f"experiments.{module}", f"--config=experiments/configs/{config}", *arguments]


def run_experiment(module: str, config: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = experiment(module, config, *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def random_filters(
    rng: np.random.Generator, count: int, size: tuple[int, int] = (3, 3), channels: int = 1, *, flat: bool = True
) -> RBFFilters:
    """Random templates of variance 0.02 to 0.5 a channel; with ``flat`` the first two are black and white, at 1e-20."""
    means = rng.uniform(0, 1, (count, *size, channels))
    variances = channels * np.exp(rng.uniform(math.log(0.02), math.log(0.5), count))
    if flat:
        means[0], means[1], variances[:2] = 0, 1, 1e-20
    return RBFFilters(jnp.asarray(means, jnp.float32), jnp.asarray(variances, jnp.float32))


def random_images(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Blocks of 4x4 pixels, some exactly black or white, the others with noise; float32 in [0, 1]."""
    batch, height, width, channels = shape
    coarse = rng.uniform(0, 1, (batch, -(-height // 4), -(-width // 4), channels))
    coarse *= rng.choice([0, 1], (*coarse.shape[:3], 1), p=[0.3, 0.7])
    coarse = np.where(rng.uniform(size=(*coarse.shape[:3], 1)) < 0.1, 1, coarse)
    images = coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width]
    noisy = np.clip(images + rng.normal(0, 0.05, shape), 0, 1)
    return np.where((images == 0) | (images == 1), images, noisy).astype(np.float32)


def float64(array: ArrayLike) -> np.ndarray:
    return np.asarray(array, np.float64)


def numpy_windows(image_shape: tuple[int, ...], size: tuple[int, int], stride: int = 1) -> list[tuple[slice, slice]]:
    """The windows of an image, rows first."""
    return [
        (slice(row, row + size[0]), slice(col, col + size[1]))
        for row in range(0, image_shape[-3] - size[0] + 1, stride)
        for col in range(0, image_shape[-2] - size[1] + 1, stride)
    ]


def numpy_extract(images: ArrayLike, size: tuple[int, int] = (3, 3), stride: int = 1) -> np.ndarray:
    """Images (B, H, W, C) -> patches (B, P, D)."""
    images = float64(images)
    cut = [images[:, rows, cols].reshape(len(images), -1) for rows, cols in numpy_windows(images.shape, size, stride)]
    return np.stack(cut, 1)


def numpy_overlap_sum(
    patches: np.ndarray, image_shape: tuple[int, ...], size: tuple[int, int] = (3, 3), stride: int = 1
) -> np.ndarray:
    """Patches (B, P, D) -> images (B, H, W, C), overlaps summed."""
    total = np.zeros((len(patches), *image_shape))
    for p, (rows, cols) in enumerate(numpy_windows(image_shape, size, stride)):
        total[:, rows, cols] += patches[:, p].reshape(-1, *size, image_shape[-1])
    return total


def numpy_count(image_shape: tuple[int, ...], size: tuple[int, int] = (3, 3), stride: int = 1) -> np.ndarray:
    """How many windows lie on each pixel, (H, W, 1)."""
    count = np.zeros((*image_shape[:2], 1))
    for rows, cols in numpy_windows(image_shape, size, stride):
        count[rows, cols] += 1
    return count


def numpy_stitch(
    patches: np.ndarray, image_shape: tuple[int, ...], size: tuple[int, int] = (3, 3), stride: int = 1
) -> np.ndarray:
    """Patches (B, P, D) -> images (B, H, W, C), overlaps averaged, 0 where no window lies."""
    count = numpy_count(image_shape, size, stride)
    return numpy_overlap_sum(patches, image_shape, size, stride) / np.where(count == 0, 1, count)


def numpy_distances(filters: RBFFilters, patches: ArrayLike) -> np.ndarray:
    """Squared distances (..., K)."""
    means = float64(filters.means).reshape(len(filters.means), -1)
    return ((float64(patches)[..., None, :] - means) ** 2).sum(-1)


def numpy_scores(
    filters: RBFFilters, patches: ArrayLike, *, variance_floor: float = 1e-12, constant: str = "none"
) -> np.ndarray:
    """Eq. 2 with its three constants, (..., K)."""
    v = np.maximum(float64(filters.variances), variance_floor)
    normaliser = {"none": np.sqrt(v), "eq9": np.sqrt(2 * np.pi * v), "eq2": np.sqrt(2 * np.pi * np.sqrt(v))}[constant]
    return -numpy_distances(filters, patches) / (2 * v) - np.log(normaliser)


def numpy_weights(filters: RBFFilters, patches: ArrayLike, beta1: float, **options) -> np.ndarray:
    """Softmax of beta1 sigmoid(score), (..., K)."""
    exponent = beta1 * expit(numpy_scores(filters, patches, **options))
    weights = np.exp(exponent - exponent.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def numpy_reconstruct(
    filters: RBFFilters, images: ArrayLike, beta1: float, *, values: np.ndarray | None = None, **options
) -> np.ndarray:
    """Static reconstruction, or with samples ``values (K, D)`` in place of the means the sampled one; not clipped."""
    images = float64(images)
    _, h, w, _ = filters.means.shape
    values = float64(filters.means).reshape(len(filters.means), -1) if values is None else values
    weights = numpy_weights(filters, numpy_extract(images, (h, w)), beta1, **options)
    return numpy_stitch(weights @ values, images.shape[1:], (h, w))


class Gradients(NamedTuple):
    """Of ``sum(cotangent * reconstruction)``, or how large an error in each is to be counted."""

    images: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    beta1: np.ndarray


def numpy_gradients(
    filters: RBFFilters,
    images: ArrayLike,
    beta1: float,
    cotangent: np.ndarray,
    *,
    values: np.ndarray | None = None,
    variance_floor: float = 1e-12,
    constant: str = "none",
) -> tuple[Gradients, Gradients]:
    """Gradients of `numpy_reconstruct`, the samples ``values`` moving with the means and not with the variances.

    Returns:
        The gradients, and the scale of each: the largest entry for images and means, the sum of the absolute
        contributions of all patches for variances and beta1, where these cancel.
    """
    images = float64(images)
    shape, (_, h, w, _) = images.shape[1:], filters.means.shape
    means = float64(filters.means).reshape(len(filters.means), -1)
    values = means if values is None else values
    variances = float64(filters.variances)
    v = np.maximum(variances, variance_floor)
    patches = numpy_extract(images, (h, w))
    squashed = expit(numpy_scores(filters, patches, variance_floor=variance_floor, constant=constant))
    weights = numpy_weights(filters, patches, beta1, variance_floor=variance_floor, constant=constant)

    count = numpy_count(shape, (h, w))
    d_patch = numpy_extract(cotangent / np.where(count == 0, 1, count), (h, w))
    d_weight = d_patch @ values.T
    d_exponent = weights * (d_weight - (weights * d_weight).sum(-1, keepdims=True))
    d_score = d_exponent * beta1 * squashed * (1 - squashed)
    pull = d_score[..., None] * (patches[..., None, :] - means) / v[:, None]  # (B, P, K, D)
    d_normaliser = {"none": 0.5, "eq9": 0.5, "eq2": 0.25}[constant] / v
    d_variance = d_score * (numpy_distances(filters, patches) / (2 * v**2) - d_normaliser)
    used = variances > variance_floor
    d_beta1 = d_exponent * squashed
    gradients = Gradients(
        images=numpy_overlap_sum(-pull.sum(2), shape, (h, w)),
        means=(pull.sum((0, 1)) + np.einsum("bpk,bpd->kd", weights, d_patch)).reshape(filters.means.shape),
        variances=d_variance.sum((0, 1)) * used,
        beta1=d_beta1.sum(),
    )
    scales = Gradients(
        images=np.abs(gradients.images).max(),
        means=np.abs(gradients.means).max(),
        variances=(np.abs(d_variance).sum((0, 1)) * used).max(),
        beta1=np.abs(d_beta1).sum(),
    )
    return gradients, scales


def recover_noise(filters: RBFFilters, images: ArrayLike, beta1: float, sampled: ArrayLike) -> np.ndarray:
    """The noise on the filters (draws, K, D) behind per-run samples (draws, B, H, W, C) that no clip has touched.

    A sample is the static reconstruction plus a linear function of the noise, so a few images determine all of it.
    """
    images = float64(images)
    _, h, w, channels = filters.means.shape
    count, width = len(filters.means), h * w * channels
    weights = numpy_weights(filters, numpy_extract(images, (h, w)), beta1)
    columns = [
        numpy_stitch(weights[..., j, None] * unit, images.shape[1:], (h, w)).ravel()
        for j in range(count)
        for unit in np.eye(width)
    ]
    difference = float64(sampled) - numpy_reconstruct(filters, images, beta1)
    noise, *_ = np.linalg.lstsq(np.stack(columns, 1), difference.reshape(len(difference), -1).T, rcond=None)
    return noise.T.reshape(-1, count, width)


def marked_images(count, shape, mark):
    """Random images, and labels of three classes: the label's row of the first column is brighter by the mark."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=count).astype(np.int32)
    images = rng.uniform(0, 1 - mark, (count, *shape)).astype(np.float32)
    images[np.arange(count), labels, 0, 0] += mark
    return images, labels
