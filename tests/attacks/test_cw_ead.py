"""The attacks of least distance by search over a constant: closed forms, foolbox, budgets, counts, hostile models."""

import functools
import importlib
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import (
    HOSTILE,
    KEY,
    assert_counted,
    assert_within,
    hostile,
    linear,
    mixed,
    mlp,
    numpy_distance,
    own_labels,
    predictions,
)
from helpers import float64
from jax.tree_util import Partial

from rbf_jax import attacks
from rbf_jax.attacks.cw import cw_l2, cw_linf, first_search, is_repeat, next_search
from rbf_jax.attacks.ead import ead, elastic_net, l1_rule
from rbf_jax.types import Array, LogitsFn

KEYS = jax.random.split(KEY, 8)
ORDER = {"cw_l2": 2, "cw_linf": np.inf, "ead": 1}
SMALL = {
    "cw_l2": cw_l2(steps=60, searches=5, learning_rate=0.03, initial_c=0.1),
    "cw_linf": cw_linf(steps=300, patience=20, learning_rate=0.02, initial_c=1e-3),
    "ead": ead(steps=60, searches=5, initial_c=0.1),
}
kinds = pytest.mark.parametrize("kind", ORDER)


@functools.cache
def compiled(kind: str) -> Any:
    return jax.jit(SMALL[kind])


def distances(result, images, kind: str) -> np.ndarray:
    return numpy_distance(float64(result.images) - float64(images), ORDER[kind])


class Planes(NamedTuple):
    """Label 0 everywhere; class 1 lies the one way along the weights, class 2, which is nearer, the other way."""

    model: LogitsFn
    images: Array
    nearest: np.ndarray  # untargeted: the gap to the nearer plane over its weights' scale
    to_target: np.ndarray  # towards class 1
    weights: np.ndarray


def planes(seed: int, towards: int, at_sides: bool) -> Planes:
    """``towards`` is the way (1 or -1) in which pixels at 0 and 1 can move."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(-1, 1, 16)
    weights[6] = 3.0  # the one pixel that is best in l1
    images = rng.uniform(0.4, 0.6, (8, 16))
    inner = np.ones(16, bool)
    if at_sides:
        inner[::2] = False
        images[:, ~inner] = np.where(towards * weights[~inner] > 0, 0.0, 1.0)
    level = images @ weights
    bias = level.mean()
    wanted = bias + np.linspace(0, 0.05, 8)
    inside = np.where(inner, weights, 0)
    images = (images + (wanted - level)[:, None] * inside / (inside @ inside)).astype(np.float32)
    assert np.all((images >= 0) & (images <= 1))
    assert np.any((images == 0) | (images == 1)) == at_sides
    level = float64(images) @ weights - bias
    model = linear(np.stack([np.zeros(16), weights, -0.5 * weights], 1), [0.0, -bias - 0.4, 0.5 * bias - 0.1])
    return Planes(model, jnp.asarray(images.reshape(8, 4, 4, 1)), 2 * (0.1 + 0.5 * level), 0.4 - level, weights)


CLOSED = {"cw_l2": (cw_l2(), 1.03), "cw_linf": (cw_linf(steps=4000, patience=100), 1.12), "ead": (ead(), 1.05)}


@functools.cache
def full(kind: str) -> Any:
    return jax.jit(CLOSED[kind][0])


@kinds
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("at_sides", [False, True], ids=["inside", "at 0 and 1"])
def test_least_distance_to_a_plane(kind, targeted, at_sides):
    """``gap / |w|`` in the dual norm; pixels at 0 and 1, half of all, must contribute to reach it."""
    for seed in range(3):
        case = planes(seed, 1 if targeted else -1, at_sides)
        targets = jnp.ones(8, jnp.int32) if targeted else None
        result = full(kind)(KEYS, case.model, case.images, jnp.zeros(8, jnp.int32), targets=targets)
        dual = {"cw_l2": 2, "cw_linf": 1, "ead": np.inf}[kind]
        least = (case.to_target if targeted else case.nearest) / np.linalg.norm(case.weights, dual)
        ratio = distances(result, case.images, kind) / least
        assert np.all(result.success)
        np.testing.assert_array_equal(predictions(case.model, result.images), 1 if targeted else 2)
        assert ratio.min() > 1 - 1e-5
        assert ratio.max() < CLOSED[kind][1]


@pytest.mark.parametrize(
    ("kind", "attack", "most"),
    [
        ("cw_l2", cw_l2(confidence=0.5), 1.03),
        ("cw_linf", cw_linf(steps=4000, patience=100, confidence=0.5), 1.12),
        ("ead", ead(confidence=0.5), 1.15),
    ],
    ids=ORDER,
)
def test_confidence_is_reached(kind, attack, most):
    case, labels = planes(0, 1, False), jnp.zeros(8, jnp.int32)
    targets = jnp.ones(8, jnp.int32)
    result = jax.jit(attack)(KEYS, case.model, case.images, labels, targets=targets)
    gap = float64(attacks.margin(case.model(KEY, result.images), labels, targets))
    assert np.all(gap >= 0.5 - 1e-5)
    dual = {"cw_l2": 2, "cw_linf": 1, "ead": np.inf}[kind]
    ratio = distances(result, case.images, kind) / ((case.to_target + 0.5) / np.linalg.norm(case.weights, dual))
    assert np.all(ratio < most)


@kinds
def test_confidence_out_of_reach_leaves_the_image(kind):
    options = {"steps": 40} if kind == "cw_linf" else {"steps": 20, "searches": 2}
    attack = {"cw_l2": cw_l2, "cw_linf": cw_linf, "ead": ead}[kind](confidence=1e4, **options)
    images, model = mixed(0, 8), mlp(0)
    result = jax.jit(attack)(KEYS, model, images, own_labels(model, images))
    np.testing.assert_array_equal(result.images, images)
    assert not np.any(result.success)


def gentle(seed: int) -> LogitsFn:
    """A network so smooth that an attack has one place to end at."""
    first, second = mlp(seed).args[0]  # type: ignore[attr-defined]
    return Partial(mlp(seed).func, (0.4 * first, second))  # type: ignore[attr-defined]


def foolbox_images(name: str, model: LogitsFn, images: Array, criterion: str, classes: Array, **options: Any) -> Array:
    pytest.importorskip("foolbox")
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        foolbox = importlib.import_module("foolbox")
        quick = jax.jit(lambda x: model(KEY, x))
        attack = getattr(foolbox.attacks, name)(abort_early=False, **options)
        wrapped = foolbox.models.JAXModel(quick, bounds=(0, 1))
        return jnp.asarray(attack.run(wrapped, images, getattr(foolbox.criteria, criterion)(classes)))


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_cw_l2_finds_what_foolbox_finds(targeted):
    """Inside the box, where the two mappings hardly differ, and further than a first step of Adam reaches."""
    images, model = jnp.clip(mixed(3, 8), 0.15, 0.85), gentle(3)
    labels = own_labels(model, images)
    targets = (labels + 1) % 5 if targeted else None
    ours = cw_l2(steps=50, searches=3, learning_rate=0.02, initial_c=0.3)
    found = jax.jit(ours)(KEYS, model, images, labels, targets=targets)
    theirs = foolbox_images(
        "L2CarliniWagnerAttack",
        model,
        images,
        *(("Misclassification", labels) if targets is None else ("TargetedMisclassification", targets)),
        steps=50,
        binary_search_steps=3,
        stepsize=0.02,
        initial_const=0.3,
    )
    reached = predictions(model, theirs)
    assert np.all(reached == targets if targeted else reached != labels)
    there = numpy_distance(float64(theirs) - float64(images), 2)
    far = there > 0.05
    assert far.sum() > 5
    np.testing.assert_allclose(distances(found, images, "cw_l2")[far], there[far], rtol=0.02)


@pytest.mark.parametrize(("rule", "name"), [(elastic_net, "EN"), (l1_rule, "L1")], ids=["EN", "L1"])
def test_ead_is_that_of_foolbox(rule, name):
    images, model = mixed(3, 8), gentle(3)
    labels = own_labels(model, images)
    targets = (labels + 1) % 5 if name == "L1" else None
    ours = ead(steps=40, searches=3, initial_c=0.3, beta=0.01, rule=rule)
    found = jax.jit(ours)(KEYS, model, images, labels, targets=targets)
    theirs = foolbox_images(
        "EADAttack",
        model,
        images,
        *(("Misclassification", labels) if targets is None else ("TargetedMisclassification", targets)),
        steps=40,
        binary_search_steps=3,
        initial_const=0.3,
        regularization=0.01,
        decision_rule=name,
    )
    # Where it finds nothing foolbox returns a black image.
    hit = np.abs(np.asarray(theirs)).max((1, 2, 3)) > 0
    assert hit.sum() > 5
    np.testing.assert_array_equal(found.success, hit)
    np.testing.assert_allclose(found.images[hit], theirs[hit], atol=1e-3)


def test_rules_choose_by_their_own_measure():
    """Along one path: l1 is least by the one, the elastic net by the other, and what is reported is l1."""
    images, model = mixed(3, 8), gentle(3)
    labels, found = own_labels(model, images), {}
    for rule in (l1_rule, elastic_net):
        result = jax.jit(ead(steps=60, searches=4, initial_c=0.1, rule=rule))(KEYS, model, images, labels)
        assert np.all(result.success)
        np.testing.assert_allclose(result.distance, distances(result, images, "ead"), rtol=1e-5)
        found[rule] = result.images - images
    for rule, other in ((l1_rule, elastic_net), (elastic_net, l1_rule)):
        least, more = (float64(rule(found[chosen], 1e-3)) for chosen in (rule, other))
        assert np.all(least <= more * (1 + 1e-6))
        assert np.any(least < more * 0.999)


def test_the_driver_reads_l1_under_any_rule():
    images, model = mixed(3, 8), gentle(3)
    attack = ead(steps=30, searches=2, initial_c=1.0, rule=elastic_net)
    problem = attack.pose(KEYS, images, own_labels(model, images))
    best = attack.advance(0, 60, model, problem, attack.begin(model, problem)).best
    assert np.sum(best.success) > 4
    np.testing.assert_allclose(-best.loss, distances(best, images, "ead"), rtol=1e-5)


def test_search_of_the_constant():
    """Fails, fails, works, fails, works; then, if asked to, once more the least that worked."""
    search = first_search(0.01, jnp.zeros(1))
    for found, expected in ((False, 0.1), (False, 1.0), (True, 0.55), (False, 0.775), (True, 0.6625)):
        repeated = next_search(search._replace(found=jnp.asarray([found])), jnp.asarray(True))
        search = next_search(search._replace(found=jnp.asarray([found])), jnp.asarray(False))
        assert float(search.c[0]) == pytest.approx(expected)
        assert not search.found[0]
    assert float(repeated.c[0]) == pytest.approx(0.775)
    ends = [n for n in range(40) if is_repeat(jnp.int32(n), 4, 10)]
    assert ends == [35, 36, 37, 38]  # the constant changes after the last step of a round only: 35
    assert not any(is_repeat(jnp.int32(n), 4, 9) for n in range(36))


def test_cw_l2_starts_each_search_at_the_image():
    images, model = jnp.clip(mixed(3, 8), 0.15, 0.85), gentle(3)
    attack = cw_l2(steps=20, searches=2, initial_c=1.0)
    problem = attack.pose(KEYS, images, own_labels(model, images))
    state = attack.advance(0, 20, model, problem, attack.begin(model, problem))
    variable = np.arctanh(0.99 * (2 * float64(images) - 1))
    assert np.abs(state.adam.w - variable).max() > 0.05
    # A first step of Adam is as long as the learning rate.
    state = attack.step(jnp.int32(20), model, problem, state)
    assert np.abs(state.adam.w - variable).max() < 0.0101
    assert np.all(state.search.c != 1)


def test_cw_linf_shrinks_tau_and_doubles_c():
    images, model = mixed(3, 8), gentle(3)
    attack = SMALL["cw_linf"]
    problem = attack.pose(KEYS, images, own_labels(model, images))
    state, step, fallen, doubled = attack.begin(model, problem), jax.jit(attack.step), 0, 0
    for number in range(200):
        before, state = state, step(jnp.int32(number), model, problem, state)
        falls, doubles = np.asarray(state.tau < before.tau), np.asarray(state.c > before.c)
        assert np.all(state.tau[falls] <= 0.9 * before.tau[falls] * (1 + 1e-6))
        assert np.all(state.since[falls] == 1)
        assert np.all(before.tried[doubles] == 19)
        np.testing.assert_allclose(state.c[doubles], 2 * before.c[doubles])
        assert not np.any(falls & doubles)
        fallen, doubled = fallen + falls, doubled + doubles
    assert np.all(fallen > 3)
    assert np.all(doubled > 1)


@kinds
def test_misled_already_is_at_distance_0(kind):
    images, model = mixed(0, 8), mlp(0)
    own = own_labels(model, images)
    even = jnp.arange(8) % 2 == 0
    result = compiled(kind)(KEYS, model, images, jnp.where(even, (own + 1) % 5, own))
    np.testing.assert_array_equal(result.distance == 0, even)
    np.testing.assert_array_equal(result.images[even], images[even])
    assert np.all(result.success)
    result = jax.jit(SMALL[kind])(KEYS, model, images, (own + 1) % 5, targets=own)
    np.testing.assert_array_equal(result.images, images)
    assert np.all(result.success)


@kinds
def test_budgets(kind):
    """What lies beyond comes back into the ball; success is what the model says there."""
    rates, attack = [], compiled(kind)
    for budget in (0.0, 1e-3, 0.02, 0.1, 0.5, 5.0):
        success = []
        for seed in (0, 1):
            images, model = mixed(seed, 8), mlp(seed)
            labels = own_labels(model, images)
            result = attack(KEYS, model, images, labels, epsilon=jnp.full(8, budget))
            found = distances(result, images, kind)
            if kind == "ead":
                assert np.all(found <= budget * (1 + 1e-6) + 1e-7)
                assert np.all((result.images >= 0) & (result.images <= 1))
            else:
                assert_within(result, images, budget, "l2" if kind == "cw_l2" else "linf")
            np.testing.assert_array_equal(result.success, predictions(model, result.images) != labels)
            success += result.success.tolist()
        rates.append(np.mean(success))
    assert rates[0] == 0
    assert np.all(np.diff(rates) >= 0)
    assert 0 < rates[2] < 1
    assert rates[-1] == 1


COUNTED = {
    "cw_l2": (cw_l2(steps=2, searches=2), 6, 4),
    "cw_l2 eot": (cw_l2(steps=2, searches=2, gradient=attacks.eot(3)), 16, 12),
    "cw_l2 mean": (cw_l2(steps=2, searches=1, gradient=attacks.mean_logits(2)), 11, 4),
    "cw_linf": (cw_linf(steps=5), 7, 5),
    "ead": (ead(steps=2, searches=2), 10, 4),
    "ead eot": (ead(steps=2, searches=1, gradient=attacks.eot(3)), 16, 6),
}


@pytest.mark.parametrize(("attack", "forwards", "backwards"), COUNTED.values(), ids=COUNTED)
def test_passes_are_counted(attack, forwards, backwards):
    assert_counted(attack, forwards, backwards)


@pytest.mark.full
@kinds
def test_batches_and_their_order_change_nothing(kind):
    images, model = mixed(3, 8), gentle(3)
    labels = own_labels(model, images)
    whole = compiled(kind)(KEYS, model, images, labels)
    assert np.unique(np.asarray(whole.distance).round(5)).size == 8
    for rows in ([5], [6, 0, 3], [7, 6, 5, 4, 3, 2, 1, 0]):
        rows = np.array(rows)
        part = compiled(kind)(KEYS[rows], model, images[rows], labels[rows])
        np.testing.assert_array_equal(part.success, whole.success[rows])
        np.testing.assert_allclose(part.images, whole.images[rows], atol=1e-3)


@pytest.mark.full
@kinds
def test_compiled_or_not(kind):
    images, model = mixed(4, 8), gentle(4)
    arguments = KEYS, model, images, own_labels(model, images)
    found, expected = compiled(kind)(*arguments), SMALL[kind](*arguments)
    assert np.all(found.success)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found, expected)


@pytest.mark.full
@kinds
def test_new_weights_compile_nothing(kind):
    images, attack, sizes, found = mixed(5, 8), compiled(kind), set(), []
    for seed in range(3):
        model = mlp(seed)
        found.append(attack(KEYS, model, images, own_labels(model, images)).images)
        sizes.add(attack._cache_size())
    assert len(sizes) == 1
    assert np.abs(found[0] - found[1]).max() > 1e-3


@kinds
def test_expectation_over_a_sure_model_is_the_exact_look(kind):
    images, model = mixed(4, 8), gentle(4)
    arguments = KEYS, model, images, own_labels(model, images)
    options: dict[str, Any] = {"steps": 200, "patience": 20} if kind == "cw_linf" else {"steps": 30, "searches": 3}
    make = functools.partial(
        {"cw_l2": cw_l2, "cw_linf": cw_linf, "ead": ead}[kind], initial_c=1.0, learning_rate=0.03, **options
    )
    single, mean = (jax.jit(make(gradient=look))(*arguments) for look in (attacks.exact, attacks.eot(2)))
    assert np.sum(single.success) > 4
    np.testing.assert_allclose(mean.distance, single.distance, rtol=0.01)


@kinds
@pytest.mark.parametrize("function", HOSTILE, ids=lambda function: function.__name__[1:])
def test_useless_gradients_do_no_harm(kind, function):
    images = mixed(7, 8).at[:4].multiply(0.4)
    labels = jnp.asarray([0, 1, 2, 3, 4, 0, 1, 2], jnp.int32)
    result = compiled(kind)(KEYS, hostile(function), images, labels)
    assert np.all(np.isfinite(result.images))
    assert np.all((result.images >= 0) & (result.images <= 1))
    assert np.all(result.distance[result.success] < 16)
    # Who is not misled keeps the clean image.
    np.testing.assert_array_equal(result.images[~result.success], images[~result.success])
    if function.__name__ == "constant":
        np.testing.assert_array_equal(result.success, labels != 1)
        np.testing.assert_array_equal(result.images, images)


def _no_number(weights, key, images):
    del key
    return jnp.nan * (images.reshape(len(images), -1) @ weights)


@kinds
def test_a_model_that_says_nan_leaves_the_images(kind):
    images = mixed(7, 8)
    result = jax.jit(SMALL[kind])(KEYS, Partial(_no_number, jnp.ones((16, 5))), images, jnp.zeros(8, jnp.int32))
    np.testing.assert_array_equal(result.images, images)
    assert not np.any(result.success)


BAD = {
    "epsilon": (lambda: cw_l2(epsilon=-1.0), "epsilon .*-1.0"),
    "NaN epsilon": (lambda: ead(epsilon=math.nan), "epsilon .*nan"),
    "steps": (lambda: cw_linf(steps=0), "steps .*0"),
    "searches": (lambda: ead(searches=0), "searches .*0"),
    "learning rate": (lambda: cw_l2(learning_rate=0.0), "learning_rate .*0.0"),
    "c": (lambda: ead(initial_c=0.0), "initial_c .*0.0"),
    "beta": (lambda: ead(beta=-0.1), "beta .*-0.1"),
    "confidence": (lambda: cw_linf(confidence=-2.0), "confidence .*-2.0"),
    "shrink": (lambda: cw_linf(shrink=1.0), "shrink .*1.0"),
    "patience": (lambda: cw_linf(patience=0), "patience .*0"),
    "start": (
        lambda: cw_l2(steps=1)(KEY, mlp(0), mixed(0, 1), jnp.zeros(1, jnp.int32), start=mixed(0, 1)),
        "start must be None",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
