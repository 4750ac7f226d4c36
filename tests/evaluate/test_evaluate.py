"""Evaluation in batches, and Wilson's interval."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.stats import binomtest

from rbf_jax import RBFFilters, attacks, certify, defend, evaluate

KEY = jax.random.key(0)
TRACES = []


def noisy(weights, key, images):
    """A linear model plus noise under each example's own key."""
    TRACES.append(images.shape)
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(key)
    return images.reshape(images.shape[0], -1) @ weights + noise


@pytest.fixture
def model():
    return Partial(noisy, jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)))


@pytest.fixture
def images():
    return np.random.default_rng(1).uniform(size=(11, 4, 4, 1)).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_predictions_do_not_depend_on_the_batches(model, images, batch_size):
    got = evaluate.predict(jax.random.key(0), model, images, batch_size=batch_size)
    expected = [model(jax.random.fold_in(jax.random.key(0), i)[None], images[i : i + 1])[0] for i in range(len(images))]
    assert np.allclose(got, expected, atol=1e-5)


def test_one_shape_is_traced_for_all_batches(model, images):
    TRACES.clear()
    evaluate.predict(jax.random.key(0), model, np.tile(images, (2, 1, 1, 1)), batch_size=7)
    assert TRACES == [(7, 4, 4, 1)]


def test_a_model_that_takes_no_key_is_told_how_it_is_called(images):
    def means(images):
        return images.mean((1, 2))

    keyless: Any = means
    with pytest.raises(
        ValueError, match=r"fails on keys \(5,\) and images \(5, 4, 4, 1\): .*lambda key, images: model"
    ):
        evaluate.predict(jax.random.key(0), keyless, images, batch_size=5)


def test_what_makes_attacks_is_no_attack(model, images):
    maker: Any = attacks.pgd
    with pytest.raises(ValueError, match=r"attack must be an attack, as attacks.pgd\(attacks.Linf, epsilon=0.3\) is"):
        evaluate.run_attack(jax.random.key(0), maker, model, images, np.zeros(11, np.int32))


def test_attacks_do_not_depend_on_the_batches(model, images):
    labels = np.arange(11, dtype=np.int32) % 3
    attack = attacks.pgd(attacks.Linf, epsilon=0.1, steps=3)
    results = [
        evaluate.run_attack(jax.random.key(0), attack, model, images, labels, batch_size=size) for size in (3, 11)
    ]
    for a, b in zip(*results, strict=True):
        assert isinstance(a, np.ndarray)
        assert len(a) == 11
        assert np.allclose(a, b, atol=1e-6)


def test_bad_input(model, images):
    with pytest.raises(ValueError, match=r"batch_size .* got 0"):
        evaluate.predict(jax.random.key(0), model, images, batch_size=0)
    attack = attacks.fgsm(attacks.Linf, epsilon=0.1)
    with pytest.raises(ValueError, match=r"labels .* shape \(11,\)"):
        evaluate.run_attack(jax.random.key(0), attack, model, images, np.zeros(3, np.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # A class that the model does not have would never be predicted or reached, so that all seems broken, or robust.
        ({"labels": np.arange(11, dtype=np.int32) % 3 + 1}, r"labels must be in \[0, 3\), got values from 1 to 3"),
        ({"targets": np.full(11, 3, np.int32)}, r"targets must be in \[0, 3\), got values from 3 to 3"),
        ({"targets": np.zeros(20, np.int32)}, r"targets must be int32 of shape \(11,\)"),
        ({"epsilon": np.full(11, -0.1, np.float32)}, r"epsilon must be at least 0 and finite"),
        ({"epsilon": np.full(11, np.nan, np.float32)}, r"epsilon must be at least 0 and finite"),
        ({"epsilon": np.full(20, 0.1, np.float32)}, r"epsilon must be a number or of shape \(11,\), got shape \(20,\)"),
        ({"start": np.zeros((20, 4, 4, 1), np.float32)}, r"start must have the images' shape \(11, 4, 4, 1\)"),
        ({"key": jax.random.split(jax.random.key(0), 11)}, r"key must be a single key, got shape \(11,\)"),
    ],
)
def test_what_a_compiled_attack_cannot_check(model, images, change, message):
    attack = attacks.pgd(attacks.Linf, epsilon=0.1, steps=3)
    arguments = {"key": jax.random.key(0), "labels": np.arange(11, dtype=np.int32) % 3} | change
    with pytest.raises(ValueError, match=message):
        evaluate.run_attack(arguments.pop("key"), attack, model, images, **arguments)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda logits: logits[:, 0], r"got shape \(\d+,\)"),
        (lambda logits: (logits, logits), "got tuple"),
        (lambda logits: logits[None], r"got shape \(1, \d+, 3\)"),
    ],
)
def test_what_a_model_must_return(model, images, returned, message):
    wrong = Partial(lambda model, key, images: returned(model(key, images)), model)
    attack, labels = attacks.fgsm(attacks.Linf, epsilon=0.1), np.zeros(11, np.int32)
    for call in (
        lambda: attack(KEY, wrong, images, labels),
        lambda: evaluate.run_suite(KEY, {"fgsm": attack}, wrong, images, labels, batch_size=11),
        lambda: certify.certify(KEY, wrong, images[0], sigma=0.1, n=10),
    ):
        with pytest.raises(ValueError, match=rf"a model must return logits \(\d+, classes\).*{message}"):
            call()


def test_labels_that_a_model_does_not_have(model, images):
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got values from 3 to 3"):
        evaluate.survival(jax.random.key(0), model, images, np.full(11, 3, np.int32), redraws=1)


def test_a_plain_function_is_evaluated_with_the_weights_that_it_has_now(images):
    """As those of NNX modules change in place."""
    held = {"weights": np.zeros((16, 3), np.float32)}

    def plain(key, images):
        del key
        return images.reshape(len(images), -1) @ held["weights"]

    labels = np.zeros(11, np.int32)
    suite = {"fgsm": attacks.fgsm(attacks.Linf, epsilon=0.0)}
    for label in (1, 2):
        held["weights"] = np.zeros((16, 3), np.float32)
        held["weights"][:, label] = 1
        assert (evaluate.predict(jax.random.key(0), plain, images).argmax(-1) == label).all()
        assert not evaluate.survival(jax.random.key(0), plain, images, labels, redraws=1).any()
        assert evaluate.run_suite(jax.random.key(0), suite, plain, images, labels + label).robust.all()
        assert certify.predict(jax.random.key(0), plain, images[0], sigma=0.1, n=50) == label


def test_a_plain_function_inside_a_model_or_an_attack_has_the_weights_of_now(images):
    weights = np.random.default_rng(2).normal(size=(3, 16, 3)).astype(np.float32) / 16
    held = {"label": 0}

    def plain(key, images):
        del key
        return images.reshape(len(images), -1) @ weights[held["label"]] + 3 * jax.nn.one_hot(held["label"], 3)

    filters = RBFFilters(jnp.full((1, 3, 3, 1), 0.5), jnp.ones(1))
    models = {
        "defend": defend(filters, plain, beta1=1.0, beta2=0.0).static,
        "straight_through": attacks.straight_through(lambda key, x: x, plain),
        "known_noise": attacks.known_noise(plain, KEY),
    }
    pgd = attacks.pgd(attacks.Linf, epsilon=0.1, steps=1, random_start=False)
    carried = {"transfer": attacks.transfer(pgd, plain), "annealed": attacks.annealed(pgd, [plain])}
    for label in (1, 2):
        held["label"] = label
        labels = np.full(11, label, np.int32)
        for name, model in models.items():
            assert (evaluate.predict(KEY, model, images).argmax(-1) == label).all(), name
            assert evaluate.survival(KEY, model, images, labels, redraws=1).all(), name
        for name, attack in carried.items():
            expected = attack(KEY, plain, images, labels).images
            got = evaluate.run_attack(KEY, attack, models["known_noise"], images, labels).images
            np.testing.assert_allclose(got, expected, err_msg=name)


def test_bars_may_be_called_or_just_wanted(model, images, capfd):
    for progress, shown in ((None, False), (False, False), (True, True), ("my bar", True)):
        evaluate.predict(jax.random.key(0), model, images, progress=progress)
        said = capfd.readouterr().err
        assert bool(said) == shown
        assert ("my bar" in said) == (progress == "my bar")


def test_no_budget_for_attacks_of_least_distance(model, images):
    quiet = Partial(lambda weights, key, images: images.reshape(len(images), -1) @ weights, *model.args)
    labels = evaluate.predict(KEY, quiet, images).argmax(-1)
    attack = attacks.deepfool(attacks.L2, epsilon=0.001)
    found = [
        evaluate.run_attack(KEY, attack, quiet, images, labels, epsilon=epsilon, leave=leave)
        for epsilon, leave in ((None, False), (np.inf, False), (np.inf, True), (np.array(np.inf, np.float32), False))
    ]
    assert [one.success.mean() for one in found] == [0, 1, 1, 1]
    for wrong in (-0.1, np.nan, np.full(11, np.inf)):
        with pytest.raises(ValueError, match="at least 0, and finite but for one inf for no budget, got"):
            evaluate.run_attack(KEY, attack, quiet, images, labels, epsilon=wrong)
    assert attacks.success_at(found[1], 100.0).shape == (1, 11)


def test_a_batch_fits_for_plain_functions_as_for_partials(model, images):
    sizes = {evaluate.fitting_batch(one, images) for one in (model, lambda key, x: model(key, x))}
    assert len(sizes) == 1


def test_one_radius_for_all(model, images):
    labels, attack = np.arange(11, dtype=np.int32) % 3, attacks.pgd(attacks.Linf, epsilon=0.1, steps=3)
    one, each = (
        evaluate.run_attack(jax.random.key(0), attack, model, images, labels, epsilon=epsilon)
        for epsilon in (0.05, np.full(11, 0.05, np.float32))
    )
    np.testing.assert_array_equal(one.images, each.images)


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (5, 10), (10, 10), (97, 100), (1, 3), (30.8, 50)])
def test_wilson_interval_solves_its_equation(successes, total):
    # The ends are the p for which the observed share lies 1.96 standard errors of p away.
    z, share = 1.959964, successes / total
    for end in evaluate.wilson_interval(successes, total):
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / total, abs=1e-6)
    low, high = evaluate.wilson_interval(successes, total)
    assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_interval_is_scipys(confidence):
    for successes in range(8):
        expected = binomtest(successes, 7).proportion_ci(confidence, method="wilson")
        assert evaluate.wilson_interval(successes, 7, confidence) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), r"total .* got 0"),
        ((11, 10), r"successes must be from 0 to the total of 10, got 11"),
        ((-0.5, 10), r"successes .* got -0\.5"),
        ((5, 10, 1.0), r"confidence must be above 0 and below 1, got 1\.0"),
    ],
)
def test_wilson_interval_of_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate.wilson_interval(*arguments)


@pytest.mark.parametrize("counts", [(3, 1, 6), (0, 0, 5), (20, 5, 175), (2, 0, 0)])
def test_a_paired_interval_is_agresti_and_mins(counts):
    """Their formula: Wald's, with half an example more in each of the four outcomes; ``c`` are alike of either kind."""
    one, other, alike = counts
    b, c, n = one + 0.5, other + 0.5, one + other + alike + 2
    half = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    found = evaluate.paired_interval([1] * one + [-1] * other + [0] * alike)
    assert found == pytest.approx((max(-1, (b - c) / n - half), min(1, (b - c) / n + half)), abs=1e-6)


def test_a_paired_interval_covers(rng):
    """Of 2,000 draws of 30 examples each the true difference lies inside in about 95 of 100."""
    draws = rng.choice([1, -1, 0], size=(2000, 30), p=[0.2, 0.05, 0.75])
    ends = np.array([evaluate.paired_interval(draw.tolist()) for draw in draws])
    assert 0.93 < np.mean((ends[:, 0] <= 0.15) & (ends[:, 1] >= 0.15)) < 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"differences .* got 0"),
        (([0.0, 1.5],), r"differences must be from -1 to 1, got 0\.0 to 1\.5"),
        (([float("nan")],), r"differences must be from -1 to 1"),
        (([0.0], 0.0), r"confidence must be above 0 and below 1, got 0\.0"),
    ],
)
def test_a_paired_interval_of_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate.paired_interval(*arguments)
