"""Claim 1: bounds against attacks on them, closed forms and the paper's own equations, in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import float64, numpy_extract, numpy_scores, random_filters
from hypothesis import given
from hypothesis import strategies as st

from rbf_jax.bounds import RULES, best_filter_is_certain, score_change_bounds
from rbf_jax.rbf import RBFFilters

ORDERS = [1.0, 1.01, 1.5, 2.0, 3.0, math.inf]
orders = pytest.mark.parametrize("p", ORDERS, ids=lambda p: f"p={p:g}")
PAIRS = [(rule, p) for rule in RULES for p in ORDERS if rule != "exact" or p in (2, math.inf)]
pairs = pytest.mark.parametrize(("rule", "p"), PAIRS, ids=[f"{rule}-p={p:g}" for rule, p in PAIRS])
EPSILONS = st.sampled_from([1e-4, 0.01, 0.1, 0.5, 2.0])
SEEDS = st.integers(0, 2**32 - 1)
COUNT, POINTS = 4, 6


def make(seed: int, channels: int = 1) -> tuple[RBFFilters, np.ndarray]:
    """Four filters and six patches, the first of which is a template and the second black."""
    rng = np.random.default_rng(seed)
    filters = random_filters(rng, COUNT, channels=channels, flat=False)
    patches = rng.uniform(0, 1, (POINTS, 9 * channels)).astype(np.float32)
    patches[0], patches[1] = np.ravel(filters.means[0]), 0
    return filters, patches


def differences(filters: RBFFilters, patches) -> np.ndarray:
    """z - mu, (P, K, D)."""
    return float64(patches)[:, None] - float64(filters.means).reshape(len(filters.means), -1)


def change(filters: RBFFilters, patches, deltas: np.ndarray) -> np.ndarray:
    """Difference of two scores of Eq. 2; deltas broadcast against (P, K, D)."""
    d, v = differences(filters, patches), float64(filters.variances)
    return (-((d + deltas) ** 2).sum(-1) + (d**2).sum(-1)) / (2 * v)


def length(deltas: np.ndarray, p: float) -> np.ndarray:
    return np.linalg.norm(deltas, p, axis=-1, keepdims=True)


def dual_point(direction: np.ndarray, p: float) -> np.ndarray:
    """The point of the unit p-ball with the largest inner product with the direction (Hoelder's equality)."""
    if p == 1:
        return np.sign(direction) * (np.abs(direction) == np.abs(direction).max(-1, keepdims=True))
    if p == math.inf:
        return np.sign(direction)
    return np.sign(direction) * np.abs(direction) ** (1 / (p - 1))


def perturbations(rng, d: np.ndarray, p: float, epsilon: float) -> list[np.ndarray]:
    """Points of the ball, each (P, K, D): random, corners, towards and away from each template, the Hoelder point."""
    directions = [rng.normal(size=d.shape) for _ in range(5)] + [rng.choice([-1.0, 1.0], d.shape) for _ in range(3)]
    directions += list(np.eye(d.shape[-1])[rng.integers(0, d.shape[-1], (3, *d.shape[:2]))])
    directions += [sign * point for point in (d, np.sign(d), dual_point(d, p)) for sign in (-1, 1)]
    surface = [epsilon * point / np.maximum(length(point, p), 1e-30) for point in directions]
    inner = [point * rng.uniform(size=(*d.shape[:2], 1)) for point in surface]
    # Onto the template itself, where it can be reached.
    return surface + inner + [-d * np.minimum(1, epsilon / np.maximum(length(d, p), 1e-30))]


def slack(filters: RBFFilters, epsilon: float) -> np.ndarray:
    """Rounding of |d|^2, 1e-6 of it, is 1e-3 of |d| where a patch lies on a template."""
    return (1e-3 * epsilon + 1e-6 * epsilon**2) / float64(filters.variances) + 1e-6


def bounds(filters, patches, epsilon, p, rule, **options) -> tuple[np.ndarray, np.ndarray]:
    lower, upper = score_change_bounds(filters, jnp.asarray(patches), epsilon, p, rule=rule, **options)
    return float64(lower), float64(upper)


def assert_bounds_hold(filters, patches, epsilon, p, rule, rng):
    lower, upper = bounds(filters, patches, epsilon, p, rule)
    assert np.all((lower <= 0) & (upper >= 0))
    tolerance = slack(filters, epsilon) + 1e-5 * np.maximum(np.abs(lower), upper)
    for deltas in perturbations(rng, differences(filters, patches), p, epsilon):
        assert np.all(length(deltas, p) <= epsilon * (1 + 1e-9))
        moved = change(filters, patches, deltas)
        assert np.all(lower - tolerance <= moved)
        assert np.all(moved <= upper + tolerance)


@pairs
@given(seed=SEEDS, epsilon=EPSILONS)
def test_no_perturbation_leaves_the_bounds(rule, p, seed, epsilon):
    filters, patches = make(seed)
    assert_bounds_hold(filters, patches, epsilon, p, rule, np.random.default_rng(seed + 1))


def digit_filters(digits) -> tuple[RBFFilters, np.ndarray]:
    patches = numpy_extract(digits).reshape(-1, 9)
    patches = patches[patches.max(-1) > 0]
    means = patches[:: len(patches) // 6][:6]
    filters = RBFFilters(jnp.asarray(means.reshape(6, 3, 3, 1), jnp.float32), jnp.linspace(0.02, 0.3, 6))
    return filters, patches[7 :: len(patches) // 100].astype(np.float32)


@pairs
def test_no_perturbation_leaves_the_bounds_on_digits(rng, digits, rule, p):
    filters, patches = digit_filters(digits)
    for epsilon in (0.03, 0.3):
        assert_bounds_hold(filters, patches, epsilon, p, rule, rng)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("p", [2.0, math.inf], ids=["p=2", "p=inf"])
@given(seed=SEEDS, epsilon=EPSILONS)
def test_exact_bounds_are_attained(channels, p, seed, epsilon):
    filters, patches = make(seed, channels)
    d = differences(filters, patches)
    if p == math.inf:
        away = epsilon * np.where(d >= 0, 1, -1)
        towards = -np.sign(d) * np.minimum(np.abs(d), epsilon)
    else:
        size = np.maximum(length(d, 2), 1e-30)
        away = np.where(size > 1e-9, epsilon * d / size, epsilon / math.sqrt(d.shape[-1]))
        towards = -d * np.minimum(1, epsilon / size)
    lower, upper = bounds(filters, patches, epsilon, p, "exact")
    np.testing.assert_allclose(lower, change(filters, patches, away), rtol=1e-4, atol=slack(filters, epsilon).max())
    np.testing.assert_allclose(upper, change(filters, patches, towards), rtol=1e-4, atol=slack(filters, epsilon).max())


@given(seed=SEEDS, epsilon=EPSILONS)
def test_cauchy_is_eqs_8_and_9_of_the_paper(seed, epsilon):
    filters, patches = make(seed)
    norm = length(differences(filters, patches), 2)[..., 0]
    sigma, n = np.sqrt(float64(filters.variances)), patches.shape[-1]
    linear = epsilon * math.sqrt(n) * norm / sigma**2
    lower, upper = bounds(filters, patches, epsilon, math.inf, "cauchy")
    tolerance = slack(filters, epsilon).max() * math.sqrt(n)
    np.testing.assert_allclose(lower, -n * epsilon**2 / (2 * sigma**2) - linear, rtol=1e-4, atol=tolerance)
    np.testing.assert_allclose(upper, linear, rtol=1e-4, atol=tolerance)
    eq9 = np.log(1 / (math.sqrt(2 * math.pi) * sigma)) - (norm - 2 * epsilon * math.sqrt(n)) * norm / (2 * sigma**2)
    score = numpy_scores(filters, patches, constant="eq9")
    np.testing.assert_allclose(upper, eq9 - score, rtol=1e-4, atol=tolerance)


@orders
def test_hoelder_is_tight_to_first_order(p):
    """For a vanishing epsilon no rule can be narrower: the Hoelder point attains ``epsilon |d|_q / v``."""
    filters, patches = make(5)
    d = differences(filters, patches)[1:, 1:]
    epsilon = 1e-5
    point = dual_point(d, p)
    attained = (epsilon * point / length(point, p) * d).sum(-1) / float64(filters.variances)[1:]
    lower, upper = bounds(filters, patches, epsilon, p, "hoelder")
    np.testing.assert_allclose(upper[1:, 1:], attained, rtol=1e-3)
    np.testing.assert_allclose(lower[1:, 1:], -attained, rtol=1e-3)


@orders
@given(seed=SEEDS, epsilon=EPSILONS)
def test_each_rule_is_within_the_wider_one(p, seed, epsilon):
    filters, patches = make(seed)
    tolerance = slack(filters, epsilon)
    nested = [bounds(filters, patches, epsilon, p, rule) for rule in RULES if (rule, p) in PAIRS]
    for (wide_low, wide_high), (low, high) in itertools.pairwise(nested):
        assert np.all(low >= wide_low - tolerance - 1e-5 * np.abs(wide_low))
        assert np.all(high <= wide_high + tolerance + 1e-5 * wide_high)
    if p == math.inf:
        # Three different rules, not one.
        assert not np.allclose(nested[0], nested[1], rtol=1e-2, atol=0)
        assert not np.allclose(nested[1], nested[2], rtol=1e-6, atol=0)


@pairs
def test_bounds_have_a_slope_at_a_template(rule, p):
    filters, patches = make(4)
    slopes = jax.jacobian(lambda patches: score_change_bounds(filters, patches, 0.1, p, rule=rule))(patches)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


def test_variance_floor_takes_the_place_of_smaller_variances():
    filters, patches = make(1)
    tiny = filters._replace(variances=jnp.asarray([1e-20, 0, 1e-6, 0.5], jnp.float32))
    raised = filters._replace(variances=jnp.asarray([0.1, 0.1, 0.1, 0.5], jnp.float32))
    for rule in RULES:
        found = bounds(tiny, patches, 0.1, math.inf, rule, variance_floor=0.1)
        np.testing.assert_allclose(found, bounds(raised, patches, 0.1, math.inf, rule))
        assert np.all(np.isfinite(bounds(tiny, patches, 0.1, math.inf, rule)))


def certain(filters, patches, epsilon, p, rule="cauchy") -> np.ndarray:
    return np.asarray(best_filter_is_certain(filters, jnp.asarray(patches), epsilon, p, rule=rule))


@pairs
def test_no_perturbation_moves_a_certain_best_filter(rng, digits, rule, p):
    filters, patches = digit_filters(digits)
    best = numpy_scores(filters, patches).argmax(-1)
    shares = []
    for epsilon in (0.003, 0.03, 0.1):
        sure = certain(filters, patches, epsilon, p, rule)
        shares.append(sure.mean())
        for deltas in perturbations(rng, differences(filters, patches), p, epsilon):
            # Towards and away from every one of the filters.
            for j in range(deltas.shape[1]):
                moved = numpy_scores(filters, float64(patches) + deltas[:, j]).argmax(-1)
                assert np.all(moved[sure] == best[sure])
    assert shares[0] > 0.5


@pairs
def test_certainty_only_falls_with_epsilon(digits, rule, p):
    filters, patches = digit_filters(digits)
    before = np.ones(len(patches), bool)
    for epsilon in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        now = certain(filters, patches, epsilon, p, rule)
        assert not np.any(now & ~before)
        before = now
    assert not before.any()


def test_wider_rules_are_certain_less_often(digits):
    filters, patches = digit_filters(digits)
    epsilons = (0.02, 0.05, 0.1, 0.15, 0.2)
    cauchy, hoelder, exact = (
        np.stack([certain(filters, patches, epsilon, math.inf, rule) for epsilon in epsilons]) for rule in RULES
    )
    assert not np.any(cauchy & ~hoelder)
    assert not np.any(hoelder & ~exact)
    assert cauchy.sum() < hoelder.sum() < exact.sum()


@pairs
def test_without_perturbation_only_ties_are_uncertain(rule, p):
    means = np.zeros((3, 3, 3, 1), np.float32)
    means[1] = means[2] = 0.75
    filters = RBFFilters(jnp.asarray(means), jnp.full(3, 0.1))
    patches = np.array([[0.0] * 9, [0.75] * 9, [0.1] * 9], np.float32)
    # The middle one lies on two templates at once.
    assert certain(filters, patches, 0.0, p, rule).tolist() == [True, False, True]


def test_a_single_filter_is_always_certain():
    filters, patches = make(0)
    single = RBFFilters(filters.means[:1], filters.variances[:1])
    assert certain(single, patches, 100.0, math.inf).all()


BAD = {
    "p below 1": (dict(p=0.5), "p must .* 0.5"),
    "p is NaN": (dict(p=math.nan), "p must .* nan"),
    "negative epsilon": (dict(epsilon=-0.1), "epsilon .* -0.1"),
    "epsilon is NaN": (dict(epsilon=math.nan), "epsilon .* nan"),
    "epsilon is infinite": (dict(epsilon=math.inf), "epsilon .* inf"),
    "several epsilons": (dict(epsilon=np.zeros(COUNT, np.float32)), "one number, got shape"),
    "unknown rule": (dict(rule="Hoelder"), "'cauchy', 'hoelder', 'exact'.*'Hoelder'"),
    "uint8 patches": (dict(patches=np.zeros((2, 9), np.uint8)), "patches must be float32 .* uint8"),
    "patches of three channels": (dict(patches=np.zeros((2, 27), np.float32)), "patches of D = 27 do not fit"),
    "negative variance": (dict(filters=make(0)[0]._replace(variances=jnp.full(COUNT, -0.5))), "variances .* -0.5"),
    "floor of 0 in float32": (dict(variance_floor=1e-40), "variance_floor .* 1e-40"),
    "exact for p = 1": (dict(rule="exact", p=1), "exact.* p = 1$"),
    "exact for p = 3": (dict(rule="exact", p=3), "exact.* p = 3$"),
}


@pytest.mark.parametrize("function", [score_change_bounds, best_filter_is_certain], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(function, arguments, message):
    filters, patches = make(0)
    options: dict = dict(filters=filters, patches=patches, epsilon=0.1, p=2) | arguments
    with pytest.raises(ValueError, match=message):
        function(**options)
