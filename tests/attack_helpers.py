"""Toy models that attacks are tried on, with answers known from closed forms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import float64
from jax.tree_util import Partial
from scipy.linalg import hadamard

from rbf_jax import attacks
from rbf_jax.attacks import Loss
from rbf_jax.types import Attack, AttackResult, LogitsFn

SHAPE = (4, 4, 1)
KEY = jax.random.key(0)

NORMS = {"linf": attacks.Linf, "l2": attacks.L2, "l1": attacks.L1}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
RADIUS = {"linf": 1.0, "l2": 4.0, "l1": 16.0}
"""The balls that reach as far as the linf ball of radius 1, for images of 16 pixels."""


@functools.cache
def make(kind: str, name: str, *, loss: Loss = attacks.margin, epsilon: float = 0.1) -> Attack:
    """One attack of each kind, always the same object: `compiled` then compiles it once for all tests."""
    if kind == "fgsm":
        return attacks.fgsm(NORMS[name], epsilon=epsilon, loss=loss)
    if kind == "mi_fgsm":
        return attacks.mi_fgsm(NORMS[name], epsilon=epsilon, steps=3, loss=loss)
    if kind == "apgd":
        return attacks.apgd(NORMS[name], epsilon=epsilon, steps=6, restarts=2, loss=loss)
    if kind == "apgd_t":
        return attacks.apgd_t(NORMS[name], epsilon=epsilon, steps=4, classes=2, loss=loss)
    return attacks.pgd(NORMS[name], epsilon=epsilon, steps=3, restarts=2, step_size=0.05, loss=loss)


@functools.cache
def compiled(kind: str, name: str, *, loss: Loss = attacks.margin) -> Any:
    return jax.jit(make(kind, name, loss=loss))


def _linear(weights, key, images):
    del key
    matrix, bias = weights
    return images.reshape(len(images), -1) @ matrix + bias


def linear(matrix, bias) -> LogitsFn:
    """``logits = W x + b``."""
    return Partial(_linear, (jnp.asarray(matrix, jnp.float32), jnp.asarray(bias, jnp.float32)))


def _mlp(weights, key, images):
    del key
    first, second = weights
    return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ first) @ second


def mlp(seed: int, shape: tuple[int, ...] = SHAPE, classes: int = 5) -> LogitsFn:
    """A smooth network whose decision regions are small enough to be left within 0.1."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    first, second = rng.normal(size=(size, 24)) * 4 / np.sqrt(size), rng.normal(size=(24, classes))
    return Partial(_mlp, (jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)))


def predictions(model: LogitsFn, images) -> np.ndarray:
    return np.asarray(model(KEY, jnp.asarray(images))).argmax(-1)


def own_labels(model: LogitsFn, images) -> jax.Array:
    """What the model says: every attack starts from no success."""
    return jnp.asarray(predictions(model, images), jnp.int32)


def grey(seed: int, count: int, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    """Images far from the box's sides."""
    return jnp.asarray(np.random.default_rng(seed).uniform(0.45, 0.55, (count, *shape)), jnp.float32)


def mixed(seed: int, count: int, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    """Images of which half the pixels are exactly 0 or 1."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.clip(rng.uniform(-0.5, 1.5, (count, *shape)), 0, 1), jnp.float32)


def orthogonal_classes(bias) -> tuple[LogitsFn, np.ndarray]:
    """Ten classes whose weights differ by the same norm from one another and touch no other class's logit.

    Rows of a Hadamard matrix: ``|w_i - w_j|_1 = 16``, ``|w_i - w_j|_2 = sqrt(32)``.
    """
    matrix = hadamard(16)[:, 1:11].astype(np.float64)
    return linear(matrix, bias), matrix


def numpy_distance(deltas, order: float) -> np.ndarray:
    return np.linalg.norm(float64(deltas).reshape(len(deltas), -1), order, axis=-1)


def assert_within(result: AttackResult, images, epsilon, name: str):
    """The contract of every attack: inside the box and the ball, up to the rounding of an image's float32."""
    adversarial = np.asarray(result.images)
    assert adversarial.dtype == np.float32
    assert adversarial.shape == images.shape
    assert np.all((adversarial >= 0) & (adversarial <= 1))
    epsilon = np.broadcast_to(float64(epsilon), len(images))
    distance = numpy_distance(float64(adversarial) - float64(images), ORDER[name])
    allowed = epsilon + 6e-8 if name == "linf" else epsilon * (1 + 1e-6) + 1e-7
    excess = distance - allowed
    assert np.all(excess <= 0), f"the ball is left by {excess.max():.3g}"
    np.testing.assert_allclose(result.distance, distance, rtol=1e-5, atol=1e-7)
    for counts in (result.success, result.forwards, result.backwards):
        assert counts.shape == (len(images),)


def constant(model, images):
    """Ignores the image altogether, and says 1."""
    del model
    return jnp.broadcast_to(jnp.asarray([0.0, 2.0, 1.0, 0.0, 0.0]), (len(images), 5))


def _saturated(model, images):
    """Each pixel is pushed to 0 or 1: the slope of the sigmoid underflows wherever a pixel is not 0.5."""
    return model(KEY, jax.nn.sigmoid(1e4 * (images - 0.5)))


def _nan_gradient(model, images):
    """The value is that of the model; the gradient is 0 times infinity."""
    return model(KEY, images) + jnp.sqrt(0 * images.reshape(len(images), -1).sum(-1, keepdims=True))


def half_nan_gradient(model, images):
    """NaN gradients for dark images only: a root of 0 there, and of 1 elsewhere."""
    total = images.reshape(len(images), -1).sum(-1, keepdims=True)
    return model(KEY, images) + jnp.sqrt((total > 8).astype(jnp.float32) + 0 * total)


def _overflow(model, images):
    return 1e37 * model(KEY, images) * 100


HOSTILE = [constant, _saturated, _nan_gradient, half_nan_gradient, _overflow]


def _choose(weights, key, images):
    del key
    which, model = weights
    return jax.lax.switch(which, HOSTILE, model, images)


def hostile(function) -> LogitsFn:
    """One model that behaves as any of them, so that an attack is compiled once for all."""
    return Partial(_choose, (jnp.int32(HOSTILE.index(function)), mlp(0)))


class Counter:
    """Counts real passes: run without compilation, every pass is a Python call."""

    def __init__(self):
        self.forwards = self.backwards = 0

        @jax.custom_vjp
        def tap(images):
            self.forwards += 1
            return images

        def forward(images):
            self.forwards += 1
            return images, None

        def backward(_, cotangent):
            self.backwards += 1
            return (cotangent,)

        tap.defvjp(forward, backward)
        self.tap = tap

    def __call__(self, key, images):
        return mlp(0)(key, self.tap(images))


def assert_counted(attack, forwards: int, backwards: int, targets=None):
    """What a result says was spent on each example is what the model saw."""
    images, counter = mixed(0, 2), Counter()
    with jax.disable_jit():
        result = attack(jax.random.key(0, impl="rbg"), counter, images, jnp.zeros(2, jnp.int32), targets=targets)
    assert (counter.forwards, counter.backwards) == (forwards, backwards)
    assert result.forwards.tolist() == [forwards] * 2
    assert result.backwards.tolist() == [backwards] * 2
