"""Non-parametric EM against its rules in plain float64 loops."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import float64, numpy_extract, numpy_scores, random_images
from hypothesis import given
from hypothesis import strategies as st

from rbf_jax import em
from rbf_jax.em import EMConfig, EMState
from rbf_jax.rbf import RBFFilters, match_scores

# From nothing on 60 digits: one filter at first, the ninth at step 16, 14 at the end.
GROWING = em.MNIST._replace(images_per_step=60, offset=0.0, steps=30)


class Reference(NamedTuple):
    """EM in float64: means (K, D), variances (K,), the next alpha; the share of new patches and the mean best score."""

    means: np.ndarray
    variances: np.ndarray
    alpha: float
    new_share: float = 0.0
    score: float = 0.0


def reference_step(before: Reference, step: int, images, config: EMConfig) -> Reference:
    """One M-step after the rules."""
    patches = numpy_extract(images, config.size).reshape(-1, math.prod(config.size) * images.shape[-1])
    chosen, best = np.full(len(patches), -1), np.full(len(patches), -np.inf)
    for j, (mean, variance) in enumerate(zip(before.means, before.variances, strict=True)):
        v = max(variance, config.variance_floor)
        score = -((patches - mean) ** 2).sum(-1) / (2 * v) - 0.5 * math.log(v)
        chosen, best = np.where(score > best, j, chosen), np.maximum(score, best)

    new = np.zeros(len(patches), bool)
    if step < config.growth_steps and before.alpha > 0:
        new = best < math.log(before.alpha) + config.offset
    means, variances = [], []
    for j in range(len(before.means)):
        own = patches[(chosen == j) & ~new]
        if len(own) > 1:
            means.append(own.mean(0))
            variances.append(((own - own.mean(0)) ** 2).sum(-1).mean())
    if new.mean() > config.new_share:
        means.append(patches[new].mean(0))
        variances.append(((patches[new] - means[-1]) ** 2).sum(-1).mean())
    growth = (1 + math.exp(len(means) / config.expected_filters)) * (1 + math.exp(min(new.mean() / 0.001, 700)))
    return Reference(
        means=np.array(means).reshape(-1, patches.shape[1]),
        variances=np.array(variances),
        alpha=before.alpha + 0.6913 / growth - 0.05,
        new_share=new.mean(),
        score=best[~new].mean() if not new.all() else 0.0,
    )


def as_reference(state: EMState) -> Reference:
    count = int(state.num_filters)
    return Reference(
        float64(state.filters.flat_means)[:count], float64(state.filters.variances)[:count], float(state.alpha)
    )


def make_state(means, variances, *, alpha=1.0, step=0, room=8) -> EMState:
    """A state whose padding is a trap: templates that fit grey patches well, and would win if they counted."""
    count = len(means)
    padded, spread = np.full((room, *means.shape[1:]), 0.5, np.float32), np.full(room, 0.05, np.float32)
    padded[:count], spread[:count] = means, variances
    filters = RBFFilters(jnp.asarray(padded), jnp.asarray(spread))
    return EMState(filters, jnp.int32(count), jnp.float32(alpha), jnp.int32(step))


def assert_tracks(state: EMState, expected: Reference, tolerance: float = 1e-5):
    found = as_reference(state)
    assert len(found.means) == len(expected.means)
    np.testing.assert_allclose(found.means, expected.means, atol=tolerance)
    np.testing.assert_allclose(found.variances, expected.variances, atol=tolerance)
    assert found.alpha == pytest.approx(expected.alpha, abs=1e-5)


def assert_same_tree(a, b):
    """Bit for bit, NaN included."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Case(NamedTuple):
    """One step from given filters; `grows` and `after` are what the loop must show for the case to deserve its name."""

    grows: bool
    after: int
    filters: int = 5
    alpha: float = 1.0
    step: int = 3
    rules: dict = {}  # noqa: RUF012 (never changed)
    lonely: bool = False


CASES = {
    "nothing is known": Case(grows=True, after=1, filters=0),
    "some are new": Case(grows=True, after=6, alpha=3.0),
    "nearly all are new": Case(grows=True, after=6, alpha=5.0),
    "none is new": Case(grows=False, after=5, alpha=1e-6),
    "alpha is 0": Case(grows=False, after=5, alpha=0.0),
    "alpha is below 0": Case(grows=False, after=5, alpha=-0.3),
    "growth is over": Case(grows=False, after=5, alpha=5.0, step=7, rules={"growth_steps": 7}),
    "last step of growth": Case(grows=True, after=6, alpha=5.0, step=6, rules={"growth_steps": 7}),
    "too few are new": Case(grows=True, after=5, alpha=3.0, rules={"new_share": 0.99}),
    "K0 is small": Case(grows=False, after=5, alpha=1e-6, rules={"expected_filters": 2.0}),
    "lonely filters go": Case(grows=False, after=3, alpha=0.0, lonely=True),
    "lonely filters go, one comes": Case(grows=True, after=4, alpha=3.0, lonely=True),
    "other floor": Case(grows=False, after=5, alpha=1e-6, rules={"variance_floor": 0.4}),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_step_equals_the_loop(rng, case, channels):
    images = random_images(rng, (12, 9, 8, channels))
    means = (
        rng.uniform(0.1, 0.9, (case.filters, 3, 3, channels)) * np.linspace(0.2, 1, case.filters)[:, None, None, None]
    )
    variances = rng.uniform(0.3, 1, case.filters) * channels
    if case.lonely:
        # The first fits no patch at all, the third exactly one (the noisy pixels make that patch unique). Their
        # variance lies above what rounding makes of a distance of 0, which differs from one processor to the next.
        means[1], variances[1] = rng.uniform(0, 1, means.shape[1:]), 1e-5
        patches = numpy_extract(images).reshape(-1, *means.shape[1:])
        unique = patches[np.ptp(patches, axis=(1, 2, 3)).argmax()]
        means[3], variances[3] = unique, 1e-5
    config = EMConfig()._replace(**case.rules)
    state = make_state(means, variances, alpha=case.alpha, step=case.step)
    expected = reference_step(as_reference(state), case.step, images, config)
    assert (expected.new_share > 0) == case.grows
    assert len(expected.means) == case.after

    found, report = em._step(state, jnp.asarray(images), config)
    assert_tracks(found, expected)
    assert float(report.new_share) == pytest.approx(expected.new_share, abs=1e-6)
    assert float(report.score) == pytest.approx(expected.score, rel=1e-4, abs=1e-4)
    assert (int(report.num_filters), float(report.alpha)) == (int(found.num_filters), float(found.alpha))
    assert int(found.step) == case.step + 1


def test_one_step_with_other_window_sizes(rng):
    images = random_images(rng, (4, 9, 8, 3))
    config = EMConfig(size=(2, 4))
    state = make_state(rng.uniform(0, 1, (3, 2, 4, 3)), rng.uniform(0.5, 2, 3), alpha=1.0)
    expected = reference_step(as_reference(state), 0, images, config)
    assert_tracks(em._step(state, jnp.asarray(images), config)[0], expected)


def test_rounding_takes_no_mean_out_of_range_and_no_variance_below_0():
    """Sums of patches that are all white, as float32 may have them."""
    state = make_state(np.ones((1, 3, 3, 1)), [0.1], step=300)
    zero = np.zeros(9, np.float32)
    counts, offsets = zero + 4 * (np.arange(9) == 0), np.zeros((9, 9), np.float32)
    offsets[0] = 4e-7
    statistics = em.EMStatistics(*map(jnp.asarray, (counts, offsets, zero, zero[0])))
    filters = em.m_step(state, statistics)[0].filters
    np.testing.assert_array_equal(filters.means[0], 1)
    assert filters.variances[0] == 0


def test_statistics_of_parts_add_up(rng):
    images = random_images(rng, (8, 9, 8, 1))
    state = make_state(rng.uniform(0, 1, (3, 3, 3, 1)), np.full(3, 0.3), alpha=2.0)
    whole = em.e_step(state, jnp.asarray(images))
    parts = [em.e_step(state, jnp.asarray(images[rows])) for rows in (slice(0, 3), slice(3, 8))]
    assert float(whole.counts.sum()) == 8 * 7 * 6
    jax.tree.map(
        lambda total, *part: np.testing.assert_allclose(total, sum(map(float64, part)), rtol=1e-5, atol=1e-4),
        whole,
        *parts,
    )


@jax.jit
def best_and_all(state: EMState, patches):
    scores = match_scores(state.filters, patches, variance_floor=1e-20)
    return *em.best_filters(state, patches, variance_floor=1e-20), scores


@pytest.mark.parametrize("channels", [1, 3])
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 16))
def test_best_filters_are_the_arg_max(channels, seed, count):
    rng = np.random.default_rng(seed)
    patches = rng.uniform(0, 1, (200, 9 * channels)).astype(np.float32)
    state = make_state(rng.uniform(0, 1, (count, 3, 3, channels)), rng.uniform(0.01, 2, count), room=16)
    index, score, scores = map(np.asarray, best_and_all(state, jnp.asarray(patches)))
    scores = float64(scores[:, :count])
    # The packing costs the last 4 bits of the score (16 filters).
    resolution = 16 * 2.0**-23 * np.abs(scores).max(-1) + 1e-6
    assert np.all(index < count)
    chosen = np.take_along_axis(scores, index[:, None], -1)[:, 0]
    assert np.all(scores.max(-1) - chosen <= resolution)
    assert np.all(np.abs(score - chosen) <= resolution)
    ranked = np.sort(scores, -1)
    clear = ranked[:, -1] - ranked[:, -2] > resolution if count > 1 else np.ones(200, bool)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(index[clear], scores.argmax(-1)[clear])


def test_whole_run_tracks_the_loop(digits):
    images = digits[:60]
    reference = Reference(np.zeros((0, 9)), np.zeros(0), 1.0)
    state, counts = em.init(1, config=GROWING), []
    for step in range(GROWING.steps):
        state = em._with_room(state)
        reference = reference_step(reference, step, images, GROWING)
        state, _ = em._step(state, jnp.asarray(images), GROWING)
        # A patch on the edge of two filters may fall to either; one of 40,560 moves a mean by about 1e-3.
        assert_tracks(state, reference, 2e-3)
        counts.append(len(reference.means))
    assert counts[-1] > 8

    filters, info = em.fit(images, config=GROWING, progress=False)
    assert info.history.num_filters.tolist() == counts
    np.testing.assert_allclose(filters.flat_means, reference.means, atol=2e-3)
    np.testing.assert_allclose(filters.variances, reference.variances, atol=2e-3)
    np.testing.assert_allclose(info.history.alpha[-1], reference.alpha, atol=1e-5)


def test_images_are_taken_in_order_and_wrap_round(rng):
    images = random_images(rng, (5, 8, 8, 1))
    config = EMConfig(images_per_step=3, steps=4, offset=0.0)
    reference = Reference(np.zeros((0, 9)), np.zeros(0), 1.0)
    for step, rows in enumerate(([0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1])):
        reference = reference_step(reference, step, images[rows], config)
    _, info = em.fit(images, config=config, progress=False)
    assert_tracks(info.state, reference, 1e-4)


def test_black_patches_give_a_filter_of_variance_0(digits):
    filters, _ = em.fit(digits[:60], config=GROWING, progress=False)
    black = np.asarray(filters.variances == 0)
    assert black.sum() == 1
    assert np.all(np.asarray(filters.means)[black] == 0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_images_give_one_exact_filter(value):
    images = np.full((4, 8, 8, 3), value, np.float32)
    filters, _ = em.fit(images, config=EMConfig(images_per_step=4, steps=5), progress=False)
    np.testing.assert_array_equal(filters.means, np.full((1, 3, 3, 3), value))
    np.testing.assert_array_equal(filters.variances, [0])


def test_a_jax_that_computes_in_float64_learns_the_same(digits, standard_promotion):
    with jax.enable_x64(True):
        filters, _ = em.fit(digits[:60], config=GROWING, progress=False)
    assert {leaf.dtype for leaf in filters} == {np.dtype(np.float32)}
    expected, _ = em.fit(digits[:60], config=GROWING, progress=False)
    np.testing.assert_allclose(filters.means, expected.means, atol=1e-4)


def test_padding_changes_nothing(digits):
    """Wider padding costs the packed scores a few bits, nothing else."""
    narrow = wide = em.init(1, config=GROWING)
    for size in (8, 16, 32):
        wide = em._with_room(wide._replace(num_filters=jnp.int32(size)))
    wide = wide._replace(num_filters=jnp.int32(0))
    assert wide.filters.variances.shape == (64,)
    for _ in range(6):
        narrow, wide = (em._step(state, jnp.asarray(digits[:60]), GROWING)[0] for state in (narrow, wide))
        assert_tracks(wide, as_reference(narrow), 1e-4)


def test_room_is_a_power_of_two_and_always_enough(digits):
    _, info = em.fit(digits[:60], config=GROWING, progress=False)
    assert info.state.filters.variances.shape == (16,)
    full = make_state(np.random.default_rng(0).uniform(0, 1, (8, 3, 3, 1)), np.full(8, 0.1))
    roomy = em._with_room(full)
    assert roomy.filters.means.shape == (16, 3, 3, 1)
    np.testing.assert_array_equal(roomy.filters.means[:8], full.filters.means)
    np.testing.assert_array_equal(roomy.filters.variances[:8], full.filters.variances)
    assert em._with_room(roomy) is roomy


def test_compiled_once_for_each_power_of_two(digits, monkeypatch):
    traces = []
    real = em.m_step

    def counted(state, statistics, *, config):
        traces.append(state.filters.variances.shape[0])
        return real(state, statistics, config=config)

    monkeypatch.setattr(em, "m_step", counted)
    # Rules that no other test uses, so that nothing is compiled yet.
    config = GROWING._replace(growth_steps=249)
    for images in (digits[:60], digits[59::-1]):
        em.fit(images, config=config, progress=False)
        assert traces == [8, 16]


def test_runs_are_deterministic(digits):
    runs = [em.fit(digits[:60], config=GROWING._replace(steps=12), progress=False) for _ in range(2)]
    assert_same_tree(*runs)


def test_resumed_run_equals_one_run(digits):
    """Bit for bit, stopped on either side of the wider padding. 24 images a step: their order matters."""
    config = GROWING._replace(images_per_step=24)
    filters, info = em.fit(digits[:60], config=config, progress=False)
    for first in (5, 25):
        _, before = em.fit(digits[:60], config=config._replace(steps=first), progress=False)
        assert before.state.filters.variances.shape == (8 if first == 5 else 16,)
        resumed, after = em.fit(digits[:60], config=config, state=before.state, progress=False)
        assert_same_tree(filters, resumed)
        assert_same_tree(info.state, after.state)
        pieces = jax.tree.map(lambda *parts: np.concatenate(parts), before.history, after.history)
        assert_same_tree(info.history, pieces)


def test_key_draws_a_first_filter(digits):
    states = [em.init(3, key=jax.random.key(seed)) for seed in range(20)]
    assert em.init(3).num_filters == 0
    assert all(state.num_filters == 1 for state in states)
    means = np.stack([state.filters.means[0] for state in states])
    variances = np.stack([state.filters.variances[0] for state in states])
    assert means.shape == (20, 3, 3, 3)
    assert np.unique(means).size == means.size
    assert np.all((means >= 0) & (means <= 1))
    assert np.all((variances >= 0) & (variances <= 1))
    assert means.std() == pytest.approx(12**-0.5, abs=0.02)
    assert_same_tree(states[3], em.init(3, key=jax.random.key(3)))

    drawn = em.fit(digits[:60], config=GROWING, key=jax.random.key(0), progress=False)
    from_state = em.fit(digits[:60], config=GROWING, state=em.init(1, key=jax.random.key(0)), progress=False)
    assert_same_tree(drawn, from_state)


def test_finds_the_templates_that_made_the_patches(rng):
    templates = np.array(
        [
            [0.8, 0.2, 0.8, 0.2, 0.8, 0.2, 0.8, 0.2, 0.8],
            [0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9],
            [0.9, 0.5, 0.1, 0.9, 0.5, 0.1, 0.9, 0.5, 0.1],
        ]
    )
    # One patch to an image; noise of 0.03 per pixel.
    patches = templates[rng.integers(0, 3, 1200)] + rng.normal(0, 0.03, (1200, 9))
    images = patches.clip(0, 1).astype(np.float32).reshape(-1, 3, 3, 1)
    config = EMConfig(images_per_step=1200, steps=60, growth_steps=40, offset=0.0, new_share=0.05)
    filters, _ = em.fit(images, config=config, progress=False)
    nearest = np.abs(float64(filters.flat_means)[:, None] - templates).max(-1)
    assert np.all(nearest.min(0) < 0.02)
    assert np.all(nearest.min(1) < 0.05)
    assert np.all(np.asarray(filters.variances) < 1.3 * 9 * 0.03**2)


BAD_FITS = {
    "uint8": (dict(images=np.zeros((2, 8, 8, 1), np.uint8)), "uint8"),
    "above 1": (dict(images=np.full((2, 8, 8, 1), 1.5, np.float32)), "1.5"),
    "three dimensions": (dict(images=np.zeros((8, 8, 1), np.float32)), r"\(8, 8, 1\)"),
    "window too large": (dict(config=EMConfig(size=(9, 3))), "9x3"),
    "no images": (dict(config=EMConfig(images_per_step=0)), "images_per_step .* 0"),
    "no steps": (dict(config=EMConfig(steps=0)), "steps .* 0"),
    "half a step": (dict(config=EMConfig(steps=1.5)), "steps .* 1.5"),  # type: ignore[arg-type]
    "growth": (dict(config=EMConfig(growth_steps=-1)), "growth_steps .* -1"),
    "K0": (dict(config=EMConfig(expected_filters=0.0)), "expected_filters .* 0.0"),
    "offset": (dict(config=EMConfig(offset=float("nan"))), "offset .* nan"),
    "share": (dict(config=EMConfig(new_share=-0.1)), "new_share .* -0.1"),
    "floor": (dict(config=EMConfig(variance_floor=0.0)), "variance_floor .* 0.0"),
    "state is past the end": (
        dict(config=EMConfig(steps=3), state=em.init(1)._replace(step=jnp.int32(3))),
        "3 M-steps.* 3",
    ),
    "key and state": (dict(key=jax.random.key(0), state=em.init(1)), "key"),
    "raw key": (dict(key=np.zeros(2, np.uint32)), "uint32"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_FITS.values(), ids=BAD_FITS.keys())
def test_bad_arguments_are_named(arguments, message):
    images = arguments.pop("images", np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=message):
        em.fit(images, progress=False, **arguments)


def gradient_fit(digits, seed=0, **options):
    defaults: dict[str, Any] = dict(
        filters=6, steps=40, batch_size=8, learning_rate=0.1, variance_floor=1e-3, progress=False
    )
    # Optax counts its steps in int32 and raises floats to them: strict promotion stops it.
    with jax.numpy_dtype_promotion("standard"):
        return em.fit_gradient(jax.random.key(seed), jnp.asarray(digits), **(defaults | options))


def test_gradient_fit_raises_the_score(digits):
    filters, scores = gradient_fit(digits)
    assert scores.shape == (40,)
    assert filters.means.shape == (6, 3, 3, 1)
    assert np.mean(scores[-10:]) > np.mean(scores[:3]) + 0.3
    means, variances = np.asarray(filters.means), np.asarray(filters.variances)
    assert np.all((means >= 0) & (means <= 1))
    assert np.all((variances >= np.float32(1e-3)) & np.isfinite(variances))
    # What it reports is the score of the filters that it returns.
    best = numpy_scores(filters, numpy_extract(digits), variance_floor=1e-3).max(-1).mean()
    assert best == pytest.approx(float(scores[-10:].mean()), abs=0.2)

    again, other = gradient_fit(digits), gradient_fit(digits, seed=1)
    assert_same_tree((filters, scores), again)
    assert np.any(np.asarray(filters.means != other[0].means))


def test_gradient_fit_keeps_its_filters_apart(digits):
    """Most patches are black: filters that begin as one patch would stay equal."""
    for seed in range(3):
        filters, _ = gradient_fit(digits, seed=seed, filters=24, steps=8)
        assert len(np.unique(filters.flat_means, axis=0)) == 24


@pytest.mark.parametrize("floor", [1e-6, 1e-4])
def test_gradient_fit_leaves_the_floor(rng, floor):
    """The patches' own variance is just below the floor, where the filter begins; from the patch it lies on it is more.

    In float32 the exponential of the floors' logarithms is below them.
    """
    noise = 0.5 + rng.normal(0, math.sqrt(0.9 * floor / 9), (64, 8, 8, 1)).astype(np.float32)
    filters, _ = gradient_fit(noise, filters=1, steps=1, batch_size=64, variance_floor=floor)
    assert float(filters.variances[0]) == pytest.approx(floor * math.exp(0.1), rel=1e-3)


def test_gradient_fit_lowers_its_rate_by_a_cosine(rng):
    """Under a slope that stays the same each step of Adam moves by the rate itself: 1, 0.85, 0.5 and 0.15 of it."""
    noise = rng.uniform(size=(64, 8, 8, 1)).astype(np.float32)
    filters, _ = gradient_fit(noise, filters=1, steps=4, batch_size=64, learning_rate=1e-3, variance_floor=0.8)
    assert math.log(float(filters.variances[0]) / 0.8) == pytest.approx(2.5e-3, rel=0.05)


def test_gradient_fit_needs_as_many_different_patches():
    with pytest.raises(ValueError, match="filters must be at most the 1 different patches of the images, got 6"):
        gradient_fit(np.zeros((2, 8, 8, 1), np.float32))


def test_a_state_of_other_filters_is_refused():
    grey, colour = np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 8, 3), np.float32)
    _, info = em.fit(grey, config=em.MNIST._replace(steps=2), progress=False)
    with pytest.raises(ValueError, match=r"state must have filters of \(3, 3, 3\), got \(3, 3, 1\)"):
        em.fit(colour, state=info.state, progress=False)
    room = jax.tree.map(lambda array: array[:6], info.state.filters)
    with pytest.raises(ValueError, match="state must have room for a power of two of filters, got 6: pad"):
        em.fit(grey, state=info.state._replace(filters=room), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(filters=0), "filters .* 0"),
        (dict(steps=0), "steps .* 0"),
        (dict(batch_size=-1), "batch_size .* -1"),
        (dict(learning_rate=0.0), "learning_rate .* 0.0"),
        (dict(variance_floor=float("nan")), "variance_floor .* nan"),
        (dict(size=(29, 3)), "29x3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_gradient_fit_names_bad_arguments(digits, options, message):
    with pytest.raises(ValueError, match=message):
        gradient_fit(digits, **options)
