"""Balls: projection, steepest direction and uniform samples against NumPy and their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import NORMS, numpy_distance
from helpers import float64
from scipy import stats

norms = pytest.mark.parametrize("name", NORMS)
ORDER = {"linf": np.inf, "l2": 2}
DUAL = {"linf": 1, "l2": 2}
SHAPE = (7, 3, 2, 2)
D = 12


def deltas_of(rng) -> jax.Array:
    """Seven perturbations: of length 1e-8 to 1e8, and none."""
    deltas = rng.normal(size=SHAPE) * np.array([1e-8, 0.01, 0.1, 1, 30, 1e8, 0])[:, None, None, None]
    return jnp.asarray(deltas, jnp.float32)


def numpy_project(deltas, epsilon, name):
    """The nearest point of the ball, float64."""
    deltas, epsilon = float64(deltas), float64(epsilon)[:, None, None, None]
    if name == "linf":
        return np.minimum(np.maximum(deltas, -epsilon), epsilon)
    length = np.sqrt((deltas**2).sum((1, 2, 3), keepdims=True))
    return deltas * np.minimum(1, epsilon / np.where(length == 0, 1, length))


def random_ball_points(rng, name, count):
    """Points of the unit ball, most of them on its surface: (count, D)."""
    points = rng.normal(size=(count, D)) * rng.choice([0.0, 1.0], (count, D), p=[0.3, 0.7]) + 1e-9
    points[: count // 4] = rng.choice([-1.0, 1.0], (count // 4, D))
    points /= np.linalg.norm(points, ORDER[name], axis=-1, keepdims=True)
    points[count // 2 :] *= rng.uniform(0.5, 1, (count - count // 2, 1))
    return points


@norms
def test_distance_is_numpys(rng, name):
    deltas = deltas_of(rng)
    np.testing.assert_allclose(NORMS[name].distance(deltas), numpy_distance(deltas, ORDER[name]), rtol=1e-6)
    assert NORMS[name].name == name


@norms
@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e36], ids=lambda scale: f"{scale:g}")
def test_distance_of_extreme_lengths(rng, name, scale):
    deltas = jnp.asarray(rng.normal(size=SHAPE) * scale, jnp.float32)
    np.testing.assert_allclose(NORMS[name].distance(deltas), numpy_distance(deltas, ORDER[name]), rtol=1e-6, atol=1e-36)


@norms
@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 0.3, 5.0])
def test_projection_is_the_nearest_point(rng, name, epsilon):
    deltas = deltas_of(rng)
    radius = jnp.full(7, epsilon) * jnp.linspace(0.5, 1, 7)
    found = NORMS[name].project(deltas, radius)
    expected = numpy_project(deltas, radius, name)
    # l2 stops 2**-25 sqrt(12) short, the room that rounding takes when the delta is added to an image.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1.1e-7 if name == "l2" else 1e-30)
    assert np.all(numpy_distance(found, ORDER[name]) <= float64(radius) * (1 + 1e-6))
    # A point inside the ball is not touched, and a second projection changes nothing.
    inside = numpy_distance(deltas, ORDER[name]) < float64(radius)
    np.testing.assert_array_equal(np.asarray(found)[inside], np.asarray(deltas)[inside])
    np.testing.assert_allclose(NORMS[name].project(found, radius), found, rtol=1e-6, atol=0)
    # The reference itself: no other point of the ball is nearer.
    for i in range(7):
        points = float(radius[i]) * random_ball_points(rng, name, 400)
        flat = float64(deltas[i]).ravel()
        nearest = np.linalg.norm(expected[i].ravel() - flat)
        assert np.all(np.linalg.norm(points - flat, axis=-1) >= nearest * (1 - 1e-12))


@norms
@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e-6, 1.0, 1e20, 1e36], ids=lambda scale: f"{scale:g}")
def test_direction_is_the_steepest(rng, name, scale):
    gradients = rng.normal(size=SHAPE) * scale
    gradients[0, 0] = 0
    gradients = jnp.asarray(gradients, jnp.float32)
    found = NORMS[name].direction(gradients, gradients)
    assert np.all(numpy_distance(found, ORDER[name]) <= 1 + 1e-6)
    slope = (float64(found) * float64(gradients)).sum((1, 2, 3))
    # It attains the dual norm, and no point of the unit ball climbs faster.
    np.testing.assert_allclose(slope, numpy_distance(gradients, DUAL[name]), rtol=1e-5)
    for gradient, best in zip(float64(gradients), slope, strict=True):
        assert np.all(random_ball_points(rng, name, 400) @ gradient.ravel() <= best * (1 + 1e-6))


@norms
def test_no_gradient_no_direction(name):
    gradients = jnp.zeros((2, 3, 3, 1)).at[1, 1, 1].set(-2.0)
    found = np.asarray(NORMS[name].direction(gradients, gradients))
    assert np.all(found[0] == 0)
    np.testing.assert_array_equal(found[1].ravel(), -1.0 * (np.arange(9) == 4))


def samples(name, count, epsilon=0.7, shape=(3, 2, 2)) -> np.ndarray:
    keys = jax.random.split(jax.random.key(4), count)
    drawn = jax.jit(NORMS[name].sample, static_argnums=1)(keys, (count, *shape), jnp.full(count, epsilon))
    assert drawn.shape == (count, *shape)
    return float64(drawn).reshape(count, -1)


@norms
def test_samples_fill_the_ball_uniformly(name):
    """Of a uniform draw, the length to the power D is uniform; in linf every coordinate is, too."""
    points = samples(name, 4000) / 0.7
    length = np.linalg.norm(points, ORDER[name], axis=-1)
    assert np.all(length <= 1 + 1e-6)
    assert stats.kstest(length**D, "uniform").pvalue > 1e-3
    if name == "linf":
        assert stats.kstest(points.ravel() / 2 + 0.5, "uniform").pvalue > 1e-3
        variance = 1 / 3
    else:
        # No direction is preferred: each unit vector is drawn as often as its negative, at E[x_i^2] = 1 / (D + 2).
        variance = 1 / (D + 2)
        angles = points[:, 0] / length
        assert stats.kstest((angles + 1) / 2, stats.beta((D - 1) / 2, (D - 1) / 2).cdf).pvalue > 1e-3
    np.testing.assert_allclose(np.cov(points.T), variance * np.eye(D), atol=5 * variance / np.sqrt(4000))
    np.testing.assert_allclose(points.mean(0), 0, atol=5 * np.sqrt(variance / 4000))


@norms
def test_each_sample_follows_its_own_key_and_radius(name):
    keys = jax.random.split(jax.random.key(1), 3)
    radius = jnp.asarray([0.0, 0.2, 3.0])
    sample = jax.jit(lambda keys, radius: NORMS[name].sample(keys, (3, 4, 4, 1), radius))
    whole = sample(keys, radius)
    order = np.array([2, 0, 1])
    moved = sample(keys[order], radius[order])
    np.testing.assert_array_equal(moved, np.asarray(whole)[order])
    # Other neighbours change nothing.
    other = sample(keys.at[:2].set(jax.random.key(9)), radius)
    np.testing.assert_array_equal(other[2], whole[2])
    assert np.all(whole[0] == 0)
    assert np.all(numpy_distance(whole, ORDER[name]) <= float64(radius) * (1 + 1e-6))
    assert np.abs(whole[2] / 15 - whole[1]).max() > 1e-3


def test_long_samples_lie_near_the_surface():
    """Drawing the radius uniformly would leave most of them deep inside."""
    assert np.linalg.norm(samples("l2", 50, shape=(28, 28, 1)), axis=-1).min() > 0.95 * 0.7
