"""Attacks that take no gradients: closed forms on linear models, the published schedules, the contract of all."""

import functools
import math
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import KEY, SHAPE, assert_within, grey, linear, mixed, mlp, numpy_distance, own_labels, predictions
from helpers import float64, quick_jit
from jax.tree_util import Partial

from rbf_jax.attacks import L1, L2, Linf, eot, margin
from rbf_jax.attacks.driver import Iterative
from rbf_jax.attacks.random_noise import random_noise
from rbf_jax.attacks.rays import rays
from rbf_jax.attacks.spsa import estimate, spsa
from rbf_jax.attacks.square import bump, share, side, square

NORMS = {"linf": Linf, "l2": L2, "l1": L1}
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
DUALS = {"linf": 1, "l2": 2, "l1": math.inf}
KEYS = jax.random.split(KEY, 8)
BALLS = [(kind, name) for kind in ("square", "spsa", "noise") for name in NORMS]
ALL = [*BALLS, ("rays", "linf")]
IDS = [" ".join(pair) for pair in ALL]
every_attack = pytest.mark.parametrize(("kind", "name"), ALL, ids=IDS)
one_of_each = pytest.mark.parametrize(
    ("kind", "name"), [("square", "linf"), ("square", "l1"), ("spsa", "l2"), ("noise", "linf"), ("rays", "linf")]
)
norms = pytest.mark.parametrize("name", NORMS)


@functools.cache
def make(kind: str, name: str, size: int) -> Iterative:
    """Always the same object, so that `compiled` compiles it once."""
    norm = NORMS[name]
    if kind == "square":
        return square(norm, epsilon=0.1, queries=size, restarts=2)
    if kind == "spsa":
        return spsa(norm, epsilon=0.1, steps=size, directions=8, chunk=4, learning_rate=0.02, restarts=2)
    if kind == "noise":
        return random_noise(norm, epsilon=0.1, samples=size)
    return rays(queries=size)


@functools.cache
def compiled(kind: str, name: str, size: int) -> Any:
    return quick_jit(make(kind, name, size))


SMALL = {"square": 12, "spsa": 3, "noise": 12, "rays": 40}
LARGE = {"square": 400, "spsa": 40, "noise": 400, "rays": 400}


def run(kind: str, name: str, images, model, labels, *, size=None, keys=KEYS, **options):
    attack = compiled(kind, name, SMALL[kind] if size is None else size)
    return attack(keys, model, images, labels, **options)


def everywhere(value) -> jax.Array:
    return jnp.full(8, value, jnp.float32)


def within(result, images, epsilon, name):
    if name != "l1":
        assert_within(result, images, epsilon, name)
        return
    adversarial = np.asarray(result.images)
    assert np.all((adversarial >= 0) & (adversarial <= 1))
    distance = numpy_distance(float64(adversarial) - float64(images), 1)
    assert np.all(distance <= float64(epsilon) * (1 + 1e-6) + 1e-7)
    np.testing.assert_allclose(result.distance, distance, rtol=1e-5, atol=1e-7)


# Closed forms


class Planes(NamedTuple):
    model: Any
    gaps: np.ndarray  # float64 (8, 2): by how much class 0 leads class 1 and class 2
    weights: np.ndarray  # (16, 2)


def planes(images) -> Planes:
    """Class 0 leads two classes whose weights are orthogonal, in coarse stripes of +-1; class 1 is the nearer one."""
    rows, columns = np.indices(SHAPE[:2])
    weights = np.stack([np.where(rows < 2, 1, -1), np.where(columns < 2, 1, -1)], -1).reshape(16, 2).astype(np.float64)
    bias = -0.5 * weights.sum(0) - np.asarray([0.5, 1.0])
    gaps = -(float64(images).reshape(8, 16) @ weights + bias)
    return Planes(linear(np.pad(weights, ((0, 0), (1, 0))), np.pad(bias, (1, 0))), gaps, weights)


ZEROS = jnp.zeros(8, jnp.int32)
TWOS = jnp.full(8, 2, jnp.int32)
STILL = 0.5 + 0.02 * (grey(0, 8) - 0.5)


@pytest.mark.parametrize("targeted", [False, True], ids=["any", "targeted"])
@pytest.mark.parametrize(("kind", "name"), [pair for pair in BALLS if pair[0] != "noise"])
def test_succeeds_just_above_the_optimum_and_never_below(kind, name, targeted):
    model, gaps, weights = planes(STILL)
    optimum = (gaps / np.linalg.norm(weights, DUALS[name], axis=0))[:, 1]
    if not targeted:
        optimum = (gaps / np.linalg.norm(weights, DUALS[name], axis=0)).min(-1)
    targets = TWOS if targeted else None
    for factor, expected in ((1.25, True), (0.99, False)):
        radius = jnp.asarray(factor * optimum, jnp.float32)
        found = run(kind, name, STILL, model, ZEROS, size=LARGE[kind], epsilon=radius, targets=targets)
        assert found.success.tolist() == [expected] * 8
        within(found, STILL, radius, name)
        np.testing.assert_array_equal(predictions(model, found.images) == (2 if targeted else 1), [expected] * 8)
        # All of the ball is of use.
        assert np.all(found.distance > 0.9 * radius)


@pytest.mark.parametrize("targeted", [False, True], ids=["any", "targeted"])
@norms
def test_noise_succeeds_far_above_the_optimum_only(name, targeted):
    model, gaps, weights = planes(STILL)
    lengths = gaps / np.linalg.norm(weights, DUALS[name], axis=0)
    optimum = lengths[:, 1] if targeted else lengths.min(-1)
    for factor, expected in ((4, True), (0.99, False)):
        radius = jnp.asarray(factor * optimum, jnp.float32)
        targets = TWOS if targeted else None
        found = run("noise", name, STILL, model, ZEROS, size=400, epsilon=radius, targets=targets)
        assert found.success.tolist() == [expected] * 8
        within(found, STILL, radius, name)


def test_noise_reaches_the_corners_in_linf():
    """Uniform noise in 16 dimensions stays well within the ball's sides."""
    model = planes(STILL).model
    found = run("noise", "linf", STILL, model, ZEROS, size=400, epsilon=everywhere(0.01))
    # A lucky uniform draw may win once.
    assert np.sum(np.abs(found.images - STILL).reshape(8, -1).min(-1) > 0.009999) >= 6


@pytest.mark.parametrize("targeted", [False, True], ids=["any", "targeted"])
def test_rays_finds_the_least_distance(targeted):
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(16, 2))
    images = grey(1, 8)
    bias = -0.5 * weights.sum(0) - np.asarray([1.5, 100.0 if targeted else 1.5])
    model = linear(np.pad(weights, ((0, 0), (1, 0))), np.pad(bias, (1, 0)))
    gaps = -(float64(images).reshape(8, 16) @ weights + bias)
    lengths = gaps / np.abs(weights).sum(0)
    optimum = lengths[:, 0] if targeted else lengths.min(-1)
    targets = jnp.ones(8, jnp.int32) if targeted else None
    found = run("rays", "linf", images, model, ZEROS, size=400, targets=targets)
    assert np.all(found.success)
    ratio = float64(found.distance) / optimum
    assert np.all((ratio > 1) & (ratio < 1.25)), ratio
    # In 400 queries the pixels have been through all levels.
    assert np.median(ratio) < 1.01


def test_rays_brings_what_is_too_far_back_into_the_ball():
    model, gaps, _ = planes(STILL)
    radius = jnp.asarray(np.where(np.arange(8) < 4, 0.5, 2) * gaps.min(-1) / 16, jnp.float32)
    found = run("rays", "linf", STILL, model, ZEROS, size=400, epsilon=radius)
    assert found.success.tolist() == [False] * 4 + [True] * 4
    assert_within(found, STILL, radius, "linf")


def test_rays_leaves_what_is_misled_already_and_what_cannot_be():
    model = Partial(_constant, jnp.zeros(()))
    labels = jnp.asarray([1, 0] * 4, jnp.int32)
    found = run("rays", "linf", mixed(0, 8), model, labels)
    np.testing.assert_array_equal(found.images, mixed(0, 8))
    assert found.success.tolist() == [False, True] * 4


# Square


def test_square_schedule_is_the_published_one():
    published = {0: 1, 10: 1, 11: 2, 50: 2, 51: 4, 200: 4, 201: 8, 500: 8, 501: 16, 1000: 16, 1001: 32, 2000: 32}
    published |= {2001: 64, 4000: 64, 4001: 128, 6000: 128, 6001: 256, 8000: 256, 8001: 512, 9999: 512}
    for number, divisor in published.items():
        assert share(0.8, number, 10_000) == 0.8 / divisor
    assert share(0.8, 26, 5000) == 0.2
    assert share(0.8, 4999, 10_000) == 0.8 / 128


def test_square_sides():
    """Those of the published code on 32x32, which rounds the root of the area; odd and at least 3 with bumps."""
    shares = [0.8 / 2**i for i in range(10)]
    assert [side(part, 32, 32, odd=False) for part in shares] == [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    assert [side(part, 32, 32, odd=True) for part in shares] == [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]
    assert side(1.0, 4, 9, odd=False) == 4
    assert side(1.0, 4, 9, odd=True) == 3
    assert side(0.001, 1, 2, odd=True) == 1


@pytest.mark.parametrize(("order", "power"), [(1, 4), (2, 2)])
def test_square_bump(order, power):
    """As the published loop over growing squares draws it, and some known by hand."""
    for length in (1, 3, 5, 6, 11):
        halves = []
        for height in (length // 2, length - length // 2):
            drawn = np.zeros((height, length))
            for ring in range(max(height, length) // 2 + 1):
                top, left = height // 2 - ring, length // 2 - ring
                drawn[max(top, 0) : top + 2 * ring + 1, max(left, 0) : left + 2 * ring + 1] += 1 / (ring + 1) ** power
            halves.append(drawn / max(np.sum(drawn**order) ** (1 / order), 1e-9))
        expected = np.concatenate([halves[0], -halves[1]])
        expected /= np.sum(np.abs(expected) ** order) ** (1 / order)
        np.testing.assert_allclose(bump(length, order), expected, atol=1e-6)
    np.testing.assert_array_equal(bump(1, order), [[-1]])
    peak = bump(3, order)[0] / bump(3, order)[0, 0]
    np.testing.assert_allclose(peak, [1, 1 + 2**power, 1], rtol=1e-5)


def _trace(attack, images, model, labels):
    """The images of the run after each query."""
    problem = attack.pose(KEYS, images, labels)
    step = quick_jit(lambda number, state: attack.step(number, model, problem, state))
    state, seen = attack.begin(model, problem), []
    for number in range(attack.count):
        state = step(jnp.int32(number), state)
        seen.append(state)
    return seen


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 9, 3), (1, 6, 2)], ids=str)
def test_square_windows(shape):
    """What a query changes in linf lies in a window of the published size, one sign by channel, anywhere."""
    images = jnp.full((8, *shape), 0.5)
    attack = square(Linf, epsilon=0.1, queries=40)
    weights = np.random.default_rng(0).normal(size=(math.prod(shape), 2))
    model = linear(weights, [1e3, 0.0])
    seen = [float64(state.run.images) - 0.5 for state in _trace(attack, images, model, ZEROS)]
    start = seen[0]
    np.testing.assert_allclose(np.abs(start), 0.1, atol=1e-6)
    assert np.all(start == start[:, :1]), "stripes are vertical"
    assert len(np.unique(start.reshape(8, -1) > 0, axis=0)) > 1, "examples share their stripes"
    accepted, rows_seen = 0, set()
    for number, (before, after) in enumerate(pairwise(seen)):
        length = side(share(0.8, number, 40), *shape[:2], odd=False)
        for old, new in zip(before, after, strict=True):
            moved = np.argwhere(np.any(old != new, -1))
            if len(moved):
                accepted += 1
                rows_seen |= set(moved[:, 0].tolist())
                low, high = moved.min(0), moved.max(0)
                assert np.all(high - low < length)
                for channel in range(shape[2]):
                    changed = new[..., channel][old[..., channel] != new[..., channel]]
                    assert len(np.unique(changed > 0)) <= 1
    assert accepted > 40
    assert rows_seen == set(range(shape[0])), "some rows are out of reach"


@pytest.mark.parametrize("name", ["l2", "l1"])
def test_square_moves_all_of_the_ball(name):
    """Off the box's sides, each proposal has the length of the ball, whatever its windows held."""
    images = jnp.full((8, 7, 9, 3), 0.5)
    model = linear(np.random.default_rng(1).normal(size=(189, 2)), [1e3, 0.0])
    attack = square(NORMS[name], epsilon=0.3, queries=16)
    states = _trace(attack, images, model, ZEROS)
    images_seen = [float64(state.run.images) - 0.5 for state in states]
    for delta in images_seen:
        np.testing.assert_allclose(numpy_distance(delta, ORDERS[name]), 0.3, rtol=1e-4)
    changes = sum(np.any(a != b) for a, b in pairwise(images_seen))
    assert changes > 3
    # From tiles of one pixel that leave nothing out.
    assert np.all(images_seen[0] != 0)


@pytest.mark.parametrize("name", ["l2", "l1"])
def test_square_uses_what_the_box_left_of_the_ball(name):
    """From black images half of the start is clipped away; windows then take up what the ball has left."""
    images = jnp.zeros((8, 6, 6, 1))
    attack = square(NORMS[name], epsilon=0.5, queries=16)
    states = _trace(attack, images, linear(np.tile([0.0, 1.0], (36, 1)), [1e3, 0.0]), ZEROS)
    start, end = (NORMS[name].distance(state.run.images) for state in (states[0], states[-1]))
    assert np.all(start < 0.45)
    assert np.all(end > 1.05 * start)


@norms
def test_square_loss_never_falls(name):
    images, model = mixed(2, 8), mlp(2)
    labels = own_labels(model, images)
    attack = square(NORMS[name], epsilon=0.05, queries=20, restarts=2)
    states = _trace(attack, images, model, labels)
    best = np.stack([state.best.loss for state in states])
    current = np.stack([state.run.loss for state in states])
    assert np.all(np.diff(best, axis=0) >= 0)
    assert np.all(np.diff(current[:20], axis=0) >= 0)
    assert np.all(np.diff(current[20:], axis=0) >= 0)
    assert np.any(current[20] < current[19]), "the second run begins anew"
    np.testing.assert_array_equal(best[-1], np.maximum(current[19], current[-1]))
    np.testing.assert_allclose(best[-1], margin(model(KEY, states[-1].best.images), labels, None), atol=1e-5)
    assert np.any(best[19] > best[0])


def test_square_horizon():
    """Over 10,000 proposals the first ten windows are all of the largest size, over ten they shrink."""
    images = jnp.full((8, 8, 8, 1), 0.5)
    model = linear(np.random.default_rng(0).normal(size=(64, 2)), [1e3, 0.0])
    short, long = (square(Linf, epsilon=0.1, queries=200, horizon=horizon) for horizon in (None, 10**6))
    losses = [quick_jit(attack)(KEYS, model, images, ZEROS).images for attack in (short, long)]
    found = [float64(margin(model(KEY, images), ZEROS, None)).mean() for images in losses]
    assert found[0] > found[1] + 0.1


# SPSA


def test_spsa_estimate_is_the_gradient():
    rng = np.random.default_rng(5)
    weights = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    x = grey(0, 3)

    def losses(keys, images):
        del keys
        return (images * weights).sum((-3, -2, -1))

    found = estimate(KEYS[:3], losses, x, directions=4096, chunk=64, delta=0.01)
    # Each entry's deviation is that of the others' signs, |w|_2 / sqrt(directions).
    deviation = float(jnp.linalg.norm(weights.ravel())) / 64
    errors = float64(found) - float64(weights)
    assert np.abs(errors).max() < 5 * deviation
    assert 0.7 * deviation < np.sqrt(np.mean(errors**2)) < 1.3 * deviation
    assert np.abs(np.corrcoef(errors.reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.9
    chunks = [estimate(KEYS[:3], losses, x, directions=24, chunk=chunk, delta=0.01) for chunk in (1, 6, 24)]
    for other in chunks[1:]:
        np.testing.assert_allclose(other, chunks[0], atol=1e-5)
    np.testing.assert_array_less(0.1, np.abs(chunks[0] - found).max())


def test_spsa_directions_are_independent_and_pairs_share_their_key():
    """A loss of one draw of noise, the same on both sides, leaves nothing; the images seen are x +- the same signs."""
    seen = []

    def losses(keys, images):
        seen.append(images)
        return jax.vmap(jax.vmap(jax.random.normal))(keys) + 0 * images.sum((-3, -2, -1))

    x = jnp.full((3, *SHAPE), 0.5)
    with jax.disable_jit():
        found = estimate(KEYS[:3], losses, x, directions=4, chunk=4, delta=0.25)
    np.testing.assert_array_equal(found, 0)
    plus, minus = (float64(images) - 0.5 for images in seen)
    np.testing.assert_array_equal(plus, -minus)
    np.testing.assert_array_equal(np.abs(plus), 0.25)
    assert len(np.unique(plus.reshape(12, -1), axis=0)) == 12


def test_spsa_chunks_change_only_rounding():
    images, model = mixed(1, 8), mlp(1)
    labels = own_labels(model, images)
    results = [
        quick_jit(spsa(Linf, epsilon=0.05, steps=4, directions=8, chunk=chunk))(KEYS, model, images, labels)
        for chunk in (1, 8, None)
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other.images, results[0].images, atol=1e-5)
        np.testing.assert_array_equal(other.forwards, results[0].forwards)


def test_spsa_first_step_is_adams():
    """Of length ``learning_rate`` in each pixel, towards the sign of the gradient."""
    model, _, weights = planes(STILL)
    attack = quick_jit(spsa(Linf, epsilon=0.5, steps=1, directions=1024, learning_rate=0.003))
    moved = float64(attack(KEYS, model, STILL, ZEROS, targets=TWOS).images - STILL)
    np.testing.assert_allclose(moved, np.broadcast_to(0.003 * weights[:, 1].reshape(SHAPE), moved.shape), atol=1e-6)


@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_spsa_steps_are_a_third_of_the_ball(norm):
    """A pixel moves by ``epsilon / 3`` over the norm of an image of ones, whatever each example's epsilon is."""
    model, _, weights = planes(STILL)
    epsilon = jnp.linspace(0.003, 0.012, len(STILL))
    attack = quick_jit(spsa(norm, epsilon=1.0, steps=1, directions=1024))
    moved = float64(attack(KEYS, model, STILL, ZEROS, epsilon=epsilon, targets=TWOS).images - STILL)
    ones = {"linf": 1, "l2": 4, "l1": 16}[norm.name]
    expected = weights[:, 1].reshape(SHAPE) * float64(epsilon)[:, None, None, None] / (3 * ones)
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-7)


def test_spsa_looks_as_far_aside_as_it_steps():
    """Behind a front that is flat within 0.03 of the images, 0.01 aside sees nothing, a third of 0.3 the boundary."""
    images = jnp.full((8, *SHAPE), 0.5)
    _, _, weights = planes(images)
    inner = linear(np.stack([np.zeros(16), weights[:, 1]], 1), [0.0, -0.5])

    model = Partial(lambda inner, key, x: inner(key, jnp.where(jnp.abs(x - 0.5) < 0.03, 0.5, x) - 0.5), inner)

    broken = [
        quick_jit(spsa(Linf, epsilon=0.3, steps=5, directions=256, delta=delta))(KEYS, model, images, ZEROS).success
        for delta in (0.01, None)
    ]
    np.testing.assert_array_equal(broken, [[False] * 8, [True] * 8])


def test_spsa_begins_at_its_start():
    images, start = jnp.full((8, *SHAPE), 0.5), jnp.full((8, *SHAPE), 0.53)
    flat = linear(np.zeros((16, 2)), [1.0, 0.0])
    attack = quick_jit(spsa(Linf, epsilon=0.1, steps=2, directions=2))
    np.testing.assert_allclose(attack(KEYS, flat, images, ZEROS, start=start).images, start, atol=1e-6)
    np.testing.assert_array_equal(attack(KEYS, flat, images, ZEROS).images, images)


# The contract


@every_attack
def test_box_and_ball(kind, name):
    reached = []
    for epsilon in (0.0, 8 / 255, 0.3, 2.0):
        images, model = mixed(0, 8), mlp(0)
        labels = own_labels(model, images)
        found = run(kind, name, images, model, labels, epsilon=everywhere(epsilon))
        within(found, images, epsilon, name)
        np.testing.assert_array_equal(found.success, predictions(model, found.images) != labels)
        reached.append(found.success.sum())
        if epsilon == 0:
            np.testing.assert_array_equal(found.images, images)
    assert reached[0] == 0
    assert reached[-1] > 1


@pytest.mark.parametrize("shape", [(3, 7, 3), (9, 1, 1)], ids=str)
@one_of_each
def test_shapes(kind, name, shape):
    images, model = mixed(0, 8, shape), mlp(0, shape)
    found = run(kind, name, images, model, own_labels(model, images), epsilon=everywhere(0.2))
    within(found, images, 0.2, name)
    assert kind == "rays" or np.all(found.distance > 0)


@pytest.mark.full
@one_of_each
def test_batches_and_their_order_change_nothing(kind, name):
    images, model = mixed(3, 8), mlp(3)
    labels, epsilons = own_labels(model, images), jnp.linspace(0.02, 0.3, 8)
    whole = run(kind, name, images, model, labels, epsilon=epsilons)
    for rows in ([5], [6, 0, 3], [7, 6, 5, 4, 3, 2, 1, 0]):
        rows = np.asarray(rows)
        part = run(kind, name, images[rows], model, labels[rows], keys=KEYS[rows], epsilon=epsilons[rows])
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_allclose(found, np.asarray(expected)[rows], atol=1e-5)


@one_of_each
def test_keys(kind, name):
    images, model = mixed(3, 8), mlp(3)
    labels, epsilon = own_labels(model, images), everywhere(0.2)
    split, single, other = (
        run(kind, name, images, model, labels, keys=keys, epsilon=epsilon)
        for keys in (KEYS, KEY, jax.random.split(jax.random.key(1), 8))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), single, split)
    # RayS draws nothing.
    assert np.any(np.asarray(split.images != other.images)) == (kind != "rays")


@pytest.mark.full
@one_of_each
def test_compiled_or_not_and_new_weights(kind, name):
    images, attack = mixed(4, 8), compiled(kind, name, SMALL[kind])
    model = mlp(4)
    arguments = KEYS, model, images, own_labels(model, images)
    expected = make(kind, name, SMALL[kind])(*arguments, epsilon=everywhere(0.2))
    found = attack(*arguments, epsilon=everywhere(0.2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    before = attack._cache_size()
    other = attack(KEYS, mlp(5), images, own_labels(mlp(5), images), epsilon=everywhere(0.1))
    assert attack._cache_size() == before
    assert np.abs(other.images - found.images).max() > 1e-3


def _constant(weights, key, images):
    del key
    return jnp.broadcast_to(jnp.asarray([0.0, 2.0, 1.0, 0.0, 0.0]), (len(images), 5)) + weights


def _saturated(weights, key, images):
    return mlp(0)(key, jax.nn.sigmoid(1e4 * (images - 0.5))) + weights


def _nan(weights, key, images):
    return mlp(0)(key, images) + jnp.nan + weights


def _half_nan(weights, key, images):
    """NaN for dark images."""
    total = images.reshape(len(images), -1).sum(-1, keepdims=True)
    return mlp(0)(key, images) + jnp.where(total > 8, 0, jnp.nan) + weights


def _overflow(weights, key, images):
    return 1e37 * mlp(0)(key, images) * 100 + weights


HOSTILE = [_constant, _saturated, _nan, _half_nan, _overflow]


def _choose(which, key, images):
    return jax.lax.switch(which, [functools.partial(function, jnp.zeros(())) for function in HOSTILE], key, images)


@pytest.mark.parametrize("function", HOSTILE, ids=lambda function: function.__name__[1:])
@one_of_each
def test_useless_losses_do_no_harm(kind, name, function):
    images = mixed(7, 8).at[:4].multiply(0.4)
    labels = jnp.asarray([0, 1, 2, 3, 4, 0, 1, 2], jnp.int32)
    epsilons = jnp.asarray([0.0, 0.05, 0.2, 0.2] * 2)
    found = run(kind, name, images, Partial(_choose, jnp.int32(HOSTILE.index(function))), labels, epsilon=epsilons)
    within(found, images, epsilons, name)
    assert np.all(np.isfinite(found.images))
    assert np.all(np.isfinite(found.distance))
    if function is _constant:
        np.testing.assert_array_equal(found.success, labels != 1)
    if function is _nan:
        assert not np.any(found.success)


class Counter:
    """Counts the passes of one example: run without compilation, every call of the model is a Python call."""

    def __init__(self):
        self.passes = 0

    def __call__(self, key, images):
        assert key.shape == (len(images),)
        self.passes += len(images) // 2
        return mlp(0)(key, images)


COUNTED = {
    "square restarts eot": (square(Linf, epsilon=0.1, queries=2, restarts=2, gradient=eot(2)), 8),
    "spsa": (spsa(Linf, epsilon=0.1, steps=1, directions=6, chunk=3), 2 * 6 + 1 + 1),
    "spsa restarts eot": (spsa(L1, epsilon=0.1, steps=1, directions=2, restarts=2, gradient=eot(3)), 2 * 3 * 6),
    "noise": (random_noise(L2, epsilon=0.1, samples=5), 5),
    # And the look at what came back into the ball.
    "rays": (rays(queries=4), 5),
}


@pytest.mark.parametrize(("attack", "forwards"), COUNTED.values(), ids=COUNTED.keys())
def test_passes_are_counted(attack, forwards):
    counter = Counter()
    with jax.disable_jit():
        result = attack(jax.random.key(0, impl="rbg"), counter, mixed(0, 2), jnp.zeros(2, jnp.int32))
    assert counter.passes == forwards
    assert result.forwards.tolist() == [forwards] * 2
    assert result.backwards.tolist() == [0, 0]


BAD_SETTINGS = {
    "square norm": (lambda: square(Linf._replace(name="l7"), epsilon=0.1), "norm .*l7"),
    "square queries": (lambda: square(Linf, epsilon=0.1, queries=0), "queries .*0"),
    "square p_init": (lambda: square(Linf, epsilon=0.1, p_init=1.5), "p_init .*1.5"),
    "square horizon": (lambda: square(Linf, epsilon=0.1, horizon=0), "horizon .*0"),
    "spsa chunk": (lambda: spsa(Linf, epsilon=0.1, directions=8, chunk=3), "chunk .*3"),
    "spsa delta": (lambda: spsa(Linf, epsilon=0.1, delta=0.0), "delta .*0"),
    "spsa rate": (lambda: spsa(Linf, epsilon=0.1, learning_rate=-1.0), "learning_rate .*-1"),
    "spsa epsilon": (lambda: spsa(Linf, epsilon=-0.5), "epsilon .*-0.5"),
    "noise samples": (lambda: random_noise(Linf, epsilon=0.1, samples=0), "samples .*0"),
    "rays epsilon": (lambda: rays(epsilon=math.nan), "epsilon .*nan"),
    "rays tolerance": (lambda: rays(tolerance=0.0), "tolerance .*0"),
}


@pytest.mark.parametrize(("build", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
