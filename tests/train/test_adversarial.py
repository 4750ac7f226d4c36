"""Adversarial training: the attack's place in a step against NumPy, its keys and radius, and what it is good for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import float64, marked_images
from jax.tree_util import Partial
from scipy.special import log_softmax, softmax

from rbf_jax import attacks, train
from rbf_jax.models import Classifier, logits_fn
from rbf_jax.types import AttackResult

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE = (4, 4, 1)
RATE = 0.5


def noise(keys, logits_fn, images, labels, *, epsilon=None, targets=None, start=None):
    """All that an attack takes from the loop besides the network, which it leaves alone: quick to compile."""
    epsilon = jnp.float32(0.1 if epsilon is None else epsilon)
    moved = images + epsilon * jax.vmap(lambda key: jax.random.uniform(key, SHAPE, minval=-1.0))(keys)
    return AttackResult(jnp.clip(moved, 0, 1), *[labels] * 5)


def centred_init(key, shape):
    size = int(np.prod(shape))
    return {"params": jax.random.normal(key, (size, 3)), "mean": jnp.full(size, 0.9, jnp.float32)}


def centred_apply(variables, images, *, train=False, key=None):
    """A linear model after a batch norm that only centres: by the batch's mean in training, else by the last one."""
    assert (key is not None) == train
    flat = images.reshape(images.shape[0], -1)
    mean = flat.mean(0) if train else variables["mean"]
    return (flat - mean) @ variables["params"], {"mean": mean}


CENTRED = Classifier(centred_init, centred_apply)


@pytest.fixture
def examples():
    return marked_images(60, SHAPE, 0.2)


def fit(examples, **changes):
    """A short run: three batches of 20 in each epoch."""
    arguments = {"optimizer": optax.sgd(RATE), "epochs": 2, "batch_size": 20, "progress": None} | changes
    return train.fit(jax.random.key(0), CENTRED, *examples, **arguments)


def assert_close(a, b, atol=1e-6):
    """Two programs may round differently."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def numpy_gradient(flat, labels, weights, mean):
    gradient = (softmax((flat - mean) @ weights, -1) - np.eye(3)[labels]) @ weights.T
    assert np.abs(gradient).min() > 1e-6, "a sign that rounding could turn"
    return gradient


def numpy_fgsm_l2(flat, labels, weights, mean, epsilon):
    gradient = numpy_gradient(flat, labels, weights, mean)
    return np.clip(flat + epsilon * gradient / np.linalg.norm(gradient, axis=-1, keepdims=True), 0, 1)


def numpy_pgd_linf(flat, labels, weights, mean, epsilon):
    """Three steps of 0.03 from the images themselves; of each the best iterate: a success, then the highest loss."""
    iterates = [flat]
    for _ in range(3):
        moved = iterates[-1] + 0.03 * np.sign(numpy_gradient(iterates[-1], labels, weights, mean))
        iterates.append(np.clip(np.clip(moved, flat - epsilon, flat + epsilon), 0, 1))
    logits = (np.stack(iterates) - mean) @ weights
    losses = -log_softmax(logits, -1)[:, np.arange(len(flat)), labels]
    return np.stack(iterates)[(losses + 1e3 * (logits.argmax(-1) != labels)).argmax(0), np.arange(len(flat))]


ATTACKS = {
    "fgsm l2": (attacks.fgsm(attacks.L2, epsilon=9.0), numpy_fgsm_l2),
    "pgd linf": (attacks.pgd(attacks.Linf, epsilon=9.0, steps=3, step_size=0.03, random_start=False), numpy_pgd_linf),
}


@pytest.mark.parametrize(("attack", "numpy_attack"), ATTACKS.values(), ids=ATTACKS.keys())
def test_training_against_numpy(examples, attack, numpy_attack):
    """Attacked are the present weights with the running mean; the loss then sees the attacked batch's own mean."""
    schedule = optax.linear_schedule(0.0, 0.1, 4)
    variables, history = fit(examples, attack=attack, epsilon=schedule)

    init_key, order_key, _ = jax.random.split(jax.random.key(0), 3)
    first = CENTRED.init(init_key, SHAPE)
    weights, mean = float64(first["params"]), float64(first["mean"])
    losses, hits = np.zeros((2, 3)), np.zeros((2, 3))
    for step in range(6):
        epoch, batch = divmod(step, 3)
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), 60)
        rows = np.asarray(order[20 * batch : 20 * batch + 20])
        labels = examples[1][rows]
        flat = float64(examples[0][rows]).reshape(20, -1)
        flat = numpy_attack(flat, labels, weights, mean, min(step, 4) * 0.1 / 4)
        mean = flat.mean(0)
        logits, targets = (flat - mean) @ weights, np.clip(np.eye(3)[labels], 0.05, 0.9)
        losses[epoch, batch] = -(targets * log_softmax(logits, -1)).sum(-1).mean()
        hits[epoch, batch] = (logits.argmax(-1) == labels).mean()
        slope = softmax(logits, -1) * targets.sum(-1, keepdims=True) - targets
        weights = weights - RATE * (flat - mean).T @ slope / 20
    np.testing.assert_allclose(variables["params"], weights, atol=1e-5)
    np.testing.assert_allclose(variables["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(history.loss, losses.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(history.accuracy, hits.mean(-1), rtol=1e-5)


def dropping_apply(variables, images, *, train=False, key=None):
    if key is not None:
        images = images * jax.random.bernoulli(key, 0.7, images.shape)
    return centred_apply(variables, images, train=train, key=key)


def test_an_attacked_step_is_the_attack_and_then_a_step(examples):
    """With dropout: it and the attack draw from their own halves of the key. Without a schedule, at its own radius."""
    network, optimizer = Classifier(centred_init, dropping_apply), optax.sgd(RATE)
    state = train.init(jax.random.key(0), network, optimizer, SHAPE)
    attacked, step = train.make_step(network, optimizer, attack=noise), train.make_step(network, optimizer)

    def by_hand(key, state, images, labels):
        attack_key, step_key = jax.random.split(key)
        keys = jax.random.split(attack_key, len(images))
        found = noise(keys, logits_fn(network, state.variables), images, labels)
        return step(step_key, state, found.images, labels)

    arguments = (jax.random.key(1), state, *examples)
    assert_close(jax.jit(attacked)(*arguments), jax.jit(by_hand)(*arguments))


def test_a_radius_of_0_is_training_without_attack(examples):
    assert_close(fit(examples, attack=noise, epsilon=lambda step: 0), fit(examples))


def test_the_attack_follows_augmentation_and_is_traced_once(examples):
    seen = []

    def attack(keys, model, images, labels, *, epsilon=None):
        seen.append((keys.shape, isinstance(model, Partial), images.shape, labels.shape, epsilon))
        return noise(keys, model, images, labels, epsilon=epsilon)

    def halve(key, rows, images, labels):
        return images[:10], labels[:10]

    fit(examples, epochs=4, attack=attack, augment=lambda epoch, _: Partial(halve))
    assert seen == [((10,), True, (10, *SHAPE), (10,), None)]


def test_adversarial_training_makes_robust():
    """One pixel moves far with the class, but is wrong at times; the others tell it surely, but move little.

    The network that was not attacked goes by the others. The robust accuracy of a linear model is known: its margin
    must exceed ``epsilon |w_1 - w_0|_1`` (Tsipras et al., ICLR 2019).
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400).astype(np.int32)
    signs = 2.0 * labels[:, None] - 1
    images = 0.5 + 0.06 * signs + rng.normal(0, 0.06, (400, 16))
    images[:, :1] = 0.5 + 0.3 * signs * rng.choice([1, -1], (400, 1), p=[0.9, 0.1])
    images = np.clip(images, 0.1, 0.9).astype(np.float32).reshape(400, *SHAPE)
    epsilon, robust, clean = 0.1, {}, {}
    flat = images.reshape(400, -1)
    for name, attack in {"clean": None, "attacked": attacks.fgsm(attacks.Linf, epsilon=epsilon)}.items():
        variables, history = fit((images, labels), optimizer=optax.adam(0.05), epochs=30, batch_size=100, attack=attack)
        weights = float64(variables["params"][:, 1] - variables["params"][:, 0])
        margin = signs[:, 0] * ((flat - float64(variables["mean"])) @ weights)
        clean[name], robust[name] = (margin > 0).mean(), (margin > epsilon * np.abs(weights).sum()).mean()
        # What the history calls accuracy is that of attacked images.
        assert float(history.accuracy[-1]) == pytest.approx(robust[name] if attack else clean[name], abs=0.05)
    assert clean["clean"] > 0.97 > 0.2 > robust["clean"]
    assert robust["attacked"] > 0.8


class StoppedError(Exception):
    pass


def test_a_run_that_was_stopped_ends_the_same(examples, tmp_path):
    options = {"epochs": 3, "attack": noise, "epsilon": optax.linear_schedule(0.0, 0.1, 7)}

    def stop(record):
        if record["epoch"] == 2:
            raise StoppedError  # before the second epoch's checkpoint

    with pytest.raises(StoppedError):
        fit(examples, checkpoints=tmp_path, log=stop, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    assert_close(fit(examples, checkpoints=tmp_path, **options), fit(examples, **options), atol=0)


def test_a_radius_without_attack_is_refused(examples):
    with pytest.raises(ValueError, match=r"epsilon must be None without an attack.*got <function"):
        fit(examples, epsilon=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="epsilon must be None without an attack"):
        train.make_step(CENTRED, optax.sgd(RATE), epsilon=optax.constant_schedule(0.1))
