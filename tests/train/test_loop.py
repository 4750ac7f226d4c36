"""Training: labels, one step against NumPy, and the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rbf_jax import train
from rbf_jax.models import Classifier

SHAPE = (4, 4, 1)


def linear_init(key, shape):
    return {"params": jax.random.normal(key, (int(np.prod(shape)), 3)) * 0.1, "seen": jnp.float32(0)}


def linear_apply(variables, images, *, train=False, key=None):
    seen = variables["seen"] + images.shape[0] if train else variables["seen"]
    return images.reshape(images.shape[0], -1) @ variables["params"], {"seen": seen}


LINEAR = Classifier(linear_init, linear_apply)


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax multiplies parameters by Python numbers that JAX's strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=90).astype(np.int32)
    images = rng.uniform(0, 0.5, (90, *SHAPE)).astype(np.float32)
    images[np.arange(90), labels, 0, 0] += 0.5
    return images, labels


def test_smoothed_labels_are_the_released_codes():
    assert np.allclose(train.smoothed_labels(jnp.array([2]), 10), [[0.1 / 9, 0.1 / 9, 0.9] + [0.1 / 9] * 7], atol=1e-7)
    assert np.allclose(train.smoothed_labels(jnp.arange(3), 3).sum(-1), 1, atol=1e-6)


def test_cross_entropy_against_numpy():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(5, 4)), rng.dirichlet(np.ones(4), 5)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(targets * log_softmax).sum(-1).mean()
    assert train.cross_entropy(jnp.float32(logits), jnp.float32(targets)) == pytest.approx(expected, rel=1e-5)


def test_a_step_of_gradient_descent_against_numpy(examples):
    images, labels = examples
    optimizer = optax.sgd(0.5)
    state = train.init(jax.random.key(0), LINEAR, optimizer, SHAPE)
    after, info = train.make_step(LINEAR, optimizer)(jax.random.key(1), state, images, labels)

    x, weights = images.reshape(90, -1).astype(np.float64), np.asarray(state.variables["params"], np.float64)
    logits = x @ weights
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    targets = np.clip(np.eye(3)[labels], 0.05, 0.9)
    targets_total = targets.sum(-1, keepdims=True)
    gradient = x.T @ (softmax * targets_total - targets) / 90
    assert np.allclose(after.variables["params"], weights - 0.5 * gradient, atol=1e-6)
    assert info.accuracy == pytest.approx((logits.argmax(-1) == labels).mean())
    assert (after.step, after.variables["seen"]) == (1, 90)


def test_fit_learns_and_repeats_itself(examples):
    def fitted():
        return train.fit(
            jax.random.key(0), LINEAR, *examples, optimizer=optax.adam(0.1), epochs=20, batch_size=40, progress=None
        )

    (variables, info), (again, _) = fitted(), fitted()
    assert info.loss.shape == (20,)
    assert info.accuracy[-1] > 0.95 > info.accuracy[0]
    # 90 images make two batches of 40 in each epoch.
    assert variables["seen"] == 20 * 80
    assert np.array_equal(variables["params"], again["params"])


def test_nan_stops_with_a_message(examples):
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train.fit(
            jax.random.key(0), LINEAR, *examples, optimizer=optax.sgd(1e38), epochs=3, batch_size=10, progress=None
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, r"epochs must be .* got 0"),
        ({"batch_size": 91}, "at most the 90 images, got 91"),
        ({"images": np.zeros((90, *SHAPE), np.uint8)}, "float32"),
        ({"labels": np.zeros(5, np.int32)}, r"shape \(90,\)"),
    ],
)
def test_bad_input(examples, change, message):
    arguments = {"images": examples[0], "labels": examples[1], "epochs": 1, "batch_size": 10} | change
    with pytest.raises(ValueError, match=message):
        train.fit(jax.random.key(0), LINEAR, optimizer=optax.sgd(0.1), progress=None, **arguments)
