"""Patches of images, and images from patches.

A patch is flattened to ``D = h * w * C`` in the order (row, col, channel); the patches of an image follow the same
order, rows first. Windows never leave the image (VALID).
"""

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.checks import check_count
from rbf_jax.types import Array


def patch_grid(image_shape: tuple[int, ...], size: tuple[int, int], stride: int = 1) -> tuple[int, int]:
    """Rows and columns of windows of that size in an image ``(..., H, W, C)``: ``(H - h) // stride + 1`` and alike.

    Raises:
        ValueError: the window or the stride is below 1, or the window does not fit into the image, or it is none.
    """
    if len(image_shape) < 3:
        raise ValueError(f"images must have shape (..., H, W, C), got {image_shape}")
    height, width = image_shape[-3:-1]
    for value, name in ((size[0], "size"), (size[1], "size"), (stride, "stride")):
        check_count(value, name)
    if size[0] > height or size[1] > width:
        raise ValueError(f"a patch of {size[0]}x{size[1]} does not fit into an image of {height}x{width}")
    return (height - size[0]) // stride + 1, (width - size[1]) // stride + 1


def extract_patches(images: Array, size: tuple[int, int] = (3, 3), stride: int = 1) -> Array:
    """Every window of every image.

    Args:
        images: ``(..., H, W, C)``.
        size: height and width of the window, pixels.
        stride: step between windows, pixels.

    Returns:
        Patches ``(..., P, D)``, ``P = rows * cols`` of `patch_grid`, ``D = h * w * C``.

    Raises:
        ValueError: the window does not fit, or size or stride is below 1.
    """
    rows, cols = patch_grid(images.shape, size, stride)
    views = [
        images[..., i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (cols - 1) + 1 : stride, :]
        for i in range(size[0])
        for j in range(size[1])
    ]
    lead, channels = images.shape[:-3], images.shape[-1]
    return jnp.concatenate(views, axis=-1).reshape(*lead, rows * cols, size[0] * size[1] * channels)


def overlap_sum(patches: Array, image_shape: tuple[int, ...], size: tuple[int, int], stride: int = 1) -> Array:
    """The adjoint of `extract_patches`: every pixel is the sum of the patches' values that lie on it.

    Args:
        patches: ``(..., P, D)``.
        image_shape: ``(H, W, C)`` of the images to build.
        size: height and width of the window, pixels.
        stride: step between windows, pixels.

    Returns:
        Images ``(..., H, W, C)``; 0 where no patch lies.

    Raises:
        ValueError: the patches' shape does not belong to that grid, or their dtype is none of floats.
    """
    rows, cols = patch_grid(image_shape, size, stride)
    height, width, channels = image_shape
    if patches.shape[-2:] != (rows * cols, size[0] * size[1] * channels):
        raise ValueError(
            f"patches of shape {patches.shape} do not belong to images of {image_shape} with windows of {size} at "
            f"stride {stride}: expected (..., {rows * cols}, {size[0] * size[1] * channels})"
        )
    if not jnp.issubdtype(patches.dtype, jnp.floating):
        raise ValueError(f"patches must be of a float dtype, in which sums fit, got {patches.dtype}")
    lead = patches.shape[:-2]
    # Split, not sliced: the gradient of nine slices would write the whole array nine times.
    views = jnp.split(patches.reshape(*lead, rows, cols, -1), size[0] * size[1], axis=-1)
    total = jnp.zeros((*lead, height, width, channels), patches.dtype)
    for (i, j), view in zip(np.ndindex(size), views, strict=True):
        high = (height - i - stride * (rows - 1) - 1, width - j - stride * (cols - 1) - 1)
        inner = ((i, high[0], stride - 1), (j, high[1], stride - 1), (0, 0, 0))
        total += jax.lax.pad(view, jnp.zeros((), view.dtype), [(0, 0, 0)] * len(lead) + list(inner))
    return total


def overlap_count(image_shape: tuple[int, ...], size: tuple[int, int], stride: int = 1) -> Array:
    """How many windows lie on each pixel, float32 ``(H, W, 1)``."""
    rows, cols = patch_grid(image_shape, size, stride)
    ones = jnp.ones((rows * cols, size[0] * size[1]), jnp.float32)
    return overlap_sum(ones, (*image_shape[:2], 1), size, stride)


def stitch_patches(
    patches: Array, image_shape: tuple[int, ...], size: tuple[int, int] = (3, 3), stride: int = 1
) -> Array:
    """Images from patches, the overlaps averaged: ``overlap_sum(patches) / overlap_count``.

    The exact inverse of `extract_patches` on the covered area, and its adjoint up to the count image.

    Args:
        patches: ``(..., P, D)``.
        image_shape: ``(H, W, C)`` of the images to build.
        size: height and width of the window, pixels.
        stride: step between windows, pixels.

    Returns:
        Images ``(..., H, W, C)``; 0 where no patch lies.

    Raises:
        ValueError: the patches' shape does not belong to that grid, or their dtype is none of floats.
    """
    count = overlap_count(image_shape, size, stride)
    return overlap_sum(patches, image_shape, size, stride) / jnp.maximum(count, 1)
