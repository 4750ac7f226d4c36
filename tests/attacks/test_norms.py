"""Balls: projection, steepest direction and uniform samples against NumPy and their definitions."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import NORMS, ORDER, numpy_distance
from helpers import float64
from numpy.typing import ArrayLike
from scipy import optimize, stats

from rbf_jax import attacks

norms = pytest.mark.parametrize("name", NORMS)
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
SHAPE = (7, 3, 2, 2)
D = 12
PROJECT = {name: jax.jit(norm.project) for name, norm in NORMS.items()}


def deltas_of(rng) -> jax.Array:
    """Seven perturbations: of length 1e-8 to 1e8, and none."""
    deltas = rng.normal(size=SHAPE) * np.array([1e-8, 0.01, 0.1, 1, 30, 1e8, 0])[:, None, None, None]
    return jnp.asarray(deltas, jnp.float32)


def slow_l1(delta, epsilon, low: ArrayLike = -np.inf, high: ArrayLike = np.inf) -> np.ndarray:
    """The nearest point with ``|z|_1 <= epsilon``, ``low <= z <= high``, float64, by trying every piece of the line.

    ``z = sign(d) clip(|d| - t, 0, limit)``: between neighbours of all |d| and |d| - limit its length is linear in t.
    """
    size, limit = np.abs(delta), np.where(delta > 0, high, -np.asarray(low))

    def soft(t):
        return np.clip(size - t, 0, limit)

    if soft(0).sum() <= epsilon:
        return np.sign(delta) * soft(0)
    ends = np.unique(np.concatenate([[0.0], size, np.maximum(size - limit, 0)]))
    for a, b in itertools.pairwise(ends):
        la, lb = soft(a).sum(), soft(b).sum()
        if lb <= epsilon <= la:
            return np.sign(delta) * soft(a if la == lb else a + (la - epsilon) / (la - lb) * (b - a))
    raise AssertionError("no piece of the line has this length")


def numpy_project(deltas, epsilon, name):
    """The nearest point of the ball, float64."""
    deltas, epsilon = float64(deltas), float64(epsilon)[:, None, None, None]
    if name == "linf":
        return np.minimum(np.maximum(deltas, -epsilon), epsilon)
    if name == "l1":
        return np.stack([slow_l1(d.ravel(), e.item()).reshape(d.shape) for d, e in zip(deltas, epsilon, strict=True)])
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
    # So does l1, 2**-25 for each pixel that moves, and a few parts in ten million.
    room = {"linf": 1e-30, "l2": 1.1e-7, "l1": 4e-7 + 1e-6 * epsilon}[name]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=room)
    assert np.all(numpy_distance(found, ORDER[name]) <= float64(radius) * (1 + 1e-6))
    # A point inside the ball is not touched, and a second projection changes nothing.
    inside = numpy_distance(deltas, ORDER[name]) < float64(radius)
    np.testing.assert_array_equal(np.asarray(found)[inside], np.asarray(deltas)[inside])
    np.testing.assert_allclose(NORMS[name].project(found, radius), found, rtol=2e-6, atol=0)
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
    found = NORMS[name].direction(gradients, jnp.full(SHAPE, 0.5))
    assert np.all(numpy_distance(found, ORDER[name]) <= 1 + 1e-6)
    slope = (float64(found) * float64(gradients)).sum((1, 2, 3))
    # It attains the dual norm, and no point of the unit ball climbs faster.
    np.testing.assert_allclose(slope, numpy_distance(gradients, DUAL[name]), rtol=1e-5)
    for gradient, best in zip(float64(gradients), slope, strict=True):
        assert np.all(random_ball_points(rng, name, 400) @ gradient.ravel() <= best * (1 + 1e-6))


@norms
def test_no_gradient_no_direction(name):
    gradients = jnp.zeros((2, 3, 3, 1)).at[1, 1, 1].set(-2.0)
    found = np.asarray(NORMS[name].direction(gradients, jnp.full((2, 3, 3, 1), 0.5)))
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
    elif name == "l1":
        # Of D exponential variates and one more, as shares of their sum: E[x_i^2] = 2 / ((D + 1) (D + 2)).
        variance = 2 / ((D + 1) * (D + 2))
        assert stats.kstest(np.abs(points).ravel(), stats.beta(1, D).cdf).pvalue > 1e-3
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


@pytest.mark.parametrize("pixels", [1, 2, 5, 40, 784])
def test_l1_with_the_box_against_the_slow_solver(pixels):
    """Thousands of random cases: pixels at the box's sides, ties, radii from nothing to all."""
    rng, count = np.random.default_rng(pixels), 800
    images = np.clip(rng.uniform(-0.5, 1.5, (count, pixels, 1, 1)), 0, 1).astype(np.float32)
    scale = 10.0 ** rng.uniform(-3, 1, (count, 1, 1, 1))
    moves = rng.normal(size=images.shape) * scale * rng.choice([0, 1], images.shape, p=[0.4, 0.6])
    moves[::4] = np.round(moves[::4], 1)
    moved = (images + moves).astype(np.float32)
    epsilon = (10.0 ** rng.uniform(-3, 1, count) * rng.choice([0, 1], count, p=[0.05, 0.95])).astype(np.float32)
    found = float64(jax.jit(attacks.L1.confine)(images, moved, epsilon))
    assert np.all((found >= 0) & (found <= 1))
    deltas = found - float64(images)
    assert np.all(numpy_distance(deltas, 1) <= float64(epsilon) * (1 + 1e-6) + 1e-7)
    for i in range(count):
        x, d = float64(images[i]).ravel(), (float64(moved[i]) - float64(images[i])).ravel()
        expected = slow_l1(d, float(epsilon[i]), -x, 1 - x)
        assert np.linalg.norm(deltas[i].ravel() - expected) <= 1e-5
        if np.abs(d).sum() < 0.999 * epsilon[i] and np.all((x + d >= 0) & (x + d <= 1)):
            np.testing.assert_allclose(deltas[i].ravel(), d, atol=6e-8)


@norms
@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8),
    epsilon=st.floats(0, 50, width=32),
)
def test_projections_of_anything(name, values, epsilon):
    delta = np.asarray(values, np.float32).reshape(1, 2, 2, 2)
    found = float64(PROJECT[name](delta, np.asarray([epsilon], np.float32)))
    assert numpy_distance(found, ORDER[name])[0] <= epsilon * (1 + 1e-6) + 1e-7
    expected = numpy_project(delta, np.asarray([epsilon]), name)
    assert np.linalg.norm(found - expected) <= 1e-5 * max(1, epsilon / 10)
    if numpy_distance(delta, ORDER[name])[0] < 0.999 * epsilon:
        np.testing.assert_array_equal(found, delta)


@norms
def test_steepest_is_the_best_point_of_the_ball(rng, name):
    """To first order; in l1 also of the box, where it fills one pixel after the other."""
    gradients = jnp.asarray(rng.normal(size=(5, 3, 2, 2)), jnp.float32)
    images = jnp.asarray(np.clip(rng.uniform(-0.3, 1.3, gradients.shape), 0, 1), jnp.float32)
    epsilon = jnp.asarray([0.0, 0.1, 0.5, 2.0, 20.0])
    deltas = float64(NORMS[name].steepest(gradients, images, epsilon)).reshape(5, -1)
    assert np.all(np.linalg.norm(deltas, ORDER[name], axis=-1) <= float64(epsilon) * (1 + 1e-6))
    flat, x = float64(gradients).reshape(5, -1), float64(images).reshape(5, -1)
    if name != "l1":
        gain = (deltas * flat).sum(-1)
        np.testing.assert_allclose(gain, float64(epsilon) * np.linalg.norm(flat, DUAL[name], axis=-1), rtol=1e-5)
        return
    assert np.all((x + deltas >= -1e-6) & (x + deltas <= 1 + 1e-6))
    for g, start, delta, radius in zip(flat, x, deltas, epsilon, strict=True):
        # Of each pixel's way up and way down: least -g.(up - down), up + down <= radius.
        best = optimize.linprog(
            np.concatenate([-g, g]),
            np.ones((1, 24)),
            [float(radius)],
            bounds=[(0, 1 - v) for v in start] + [(0, v) for v in start],
        )
        np.testing.assert_allclose(delta @ g, -best.fun, atol=1e-5)


def test_sparse_direction_keeps_the_largest_open_gradients():
    gradients = np.arange(1.0, 201.0, dtype=np.float32).reshape(1, 10, 10, 2)
    images = np.full(gradients.shape, 0.5, np.float32)
    images[0, 9, 9, 1] = 1.0  # the largest of all, and the box blocks its way
    found = np.asarray(attacks.sparse(0.05)(gradients, images)).ravel()
    np.testing.assert_allclose(found[189:199], 0.1)
    assert np.count_nonzero(found) == 10
    down = np.asarray(attacks.sparse(0.05)(-gradients, images)).ravel()
    np.testing.assert_allclose(down[190:], -0.1)
    everything = np.asarray(attacks.dense(gradients, images)).ravel()
    np.testing.assert_allclose(everything[:199], np.arange(1, 200) / np.arange(1, 200).sum(), rtol=1e-5)
    assert everything[199] == 0
    # Where nothing is open there is no way to go; float32's least normal numbers point the way as others do.
    flat = np.where(images == 1, gradients, 0).astype(np.float32)
    for direction in (attacks.dense, attacks.sparse(0.05)):
        for least in (0 * gradients, flat):
            assert not np.asarray(jax.jit(direction)(least, images)).any()
    np.testing.assert_allclose(attacks.dense(gradients * np.float32(1e-37), images).ravel(), everything, rtol=1e-5)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
            attacks.sparse(share)
