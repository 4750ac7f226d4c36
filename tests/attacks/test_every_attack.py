"""The contract, held for every public attack there is: a new one that is not listed here fails the first test."""

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import RADIUS, assert_within, mixed, mlp, own_labels, predictions
from jax.tree_util import Partial

from rbf_jax import attacks
from rbf_jax.attacks import L1, L2, Composed, Iterative, Linf

SMALL = attacks.pgd(Linf, epsilon=0.1, steps=3)
BY_NORM = {
    "fgsm": lambda norm: attacks.fgsm(norm, epsilon=0.1),
    "pgd": lambda norm: attacks.pgd(norm, epsilon=0.1, steps=3, restarts=2),
    "mi_fgsm": lambda norm: attacks.mi_fgsm(norm, epsilon=0.1, steps=3),
    "apgd": lambda norm: attacks.apgd(norm, epsilon=0.1, steps=8),
    "apgd_t": lambda norm: attacks.apgd_t(norm, epsilon=0.1, steps=4, classes=2),
    "daa": lambda norm: attacks.daa(norm, epsilon=0.1, steps=3),
    "fab": lambda norm: attacks.fab(norm, steps=3, restarts=2),
    "fab_t": lambda norm: attacks.fab_t(norm, steps=3, classes=2),
    "deepfool": lambda norm: attacks.deepfool(norm, steps=4),
    "square": lambda norm: attacks.square(norm, epsilon=0.1, queries=20),
    "spsa": lambda norm: attacks.spsa(norm, epsilon=0.1, steps=3, directions=8),
    "random_noise": lambda norm: attacks.random_noise(norm, epsilon=0.1, samples=10),
}
FOR_ONE_NORM = {
    "cw_l2": attacks.cw_l2(steps=6, searches=2),
    "cw_linf": attacks.cw_linf(steps=20),
    "ead": attacks.ead(steps=20, searches=2, initial_c=1.0),
    "rays": attacks.rays(queries=40),
    "transfer": attacks.transfer(SMALL, mlp(9)),
    "annealed": attacks.annealed(SMALL, [mlp(9)]),
}
EVERY = {f"{name} {norm.name}": make(norm) for name, make in BY_NORM.items() for norm in (Linf, L2, L1)} | FOR_ONE_NORM
COUPLED = "daa"
NORMS = ("linf", "l2", "l1")
# By default each attack in one norm, in turn: nearly all of the time goes into compiling.
BY_DEFAULT = {f"{name} {NORMS[i % 3]}" for i, name in enumerate(BY_NORM)} | FOR_ONE_NORM.keys()
every_attack = pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in EVERY]
)

KEYS = jax.random.split(jax.random.key(0), 8)
MODEL, IMAGES = mlp(3), mixed(3, 8)
LABELS = own_labels(MODEL, IMAGES)


def compiled() -> Any:
    return jax.jit(lambda attack, *arguments, epsilon: attack(*arguments, epsilon=epsilon))


def radii(norm) -> jax.Array:
    return jnp.asarray(RADIUS[norm.name] * np.linspace(0, 0.3, 8), jnp.float32)


def test_no_public_attack_is_missing():
    public = {
        name
        for name, value in vars(attacks).items()
        if inspect.isfunction(value) and inspect.signature(value).return_annotation in (Iterative, Composed)
    }
    assert public == {name.split()[0] for name in EVERY}


def test_the_page_names_every_attack():
    page = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text()
    assert {name.split()[0] for name in EVERY if f"`{name.split()[0]}" not in page} == set()


@every_attack
def test_the_contract(name):
    """Box and ball, each example's own radius, the model's word for success; keys, weights, batches."""
    run, attack = compiled(), EVERY[name]
    epsilon = radii(attack.norm)
    result = run(attack, KEYS, MODEL, IMAGES, LABELS, epsilon=epsilon)
    assert_within(result, IMAGES, epsilon, attack.norm.name)
    np.testing.assert_array_equal(result.success, predictions(MODEL, result.images) != LABELS)
    np.testing.assert_allclose(result.images[0], IMAGES[0], atol=6e-8)
    assert np.any(np.asarray(result.images) != np.asarray(IMAGES)) or name == "transfer"
    assert result.restart.shape == (8,)
    assert np.all(result.forwards > 0)

    again = run(attack, KEYS, MODEL, IMAGES, LABELS, epsilon=epsilon)
    jax.tree.map(np.testing.assert_array_equal, again, result)
    run(attack, KEYS, mlp(4), IMAGES, own_labels(mlp(4), IMAGES), epsilon=epsilon)
    assert run._cache_size() == 1

    # Upside down, with every example's key and radius moving along.
    turned = run(attack, KEYS[::-1], MODEL, IMAGES[::-1], LABELS[::-1], epsilon=epsilon[::-1])
    few = np.array([6, 2, 5])
    part = run(attack, KEYS[few], MODEL, IMAGES[few], LABELS[few], epsilon=epsilon[few])
    assert run._cache_size() == 2
    if not name.startswith(COUPLED):
        for found, rows in ((turned, np.arange(8)[::-1]), (part, few)):
            for a, b in zip(found, result, strict=True):
                np.testing.assert_allclose(a, np.asarray(b)[rows], atol=2e-5)


def _half(key, images):
    return MODEL(key, images).astype(jnp.bfloat16)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("wide", [False, True], ids=["half precision", "x64"])
def test_the_precision_of_the_model_and_of_jax(name, wide, standard_promotion):
    """Logits in bfloat16, as of mixed-precision models, and a JAX that computes in float64 where nothing is said."""
    with jax.enable_x64(wide):
        result = jax.eval_shape(EVERY[name], KEYS, MODEL if wide else Partial(_half), IMAGES, LABELS)
    assert (result.images.dtype, result.distance.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.parametrize("name", BY_NORM)
def test_the_name_of_a_norm_is_no_norm(name):
    with pytest.raises(ValueError, match=r"norm must be attacks.Linf, attacks.L2 or attacks.L1, got 'linf'"):
        BY_NORM[name]("linf")


@every_attack
def test_bad_arguments_are_refused(name):
    attack = EVERY[name]
    for labels, message in (
        (LABELS[:3], "labels must be int32 of shape"),
        (LABELS.astype(jnp.float32), "labels must be int32"),
        (LABELS + 5, r"labels must be in \[0, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(KEYS, MODEL, IMAGES, labels)
    for images, message in ((IMAGES[0], "4 dimensions"), (IMAGES + 1, r"lie in \[0, 1\]")):
        with pytest.raises(ValueError, match=message):
            attack(KEYS, MODEL, images, LABELS)
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        attack(KEYS, MODEL, IMAGES, LABELS, epsilon=-1.0)
    with pytest.raises(ValueError, match="key must be a typed key"):
        attack(jnp.zeros((8, 2), jnp.uint32), MODEL, IMAGES, LABELS)
