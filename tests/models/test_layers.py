"""Convolution, pooling and batch norm against the native operations, in value and gradient."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.models import winograd
from rbf_jax.models.layers import BatchNorm, Conv, conv, max_pool

SIZES = [((side, side), size) for side in (1, 3, 5) for size in ((2, 2), (3, 3), (7, 5), (28, 28))]
SIZES += [((3, 3), (1, 1)), ((3, 3), (2, 3)), ((1, 3), (7, 5)), ((5, 3), (2, 2))]


def native(images, kernel):
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def value_and_gradients(function, images, kernel, cotangent):
    value, pull = jax.vjp(function, images, kernel)
    return value, *pull(cotangent)


@jax.jit
def both(*args):
    return value_and_gradients(conv, *args), value_and_gradients(native, *args)


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * (1 + np.abs(b).max()))


def loop_conv(images, kernel):
    """Each output pixel the sum over the taps that lie inside, float64."""
    images, kernel = np.asarray(images, np.float64), np.asarray(kernel, np.float64)
    height, width = images.shape[1:3]
    result = np.zeros((*images.shape[:3], kernel.shape[3]))
    for i, j in np.ndindex(height, width):
        for a, b in np.ndindex(kernel.shape[:2]):
            row, col = i + a - kernel.shape[0] // 2, j + b - kernel.shape[1] // 2
            if 0 <= row < height and 0 <= col < width:
                result[:, i, j] += images[:, row, col] @ kernel[a, b]
    return result


@pytest.mark.parametrize(
    ("kernel_size", "size"), SIZES, ids=["{}x{} on {}x{}".format(*kernel, *size) for kernel, size in SIZES]
)
def test_conv_is_the_native_one(rng, kernel_size, size):
    images, kernel = normal(rng, 3, *size, 4), normal(rng, *kernel_size, 4, 5)
    cotangent = normal(rng, 3, *size, 5)
    found, expected = both(images, kernel, cotangent)
    assert_close(found, expected)
    if size != (28, 28):
        np.testing.assert_allclose(found[0], loop_conv(images, kernel), atol=1e-4)


@pytest.mark.parametrize("size", [(2, 2), (7, 5)], ids=["2x2", "7x5"])
def test_conv_inside_scan(rng, size):
    """A chain of convolutions: the gradient flows through all steps of the loop."""
    images, kernels = normal(rng, 2, *size, 3), normal(rng, 3, 3, 3, 3, 3) / 5
    cotangent = normal(rng, *images.shape)

    def chain(function):
        def run(images, kernels):
            return jax.lax.scan(lambda x, kernel: (jnp.tanh(function(x, kernel)), None), images, kernels)[0]

        return value_and_gradients(run, images, kernels, cotangent)

    assert_close(*jax.jit(lambda: (chain(conv), chain(native)))())


@pytest.mark.parametrize("size", [(2, 2), (7, 5)], ids=["2x2", "7x5"])
@pytest.mark.parametrize("axes", [(0, None, 0), (None, 0, 0), (0, 0, 0)], ids=["images", "kernels", "both"])
def test_conv_under_vmap(rng, size, axes):
    def batched(axis, *shape):
        return normal(rng, *shape) if axis is None else normal(rng, 4, *shape)

    images, kernel = batched(axes[0], 2, *size, 3), batched(axes[1], 3, 3, 3, 5)
    cotangent = normal(rng, 4, 2, *size, 5)

    def run(function):
        return jax.vmap(lambda *args: value_and_gradients(function, *args), axes)(images, kernel, cotangent)

    assert_close(*jax.jit(lambda: (run(conv), run(native)))())


@pytest.mark.parametrize("size", [(4, 4), (4, 8), (12, 8)], ids=lambda s: "{}x{}".format(*s))
def test_winograd_is_the_loop(rng, size):
    with jax.enable_x64(True):
        images, kernel = jnp.asarray(rng.normal(size=(2, *size, 3))), jnp.asarray(rng.normal(size=(3, 3, 3, 5)))
        cotangent = jnp.asarray(rng.normal(size=(2, *size, 5)))
        found = jax.jit(winograd.conv)(images, kernel), jax.jit(winograd.kernel_gradient)(images, cotangent)
        expected = jax.jit(lambda *args: jax.vjp(native, *args)[1](cotangent)[1])(images, kernel)
    np.testing.assert_allclose(found[0], loop_conv(images, kernel), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found[1], expected, rtol=1e-10, atol=1e-12)


def large(rng):
    """Just large enough for Winograd's filtering."""
    return normal(rng, 16, 4, 4, 128), normal(rng, 3, 3, 128, 130) / 34, normal(rng, 16, 4, 4, 130)


@pytest.mark.parametrize("outer", [lambda f: f, jax.vmap], ids=["alone", "vmap"])
def test_large_conv_is_the_native_one(rng, outer, monkeypatch):
    seen = []
    for name in ("conv", "kernel_gradient"):
        function = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *args, f=function, n=name: (seen.append(n), f(*args))[1])
    jax.clear_caches()  # what another test has traced is not traced again
    arguments = large(rng) if outer is not jax.vmap else [jnp.stack([x, x[::-1]]) for x in large(rng)]

    @jax.jit
    def run(*arguments):
        return [outer(functools.partial(value_and_gradients, function))(*arguments) for function in (conv, native)]

    for found, expected in zip(*run(*arguments), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert seen == ["conv", "conv", "kernel_gradient"]


def test_constant_kernels_are_not_transformed_by_the_compiler(rng):
    """It would take seconds for each."""
    images, kernel, _ = large(rng)
    program = jax.jit(lambda images: conv(images, kernel)).lower(images).compile().as_text()
    constants = re.findall(r"f32\[([0-9,]+)\]\S* constant\(\{", str(program))
    assert "3,3,128,130" in constants
    assert not {"36,16640", "36,128,130"} & {*constants}


@pytest.mark.parametrize(
    ("images", "kernel", "dtype"),
    [
        ((16, 4, 4, 127), (3, 3, 127, 128), "float32"),
        ((16, 4, 4, 128), (3, 3, 128, 64), "float32"),
        ((15, 4, 4, 128), (3, 3, 128, 128), "float32"),
        ((16, 4, 6, 128), (3, 3, 128, 128), "float32"),
        ((16, 5, 4, 128), (3, 3, 128, 128), "float32"),
        ((16, 4, 4, 128), (5, 5, 128, 128), "float32"),
        ((16, 4, 4, 128), (3, 3, 128, 128), "bfloat16"),
    ],
    ids=["channels", "features", "pixels", "width", "height", "kernel", "dtype"],
)
def test_other_convs_are_direct(images, kernel, dtype):
    assert winograd.pays(jnp.zeros((16, 4, 4, 128)), jnp.zeros((3, 3, 128, 128)))
    assert not winograd.pays(jnp.zeros(images, dtype), jnp.zeros(kernel, dtype))


@pytest.mark.parametrize("kernel_size", [(2, 3), (3, 2), (4, 4)])
def test_even_kernels_are_refused(kernel_size):
    with pytest.raises(ValueError, match=r"odd .*\({}, {}\)".format(*kernel_size)):
        conv(jnp.zeros((1, 5, 5, 1)), jnp.zeros((*kernel_size, 1, 1)))


@jax.jit
def both_pools(images, cotangent):
    def run(pool):
        value, pull = jax.vjp(pool, images)
        return value, pull(cotangent)

    return run(max_pool), run(lambda x: nn.max_pool(x, (2, 2), (2, 2)))


@pytest.mark.parametrize("size", [(2, 2), (5, 4), (4, 7), (28, 28)], ids=lambda s: "{}x{}".format(*s))
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_max_pool_is_the_native_one(rng, size, ties):
    images = rng.normal(size=(3, *size, 4))
    if ties:
        # After a ReLU: half of the entries are 0, whole windows of them; others tie at 1.
        images = np.clip(np.round(images), 0, 1)
    images = jnp.asarray(images, jnp.float32)
    cotangent = normal(rng, 3, size[0] // 2, size[1] // 2, 4)
    found, expected = both_pools(images, cotangent)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_no_pool_swallows_a_nan(place):
    """It must reach the logits, where it counts for no class."""
    window = np.ones((1, 2, 2, 1), np.float32)
    window[(0, *place, 0)] = np.nan
    assert np.isnan(max_pool(jnp.asarray(window))).all()


def test_max_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 pixels high and wide to be pooled, got shape \(1, 2, 1, 3\)"):
        max_pool(jnp.zeros((1, 2, 1, 3)))


def test_the_module_takes_one_size(rng):
    with pytest.raises(ValueError, match=r"size must be a whole number of at least 1, got \(3, 3\)"):
        Conv(4, (3, 3)).init(jax.random.key(0), jnp.zeros((1, 6, 6, 1)))  # type: ignore[arg-type]


def test_module_adds_its_bias(rng):
    images = normal(rng, 2, 5, 4, 3)
    kernel, bias = normal(rng, 5, 5, 3, 6), normal(rng, 6)
    found: Any = Conv(6, size=5).apply({"params": {"kernel": kernel, "bias": bias}}, images)
    np.testing.assert_allclose(found, loop_conv(images, kernel) + np.asarray(bias), atol=1e-4)
    found = Conv(6, size=5, use_bias=False).apply({"params": {"kernel": kernel}}, images)
    np.testing.assert_allclose(found, loop_conv(images, kernel), atol=1e-4)


def test_gradients_of_the_module_with_bias(rng):
    """The bias has a gradient of its own: the cotangent's sum over batch and pixels."""
    images, cotangent = normal(rng, 2, 5, 4, 3), normal(rng, 2, 5, 4, 6)
    params = {"kernel": normal(rng, 3, 3, 3, 6), "bias": normal(rng, 6)}
    module = Conv(6)
    d_params, d_images = jax.vjp(lambda p, x: jnp.asarray(module.apply({"params": p}, x)), params, images)[1](cotangent)
    _, expected_images, expected_kernel = value_and_gradients(native, images, params["kernel"], cotangent)
    assert_close((d_images, d_params["kernel"]), (expected_images, expected_kernel))
    np.testing.assert_allclose(d_params["bias"], np.asarray(cotangent, np.float64).sum((0, 1, 2)), atol=1e-5)
    per_example = jax.vmap(jax.grad(lambda p, x: jnp.asarray(module.apply({"params": p}, x[None])).sum()), (None, 0))
    np.testing.assert_allclose(per_example(params, images)["bias"], np.full((2, 6), 20.0), rtol=1e-6)


def test_module_starts_at_the_scale_of_he(rng):
    """Variance 2 / (inputs of one output): what keeps ReLU networks at one scale through their depth."""
    params: Any = Conv(64).init(jax.random.key(1), normal(rng, 1, 4, 4, 32))["params"]
    assert jax.tree.map(jnp.shape, params) == {"kernel": (3, 3, 32, 64), "bias": (64,)}
    assert np.all(params["bias"] == 0)
    kernel = params["kernel"]
    assert np.var(kernel) == pytest.approx(2 / (3 * 3 * 32), rel=0.05)
    assert np.mean(kernel) == pytest.approx(0, abs=0.005)


def norm_variables(rng, channels):
    spread = 1 + np.arange(channels)
    return {
        "params": {"scale": normal(rng, channels), "bias": normal(rng, channels)},
        "batch_stats": {"mean": normal(rng, channels), "var": jnp.asarray(spread, jnp.float32)},
    }


@pytest.mark.parametrize("shape", [(6, 3), (5, 2, 2, 4), (3, 7, 5, 8)], ids=str)
def test_batch_norm_is_flax_s(rng, shape):
    """Flax's own layer on the same variables, its gradient by autodiff."""
    x, cotangent, variables = 3 + 2 * normal(rng, *shape), normal(rng, *shape), norm_variables(rng, shape[-1])
    layers = {
        "ours": lambda *args: BatchNorm(0.7, 1e-3).apply(*args, train=True, mutable="batch_stats"),
        "Flax's": lambda *args: nn.BatchNorm(False, momentum=0.7, epsilon=1e-3).apply(*args, mutable="batch_stats"),
    }

    def run(layer):
        def value(params, x):
            return layer({**variables, "params": params}, x)

        result, pull, state = jax.vjp(value, variables["params"], x, has_aux=True)
        return result, pull(cotangent), state

    found, expected = (jax.jit(lambda layer=layer: run(layer))() for layer in layers.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)
    ours, theirs = BatchNorm(epsilon=1e-3), nn.BatchNorm(True, epsilon=1e-3)
    tested: tuple[Any, Any] = ours.apply(variables, x), theirs.apply(variables, x)
    np.testing.assert_allclose(*tested, rtol=1e-6, atol=1e-6)


def test_batch_norm_s_gradient_is_the_difference_quotient(rng):
    x, direction, cotangent = (rng.normal(size=(4, 3, 2, 3)) for _ in range(3))
    scale, bias = rng.normal(size=(2, 3))

    def loss(x):
        centred = x - x.mean((0, 1, 2))
        return np.sum(cotangent * (scale * centred / np.sqrt((centred**2).mean((0, 1, 2)) + 1e-5) + bias))

    module, variables = BatchNorm(), norm_variables(rng, 3)
    variables["params"] = {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}

    def ours(x):
        return jnp.sum(cotangent * module.apply(variables, x, train=True, mutable="batch_stats")[0])

    slope = (loss(x + 1e-4 * direction) - loss(x - 1e-4 * direction)) / 2e-4
    np.testing.assert_allclose(np.sum(jax.grad(ours)(jnp.float32(x)) * direction), slope, rtol=1e-4)


def test_batch_norm_keeps_its_precision_far_from_zero(rng):
    """Flax's mean of squares loses the variance of activations around 1,000."""
    x = jnp.asarray(1000 + rng.normal(size=(64, 4, 4, 2)), jnp.float32)
    module = BatchNorm()
    found: Any = module.apply(module.init(jax.random.key(0), x), x, train=True, mutable="batch_stats")[0]
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(found, exact, atol=2e-3)


def test_batch_norm_begins_as_flax_s():
    """Its variables are those of Flax's layer, and initialising moves no running average."""
    key, x = jax.random.key(0), 5 + jnp.ones((4, 2, 2, 3))
    found, expected = BatchNorm().init(key, x, train=True), nn.BatchNorm(False).init(key, x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
