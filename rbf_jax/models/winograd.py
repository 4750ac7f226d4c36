"""3x3 convolution by Winograd's minimal filtering: a quarter of the products of the direct sum.

A tile of 4x4 outputs d * g = A^T [(G g G^T) . (B^T d B)] A takes 36 products per pair of channels where nine taps take
144 (F(4x4, 3x3) with the points 0, 1, -1, 2, -2 and infinity). Summed over the input channels, each of the 36 is a
matrix product of all tiles. In float32 its error is about ten times that of the direct sum, 1e-5 of the largest value.

Reference: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# B^T, G and A^T.
_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
# On both axes at once: (36, 9).
_KERNEL_2D = np.kron(_KERNEL, _KERNEL)


def pays(images: Array, kernel: Array) -> bool:
    """Whether `conv` can take these arguments and is faster on CPU than the direct sum.

    With fewer channels the transforms of the tiles outweigh what the products save, with fewer pixels the kernel's.
    """
    batch, height, width, channels = images.shape
    fits = kernel.shape[:2] == (3, 3) and height % 4 == 0 and width % 4 == 0 and jnp.finfo(images.dtype).bits >= 32
    return fits and min(channels, kernel.shape[3]) >= 128 and batch * height * width >= 256


def _combine(matrix: np.ndarray, parts: Sequence[Array], axis: int) -> Array:
    """Stacks the rows of matrix @ parts along a new axis; written out, for most of the entries are 0 or 1."""
    rows = ([float(factor) * part for factor, part in zip(row, parts, strict=True) if factor] for row in matrix)
    return jnp.stack([functools.reduce(operator.add, row) for row in rows], axis)


def _input_tiles(images: Array) -> Array:
    """B^T d B of the 6x6 pixels that each tile of outputs sees: ``(36, tiles, C)``."""
    height, width, channels = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    columns = _combine(_INPUT, [padded[:, :, k : k + width - 3 : 4] for k in range(6)], 0)
    rows = _combine(_INPUT, [columns[:, :, k : k + height - 3 : 4] for k in range(6)], 0)
    return rows.reshape(36, -1, channels)


def conv(images: Array, kernel: Array) -> Array:
    """Convolution, stride 1, zero padding: ``(B, H, W, C)``, H and W multiples of 4, and ``(3, 3, C, K)``."""
    batch, height, width, channels = images.shape
    # Behind the barrier: of a constant kernel the compiler would work out the transform, and take seconds for each.
    kernel = jax.lax.optimization_barrier(kernel)
    transformed = jnp.matmul(_KERNEL_2D.astype(kernel.dtype), kernel.reshape(9, -1)).reshape(36, channels, -1)
    products = jnp.matmul(_input_tiles(images), transformed)
    products = products.reshape(6, 6, batch, height // 4, width // 4, -1)
    rows = _combine(_OUTPUT, list(products), 3)
    return _combine(_OUTPUT, list(rows), 4).reshape(batch, height, width, -1)


def kernel_gradient(images: Array, cotangent: Array) -> Array:
    """What `conv` of the images pulls the cotangent back to in its kernel: ``(3, 3, C, K)``."""
    batch, height, width, features = cotangent.shape
    tiles = cotangent.reshape(batch, height // 4, 4, width // 4, 4, features)
    columns = _combine(_OUTPUT.T, [tiles[:, :, :, :, k] for k in range(4)], 0)
    rows = _combine(_OUTPUT.T, [columns[:, :, :, k] for k in range(4)], 0)
    gradient = jnp.matmul(_input_tiles(images).swapaxes(1, 2), rows.reshape(36, -1, features))
    gradient = jnp.matmul(_KERNEL_2D.T.astype(gradient.dtype), gradient.reshape(36, -1))
    return gradient.reshape(3, 3, -1, features)
