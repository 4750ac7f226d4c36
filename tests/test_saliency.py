"""Loss gradients and losses along lines against closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import float64
from scipy.special import log_softmax, softmax

from rbf_jax.saliency import as_picture, loss_gradients, losses_along

SHAPE, CLASSES = (5, 4, 3, 2), 6
LABELS = jnp.asarray([0, 5, 2, 2, 1], jnp.int32)


@pytest.fixture
def weights(rng):
    return rng.normal(size=(24, CLASSES)).astype(np.float32)


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.uniform(0, 1, SHAPE), jnp.float32)


def test_gradient_of_a_linear_model(weights, images):
    def logits_fn(key, x):
        del key
        return x.reshape(len(x), -1) @ weights

    found = loss_gradients(jax.random.key(0), logits_fn, images, LABELS)
    probabilities = softmax(float64(images).reshape(5, -1) @ float64(weights), -1)
    expected = (probabilities - np.eye(CLASSES)[LABELS]) @ float64(weights).T
    np.testing.assert_allclose(np.asarray(found).reshape(5, -1), expected, atol=1e-5)


def test_gradient_of_a_sure_model(weights):
    """Where the probability of the label rounds to 1 in float32, its own weights still count."""
    bias = jnp.asarray([20.0, 0, 0, 0, 0, 0])
    found = loss_gradients(
        jax.random.key(0),
        lambda key, x: x.reshape(len(x), -1) @ weights + bias,
        jnp.zeros(SHAPE),
        jnp.zeros(5, jnp.int32),
    )
    others = float64(weights)[:, 1:] - float64(weights)[:, :1]
    expected = others.sum(-1) * np.exp(-20) / (1 + 5 * np.exp(-20))
    np.testing.assert_allclose(np.asarray(found).reshape(5, -1), np.tile(expected, (5, 1)), rtol=1e-4)


def test_gradient_of_a_sure_model_in_half_precision(weights, images):
    """At margins where the slope of the cross-entropy is below all of float16's numbers."""
    scaled = jnp.asarray(weights, jnp.float16)

    def logits_fn(key, x):
        del key
        bias = jnp.asarray([25.0, 0, 0, 0, 0, 0], jnp.float16)
        return x.astype(jnp.float16).reshape(len(x), -1) @ scaled * 0.01 + bias

    found = loss_gradients(jax.random.key(0), logits_fn, images, jnp.zeros(5, jnp.int32))
    others = (float64(scaled)[:, 1:] - float64(scaled)[:, :1]).sum(-1) * 0.01
    shares = np.asarray(found).reshape(5, -1) / others
    np.testing.assert_allclose(shares, np.exp(-25), rtol=0.5)


def test_gradient_equals_finite_differences(weights, images):
    def logits(x, xp):
        return xp.tanh(3 * x.reshape(len(x), -1) - 1) @ weights

    def numpy_loss(x):
        return -log_softmax(logits(x, np), -1)[np.arange(5), LABELS]

    found = np.asarray(loss_gradients(jax.random.key(0), lambda key, x: logits(x, jnp), images, LABELS)).reshape(5, -1)
    for pixel in range(24):
        step = (np.arange(24) == pixel).reshape(SHAPE[1:]) * 1e-5
        slope = (numpy_loss(float64(images) + step) - numpy_loss(float64(images) - step)) / 2e-5
        np.testing.assert_allclose(found[:, pixel], slope, atol=1e-4)


def test_the_model_sees_the_key(weights, images):
    def noisy(key, x):
        return (x + jax.random.normal(key, x.shape)).reshape(len(x), -1) @ weights

    first, again, other = (loss_gradients(jax.random.key(seed), noisy, images, LABELS) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_picture_shows_each_image_at_its_own_scale(rng):
    gradients = rng.normal(size=(3, 8, 8, 1)) * np.array([1e-25, 1, 1e25])[:, None, None, None]
    found = np.asarray(as_picture(jnp.asarray(gradients, jnp.float32), clip=1.5))
    for picture, gradient in zip(found, gradients, strict=True):
        shown = np.clip(gradient, -1.5 * gradient.std(), 1.5 * gradient.std())
        np.testing.assert_allclose(picture, shown / (3 * gradient.std()) + 0.5, atol=1e-5)
        assert picture.min() == 0
        assert picture.max() == 1


def test_picture_of_no_gradient_is_grey():
    np.testing.assert_array_equal(as_picture(jnp.zeros((2, 4, 4, 3))), np.full((2, 4, 4, 3), 0.5))


BAD = {
    "uint8 images": (dict(images=jnp.zeros(SHAPE, jnp.uint8)), "uint8"),
    "images above 1": (dict(images=jnp.full(SHAPE, 2.5, jnp.float32)), "2.5"),
    "too few labels": (dict(labels=jnp.zeros(4, jnp.int32)), r"\(4,\)"),
    "float labels": (dict(labels=jnp.zeros(5)), "float32"),
    "negative label": (dict(labels=jnp.asarray([0, 1, -3, 0, 0], jnp.int32)), "-3"),
    "label above the classes": (dict(labels=jnp.asarray([0, 1, 6, 0, 0], jnp.int32)), "6"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(weights, images, arguments, message):
    options = dict(images=images, labels=LABELS) | arguments
    with pytest.raises(ValueError, match=message):
        loss_gradients(jax.random.key(0), lambda key, x: x.reshape(len(x), -1) @ weights, **options)


def test_losses_along_a_line_are_those_of_the_clipped_images(rng, weights, images):
    directions, distances = rng.normal(size=SHAPE).astype(np.float32), np.array([-0.5, 0, 0.25, 3], np.float32)

    def noisy(key, x):
        return (x + jax.random.normal(key, x.shape)).reshape(len(x), -1) @ weights

    key = jax.random.key(3)
    found = jax.jit(losses_along, static_argnums=1)(key, noisy, images, LABELS, directions, distances)
    assert found.shape == (4, 5)
    noise = float64(jax.random.normal(key, SHAPE))
    for distance, losses in zip(distances, found, strict=True):
        moved = np.clip(float64(images) + distance * directions, 0, 1)
        logits = (moved + noise).reshape(5, -1) @ float64(weights)
        np.testing.assert_allclose(losses, -log_softmax(logits, -1)[np.arange(5), LABELS], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": jnp.full(SHAPE, 2.0)}, r"images must lie in \[0, 1\]"),
        ({"labels": LABELS + 1}, "labels"),
        (
            {"directions": jnp.ones((5, 4, 3, 1))},
            r"directions must have the images' shape \(5, 4, 3, 2\), got \(5, 4, 3, 1\)",
        ),
    ],
)
def test_lines_that_cannot_be_are_refused(weights, images, arguments, message):
    def logits_fn(key, x):
        del key
        return x.reshape(len(x), -1) @ weights

    given = {"images": images, "labels": LABELS, "directions": jnp.ones(SHAPE)} | arguments
    with pytest.raises(ValueError, match=message):
        losses_along(jax.random.key(0), logits_fn, distances=jnp.ones(2), **given)
