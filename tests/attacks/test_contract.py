"""What holds for every attack, whatever the model: box and ball, counts, keys, batches, compilation, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import (
    HOSTILE,
    KEY,
    NORMS,
    RADIUS,
    SHAPE,
    assert_counted,
    assert_within,
    compiled,
    constant,
    grey,
    half_nan_gradient,
    hostile,
    linear,
    make,
    mixed,
    mlp,
    own_labels,
    predictions,
)
from helpers import float64
from jax.tree_util import Partial

from rbf_jax import attacks

KINDS = ["fgsm", "pgd", "mi_fgsm", "apgd", "apgd_t"]
# In l1 test_every_attack.py holds what holds for every attack.
COMBINATIONS = [(kind, name) for kind in KINDS for name in ("linf", "l2")]
TARGETED = [("fgsm", "l2", True), ("pgd", "linf", True), ("mi_fgsm", "linf", True), ("apgd", "l2", True)]
STARTS_AT_RANDOM = {"pgd", "apgd", "apgd_t"}
all_attacks = pytest.mark.parametrize(("kind", "name"), COMBINATIONS, ids=[" ".join(pair) for pair in COMBINATIONS])
norms = pytest.mark.parametrize("name", NORMS)
KEYS = jax.random.split(KEY, 8)


def everywhere(value) -> jax.Array:
    """For each of eight images, so that all tests share one compilation."""
    return jnp.full(8, value, jnp.float32)


@pytest.mark.parametrize(
    ("kind", "name", "targeted"),
    [(*pair, False) for pair in COMBINATIONS] + TARGETED,
    ids=[" ".join(pair) for pair in COMBINATIONS] + [f"{kind} {name} targeted" for kind, name, _ in TARGETED],
)
def test_box_and_ball(kind, name, targeted):
    attack, rates = compiled(kind, name), []
    for epsilon in (0.0, 1e-3, 8 / 255, 0.3, 2.0):
        for seed in (0, 1):
            images, model = mixed(seed, 8), mlp(seed)
            labels = own_labels(model, images)
            targets = (labels + 1) % 5 if targeted else None
            result = attack(KEYS, model, images, labels, epsilon=everywhere(epsilon), targets=targets)
            assert_within(result, images, epsilon, name)
            reached = predictions(model, result.images)
            # The model is deterministic: success is what it says of the image returned.
            np.testing.assert_array_equal(result.success, reached == targets if targeted else reached != labels)
            rates.append((epsilon, result.success.mean()))
    assert all(rate == 0 for epsilon, rate in rates if epsilon == 0)
    assert all(rate > 0.2 for epsilon, rate in rates if epsilon == 2)


def test_l2_ball_at_full_size():
    """The more pixels, the more rounding in the length of a perturbation."""
    shape = (32, 32, 3)
    images, model = mixed(0, 6, shape), mlp(0, shape)
    attack = jax.jit(attacks.pgd(attacks.L2, epsilon=0.3, steps=4))
    for epsilon in (1e-3, 8 / 255, 0.5, 2.0):
        radius = jnp.full(6, epsilon)
        assert_within(attack(KEY, model, images, own_labels(model, images), epsilon=radius), images, epsilon, "l2")


@all_attacks
def test_ball_where_all_pixels_round_the_same_way(kind, name):
    """Flat images and a flat gradient: the rounding of ``x + delta`` does not average out over the pixels."""
    pixels = np.linspace(0.05, 0.95, 46, dtype=np.float32)
    images = jnp.asarray(np.broadcast_to(pixels[:, None, None, None], (46, 28, 28, 1)))
    # The brighter, the more of class 1, which never wins.
    model = linear(np.tile([-1.0, 1.0], (784, 1)), [1e4, 0.0])
    attack = make(kind, name)
    if kind == "pgd":
        attack = attacks.pgd(NORMS[name], epsilon=0.1, steps=3, loss=attacks.margin, random_start=False)
    if kind == "apgd_t":
        attack = attacks.apgd_t(NORMS[name], epsilon=0.1, steps=3, classes=1, loss=attacks.margin)
    attack = jax.jit(attack)
    for epsilon in (0.003, 0.01, 0.04):
        result = attack(KEY, model, images, jnp.zeros(46, jnp.int32), epsilon=jnp.full(46, epsilon))
        # Three sparse l1 steps do not fill the ball.
        assert np.all(result.distance > (0.3 if name == "l1" else 0.9) * epsilon)
        assert_within(result, images, epsilon, name)


@pytest.mark.parametrize("kind", KINDS)
def test_own_epsilon_is_the_default(kind):
    images, model = mixed(0, 8), mlp(0)
    labels = own_labels(model, images)
    own = jax.jit(make(kind, "linf"))(KEYS, model, images, labels)
    given = compiled(kind, "linf")(KEYS, model, images, labels, epsilon=everywhere(0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), own, given)


@all_attacks
def test_each_example_has_its_own_epsilon(kind, name):
    images, model, attack = mixed(0, 8), mlp(0), compiled(kind, name)
    labels, epsilons = own_labels(model, images), RADIUS[name] * np.linspace(0, 0.35, 8, dtype=np.float32)
    result = attack(KEYS, model, images, labels, epsilon=jnp.asarray(epsilons))
    assert_within(result, images, epsilons, name)
    np.testing.assert_array_equal(result.images[0], images[0])
    for i in (1, 4, 7):
        alone = attack(KEYS, model, images, labels, epsilon=everywhere(epsilons[i]))
        np.testing.assert_allclose(result.images[i], alone.images[i], atol=1e-6)
        assert result.distance[i] > 0


@all_attacks
def test_epsilon_0_returns_the_images(kind, name):
    images, model = mixed(1, 8), mlp(1)
    result = compiled(kind, name)(KEYS, model, images, own_labels(model, images), epsilon=everywhere(0))
    np.testing.assert_array_equal(result.images, images)
    assert np.all(result.distance == 0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("fgsm", "linf"), ("pgd", "l2"), ("mi_fgsm", "l2"), ("apgd", "linf"), ("apgd_t", "l2")],
    ids=lambda value: value,
)
@pytest.mark.full
def test_batches_and_their_order_change_nothing(kind, name):
    """With one key for each example, which moves along with it."""
    images, model = mixed(3, 8), mlp(3)
    labels, epsilons = own_labels(model, images), jnp.linspace(0.02, 0.3, 8)
    attack = compiled(kind, name)
    whole = attack(KEYS, model, images, labels, epsilon=epsilons)
    for rows in ([5], [6, 0, 3], [7, 6, 5, 4, 3, 2, 1, 0]):
        rows = np.array(rows)
        part = attack(KEYS[rows], model, images[rows], labels[rows], epsilon=epsilons[rows])
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_allclose(found, np.asarray(expected)[rows], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_keys(kind):
    """A single key is split by position; the same key gives the same result, another one another."""
    images, model = mixed(3, 8), mlp(3)
    labels, epsilon = own_labels(model, images), everywhere(0.5)
    split, single, again = (
        compiled(kind, "linf")(keys, model, images, labels, epsilon=epsilon) for keys in (KEYS, KEY, KEY)
    )
    other = compiled(kind, "linf")(jax.random.split(jax.random.key(1), 8), model, images, labels, epsilon=epsilon)
    jax.tree.map(np.testing.assert_array_equal, single, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), single, split)
    assert np.any(np.asarray(split.images != other.images)) == (kind in STARTS_AT_RANDOM)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_or_not(kind):
    images, model = mixed(4, 8), mlp(4)
    arguments = KEYS, model, images, own_labels(model, images)
    found, expected = (run(kind, "linf")(*arguments, epsilon=everywhere(0.2)) for run in (compiled, make))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


@all_attacks
def test_new_weights_compile_nothing(kind, name):
    images, attack, found, compilations = mixed(5, 8), compiled(kind, name), [], set()
    for seed in range(3):
        model = mlp(seed)
        labels = own_labels(model, images)
        found.append(attack(KEYS, model, images, labels, epsilon=everywhere(0.1 * seed)))
        compilations.add(attack._cache_size())
    assert len(compilations) == 1
    assert np.abs(found[1].images - found[2].images).max() > 1e-3


@pytest.mark.parametrize("function", HOSTILE, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("fgsm", attacks.cross_entropy),
        *((kind, attacks.margin) for kind in ("pgd", "mi_fgsm", "apgd")),
        ("apgd", attacks.dlr),
    ],
    ids=["fgsm", "pgd", "mi_fgsm", "apgd", "apgd dlr"],
)
@norms
def test_useless_gradients_do_no_harm(function, kind, loss, name):
    images = mixed(7, 8).at[:4].multiply(0.4)
    labels = jnp.asarray([0, 1, 2, 3, 4, 0, 1, 2], jnp.int32)
    epsilons = jnp.asarray([0.0, 0.05, 0.2, 0.2] * 2)
    result = compiled(kind, name, loss=loss)(KEYS, hostile(function), images, labels, epsilon=epsilons)
    assert_within(result, images, epsilons, name)
    assert np.all(np.isfinite(result.images))
    assert np.all(np.isfinite(result.distance))


def _rooted(weights, key, images):
    """Two classes, linear in the root of each pixel: on black ones the slope is infinite."""
    del key
    score = jnp.sqrt(images).reshape(len(images), -1) @ weights
    return jnp.stack([score, -score], -1)


def rooted():
    """Model, its weights, mostly black images, and labels."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16,)).astype(np.float32)
    images = np.where(rng.uniform(size=(64, *SHAPE)) < 0.75, 0, rng.uniform(size=(64, *SHAPE))).astype(np.float32)
    model = Partial(_rooted, weights)
    return model, weights, images, own_labels(model, images)


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "mi_fgsm", "apgd", "deepfool", "fab"])
def test_infinite_gradients_are_the_steepest(kind):
    """Each pixel has a best end of its interval: all can be broken that are wrong there, and no others."""
    (model, weights, images, labels), epsilon = rooted(), 0.02
    way = np.where(np.asarray(labels)[:, None] == 0, -1, 1) * np.sign(weights)
    corners = np.clip(images + epsilon * way.reshape(64, *SHAPE), 0, 1)
    breakable = predictions(model, corners) != labels
    assert 0.2 < breakable.mean() < 0.9
    attack = {
        "fgsm": attacks.fgsm(attacks.Linf, epsilon=epsilon),
        "pgd": attacks.pgd(attacks.Linf, epsilon=epsilon, steps=5),
        "mi_fgsm": attacks.mi_fgsm(attacks.Linf, epsilon=epsilon, steps=5),
        "apgd": attacks.apgd(attacks.Linf, epsilon=epsilon, steps=10),
        "deepfool": attacks.deepfool(attacks.Linf, epsilon=epsilon),
        "fab": attacks.fab(attacks.Linf, epsilon=epsilon, steps=40),
    }[kind]
    found = np.asarray(jax.jit(attack)(KEY, model, images, labels).success)
    if kind in ("deepfool", "fab"):  # they follow a boundary that is not straight
        assert not found[~breakable].any()
        assert found[breakable].mean() > 0.8
    else:
        np.testing.assert_array_equal(found, breakable)


@pytest.mark.parametrize("kind", [attacks.deepfool, attacks.fab], ids=["deepfool", "fab"])
def test_boundaries_behind_infinite_gradients_alone(kind):
    """On black images every slope is infinite: none is the steepest finite one."""

    def model(key, images):
        del key
        roots = jnp.sqrt(images).sum((1, 2, 3))
        return jnp.stack([jnp.full_like(roots, 0.5), roots], -1)

    images, labels = np.zeros((2, *SHAPE), np.float32), np.zeros(2, np.int32)
    found = jax.jit(kind(attacks.Linf, epsilon=0.1))(KEY, Partial(model), images, labels)
    assert found.success.all()


@pytest.mark.parametrize("kind", [attacks.pgd, attacks.apgd], ids=["pgd", "apgd"])
def test_infinite_gradients_that_lead_out_of_the_box_do_not_count(kind):
    """In l2, where the steepest pixels take all of a step, a random search would find more."""
    model, _, images, labels = rooted()
    searched = jax.jit(attacks.square(attacks.L2, epsilon=0.1, queries=500))(KEY, model, images, labels)
    found = jax.jit(kind(attacks.L2, epsilon=0.1, steps=20))(KEY, model, images, labels)
    assert found.success.mean() >= searched.success.mean() > 0.3


def _in_half_precision(weights, key, images):
    del key
    return (images.astype(jnp.float16) - 0.5).reshape(len(images), -1) @ weights


@pytest.mark.parametrize(
    "gradient", [attacks.exact, attacks.eot(2), attacks.mean_softmax(2)], ids=["exact", "eot", "mean"]
)
def test_gradients_of_a_model_in_half_precision_that_is_sure(gradient):
    """Margins at which the slope of the cross-entropy is below all of float16's numbers: FGSM still finds its way."""
    way = np.random.default_rng(0).normal(size=(16,))
    weights = jnp.asarray(np.stack([way, -way], -1) * 4, jnp.float16)
    images = jnp.asarray(0.5 + 0.2 * np.sign(way).reshape(1, *SHAPE) * np.ones((4, 1, 1, 1)), jnp.float32)
    model, labels = Partial(_in_half_precision, weights), jnp.zeros(4, jnp.int32)
    logits = model(KEY, images)
    assert np.all((logits[:, 0] - logits[:, 1] > 17) & (logits[:, 0] - logits[:, 1] < 40))
    found = attacks.fgsm(attacks.Linf, epsilon=0.1, gradient=gradient)(KEY, model, images, labels)
    np.testing.assert_allclose(found.images, images - 0.1 * np.sign(way).reshape(1, *SHAPE), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "loss"), [("fgsm", attacks.cross_entropy), ("pgd", attacks.margin)], ids=["fgsm", "pgd"]
)
def test_constant_model_is_misled_only_where_it_was_wrong(kind, loss):
    labels = jnp.arange(8, dtype=jnp.int32) % 3
    attack, model = compiled(kind, "l2", loss=loss), hostile(constant)
    found = attack(KEYS, model, mixed(7, 8), labels, epsilon=everywhere(0.1))
    np.testing.assert_array_equal(found.success, labels != 1)


def test_unusable_gradients_of_some_leave_the_others_alone():
    """The bright images, whose gradients are sound, end where they end on the sound model."""
    dark = np.arange(8) < 4
    images = jnp.where(dark[:, None, None, None], 0.4 * mixed(7, 8), 0.6 + 0.4 * mixed(7, 8))
    labels = own_labels(mlp(0), images)
    attack = compiled("fgsm", "linf")
    found, expected = (
        attack(KEYS, model, images, labels, epsilon=everywhere(0.1)).images
        for model in (hostile(half_nan_gradient), mlp(0))
    )
    np.testing.assert_array_equal(found[dark], images[dark])
    np.testing.assert_allclose(found[~dark], expected[~dark], atol=1e-6)
    assert np.abs(found - images)[~dark].max() > 0.09


COUNTED = {
    "fgsm": (attacks.fgsm(attacks.Linf, epsilon=0.1), 2, 1),
    "fgsm eot": (attacks.fgsm(attacks.Linf, epsilon=0.1, gradient=attacks.eot(3)), 6, 3),
    "pgd": (attacks.pgd(attacks.Linf, epsilon=0.1, steps=4, random_start=False), 5, 4),
    "mi_fgsm": (attacks.mi_fgsm(attacks.L2, epsilon=0.1, steps=4), 5, 4),
    "apgd restarts": (attacks.apgd(attacks.Linf, epsilon=0.1, steps=4, restarts=2), 10, 10),
    "apgd_t": (attacks.apgd_t(attacks.Linf, epsilon=0.1, steps=3, classes=2), 9, 8),
    "pgd restarts eot": (attacks.pgd(attacks.Linf, epsilon=0.1, steps=2, restarts=2, gradient=attacks.eot(3)), 18, 12),
}


@pytest.mark.parametrize(("attack", "forwards", "backwards"), COUNTED.values(), ids=COUNTED.keys())
def test_passes_are_counted(attack, forwards, backwards):
    assert_counted(attack, forwards, backwards)


def test_more_restarts_never_lower_success():
    """`compiled` restarts once; its first run is that of the same attack without."""
    single = jax.jit(attacks.pgd(attacks.Linf, epsilon=1.0, steps=3, step_size=0.05, loss=attacks.margin))
    gain = 0.0
    for seed in range(6):
        images, model = grey(seed, 8), mlp(seed)
        labels, outcomes = own_labels(model, images), []
        for attack in (single, compiled("pgd", "linf")):
            result = attack(KEYS, model, images, labels, epsilon=everywhere(0.5))
            outcomes.append(float64(attacks.margin(model(KEY, result.images), labels, None)))
            np.testing.assert_array_equal(result.success, outcomes[-1] > 0)
        assert np.all(outcomes[1] >= outcomes[0] - 1e-5)
        gain += np.sum(outcomes[1] - outcomes[0])
    assert gain > 0.1


def test_more_steps_never_lower_success():
    """The same path, seen for longer: steps far too long throw the iterates to and fro, the best one is kept."""
    images, model = grey(2, 30), mlp(2)
    labels, losses = own_labels(model, images), np.full(30, -np.inf)
    for steps in (1, 3, 6):
        attack = attacks.pgd(
            attacks.Linf, epsilon=0.02, steps=steps, step_size=0.04, random_start=False, loss=attacks.margin
        )
        result = jax.jit(attack)(KEY, model, images, labels)
        loss = float64(attacks.margin(model(KEY, result.images), labels, None))
        np.testing.assert_array_equal(result.success, loss > 0)
        assert np.all(loss >= losses - 1e-5)
        losses = loss
    assert np.sum(losses > 0) > 3


@norms
def test_success_grows_with_the_ball(name):
    before = np.zeros(40, bool)
    for epsilon in (0, 0.005, 0.01, 0.02, 0.3):
        success = []
        for seed in range(5):
            images, model = grey(seed, 8), mlp(seed)
            labels, radius = own_labels(model, images), everywhere(RADIUS[name] * epsilon)
            success += compiled("pgd", name)(KEYS, model, images, labels, epsilon=radius).success.tolist()
        # Three steps may lose one or the other on the way, never their number.
        assert np.sum(success) >= np.sum(before)
        assert np.any(success) == (epsilon > 0)
        before = np.asarray(success)
    assert before.mean() > 0.8


GOOD = dict(keys=KEY, images=mixed(0, 3), labels=jnp.asarray([0, 1, 2], jnp.int32))
BAD = {
    "three dimensions": (dict(images=jnp.zeros((4, 4, 1))), r"images .*\(4, 4, 1\)"),
    "uint8": (dict(images=jnp.zeros((3, *SHAPE), jnp.uint8)), "images .*uint8"),
    "no images": (dict(images=jnp.zeros((0, *SHAPE)), labels=jnp.zeros(0, jnp.int32)), r"images .*\(0, 4, 4, 1\)"),
    "above 1": (dict(images=jnp.full((3, *SHAPE), 1.25)), "images .*1.25"),
    "below 0": (dict(images=jnp.full((3, *SHAPE), -0.25)), "images .*-0.25"),
    "NaN": (dict(images=jnp.full((3, *SHAPE), jnp.nan)), "images .*nan"),
    "other number of labels": (dict(labels=jnp.zeros(2, jnp.int32)), r"labels .*\(2,\)"),
    "one-hot labels": (dict(labels=jnp.zeros((3, 5), jnp.int32)), r"labels .*\(3, 5\)"),
    "float labels": (dict(labels=jnp.zeros(3)), "labels .*float32"),
    "negative label": (dict(labels=jnp.asarray([0, -7, 1], jnp.int32)), "labels .*-7"),
    "label above the classes": (dict(labels=jnp.asarray([0, 5, 1], jnp.int32)), "labels .*5"),
    "other number of targets": (dict(targets=jnp.zeros(4, jnp.int32)), r"targets .*\(4,\)"),
    "negative target": (dict(targets=jnp.asarray([0, 1, -2], jnp.int32)), "targets .*-2"),
    "target above the classes": (dict(targets=jnp.asarray([0, 1, 9], jnp.int32)), "targets .*9"),
    "negative epsilon": (dict(epsilon=-0.1), "epsilon .*-0.1"),
    "NaN epsilon": (dict(epsilon=math.nan), "epsilon .*nan"),
    "one epsilon negative": (dict(epsilon=jnp.asarray([0.1, -0.3, 0.1])), "epsilon .*-0.3"),
    "other number of epsilons": (dict(epsilon=jnp.asarray([0.1, 0.1])), r"epsilon .*\(2,\)"),
    "other number of keys": (dict(keys=jax.random.split(KEY, 2)), r"keys .*\(2,\)"),
    "raw key": (dict(keys=jnp.zeros(2, jnp.uint32)), "key .*uint32"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize(
    "attack",
    [
        attacks.fgsm(attacks.Linf, epsilon=0.1),
        attacks.pgd(attacks.L2, epsilon=0.1, steps=1),
        attacks.mi_fgsm(attacks.L2, epsilon=0.1, steps=1),
        attacks.apgd(attacks.Linf, epsilon=0.1, steps=1),
    ],
    ids=["fgsm", "pgd", "mi_fgsm", "apgd"],
)
def test_bad_arguments_are_named(attack, arguments, message):
    options = GOOD | arguments
    keys, images, labels = (options.pop(name) for name in ("keys", "images", "labels"))
    with pytest.raises(ValueError, match=message):
        attack(keys, mlp(0), images, labels, **options)


BAD_SETTINGS = {
    "fgsm epsilon": (lambda: attacks.fgsm(attacks.Linf, epsilon=-0.5), "epsilon .*-0.5"),
    "pgd epsilon": (lambda: attacks.pgd(attacks.Linf, epsilon=math.nan, steps=1), "epsilon .*nan"),
    "no steps": (lambda: attacks.pgd(attacks.Linf, epsilon=0.1, steps=0), "steps .*0"),
    "no restarts": (lambda: attacks.pgd(attacks.Linf, epsilon=0.1, steps=1, restarts=0), "restarts .*0"),
    "step of length 0": (lambda: attacks.pgd(attacks.Linf, epsilon=0.1, steps=1, step_size=0.0), "step_size .*0.0"),
    "restarts all alike": (
        lambda: attacks.pgd(attacks.Linf, epsilon=0.1, steps=1, restarts=3, random_start=False),
        "restarts .*3",
    ),
    "mi_fgsm epsilon": (lambda: attacks.mi_fgsm(attacks.Linf, epsilon=-1.0), "epsilon .*-1.0"),
    "mi_fgsm decay": (lambda: attacks.mi_fgsm(attacks.Linf, epsilon=0.1, decay=-0.5), "decay .*-0.5"),
    "mi_fgsm step": (lambda: attacks.mi_fgsm(attacks.Linf, epsilon=0.1, step_size=0.0), "step_size .*0.0"),
    "apgd steps": (lambda: attacks.apgd(attacks.Linf, epsilon=0.1, steps=0), "steps .*0"),
    "apgd_t classes": (lambda: attacks.apgd_t(attacks.Linf, epsilon=0.1, classes=0), "classes .*0"),
    "no draws": (lambda: attacks.eot(0), "draws .*0"),
    "half a draw": (lambda: attacks.eot(2.5), "draws .*2.5"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("make", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
