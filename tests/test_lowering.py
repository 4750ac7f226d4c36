"""What the GPU and TPU will be given: the main programs lower for all three platforms, though only one is here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_filters
from jax.export import export

from rbf_jax import attacks, em, models
from rbf_jax.defense import defend
from rbf_jax.reconstruction import reconstruct, sample_reconstruction

PLATFORMS = ("cpu", "cuda", "tpu")
KEY = jax.random.key(0)
FILTERS = random_filters(np.random.default_rng(0), 8)
GREY, COLOUR = jax.ShapeDtypeStruct((4, 28, 28, 1), jnp.float32), jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
LABELS = jax.ShapeDtypeStruct((4,), jnp.int32)


def lower(function, *arguments):
    exported = export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    return exported


def sampled(noise):
    return lambda key, filters, images: sample_reconstruction(key, filters, images, 17.33, 1.75, noise=noise)


FRONT_ENDS = {
    "static": lambda key, filters, images: reconstruct(filters, images, 17.33),
    "per run": sampled("per_run"),
    "per patch": sampled("per_patch"),
}


@pytest.mark.parametrize("keys", [KEY, jax.random.split(KEY, 4)], ids=["one key", "key per image"])
@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS.keys())
def test_front_end(front_end, keys):
    assert lower(front_end, keys, FILTERS, GREY).out_avals[0].shape == GREY.shape


@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS.keys())
def test_gradient_of_the_front_end(front_end):
    def total(filters, images, key):
        return jnp.sum(front_end(key, filters, images) ** 2)

    exported = lower(jax.grad(total, (0, 1)), FILTERS, GREY, KEY)
    assert [aval.shape for aval in exported.out_avals] == [(8, 3, 3, 1), (8,), GREY.shape]


def test_em_step():
    def step(state, images):
        return em._step(state, images, em.MNIST)

    lower(step, em.init(1), jax.ShapeDtypeStruct((6, 28, 28, 1), jnp.float32))


@pytest.mark.parametrize(("network", "images"), [(models.CNN(), GREY), (models.VGG16(), COLOUR)], ids=["CNN", "VGG16"])
def test_training_step(network, images):
    classifier = models.from_linen(network)
    variables = jax.eval_shape(lambda: classifier.init(KEY, images.shape[1:]))

    def step(variables, images, labels, key):
        def loss(params):
            logits, state = classifier.apply(variables | {"params": params}, images, train=True, key=key)
            log_softmax = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(log_softmax, labels[:, None], -1).mean(), state

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    exported = lower(step, variables, images, LABELS, KEY)
    # The convolutions' own gradients are chosen by platform inside the program.
    assert exported.mlir_module().count("case") > 0


def test_pgd_through_the_defended_network():
    classifier = models.from_linen(models.CNN())
    variables = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(lambda: classifier.init(KEY, (28, 28, 1)))
    )
    defense = defend(FILTERS, models.logits_fn(classifier, variables), beta1=17.33, beta2=1.75)
    attack = attacks.pgd(attacks.Linf, epsilon=0.3, steps=3, restarts=2, loss=attacks.margin, gradient=attacks.eot(2))

    def run(keys, images, labels):
        return attack(keys, defense.bpda, images, labels)

    exported = lower(run, jax.random.split(KEY, 4), GREY, LABELS)
    assert exported.out_avals[0].shape == GREY.shape
