"""What is learned from what: the parts of the data, the optimizers, the examples drawn for attack."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluation, learn
from experiments.configs import cifar10, mnist, quickstart
from rbf_jax import data


def test_the_last_training_images_validate():
    config = quickstart.get_config("smoke")
    parts, whole = learn.load(config, None), data.load_embedded()
    total, last = config.examples.train, config.examples.train - config.examples.validation
    joined = np.concatenate([parts.train.images, parts.validation.images])
    np.testing.assert_array_equal(joined, data.as_float(whole["train"].images[:total]))
    np.testing.assert_array_equal(parts.validation.labels, whole["train"].labels[last:total])
    np.testing.assert_array_equal(parts.test.labels, whole["test"].labels[: config.examples.test])


@pytest.mark.parametrize("total", [10_000, 1_000])
def test_attacked_examples_are_drawn_once_from_all(total):
    config = mnist.get_config("cpu")
    config.examples.test = total
    many, few = evaluation.drawn(config, 500), evaluation.drawn(config, 100)
    assert len(set(many)) == 500
    assert (np.diff(many) > 0).all()
    assert set(few) < set(many)
    assert many.max() > 0.97 * total
    assert abs(many.mean() - total / 2) < 0.06 * total
    np.testing.assert_array_equal(evaluation.drawn(config, total), np.arange(total))


def step_lengths(config, examples, at):
    """Length of the update of a parameter of gradient 1, at some steps."""
    optimizer = learn.optimizer(config, examples)
    params = {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}

    @jax.jit
    def step(state):
        return optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)

    state, lengths = optimizer.init(params), []
    for number in range(max(at) + 1):
        updates, state = step(state)
        if number in at:
            lengths.append(-float(updates["kernel"][0, 0]))
    return lengths


def test_learning_rates_follow_their_schedules():
    with jax.numpy_dtype_promotion("standard"):
        config = mnist.get_config("cpu")
        config.train.epochs = 4
        # Adam's step is the learning rate where the gradient stays the same: a cosine over 4 epochs of 10 steps.
        found = step_lengths(config, 10 * 128 + 5, [0, 20, 39])
        assert found == pytest.approx([1e-3, 5e-4, 1e-3 * 0.5 * (1 + np.cos(np.pi * 39 / 40))], rel=1e-3)
        config = mnist.get_config("paper")
        config.train.halve_every = 2
        assert step_lengths(config, 10 * 128, [0, 19, 20, 41]) == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4], rel=1e-3)


def test_weight_decay_spares_biases_and_batch_norm():
    with jax.numpy_dtype_promotion("standard"):
        config = cifar10.get_config("cpu")
        optimizer = learn.optimizer(config, 64)
        params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.full(1, 2.0)}
        updates: Any = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]
        # Nesterov's first step is 1.9 times the rate.
        decay = config.train.learning_rate * config.train.weight_decay * 1.9 * 2
        assert float(updates["kernel"][0, 0]) == pytest.approx(-decay, rel=1e-5)
        assert float(updates["bias"][0]) == 0


def test_a_defended_model_has_all_forms(filters):
    config = quickstart.get_config("smoke")
    variables = learn.classifier(config).init(jax.random.key(0), (28, 28, 1))
    assert list(learn.forms(config, filters, "cnn_plus", variables)) == ["static"]
    assert list(learn.forms(config, filters, "rcnn_plus", variables)) == ["static", "draw", "bpda", "predict"]
