"""Smoothing certificates against closed forms, scipy's tests, and models whose probabilities are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_filters
from jax.tree_util import Partial
from scipy.stats import binomtest, norm

from rbf_jax.certify import ABSTAIN, certified_radius, certify, predict
from rbf_jax.defense import defend

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
GREY = np.full(SHAPE, 0.5, np.float32)
TRACES = []


def _linear(weights, key, images):
    """Two classes: 0 where ``w.x > b``."""
    del key
    TRACES.append(images.shape)
    matrix, bias = weights
    score = images.reshape(len(images), -1) @ matrix - bias
    return jnp.stack([score, -score], -1)


def linear(rng, margin):
    """A random linear model whose boundary lies at an l2 distance of ``margin`` from the grey image."""
    matrix = rng.normal(size=math.prod(SHAPE))
    bias = matrix @ GREY.ravel() - margin * np.linalg.norm(matrix)
    return Partial(_linear, (jnp.asarray(matrix, jnp.float32), jnp.float32(bias)))


def _dice(probabilities, keys, images):
    """Says a class at random, by each image's own key alone."""
    del images
    return jax.vmap(lambda key: jnp.log(probabilities) + jax.random.gumbel(key, probabilities.shape))(keys)


def dice(*probabilities):
    return Partial(_dice, jnp.asarray(probabilities, jnp.float32))


@Partial
def constant(key, images):
    del key
    return jnp.tile(jnp.asarray([0.0, 1.0, -1.0]), (len(images), 1))


@Partial
def half_nan(key, images):
    """Class 1 of three, and no class at all where the first pixel is dark: there, one logit is NaN."""
    trouble = jnp.where(images[:, 0, 0, 0] < 0.5, jnp.nan, 0)
    return constant(key, images).at[:, 2].add(trouble)


def share(calls, probability):
    """Whether the share of true calls is within four deviations of their probability."""
    return abs(np.mean(calls) - probability) <= 4 * math.sqrt(probability * (1 - probability) / len(calls))


def predictions(model, repeats, **options):
    return np.asarray([predict(key, model, GREY, sigma=0.25, **options) for key in jax.random.split(KEY, repeats)])


@pytest.mark.parametrize(("n", "radius"), [(1000, 2.463), (10_000, 3.199), (50_000, 3.6366), (100_000, 3.8115)])
def test_largest_radius(n, radius):
    # All samples agree: p = alpha^(1 / n).
    np.testing.assert_allclose(certified_radius(n, n, 1e-3, 1), radius, atol=5e-4)
    np.testing.assert_allclose(certified_radius(n, n, 1e-3, 0.25), 0.25 * norm.ppf(1e-3 ** (1 / n)), rtol=1e-9)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.05, 0.6])
@pytest.mark.parametrize("n", [1, 10, 1000, 50_000])
def test_radius_is_that_of_the_exact_one_sided_interval(n, alpha):
    for count in sorted({0, 1, n // 2, n // 2 + 1, 6 * n // 10, 9 * n // 10, n - 1, n}):
        lower = binomtest(count, n, alternative="greater").proportion_ci(1 - alpha, "exact").low
        expected = 0.5 * norm.ppf(lower) if lower > 0.5 else 0
        found = certified_radius(count, n, alpha, 0.5)
        assert isinstance(found, float)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_certificate_of_a_constant_model(sigma):
    found = certify(KEY, constant, GREY, sigma=sigma, n0=3, n=1000)
    np.testing.assert_allclose(found.radius, 2.463 * sigma, rtol=1e-3)
    assert found.label == 1
    assert found.counts.tolist() == [0, 1000, 0]
    assert found.counts.dtype == np.int32
    assert predict(KEY, constant, GREY, sigma=sigma) == 1


@pytest.mark.parametrize("margin", [0.05, 0.25, 0.5, -0.3])
def test_linear_model(rng, margin):
    """P(f = 0) = Phi(margin / sigma), and the margin itself is the true radius: never exceeded, and nearly reached."""
    sigma, n = 0.25, 4000
    probability = norm.cdf(abs(margin) / sigma)
    found = [certify(key, linear(rng, margin), GREY, sigma=sigma, n=n) for key in jax.random.split(KEY, 8)]
    assert {certificate.label for certificate in found} == {0 if margin > 0 else 1}
    counts = np.asarray([certificate.counts for certificate in found])
    np.testing.assert_array_equal(counts.sum(-1), n)
    assert share(np.repeat([True, False], [counts.max(-1).sum(), counts.min(-1).sum()]), probability)
    radii = np.asarray([certificate.radius for certificate in found])
    assert (radii <= abs(margin)).all()
    # The bound lies 3.1 deviations of a count below what was counted.
    worst = probability - 8 * math.sqrt(probability * (1 - probability) / n)
    assert (radii >= sigma * norm.ppf(worst)).all()


def test_noise_is_not_clipped():
    @Partial
    def outside(key, images):
        del key
        extreme = jnp.abs(images - 0.5).max((1, 2, 3))
        return jnp.stack([jnp.full(len(images), 0.5), extreme], -1)

    # Some pixel of 16 leaves the box in all but 1e-4 of the samples.
    found = certify(KEY, outside, GREY, sigma=1.0, n=1000)
    assert found.label == 1
    assert found.counts[1] > 990


def test_every_sample_has_its_own_key():
    # With one key for several samples the counts would scatter more than a binomial's.
    n, probabilities = 500, np.asarray([0.6, 0.3, 0.1])
    certificates = [
        certify(key, dice(*probabilities), GREY, sigma=0.25, n=n, alpha=0.01) for key in jax.random.split(KEY, 60)
    ]
    counts = np.asarray([certificate.counts for certificate in certificates])
    statistic = ((counts - n * probabilities) ** 2 / (n * probabilities)).sum()
    degrees = 2 * len(counts)
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)
    # Phi^-1(0.6) is the true radius at sigma = 1; a wrong certificate has probability 0.01.
    exceeded = [certificate.radius > 0.25 * norm.ppf(0.6) for certificate in certificates]
    assert sum(exceeded) <= 4


def test_noise_of_the_model_is_independent_of_the_samples():
    @Partial
    def product(keys, images):
        own = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
        score = ((images - 0.5) * own)[:, 0, 0, 0]
        return jnp.stack([score, -score], -1)

    counts = certify(KEY, product, GREY, sigma=0.25, n=2000).counts
    assert binomtest(int(counts[0]), 2000).pvalue > 1e-4


def test_samples_that_bound_are_fresh():
    # Were they those that picked the class, it would lead among them nearly always. 11 of 20 certify at alpha = 0.5.
    certified = [
        certify(key, dice(0.5, 0.5), GREY, sigma=0.25, n0=20, n=20, alpha=0.5).label != ABSTAIN
        for key in jax.random.split(KEY, 200)
    ]
    assert share(certified, binomtest(11, 20, alternative="greater").pvalue)


def test_first_samples_pick_the_class():
    # One sample picks; the class it picks is certified only if it is the likely one.
    labels = [certify(key, dice(0.8, 0.2), GREY, sigma=0.25, n0=1, n=300).label for key in jax.random.split(KEY, 200)]
    assert set(labels) == {0, ABSTAIN}
    assert share(np.asarray(labels) == 0, 0.8)


def test_batch_size_does_not_matter(rng):
    model = linear(rng, 0.1)
    reference = certify(KEY, model, GREY, sigma=0.25, n0=10, n=230)
    assert 0 < reference.counts[1] < 230
    for batch_size in (115, 256):
        found = certify(KEY, model, GREY, sigma=0.25, n0=10, n=230, batch_size=batch_size)
        assert found.counts.tolist() == reference.counts.tolist()
        assert found[:2] == reference[:2]


def test_nothing_is_compiled_anew(rng):
    def run(margin, image, sigma, n0, n):
        certify(KEY, linear(rng, margin), image, sigma=sigma, n0=n0, n=n)
        predict(KEY, linear(rng, margin), image, sigma=sigma, n=n)

    run(0.1, GREY, 0.25, 100, 200)
    traces = len(TRACES)
    run(0.2, jnp.asarray(GREY) / 2, 0.5, 7, 1001)
    run(0.3, np.zeros(SHAPE, np.float32), 1, 1, 1)
    assert len(TRACES) == traces


def test_nan_counts_for_no_class():
    found = certify(KEY, half_nan, GREY, sigma=0.25, n=2000)
    assert found.counts[[0, 2]].tolist() == [0, 0]
    assert binomtest(int(found.counts[1]), 2000).pvalue > 1e-4
    # n stays the denominator: a class with half of the samples is certain of nothing.
    assert found.label == ABSTAIN
    assert found.radius == 0
    assert predict(KEY, half_nan, GREY, sigma=0.25) == 1


def test_nothing_but_nan():
    found = certify(KEY, dice(math.nan, math.nan), GREY, sigma=0.25, n=200)
    assert found[:2] == (ABSTAIN, 0)
    assert found.counts.tolist() == [0, 0]
    assert predict(KEY, dice(math.nan, math.nan), GREY, sigma=0.25) == ABSTAIN


def test_prediction_on_a_coin_flip():
    # The test is exact, so what it promises is the sum of the binomial's tails at p-values up to alpha.
    n, alpha = 50, 0.2
    promised = sum(math.comb(n, k) for k in range(n + 1) if binomtest(k, n).pvalue <= alpha) / 2**n
    assert 0.1 < promised <= alpha
    found = predictions(dice(0.5, 0.5), 400, n=n, alpha=alpha)
    assert share(found != ABSTAIN, promised)
    assert share(found[found != ABSTAIN] == 0, 0.5)


def test_prediction_compares_the_two_most_frequent(rng):
    n, alpha, probabilities = 60, 0.05, [0.2, 0.5, 0.3]

    def decides(counts):
        _, second, top = sorted(counts)
        return bool(binomtest(top, top + second).pvalue <= alpha)

    simulated = np.mean([decides(map(int, counts)) for counts in rng.multinomial(n, probabilities, 1000)])
    found = predictions(dice(*probabilities), 300, n=n, alpha=alpha)
    assert share(found != ABSTAIN, simulated)
    assert set(found) <= {1, 2, ABSTAIN}
    assert (found == 1).sum() > 100


@pytest.mark.parametrize(("alpha", "label"), [(0.0020, 1), (0.0019, ABSTAIN)])
def test_prediction_at_the_edge(alpha, label):
    # Ten of ten: 2 / 2^10 = 0.00195.
    assert predict(KEY, constant, GREY, sigma=0.25, n=10, alpha=alpha) == label


def test_a_single_class():
    assert predict(KEY, dice(1.0), GREY, sigma=0.25) == 0


def test_defence_draws_its_noise_for_each_sample(rng):
    def classify(weights, key, images):
        del key
        return images.reshape(len(images), -1) @ weights

    weights = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    defense = defend(random_filters(rng, 4, flat=False), Partial(classify, weights), beta1=17.33, beta2=10)
    # Next to no smoothing noise: a batch that shared one draw of the defence's would say one class 100 times.
    counts = certify(KEY, defense.draw, GREY, sigma=1e-6, n=1000, batch_size=100).counts
    assert (counts > 50).all()
    assert (counts % 100).any()


BAD = {
    "several keys": (dict(key=jax.random.split(KEY, 3)), r"must be a single key.*\(3,\)"),
    "old key": (dict(key=jnp.zeros(2, jnp.uint32)), "uint32"),
    "batch of images": (dict(image=GREY[None]), r"\(1, 4, 4, 1\)"),
    "list": (dict(image=[[[0.5]]]), "list"),
    "uint8 image": (dict(image=np.zeros(SHAPE, np.uint8)), "image must be .*uint8"),
    "image above 1": (dict(image=2 * GREY + 1.5), "2.5"),
    "no noise": (dict(sigma=0.0), "sigma .* 0.0"),
    "NaN noise": (dict(sigma=math.nan), "sigma .* nan"),
    "no samples": (dict(n=0), "n must .* 0"),
    "nothing to pick": (dict(n0=0), "n0 must .* 0"),
    "half a sample": (dict(n=1.5), "n must .* 1.5"),
    "alpha 0": (dict(alpha=0), "alpha .* 0"),
    "alpha 1": (dict(alpha=1.0), "alpha .* 1.0"),
    "NaN alpha": (dict(alpha=math.nan), "alpha .* nan"),
    "empty batches": (dict(batch_size=0), "batch_size .* 0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(arguments, message):
    options = dict(key=KEY, logits_fn=constant, image=GREY, sigma=0.25) | arguments
    with pytest.raises(ValueError, match=message):
        certify(**options)
    if "n0" not in arguments:
        with pytest.raises(ValueError, match=message):
            predict(**options)


COUNTS = {
    "more than n": ((11, 10, 0.1, 1), "at most n = 10, got 11"),
    "below 0": ((-1, 10, 0.1, 1), "count .* -1"),
    "no samples": ((0, 0, 0.1, 1), "n must .* 0"),
    "alpha": ((5, 10, 1, 1), "alpha .* 1"),
    "sigma": ((5, 10, 0.1, -2), "sigma .* -2"),
}


@pytest.mark.parametrize(("arguments", "message"), COUNTS.values(), ids=COUNTS.keys())
def test_bad_counts_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        certified_radius(*arguments)
