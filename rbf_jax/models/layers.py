"""Convolution, pooling and batch norm that are fast on CPU, also inside compiled loops.

XLA's CPU backend has one fast path for convolutions: channels last, forward. The gradients that autodiff makes are
transposed convolutions; inside ``lax.scan`` and ``while`` these fall off that path and take 20 to 110 times as long
(jax-ml/jax issue 12868). Here both gradients are written as forward convolutions on CPU, the large ones by Winograd's
minimal filtering; elsewhere they are autodiff's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rbf_jax.checks import check_count
from rbf_jax.models import winograd

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def _native(images: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=_DIMENSIONS)


def _taps_2x2(images: Array, kernel: Array) -> Array:
    """A 3x3 convolution of 2x2 images, a product for each tap: four pixels see its middle, two an edge, one a corner.

    XLA's CPU convolution of so small an image runs at about 1 GFLOP/s, this at the rate of a matmul; and it spares the
    20 of the 36 products that fall on the padding.
    """
    total = jnp.zeros((*images.shape[:3], kernel.shape[3]), images.dtype)
    for i, j in np.ndindex(3, 3):
        # Output rows and columns whose input at this tap lies inside.
        rows, cols = ((max(0, 1 - k), min(2, 3 - k)) for k in (i, j))
        seen = images[:, rows[0] + i - 1 : rows[1] + i - 1, cols[0] + j - 1 : cols[1] + j - 1]
        around = ((0, 0), (rows[0], 2 - rows[1]), (cols[0], 2 - cols[1]), (0, 0))
        total += jnp.pad(jnp.matmul(seen, kernel[i, j]), around)
    return total


def _is_2x2(images: Array, kernel: Array) -> bool:
    return images.shape[1:3] == (2, 2) and kernel.shape[:2] == (3, 3)


def _cpu(images: Array, kernel: Array) -> Array:
    if _is_2x2(images, kernel):
        return _taps_2x2(images, kernel)
    return winograd.conv(images, kernel) if winograd.pays(images, kernel) else _native(images, kernel)


def _cpu_gradients(images: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    if _is_2x2(images, kernel):
        return jax.vjp(_taps_2x2, images, kernel)[1](cotangent)
    d_images = _cpu(cotangent, kernel[::-1, ::-1].swapaxes(2, 3))
    if winograd.pays(images, kernel):
        return d_images, winograd.kernel_gradient(images, cotangent)
    # The images' batch becomes the contracted channel, the cotangent the kernel.
    high, wide = kernel.shape[0] // 2, kernel.shape[1] // 2
    d_kernel = jax.lax.conv_general_dilated(
        images.transpose(3, 1, 2, 0),
        cotangent.transpose(1, 2, 0, 3),
        (1, 1),
        ((high, high), (wide, wide)),
        dimension_numbers=_DIMENSIONS,
    )
    return d_images, d_kernel.transpose(1, 2, 0, 3)


def _native_gradients(images: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(_native, images, kernel)[1](cotangent)


@jax.custom_vjp
def conv(images: Array, kernel: Array) -> Array:
    """Convolution, stride 1, zero padding to the same size.

    Args:
        images: ``(B, H, W, C)``.
        kernel: ``(h, w, C, K)``, h and w odd.

    Returns:
        ``(B, H, W, K)``. Differentiable in reverse mode only (``grad``, not ``jvp``).

    Raises:
        ValueError: an even kernel size.
    """
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"kernel must have odd height and width, got {kernel.shape[:2]}")
    return jax.lax.platform_dependent(images, kernel, cpu=_cpu, default=_native)


def _conv_forward(images: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return conv(images, kernel), (images, kernel)


def _conv_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    return jax.lax.platform_dependent(*residuals, cotangent, cpu=_cpu_gradients, default=_native_gradients)


conv.defvjp(_conv_forward, _conv_backward)


def _channel_sums(images: Array) -> Array:
    """Sums over all axes but the last."""

    # On CPU as a product with ones: XLA's own sum over so many pixels takes seven times as long.
    def product(images: Array) -> Array:
        flat = images.reshape(-1, images.shape[-1])
        return jnp.matmul(jnp.ones_like(flat[:, 0]), flat)

    def total(images: Array) -> Array:
        return images.sum(tuple(range(images.ndim - 1)))

    return jax.lax.platform_dependent(images, cpu=product, default=total)


@jax.custom_vjp
def _add_bias(images: Array, bias: Array) -> Array:
    return images + bias


def _add_bias_forward(images: Array, bias: Array) -> tuple[Array, None]:
    return images + bias, None


def _add_bias_backward(_: None, cotangent: Array) -> tuple[Array, Array]:
    return cotangent, _channel_sums(cotangent)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def _normalize(images: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array, Array]:
    """Batch norm, and its mean and variance, which are for the running averages and have no gradient."""
    return _normalize_forward(images, scale, bias, epsilon)[0]


def _normalize_forward(
    images: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array, Array]]:
    count = images.size // images.shape[-1]
    mean = _channel_sums(images) / count
    centred = images - mean
    variance = _channel_sums(jnp.square(centred)) / count
    inverse = jax.lax.rsqrt(variance + epsilon)
    return (centred * inverse * scale + bias, mean, variance), (images, scale, mean, inverse)


def _normalize_backward(
    residuals: tuple[Array, Array, Array, Array], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, None]:
    images, scale, mean, inverse = residuals
    cotangent, count = cotangents[0], images.size // images.shape[-1]
    standard = (images - mean) * inverse
    d_scale, d_bias = _channel_sums(cotangent * standard), _channel_sums(cotangent)
    return scale * inverse * (cotangent - (d_bias + standard * d_scale) / count), d_scale, d_bias, None


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _first_maximum(a: Array, b: Array) -> Array:
    # jnp.maximum shares the gradient of a tie, the native pool gives it to the first. NaN is no maximum, but stays.
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def max_pool(images: Array) -> Array:
    """Maximum over windows of 2x2 at stride 2; an odd last row or column is dropped.

    By slices, columns first: the gradient of a tie goes to the window's first entry, as in the native pool, whose own
    gradient (select-and-scatter) takes 30 times as long on CPU.

    Args:
        images: ``(B, H, W, C)``, H and W at least 2.

    Returns:
        ``(B, H // 2, W // 2, C)``.

    Raises:
        ValueError: nothing to pool.
    """
    if min(images.shape[1:3]) < 2:
        raise ValueError(f"images must be at least 2 pixels high and wide to be pooled, got shape {images.shape}")
    height, width = images.shape[1] // 2 * 2, images.shape[2] // 2 * 2
    images = images[:, :height, :width]
    columns = _first_maximum(images[:, :, ::2], images[:, :, 1::2])
    return _first_maximum(columns[:, ::2], columns[:, 1::2])


class Conv(nn.Module):
    """`conv` with bias as a Flax module: parameters ``kernel (size, size, C, features)`` and ``bias (features,)``.

    Attributes:
        features: output channels.
        size: odd height and width of the kernel.
        use_bias: add a bias.
    """

    features: int
    size: int = 3
    use_bias: bool = True

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """``(B, H, W, C)`` -> ``(B, H, W, features)``."""
        check_count(self.size, "size")
        shape = (self.size, self.size, images.shape[-1], self.features)
        result = conv(images, self.param("kernel", nn.initializers.he_normal(), shape))
        if self.use_bias:
            result = _add_bias(result, self.param("bias", nn.initializers.zeros_init(), (self.features,)))
        return result


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last: (x - mean) / sqrt(variance + epsilon) * scale + bias.

    In the layout of ``flax.linen.BatchNorm``: parameters ``scale`` and ``bias``, in the collection ``batch_stats`` the
    running averages ``mean`` and ``var``, each ``(C,)``. Gradient and statistics are written with sums that are fast on
    CPU, where it takes a quarter of the time of Flax's.

    Attributes:
        momentum: of the running averages, in [0, 1].
        epsilon: added to the variance.

    Reference: Ioffe and Szegedy, ICML 2015.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """``(..., C)`` -> the same shape; with ``train`` by the batch's mean and variance, else by the running ones."""
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_variance = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones_init(), channels)
        bias = self.param("bias", nn.initializers.zeros_init(), channels)
        if not train:
            factor = jax.lax.rsqrt(running_variance.value + self.epsilon) * scale
            return (x - running_mean.value) * factor + bias
        result, mean, variance = _normalize(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            for average, value in ((running_mean, mean), (running_variance, variance)):
                average.value = self.momentum * average.value + (1 - self.momentum) * value
        return result
