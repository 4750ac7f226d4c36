"""FAB and DeepFool: closed forms of linear models, budgets, counts, hostile models."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import (
    HOSTILE,
    KEY,
    assert_counted,
    assert_within,
    grey,
    hostile,
    linear,
    mixed,
    mlp,
    numpy_distance,
    own_labels,
    predictions,
)
from helpers import float64
from scipy.linalg import hadamard

from rbf_jax.attacks import L1, L2, Linf
from rbf_jax.attacks.deepfool import deepfool
from rbf_jax.attacks.fab import fab, fab_t
from rbf_jax.attacks.losses import margin

NORMS = {"linf": Linf, "l2": L2, "l1": L1}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
KINDS = ["fab", "fab_t", "deepfool"]
FARTHER = {"fab": 1.001, "fab_t": 1.001, "deepfool": 1.03}
KEYS = jax.random.split(KEY, 8)
AMPLE = jnp.full(8, 1e3, jnp.float32)
"""A budget for each of eight images, so that tests share their compilations."""
norms = pytest.mark.parametrize("name", NORMS)
kinds = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def make(kind, name):
    if kind == "fab":
        return fab(NORMS[name], steps=8, restarts=2)
    if kind == "fab_t":
        return fab_t(NORMS[name], steps=8, classes=4)
    return deepfool(NORMS[name], steps=12)


@functools.cache
def compiled(kind, name) -> Any:
    return jax.jit(make(kind, name))


def centred(seed, classes):
    """A linear model whose boundaries pass close to grey images, far from the box's sides."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(16, classes))
    return linear(matrix, 0.15 * rng.normal(size=classes) - 0.5 * matrix.sum(0)), matrix.astype(np.float32)


def gaps_by_class(model, matrix, images, labels, name):
    """For each example and class the distance of the boundary between it and the label's class, float64."""
    matrix, images = float64(matrix), float64(images).reshape(len(images), -1)
    logits, rows = images @ matrix + float64(model.args[0][1]), np.arange(len(images))
    steepness = np.linalg.norm(matrix[:, None] - matrix[:, :, None], DUAL[name], axis=0)[labels]
    gaps = logits[rows, labels][:, None] - logits
    gaps[rows, labels], steepness[rows, labels] = np.inf, 1
    return gaps / steepness


# Closed forms


@pytest.mark.parametrize(
    ("kind", "classes", "name"),
    [*((kind, 5, name) for kind in KINDS for name in NORMS), *((kind, n, "l2") for kind in KINDS[::2] for n in (2, 3))],
)
def test_least_distance_of_linear_models(kind, classes, name):
    attack, tried = compiled(kind, name), 0
    for seed in range(3):
        model, matrix = centred(seed, classes)
        images = grey(seed, 8)
        labels = own_labels(model, images)
        least = gaps_by_class(model, matrix, images, labels, name).min(-1)
        result = attack(KEYS, model, images, labels, epsilon=AMPLE)
        distance = numpy_distance(float64(result.images) - float64(images), ORDER[name])
        # In l1 the one pixel that moves must not reach its side.
        inner = least < 0.4
        tried += inner.sum()
        assert np.all(result.success)
        np.testing.assert_array_equal(predictions(model, result.images) != labels, result.success)
        np.testing.assert_allclose(result.distance, distance, rtol=1e-5)
        # float32 logits of about 1 tell the boundary's sides apart to 1e-6.
        assert np.all(distance >= least - 1e-6)
        excess = distance - FARTHER[kind] * least - (1.1e-4 if kind == "deepfool" else 2e-6)
        assert np.all(excess[inner] <= 0), excess[inner].max()
    assert tried > 16


@norms
@pytest.mark.parametrize("kind", ["fab", "deepfool"])
def test_least_distance_towards_a_target(kind, name):
    """Class 1 is the target, the label is 0; class 2 is out of reach, or nearer and in the way."""
    matrix, images = hadamard(16)[:, 1:6].astype(np.float32), grey(0, 8)
    labels, targets = jnp.zeros(8, jnp.int32), jnp.full(8, 1, jnp.int32)
    for third in (-40.0, 0.2):
        model = linear(matrix, [0.5, 0.0, third, -40.0, -40.0] - 0.5 * matrix.sum(0))
        np.testing.assert_array_equal(own_labels(model, images), labels)
        by_class = gaps_by_class(model, matrix, images, labels, name)
        result = compiled(kind, name)(KEYS, model, images, labels, epsilon=AMPLE, targets=targets)
        np.testing.assert_array_equal(predictions(model, result.images), targets)
        assert np.all(result.success)
        assert np.all(result.distance >= by_class[:, 1] - 1e-6)
        if third < 0:
            assert np.all(result.distance <= FARTHER[kind] * by_class[:, 1] + 1.1e-4)
        else:
            nearer = by_class[:, 2] < by_class[:, 1]
            assert nearer.sum() > 4
            untargeted = compiled(kind, name)(KEYS, model, images, labels, epsilon=AMPLE)
            assert np.all(untargeted.distance[nearer] < result.distance[nearer])


# What holds for attacks of least distance


@pytest.mark.parametrize("targeted", [False, True])
def test_what_misleads_does_so_by_more_than_rounding(targeted):
    """Whoever scores the image again does so in another program."""
    model, images = mlp(0), mixed(0, 16)
    labels = own_labels(model, images)
    targets = (labels + 1) % 5 if targeted else None
    found = jax.jit(fab(Linf, steps=10))(KEY, model, images, labels, targets=targets)
    logits = model(KEY, found.images)
    ahead = margin(logits, labels, targets)[found.success]
    assert found.success.mean() > 0.9
    assert np.all(ahead > 5e-6 * np.abs(logits.max(-1))[found.success])


def test_no_budget_by_default():
    images, model = mixed(0, 8), mlp(0)
    labels = own_labels(model, images)
    own = jax.jit(make("deepfool", "l2"))(KEYS, model, images, labels)
    ample = compiled("deepfool", "l2")(KEYS, model, images, labels, epsilon=AMPLE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), own, ample)
    assert [make(kind, "l2").epsilon for kind in KINDS] == [math.inf] * 3


@norms
@kinds
def test_misled_images_stay(kind, name):
    images, model = mixed(0, 8), mlp(0)
    labels = own_labels(model, images).at[::2].add(1) % 5
    result = compiled(kind, name)(KEYS, model, images, labels, epsilon=AMPLE)
    assert np.all(result.success)
    np.testing.assert_array_equal(result.images[::2], images[::2])
    np.testing.assert_array_equal(result.distance[::2], 0)
    assert np.all(result.distance[1::2] > 0)


@norms
@kinds
def test_budget(kind, name):
    """Success is what is misled within the budget, and the images never leave it."""
    images, model = mixed(1, 8), mlp(1)
    labels, attack = own_labels(model, images), compiled(kind, name)
    least = attack(KEYS, model, images, labels, epsilon=AMPLE).distance
    for factor in (0.0, 0.5, 0.999, 1.01, 3.0):
        result = attack(KEYS, model, images, labels, epsilon=factor * least)
        if name != "l1":
            assert_within(result, images, factor * least, name)
        assert np.all(numpy_distance(float64(result.images) - float64(images), ORDER[name]) <= factor * least + 1e-6)
        np.testing.assert_array_equal(result.success, predictions(model, result.images) != labels)
        if factor >= 1:
            assert np.mean(result.success) > 0.8
        if factor <= 0.5:
            assert np.mean(result.success) < 0.2
    ones = attack(KEYS, model, images, labels, epsilon=jnp.where(jnp.arange(8) < 4, 0.5, 1.5) * least)
    assert ones.success.tolist()[4:] == [True] * 4
    assert np.mean(ones.success[:4]) < 0.3


COUNTED = {
    "fab": (fab(Linf, steps=2, restarts=2), None, 1 + 2 * 4 + 3 + 1, 4 * 4),
    "fab targeted": (fab(L2, steps=2), 1, 1 + 2 * 2 + 3 + 1, 2),
    "fab_t": (fab_t(Linf, steps=1, classes=3, restarts=2), None, 1 + 2 * 6 + 3 + 1, 6),
    "deepfool": (deepfool(L2, steps=4, classes=3), None, 1 + 4 + 1 + 1, 8),
    "deepfool, all": (deepfool(Linf, steps=4, classes=None), None, 1 + 4 + 1 + 1, 16),
    "deepfool targeted": (deepfool(L2, steps=4), 1, 1 + 4 + 1 + 1, 4),
}


@pytest.mark.parametrize(("attack", "target", "forwards", "backwards"), COUNTED.values(), ids=COUNTED.keys())
def test_passes_are_counted(attack, target, forwards, backwards):
    targets = None if target is None else jnp.full(2, target, jnp.int32)
    assert_counted(attack, forwards, backwards, targets)


@pytest.mark.full
@kinds
def test_batches_and_their_order_change_nothing(kind):
    images, model = mixed(3, 8), mlp(3)
    labels, epsilons, attack = own_labels(model, images), jnp.linspace(0.02, 0.3, 8), compiled(kind, "l2")
    whole = attack(KEYS, model, images, labels, epsilon=epsilons)
    for rows in ([5], [6, 0, 3], [7, 6, 5, 4, 3, 2, 1, 0]):
        rows = np.array(rows)
        part = attack(KEYS[rows], model, images[rows], labels[rows], epsilon=epsilons[rows])
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_allclose(found, np.asarray(expected)[rows], atol=1e-4)


@pytest.mark.full
@kinds
def test_compiled_or_not_and_new_weights(kind):
    images, attack, found, compilations = mixed(4, 8), compiled(kind, "linf"), [], set()
    for seed in range(3):
        model = mlp(seed)
        found.append(attack(KEYS, model, images, own_labels(model, images), epsilon=jnp.full(8, 0.2)))
        compilations.add(attack._cache_size())
    assert len(compilations) == 1
    assert np.abs(found[1].images - found[2].images).max() > 1e-3
    plain = make(kind, "linf")(KEYS, mlp(2), images, own_labels(mlp(2), images), epsilon=jnp.full(8, 0.2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, found[2])


def test_keys_matter_only_to_restarts():
    images, model = mixed(4, 8), mlp(4)
    labels, other = own_labels(model, images), jax.random.split(jax.random.key(1), 8)
    attack = compiled("fab", "l2")
    first, again, third = (attack(keys, model, images, labels, epsilon=AMPLE) for keys in (KEYS, KEYS, other))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first.distance != third.distance)
    alone = jax.jit(fab(L2, steps=8))
    single = [alone(keys, model, images, labels, epsilon=AMPLE) for keys in (KEYS, other)]
    jax.tree.map(np.testing.assert_array_equal, *single)
    assert np.all(first.distance <= single[0].distance + 1e-4)


@pytest.mark.parametrize("function", HOSTILE, ids=lambda function: function.__name__[1:])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("fab", "linf"), ("fab", "l1"), ("fab_t", "l2"), ("deepfool", "l2"), ("deepfool", "l1")],
    ids=lambda value: value,
)
def test_useless_gradients_do_no_harm(function, kind, name):
    images = mixed(7, 8).at[:4].multiply(0.4)
    labels = jnp.asarray([0, 1, 2, 3, 4, 0, 1, 2], jnp.int32)
    model = hostile(function)
    result = compiled(kind, name)(KEYS, model, images, labels, epsilon=jnp.full(8, 0.3))
    distance = numpy_distance(float64(result.images) - float64(images), ORDER[name])
    assert np.all(np.isfinite(result.images) & (result.images >= 0) & (result.images <= 1))
    assert np.all(distance <= 0.3 + 1e-6)
    wrong = predictions(model, images) != labels
    np.testing.assert_array_equal(np.asarray(result.images)[wrong], images[wrong])
    if function is HOSTILE[0]:
        np.testing.assert_array_equal(result.success, labels != 1)
        np.testing.assert_array_equal(result.images, images)


@kinds
def test_nan_logits_mislead_nobody(kind):
    images, model = mixed(7, 8), jax.tree.map(lambda weights: jnp.nan * weights, mlp(0))
    result = compiled(kind, "linf")(KEYS, model, images, jnp.zeros(8, jnp.int32), epsilon=AMPLE)
    assert not np.any(result.success)
    np.testing.assert_array_equal(result.images, images)


@norms
def test_the_boundary_is_reached_on_a_curved_model(name):
    """FAB ends close to the boundary, mostly nearer than DeepFool, on images at the box's sides."""
    nearer = []
    for seed in range(3):
        images, model = mixed(seed, 8), mlp(seed)
        labels = own_labels(model, images)
        found, rough = (
            compiled(kind, name)(KEYS, model, images, labels, epsilon=AMPLE) for kind in ("fab", "deepfool")
        )
        assert np.all(found.success & rough.success)
        short = images + 0.97 * (found.images - images)
        np.testing.assert_array_equal(predictions(model, short), labels)
        nearer.append(np.asarray(found.distance / rough.distance))
    assert np.max(nearer) < (1.2 if name == "l1" else 1.01)
    assert np.mean(nearer) < 0.98


BAD_SETTINGS = {
    "fab epsilon": (lambda: fab(Linf, epsilon=-0.5), "epsilon .*-0.5"),
    "fab restarts": (lambda: fab(Linf, restarts=0), "restarts .*0"),
    "fab alpha_max": (lambda: fab(Linf, alpha_max=0.0), "alpha_max .*0.0"),
    "fab eta": (lambda: fab(Linf, eta=0.9), "eta .*0.9"),
    "fab eta NaN": (lambda: fab(Linf, eta=math.nan), "eta .*nan"),
    "fab_t beta": (lambda: fab_t(Linf, beta=1.5), "beta .*1.5"),
    "fab_t classes": (lambda: fab_t(Linf, classes=0), "classes .*0"),
    "deepfool epsilon": (lambda: deepfool(Linf, epsilon=math.nan), "epsilon .*nan"),
    "deepfool steps": (lambda: deepfool(Linf, steps=0), "steps .*0"),
    "deepfool overshoot": (lambda: deepfool(Linf, overshoot=-0.1), "overshoot .*-0.1"),
    "deepfool classes": (lambda: deepfool(Linf, classes=1), "classes .*1"),
}


@pytest.mark.parametrize(("make", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_arguments_are_named():
    images, labels = mixed(0, 2), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="targets must be None"):
        fab_t(Linf, classes=2)(KEY, mlp(0), images, labels, targets=labels)
    with pytest.raises(ValueError, match="classes must be below the model's 5, got 9"):
        fab_t(Linf)(KEY, mlp(0), images, labels)
    with pytest.raises(ValueError, match="start must be None"):
        fab(Linf)(KEY, mlp(0), images, labels, start=images)
    with pytest.raises(ValueError, match=r"labels .*7"):
        deepfool(Linf)(KEY, mlp(0), images, labels + 7)
