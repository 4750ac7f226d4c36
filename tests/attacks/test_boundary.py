"""The shortest way to a hyperplane within the box against exact solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import numpy_distance
from helpers import float64
from scipy.optimize import linprog

from rbf_jax.attacks import L1, L2, Linf
from rbf_jax.attacks.boundary import to_hyperplane

NORMS = {"linf": Linf, "l2": L2, "l1": L1}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
norms = pytest.mark.parametrize("name", NORMS)


def exact_length(name, x, w, rise):
    """The least norm of a delta with ``w . delta = rise`` and x + delta in the box; inf where there is none."""
    size, one = len(x), np.eye(len(x))
    if name == "l2":
        way = np.sign(w) * np.sign(rise)
        room = np.where(way > 0, 1 - x, x)
        if np.abs(w) @ room < abs(rise):
            return np.inf
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            short = np.abs(w) @ np.minimum(middle * np.abs(w), room) < abs(rise)
            low, high = (middle, high) if short else (low, middle)
        return np.linalg.norm(np.minimum(high * np.abs(w), room))
    if name == "linf":
        column = np.ones((size, 1))
        found = linprog(
            np.r_[np.zeros(size), 1],
            np.block([[one, -column], [-one, -column]]),
            np.zeros(2 * size),
            np.r_[w, 0][None],
            [rise],
            [*zip(-x, 1 - x, strict=True), (0, None)],
        )
    else:
        sides = [(0, side) for side in np.r_[1 - x, x]]
        found = linprog(np.ones(2 * size), A_eq=np.r_[w, -w][None], b_eq=[rise], bounds=sides)
    assert found.status in (0, 2)
    return found.fun if found.status == 0 else np.inf


def hyperplanes(count, size):
    """Points of which a third of the pixels lie at the box's sides, slopes with zeros, rises within reach or not."""
    rng = np.random.default_rng(7)
    x = np.clip(rng.uniform(-0.25, 1.25, (count, size)), 0, 1).astype(np.float32)
    w = (rng.normal(size=(count, size)) ** 3 * (rng.uniform(size=(count, size)) < 0.8)).astype(np.float32)
    w[0] = 0
    w[1] = 1
    most = (np.abs(w) * np.where(w > 0, 1 - x, x)).sum(-1)
    rise = (np.sign(rng.normal(size=count)) * most * rng.choice([0.01, 0.3, 0.7, 1.5], count)).astype(np.float32)
    return x, w, rise


@norms
@pytest.mark.parametrize("scale", [1, 1e-25, 1e25])
def test_deltas_to_a_hyperplane_are_the_shortest_in_the_box(name, scale):
    count = 200
    x, w, rise = hyperplanes(count, 7)
    scaled = (jnp.asarray(values * np.float32(scale)) for values in (w.reshape(count, 7, 1, 1), rise))
    deltas = jax.jit(lambda *a: to_hyperplane(NORMS[name], *a))(jnp.asarray(x.reshape(count, 7, 1, 1)), *scaled)
    deltas, x, w, rise = (float64(values).reshape(count, -1) for values in (deltas, x, w, rise))
    rise = rise[:, 0]
    assert np.all((x + deltas > -1e-6) & (x + deltas < 1 + 1e-6))
    length = np.array([exact_length(name, *case) for case in zip(x, w, rise, strict=True)])
    within = np.isfinite(length)
    assert 0.4 < within.mean() < 0.9
    gained = (w * deltas).sum(-1)
    np.testing.assert_allclose(gained[within], rise[within], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numpy_distance(deltas, ORDER[name])[within], length[within], rtol=1e-5, atol=1e-6)
    corner = np.where(w * rise[:, None] > 0, 1, np.where(w * rise[:, None] < 0, 0, x))
    np.testing.assert_allclose((x + deltas)[~within], corner[~within], atol=1e-6)


@norms
def test_deltas_to_a_hyperplane_that_is_none(name):
    """No slope, or a rise that overflowed: stay, or go to the corner, but never NaN."""
    x, slope = jnp.full((4, 2, 1, 1), 0.25), jnp.ones((4, 2, 1, 1)).at[:2].set(0)
    deltas = to_hyperplane(NORMS[name], x, slope, jnp.asarray([0, 1, jnp.inf, jnp.nan], jnp.float32))
    np.testing.assert_array_equal(deltas[:, 0, 0, 0], [0, 0, 0.75, 0])
