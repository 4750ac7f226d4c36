"""FGSM and PGD against closed forms of linear models, and on toy defences that hide their gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import KEY, NORMS, grey, linear, mixed, mlp, orthogonal_classes, own_labels, predictions
from helpers import float64
from jax.tree_util import Partial
from scipy.special import logsumexp, softmax

from rbf_jax import attacks
from rbf_jax.attacks.gradients import fold_in
from rbf_jax.reconstruction import bpda

norms = pytest.mark.parametrize("name", NORMS)
smooth_norms = pytest.mark.parametrize("name", ["linf", "l2"])
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
BATCH = 12


@functools.cache
def attack_of(kind, name, loss):
    if kind == "fgsm":
        return jax.jit(attacks.fgsm(NORMS[name], epsilon=1.0, loss=loss))
    if kind == "mi_fgsm":
        return jax.jit(attacks.mi_fgsm(NORMS[name], epsilon=1.0, loss=loss))
    if kind == "apgd":
        return jax.jit(attacks.apgd(NORMS[name], epsilon=1.0, steps=40, loss=loss))
    # Short steps against the size of the balls below (0.01 to 0.1), and enough of them to cross one. From a random
    # start where the way from everywhere is the same: with ten classes it may lead to another one.
    random_start = loss is attacks.cross_entropy and name == "linf"
    return jax.jit(
        attacks.pgd(NORMS[name], epsilon=1.0, steps=40, step_size=0.01, loss=loss, random_start=random_start)
    )


def two_classes():
    """Random weights; each image's class is the model's; the distance to the plane is ``|w.x + b| / |w|``."""
    rng = np.random.default_rng(5)
    matrix = rng.normal(size=(16, 2))
    images = grey(6, BATCH)
    flat = float64(images).reshape(BATCH, -1)
    model = linear(matrix, [-0.5 * matrix[:, 0].sum(), -0.5 * matrix[:, 1].sum()])
    w = matrix[:, 1] - matrix[:, 0]
    margin = np.abs((flat - 0.5) @ w)
    return (
        model,
        images,
        own_labels(model, images),
        {name: margin / np.linalg.norm(w, DUAL[name]) for name in NORMS},
        None,
    )


def ten_classes(targeted=False):
    """Equally distant classes: the nearest plane is that of the runner-up; of a target, the one to the leader."""
    rng = np.random.default_rng(8)
    bias = rng.permutation([0.4, 0.2, *rng.uniform(0, 0.02, 8)])
    model, matrix = orthogonal_classes(bias)
    images = grey(9, BATCH) * 0.04 + 0.48
    logits = float64(images).reshape(BATCH, -1) @ matrix + bias
    ranked = np.argsort(-logits, -1)
    targets = jnp.asarray(ranked[:, 3], jnp.int32) if targeted else None
    other = ranked[:, 3] if targeted else ranked[:, 1]
    rows = np.arange(BATCH)
    margin = logits[rows, ranked[:, 0]] - logits[rows, other]
    # |w_i - w_j|_1 = 16, |w_i - w_j|_2 = sqrt(32) and |w_i - w_j|_inf = 2.
    distances = {"linf": margin / 16, "l2": margin / math.sqrt(32), "l1": margin / 2}
    return model, images, jnp.asarray(ranked[:, 0], jnp.int32), distances, targets


def two_classes_targeted():
    model, images, labels, distances, _ = two_classes()
    return model, images, labels, distances, 1 - labels


# With more than two classes the gradient of the cross-entropy points away from the label, not across the nearest plane.
CASES = {
    "two classes, cross-entropy": (two_classes, attacks.cross_entropy),
    "two classes, targeted, cross-entropy": (two_classes_targeted, attacks.cross_entropy),
    "ten classes, margin": (ten_classes, attacks.margin),
    "ten classes, targeted, margin": (functools.partial(ten_classes, targeted=True), attacks.margin),
}


@pytest.mark.parametrize(("problem", "loss"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("kind", ["fgsm", "pgd", "mi_fgsm", "apgd"])
@norms
def test_linear_models_fall_at_their_distance(problem, loss, kind, name):
    """From 1.01 times the smallest perturbation on, and not at 0.99 times."""
    model, images, labels, distances, targets = problem()
    if (kind, name) == ("fgsm", "l1") and targets is not None and model.args[0][1].size > 2:
        pytest.skip("the one pixel that is filled also raises classes between the label and the target")
    distance = distances[name]
    assert np.all(distance > 0)
    for factor, falls in ((0.99, False), (1.01, True)):
        radius = factor * distance
        assert np.all((images - radius.max() >= 0) & (images + radius.max() <= 1))
        epsilon = jnp.asarray(radius, jnp.float32)
        result = attack_of(kind, name, loss)(KEY, model, images, labels, epsilon=epsilon, targets=targets)
        reached = predictions(model, result.images)
        misled = reached != labels if targets is None else reached == np.asarray(targets)
        assert np.all(misled == falls)
        np.testing.assert_array_equal(result.success, misled)


def numpy_gradient(model, images, labels, targets, loss):
    """Of cross-entropy and margin on a linear model."""
    matrix, bias = map(float64, model.args[0])
    logits = float64(images).reshape(len(images), -1) @ matrix + bias
    rows, classes = np.arange(len(images)), logits.shape[-1]
    own = np.eye(classes)[labels if targets is None else targets]
    if loss is attacks.cross_entropy:
        pull = softmax(logits, -1) - own
    else:
        pull = np.eye(classes)[np.where(own == 1, -np.inf, logits)[rows].argmax(-1)] - own
    if targets is not None:
        pull = -pull
    return (pull @ matrix.T).reshape(images.shape)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("loss", [attacks.cross_entropy, attacks.margin], ids=lambda loss: loss.__name__)
@smooth_norms
def test_fgsm_is_one_line_of_numpy(name, loss, targeted):
    rng = np.random.default_rng(0)
    model, images = linear(rng.normal(size=(16, 5)), rng.normal(size=5)), mixed(0, 7)
    labels = jnp.asarray(rng.integers(0, 5, 7), jnp.int32)
    targets = (labels + 2) % 5 if targeted else None
    gradient = numpy_gradient(model, images, labels, targets, loss)
    length = np.sqrt((gradient**2).sum((1, 2, 3), keepdims=True))
    step = np.sign(gradient) if name == "linf" else gradient / length
    expected = np.clip(float64(images) + 0.07 * step, 0, 1)
    attack = jax.jit(attacks.fgsm(NORMS[name], epsilon=0.07, loss=loss))
    np.testing.assert_allclose(attack(KEY, model, images, labels, targets=targets).images, expected, atol=2e-7)


@pytest.mark.parametrize("step_size", [0.05, 0.5], ids=["inside the ball", "beyond the ball"])
@smooth_norms
def test_one_step_of_pgd(name, step_size):
    """Without a random start it is FGSM's step, cut at the ball."""
    images, model = mixed(0, 7), linear(np.random.default_rng(0).normal(size=(16, 2)), [0.0, 0.0])
    labels = own_labels(model, images)
    attack = attacks.pgd(NORMS[name], epsilon=0.07, steps=1, step_size=step_size, random_start=False)
    fgsm = attacks.fgsm(NORMS[name], epsilon=min(step_size, 0.07))
    found, expected = (jax.jit(attack)(KEY, model, images, labels).images for attack in (attack, fgsm))
    np.testing.assert_allclose(found, expected, atol=2e-7)
    assert np.abs(found - images).max() > 0.01


@smooth_norms
def test_pgd_is_a_loop_of_numpy(name):
    """Three steps on a smooth model, the gradient by JAX and the rest by NumPy; the last iterate wins here."""
    images, model = mixed(1, 4), mlp(1)
    labels = own_labels(model, images)
    epsilon, step_size = (0.1, 0.04) if name == "linf" else (0.3, 0.12)

    def loss(x):
        return attacks.cross_entropy(model(KEY, x), labels, None).sum()

    x, x0, losses, iterates = float64(images), float64(images), [], []
    for _ in range(4):
        iterates.append(x)
        value = attacks.cross_entropy(model(KEY, jnp.asarray(x, jnp.float32)), labels, None)
        losses.append(float64(value))
        gradient = float64(jax.grad(loss)(jnp.asarray(x, jnp.float32)))
        length = np.sqrt((gradient**2).sum((1, 2, 3), keepdims=True))
        delta = x + step_size * (np.sign(gradient) if name == "linf" else gradient / length) - x0
        if name == "linf":
            delta = np.clip(delta, -epsilon, epsilon)
        else:
            delta *= np.minimum(1, epsilon / np.sqrt((delta**2).sum((1, 2, 3), keepdims=True)))
        x = np.clip(x0 + delta, 0, 1)
    wrong = np.stack([predictions(model, jnp.asarray(iterate, jnp.float32)) != labels for iterate in iterates])
    best = np.argmax(np.stack(losses) + 1e6 * wrong, 0)
    expected = np.stack(iterates)[best, np.arange(4)]
    attack = attacks.pgd(NORMS[name], epsilon=epsilon, steps=3, step_size=step_size, random_start=False)
    np.testing.assert_allclose(jax.jit(attack)(KEY, model, images, labels).images, expected, atol=1e-6)


@pytest.mark.parametrize(("steps", "share"), [(5, 0.5), (10, 0.25)])
def test_default_step_size_follows_each_epsilon(steps, share):
    """2.5 epsilon / steps: one of five steps is half of the radius."""
    model, images, seen = linear(np.tile([-1.0, 1.0], (16, 1)), [0.0, 0.0]), grey(0, 3), []

    def spying(key, x):
        jax.debug.callback(lambda value: seen.append(np.asarray(value)), x, ordered=True)
        return model(key, x)

    epsilons = jnp.asarray([0.02, 0.1, 0.2])
    attack = attacks.pgd(attacks.Linf, epsilon=1.0, steps=steps, random_start=False)
    attack(KEY, spying, images, own_labels(model, images), epsilon=epsilons)
    jax.effects_barrier()
    assert len(seen) == steps + 1
    np.testing.assert_array_equal(seen[0], images)
    np.testing.assert_allclose(np.abs(seen[1] - seen[0]).max((1, 2, 3)), share * epsilons, rtol=1e-4)


def test_the_best_iterate_is_kept():
    """A ridge: the first step lands beyond the boundary, every later one further off, back in the label's land."""

    def ridge(key, images):
        del key
        height = images.reshape(len(images), -1).mean(-1) - 0.5
        # Class 1 wins between 0.05 and 0.15 only; the slope always says go on.
        score = jnp.where((height > 0.05) & (height < 0.15), 1.0, -1.0) + 0 * height + height
        return jnp.stack([jnp.zeros_like(score), jax.lax.stop_gradient(score - height) + height], -1)

    images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.zeros(1, jnp.int32)
    attack = attacks.pgd(attacks.Linf, epsilon=0.4, steps=4, step_size=0.1, random_start=False)
    result = attack(KEY, ridge, images, labels)
    assert result.success.tolist() == [True]
    np.testing.assert_allclose(result.images, 0.6, atol=1e-6)


def _noisy_linear(weights, keys, images):
    """A fresh disturbance of the weights for each example and draw; its mean is the sound model."""
    w, sigma = weights
    flat = images.reshape(len(images), -1) - 0.5
    keys = keys if keys.shape else jax.random.split(keys, len(images))
    noise = jax.vmap(lambda key: jax.random.rademacher(key, w.shape, jnp.float32))(keys)
    score = jnp.sum(flat * (w + sigma * noise), -1) - 0.4
    return jnp.stack([jnp.zeros_like(score), score], -1)


def noisy(sigma):
    return Partial(_noisy_linear, (jnp.ones(64), jnp.float32(sigma)))


IMAGES = jnp.full((16, 8, 8, 1), 0.5)
ZEROS = jnp.zeros(16, jnp.int32)
KEYS = jax.random.split(jax.random.key(3), 16)


def test_eot_is_the_mean_of_single_draws():
    model, images = noisy(3.0), mixed(0, 16, (8, 8, 1))
    arguments = (model, attacks.cross_entropy, images, ZEROS, None)
    seen, blind = jax.jit(
        lambda: tuple(attacks.eot(5).look(KEYS, *arguments, with_gradient=wanted) for wanted in (True, False))
    )()
    draws = [fold_in(KEYS, i) for i in range(5)]

    @jax.jit
    def single(keys):
        def total(x):
            logits = model(keys, x)
            loss = attacks.cross_entropy(logits, ZEROS, None)
            return loss.sum(), (loss, logits)

        (_, (loss, logits)), gradient = jax.value_and_grad(total, has_aux=True)(images)
        return loss, logits, gradient

    losses, logits, gradients = map(list, zip(*(map(float64, single(keys)) for keys in draws), strict=True))
    np.testing.assert_allclose(seen.gradient, np.mean(gradients, 0), atol=1e-6)
    np.testing.assert_allclose(seen.loss, np.mean(losses, 0), rtol=1e-5)
    np.testing.assert_allclose(seen.logits, np.log(np.mean([softmax(rows, -1) for rows in logits], 0)), atol=1e-5)
    # Five different draws, and the gradient of none of them.
    assert min(np.abs(a - b).max() for i, a in enumerate(logits) for b in logits[:i]) > 0.1

    np.testing.assert_allclose(blind.loss, seen.loss, rtol=1e-6)
    np.testing.assert_allclose(blind.logits, seen.logits, rtol=1e-6)


def test_eot_of_a_deterministic_model_is_exact():
    images, model = mixed(0, 4), mlp(0)
    labels = own_labels(model, images)
    arguments = (KEYS[:4], model, attacks.margin, images, labels, None)
    one, many = jax.jit(
        lambda: tuple(estimator.look(*arguments, with_gradient=True) for estimator in (attacks.exact, attacks.eot(3)))
    )()
    np.testing.assert_allclose(one.loss, many.loss, rtol=1e-5)
    np.testing.assert_allclose(one.gradient, many.gradient, atol=1e-5)
    np.testing.assert_allclose(jax.nn.log_softmax(one.logits), many.logits, atol=1e-5)


def test_eot_sees_through_noise():
    """The mean model falls at 0.4 / 64; at twice that a single draw, mostly noise, cannot steer there."""
    rates = []
    for gradient in (attacks.exact, attacks.eot(100)):
        attack = attacks.pgd(
            attacks.Linf, epsilon=0.0125, steps=2, random_start=False, loss=attacks.margin, gradient=gradient
        )
        result = jax.jit(attack)(KEYS, noisy(4.0), IMAGES, ZEROS)
        rates.append(np.mean(predictions(noisy(0.0), result.images) == 1))
    assert rates[0] < 0.2
    assert rates[1] > 0.9


def _quantised(through, key, images):
    del key
    coarse = jnp.round(images * 10) / 10
    shown = jnp.where(through, bpda(images, coarse), coarse)
    score = jnp.sum(shown - 0.5, (1, 2, 3)) - 2
    return jnp.stack([jnp.zeros_like(score), score], -1)


@smooth_norms
def test_bpda_gets_through_a_quantiser(name):
    """Rounding has no gradient; the identity in its place has. Both models say the same of every image."""
    images = jnp.asarray(np.random.default_rng(0).uniform(0.42, 0.5, (16, 8, 8, 1)), jnp.float32)
    blocked, opened = (Partial(_quantised, jnp.asarray(through)) for through in (False, True))
    np.testing.assert_allclose(blocked(KEY, images), opened(KEY, images), atol=1e-5)
    epsilon = 0.12 if name == "linf" else 0.12 * 8
    attack = jax.jit(attacks.pgd(NORMS[name], epsilon=epsilon, steps=5, loss=attacks.margin))
    failed, succeeded = (attack(KEYS, model, images, ZEROS) for model in (blocked, opened))
    assert not failed.success.any()
    assert succeeded.success.all()
    # What was found through the open model misleads the real one.
    assert np.all(predictions(blocked, succeeded.images) == 1)


def test_losses_are_their_formulas():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 6)) * 5
    labels = rng.integers(0, 6, 20)
    targets = (labels + rng.integers(1, 6, 20)) % 6
    arguments = jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32)
    log_p = np.log(softmax(logits, -1))
    for i in range(20):
        others = [logits[i, j] for j in range(6) if j != labels[i]]
        not_target = [logits[i, j] for j in range(6) if j != targets[i]]
        expected = {
            (attacks.cross_entropy, False): -log_p[i, labels[i]],
            (attacks.cross_entropy, True): log_p[i, targets[i]],
            (attacks.margin, False): max(others) - logits[i, labels[i]],
            (attacks.margin, True): logits[i, targets[i]] - max(not_target),
        }
        for (loss, targeted), value in expected.items():
            found = loss(*arguments, jnp.asarray(targets, jnp.int32) if targeted else None)
            assert float(found[i]) == pytest.approx(value, abs=1e-5)


def test_success_at_budgets():
    images, model = grey(0, 6), mlp(0)
    result = jax.jit(attacks.deepfool(attacks.L2, steps=10))(KEY, model, images, own_labels(model, images))
    middle = float(np.median(result.distance))
    within = np.asarray(attacks.success_at(result, jnp.asarray([0.0, middle, 100.0])))
    assert within.sum(1).tolist() == [0, 3, int(result.success.sum())]
    np.testing.assert_array_equal(within[1], np.asarray(result.success) & (np.asarray(result.distance) <= middle))


@pytest.mark.parametrize("sure", [0.0, 5.0, 20.0, 80.0])
def test_the_gradient_of_the_cross_entropy_of_a_sure_model(sure):
    """Softmax minus one-hot, relative to the largest entry; that of the true class is minus the sum of the others."""
    logits = np.array([[sure, 0.0, -1.0], [2.0, sure + 2, 1.5]])
    labels = np.array([0, 1], np.int32)

    def total(logits):
        return attacks.cross_entropy(logits, jnp.asarray(labels), None).sum()

    found = float64(jax.grad(total)(jnp.asarray(logits, jnp.float32)))
    others = np.where(np.eye(3, dtype=bool)[labels], -np.inf, logits)
    expected = np.exp(others - logsumexp(logits, -1, keepdims=True))
    expected -= np.eye(3)[labels] * expected.sum(-1, keepdims=True)
    scale = np.abs(expected).max(-1, keepdims=True)
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)


def test_fgsm_on_a_very_sure_linear_model_finds_the_closed_form():
    """Where probabilities round to 1: a hundredth more than the margin over the weights' dual norm is enough."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16, 2)) * 80
    weights -= weights.mean(0)
    images = jnp.asarray(rng.uniform(0.4, 0.6, (200, 4, 4, 1)), jnp.float32)
    difference = float64(images).reshape(200, 16) @ (weights[:, 1] - weights[:, 0])
    sure = (np.abs(difference) > 20) & (np.abs(difference) < 60)
    assert sure.sum() > 20

    def model(key, images):
        del key
        return images.reshape(len(images), -1) @ jnp.asarray(weights, jnp.float32)

    epsilon = 1.01 * np.abs(difference[sure]) / np.abs(weights[:, 1] - weights[:, 0]).sum()
    labels, attack = jnp.asarray(difference[sure] > 0, jnp.int32), attacks.fgsm(attacks.Linf, epsilon=1.0)
    result = attack(KEY, Partial(model), images[sure], labels, epsilon=jnp.asarray(epsilon, jnp.float32))
    assert result.success.all()


def test_hinge_is_the_margin_up_to_its_confidence():
    logits, labels = jnp.asarray([[3.0, 1.0, 0.0], [0.0, 60.0, 1.0]]), jnp.asarray([0, 0], jnp.int32)
    np.testing.assert_allclose(attacks.hinge(50.0)(logits, labels, None), [-52.0, 0.0])
    np.testing.assert_allclose(attacks.hinge(0.0)(logits, labels, jnp.asarray([1, 1], jnp.int32)), [-2.0, 0.0])
