"""DAA against its formulas in NumPy, and what its coupling of the batch means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import KEY, assert_within, grey, mixed, mlp, own_labels
from helpers import float64
from scipy.spatial.distance import pdist, squareform

from rbf_jax import attacks


def numpy_direction(kind, theta, gradient, c):
    """The released code's lines, with pairwise distances by scipy."""
    squares = squareform(pdist(theta)) ** 2
    count = len(theta) + (kind == "dgf")
    h = np.sqrt(0.5 * np.median(squares) / np.log(count))
    kernel = np.exp(-squares / h**2 / 2)
    if kind == "dgf":
        kernel = (squares / h**2 / 2 - 1) * kernel
    push = -kernel @ theta + theta * kernel.sum(1)[:, None]
    if kind == "dgf":
        return c * push + gradient
    return c * -(kernel @ -gradient + push / h**2) / len(theta) + gradient


@pytest.mark.parametrize(("kind", "c"), [("blob", 1.1), ("blob", 10.0), ("dgf", -0.001), ("dgf", 0.5)])
def test_interactions_are_the_published_ones(kind, c):
    rng = np.random.default_rng(0)
    theta, gradient = rng.uniform(size=(9, 30)), rng.normal(size=(9, 30))
    interaction = getattr(attacks, kind)(c)
    found = jax.jit(interaction)(jnp.asarray(theta, jnp.float32), jnp.asarray(gradient, jnp.float32))
    np.testing.assert_allclose(found, numpy_direction(kind, theta, gradient, c), atol=2e-4)


@pytest.mark.parametrize("kind", ["blob", "dgf"])
def test_equal_particles_do_no_harm(kind):
    """Copies fill up a batch: each goes where its own gradient points, however they are added up."""
    rng = np.random.default_rng(0)
    particles, gradients = (np.tile(rng.normal(size=784), (40, 1)).astype(np.float32) for _ in range(2))
    for others in (0, 1, 10):
        particles[:others] = rng.uniform(size=(others, 784))
        found = float64(getattr(attacks, kind)()(jnp.asarray(particles), jnp.asarray(gradients)))
        np.testing.assert_array_equal(np.sign(found[others:]), np.sign(gradients[others:]))


def test_groups_are_drawn_anew():
    """Two pairs of four examples: whom the others act on changes with the group, every ten steps."""
    pushed = []

    def interact(particles, gradients):
        jax.debug.callback(lambda means: pushed.append(sorted(np.round(np.asarray(means), 3))), particles.mean(1))
        return gradients

    images = jnp.broadcast_to(jnp.asarray([0.1, 0.3, 0.5, 0.7])[:, None, None, None], (4, 4, 4, 1))
    attack = attacks.daa(attacks.Linf, epsilon=0.0, steps=40, interaction=interact, group=2)
    jax.block_until_ready(attack(KEY, mlp(0), images, own_labels(mlp(0), images)))
    jax.effects_barrier()
    pairs = [tuple(sorted(map(tuple, pushed[n : n + 2]))) for n in range(0, len(pushed), 2)]
    assert len(pairs) == 40
    for first in range(0, 40, 10):
        assert len(set(pairs[first : first + 10])) == 1
    assert len(set(pairs)) > 1


@pytest.mark.parametrize("kind", ["blob", "dgf"])
def test_it_breaks_what_pgd_breaks(kind):
    model, images = mlp(0), grey(0, 24)
    labels = own_labels(model, images)
    attack = attacks.daa(attacks.Linf, epsilon=0.1, steps=20, restarts=2, interaction=getattr(attacks, kind)(), group=8)
    plain = attacks.pgd(attacks.Linf, epsilon=0.1, steps=20, restarts=2)
    found, expected = (jax.jit(a)(KEY, model, images, labels) for a in (attack, plain))
    assert_within(found, images, 0.1, "linf")
    assert expected.success.mean() > 0.3
    assert found.success.mean() >= expected.success.mean() - 0.1
    assert found.forwards.tolist() == [42] * 24
    assert found.backwards.tolist() == [40] * 24
    assert set(np.unique(found.restart)) == {0, 1}


def test_examples_act_on_one_another():
    """Unlike in every other attack: with another neighbour, the same example ends elsewhere."""
    model, images = mlp(0), mixed(0, 4)
    labels, keys = own_labels(model, images), jax.random.split(KEY, 4)
    attack = jax.jit(attacks.daa(attacks.Linf, epsilon=0.1, steps=5, interaction=attacks.blob(50.0)))
    first = attack(keys, model, images, labels).images
    second = attack(keys, model, images.at[3].set(1 - images[3]), labels.at[3].set(0)).images
    assert np.abs(first[0] - second[0]).max() > 1e-4


@pytest.mark.parametrize(("batch", "group"), [(6, 4), (1, None)])
def test_batches_that_do_not_divide(batch, group):
    model, images = mlp(0), mixed(0, batch)
    with pytest.raises(ValueError, match="divides into groups"):
        attacks.daa(attacks.Linf, epsilon=0.1, group=group)(KEY, model, images, own_labels(model, images))
    with pytest.raises(ValueError, match="group must be a whole number of at least 2"):
        attacks.daa(attacks.Linf, epsilon=0.1, group=1)
