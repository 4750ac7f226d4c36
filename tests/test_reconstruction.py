"""Reconstructions and their gradients against float64, the noise against its closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Gradients,
    numpy_extract,
    numpy_gradients,
    numpy_reconstruct,
    numpy_weights,
    quick_jit,
    random_filters,
    random_images,
    recover_noise,
    shipped_jit,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rbf_jax.rbf import CONSTANTS, RBFFilters, tile_images
from rbf_jax.reconstruction import (
    NOISES,
    PRESETS,
    bpda,
    mixing_weights,
    reconstruct,
    sample_reconstruction,
    sample_std,
)

KEY = jax.random.key(0)
IMAGES = np.full((2, 5, 5, 1), 0.5, np.float32)
BETA1 = [2.0, 17.33, 86.64, 100.0]
betas = pytest.mark.parametrize("beta1", BETA1)
channels_1_and_3 = pytest.mark.parametrize("channels", [1, 3])

# Compiled once for all tests, which share a few shapes: what is not jitted is compiled anew on every call.
jit_reconstruct = shipped_jit(reconstruct)
jit_weights = quick_jit(mixing_weights, static_argnames="constant")
jit_sample = quick_jit(sample_reconstruction, static_argnames=("noise", "scale", "draws", "constant"))


def rebuild_and_differentiate(filters, images, beta1, cotangent, variance_floor, constant):
    def total(images, filters, beta1):
        rebuilt = reconstruct(filters, images, beta1, variance_floor=variance_floor, constant=constant)
        return jnp.vdot(cotangent, rebuilt), rebuilt

    (_, rebuilt), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(images, filters, beta1)
    images, filters, beta1 = gradients
    return rebuilt, Gradients(images, filters.means, filters.variances, beta1)


jit_rebuild = shipped_jit(rebuild_and_differentiate, static_argnums=5)
quick_rebuild = quick_jit(rebuild_and_differentiate, static_argnums=5)


def rebuild(filters, images, beta1, cotangent, *, variance_floor=1e-12, constant="none"):
    """The static reconstruction and the gradients of its product with the cotangent."""
    # Rounding is judged under XLA's ordinary optimisations, and once for each number of channels.
    compiled = jit_rebuild if constant == "none" and len(filters.means) == 8 else quick_rebuild
    return compiled(filters, images, beta1, cotangent, variance_floor, constant)


def inputs(rng, digits, channels):
    """Filters, images with black areas, and a cotangent."""
    images = digits[:3] if channels == 1 else random_images(rng, (3, 14, 13, 3))
    return random_filters(rng, 8, channels=channels), images, rng.normal(size=images.shape).astype(np.float32)


def tolerance(beta1):
    """Of what is of order 1: the exponents are rounded to beta1 * 6e-8, and much depends on their differences."""
    return 1e-5 if beta1 < 20 else 5e-5


def grey_filters(rng, count, size=(3, 3)):
    """Templates and variances in the middle, so that moderate noise never meets the clip."""
    means = rng.uniform(0.35, 0.65, (count, *size, 1)).astype(np.float32)
    return RBFFilters(jnp.asarray(means), jnp.asarray(rng.uniform(0.02, 0.08, count), jnp.float32))


# ------------------------------------------------------------------------------------------------------------ static


def check(filters, images, beta1, cotangent, *, slack=1, **options):
    """Reconstruction and gradients against float64."""
    rebuilt, got = rebuild(filters, images, beta1, cotangent, **options)
    wanted = numpy_reconstruct(filters, images, beta1, **options)
    np.testing.assert_allclose(rebuilt, wanted, rtol=0, atol=tolerance(beta1))
    expected, scales = numpy_gradients(filters, images, beta1, np.asarray(cotangent, np.float64), **options)
    errors = {
        name: float(np.abs(np.asarray(getattr(got, name), np.float64) - getattr(expected, name)).max() / scale)
        for name, scale in scales._asdict().items()
    }
    assert all(error < slack * tolerance(beta1) for error in errors.values()), errors  # NaN fails as well


@betas
@channels_1_and_3
def test_reconstruction_and_gradients_are_those_of_float64(rng, digits, channels, beta1):
    filters, images, cotangent = inputs(rng, digits, channels)
    check(filters, images, beta1, cotangent)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4])
@pytest.mark.parametrize("beta1", [17.33, 86.64, 100.0])
def test_gradients_of_any_size_are_those_of_float64(rng, digits, beta1, scale):
    """A loss averaged over a batch and a confident classifier hand back cotangents of 1e-8."""
    filters, images, cotangent = inputs(rng, digits, 3)
    check(filters, images, beta1, scale * cotangent)


@betas
@channels_1_and_3
def test_weights_are_the_softmax_of_float64(rng, digits, channels, beta1):
    filters, images, _ = inputs(rng, digits, channels)
    patches = numpy_extract(images).astype(np.float32)
    weights = jit_weights(filters, patches, beta1)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights, numpy_weights(filters, patches, beta1), rtol=0, atol=tolerance(beta1))


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("variance_floor", [1e-9, 0.1])
def test_options_reach_the_scores(rng, digits, constant, variance_floor):
    filters, images, cotangent = inputs(rng, digits, 1)
    options = {"constant": constant, "variance_floor": variance_floor}
    # Compiled quickly, sums are taken one by one and round more.
    check(filters, images, 17.33, cotangent, slack=20, **options)
    patches = numpy_extract(images).astype(np.float32)
    weights = numpy_weights(filters, patches, 17.33, **options)
    np.testing.assert_allclose(jit_weights(filters, patches, 17.33, **options), weights, rtol=0, atol=1e-5)


def test_options_reach_the_scores_of_samples(filters, digits):
    options = {"constant": "eq2", "variance_floor": 0.1}
    sampled = jit_sample(KEY, filters, digits[:3], 17.33, 0.0, **options)
    np.testing.assert_allclose(sampled, numpy_reconstruct(filters, digits[:3], 17.33, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variance_floor", [1e-20, 1e-12, 1e-3])
def test_gradients_are_finite_at_any_floor(filters, digits, variance_floor):
    filters = filters._replace(variances=filters.variances.at[2].set(0))
    _, gradients = rebuild(filters, digits[:3], 17.33, np.ones_like(digits[:3]), variance_floor=variance_floor)
    assert {name: bool(np.isfinite(leaf).all()) for name, leaf in gradients._asdict().items()} == dict.fromkeys(
        Gradients._fields, True
    )


def test_gradients_are_the_finite_differences_of_float64(rng):
    filters, beta1, step = grey_filters(rng, 4), 17.33, 1e-5
    images = rng.uniform(0.05, 0.95, (2, 5, 5, 1)).astype(np.float32)
    cotangent = rng.normal(size=images.shape).astype(np.float32)
    point = [np.asarray(x, np.float64) for x in (images, filters.means, filters.variances, beta1)]
    exact, scales = numpy_gradients(filters, images, beta1, cotangent.astype(np.float64))
    _, traced = rebuild(filters, images, beta1, cotangent)

    def total(moved):
        # NamedTuples hold NumPy arrays here, so that nothing is rounded to float32.
        return (cotangent * numpy_reconstruct(RBFFilters(*moved[1:3]), moved[0], moved[3])).sum()

    for position, name in enumerate(Gradients._fields):
        for _ in range(3):
            direction = rng.normal(size=point[position].shape)
            ends = [
                [*point[:position], point[position] + side * step * direction, *point[position + 1 :]]
                for side in (1, -1)
            ]
            slope = (total(ends[0]) - total(ends[1])) / (2 * step)
            scale = np.abs(getattr(scales, name) * direction).sum()
            assert (getattr(exact, name) * direction).sum() == pytest.approx(slope, abs=1e-6 * scale), name
            assert (np.asarray(getattr(traced, name)) * direction).sum() == pytest.approx(slope, abs=2e-5 * scale), name


@pytest.mark.parametrize("noise", NOISES)
def test_all_products_are_taken_in_full_float32(filters, noise):
    """An accelerator's default, TF32 or bfloat16, is worth three digits; on CPU only the program can tell."""

    def total(images):
        static = reconstruct(filters, images, 17.33)
        return (static * sample_reconstruction(KEY, filters, images, 17.33, 1.75, noise=noise)).sum()

    program = str(jax.make_jaxpr(jax.grad(total))(IMAGES))
    assert program.count("dot_general[") >= 6
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == program.count("dot_general[")


@pytest.mark.parametrize("batch", [1, 19])
def test_batches_of_any_size_are_tiled_right(rng, digits, batch):
    filters = random_filters(rng, 240)
    assert jax.default_backend() != "cpu" or tile_images((19, 28, 28, 1), (3, 3), 240) in range(2, 19)
    rebuilt = jit_reconstruct(filters, digits[:batch], 17.33)
    np.testing.assert_allclose(rebuilt, wanted_of_240(digits, filters)[:batch], rtol=0, atol=1e-5)


_wanted: list[np.ndarray] = []


def wanted_of_240(digits, filters):
    if not _wanted:
        _wanted.append(np.concatenate([numpy_reconstruct(filters, image[None], 17.33) for image in digits[:19]]))
    return _wanted[0]


def test_an_example_does_not_depend_on_the_batch_around_it(rng, filters, digits):
    cotangent = rng.normal(size=(4, 28, 28, 1)).astype(np.float32)
    rebuilt, gradients = rebuild(filters, digits[:3], 86.64, cotangent[:3])
    moved, moved_gradients = rebuild(filters, digits[[3, 0, 2]], 86.64, cotangent[jnp.array([3, 0, 2])])
    for before, after in [(0, 1), (2, 2)]:
        np.testing.assert_allclose(moved[after], rebuilt[before], rtol=0, atol=1e-6)
        scale = float(jnp.abs(gradients.images).max())
        np.testing.assert_allclose(moved_gradients.images[after], gradients.images[before], rtol=0, atol=1e-6 * scale)


unit = st.one_of(st.floats(0, 1, width=32, allow_subnormal=False), st.sampled_from([0, 1 - 2**-24, 1]))


@given(
    arrays(np.float32, (4, 3, 3, 1), elements=unit),
    arrays(np.float32, (4,), elements=st.floats(0, 10, width=32, allow_subnormal=False)),
    arrays(np.float32, (2, 5, 5, 1), elements=unit),
    st.sampled_from(BETA1),
)
def test_static_reconstructions_stay_in_the_box_and_have_finite_gradients(means, variances, images, beta1):
    filters = RBFFilters(jnp.asarray(means), jnp.asarray(variances))
    rebuilt, gradients = rebuild(filters, images, beta1, np.ones_like(images))
    assert (rebuilt >= 0).all()
    assert (rebuilt <= 1).all()
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize("value", [0, 0.1, 0.7, 1 - 2**-24, 1])
def test_filters_of_one_value_rebuild_it_and_stay_in_the_box(rng, value):
    means = np.full((240, 3, 3, 1), value, np.float32)
    filters = RBFFilters(jnp.asarray(means), jnp.asarray(rng.uniform(0.01, 1, 240), jnp.float32))
    rebuilt = jit_reconstruct(filters, rng.uniform(0, 1, (2, 9, 9, 1)).astype(np.float32), 86.64)
    np.testing.assert_allclose(rebuilt, np.float32(value), rtol=2e-6)
    assert (rebuilt <= 1).all()


def test_presets_are_those_of_paper_and_code():
    assert {name: (round(b.train, 2), round(b.test, 2)) for name, b in PRESETS.items()} == {
        "code": (86.64, 17.33),
        "v2": (17.33, 17.33),
        "paper": (25.0, 25.0),
    }


# ----------------------------------------------------------------------------------------------------------- sampled


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("variance", [0, 1.75 * 0.04, 1.75 * 0.25]),
        ("sigma", [0, 1.75 * 0.2, 1.75 * 0.5]),
        ("sqrt_sigma", [0, math.sqrt(1.75 * 0.2), math.sqrt(1.75 * 0.5)]),
    ],
)
def test_the_three_scales(expected, scale):
    filters = RBFFilters(jnp.zeros((3, 1, 1, 1)), jnp.asarray([0, 0.04, 0.25]))
    np.testing.assert_allclose(sample_std(filters, 1.75, scale), expected, rtol=1e-6)
    np.testing.assert_array_equal(sample_std(filters, 0.0, scale), 0)
    for beta2 in (0.0, 1.75):
        slopes = jax.grad(lambda filters, beta2: sample_std(filters, beta2, scale).sum(), (0, 1))(filters, beta2)
        assert all(np.all(np.isfinite(slope)) for slope in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("noise", "scale", "beta2"),
    [("per_run", "variance", 0.2), ("per_patch", "variance", 0.2), ("per_patch", "sqrt_sigma", 5e-4)],
)
def test_the_noise_of_one_patch_has_its_closed_form(rng, noise, scale, beta2):
    """An image as large as a patch is rebuilt as ``N(sum_j w_j mu_j, sum_j w_j^2 s_j^2 I)``, whatever is drawn when."""
    filters = grey_filters(rng, 6)
    image = rng.uniform(0.3, 0.7, (1, 3, 3, 1)).astype(np.float32)
    draws = 8_000
    sampled = jit_sample(jax.random.key(1), filters, image, 4.0, beta2, noise=noise, scale=scale, draws=draws)
    samples = np.asarray(sampled, np.float64).reshape(draws, 9)

    weights = numpy_weights(filters, numpy_extract(image), 4.0)[0, 0]
    v = np.asarray(filters.variances, np.float64)
    std = {"variance": beta2 * v, "sqrt_sigma": np.sqrt(beta2 * np.sqrt(v))}[scale]
    expected_std = np.sqrt((weights**2 * std**2).sum())
    assert 0.002 < expected_std < 0.05  # far from the clip
    means = weights @ np.asarray(filters.means, np.float64).reshape(6, 9)
    np.testing.assert_allclose(samples.mean(0), means, rtol=0, atol=5 * expected_std / math.sqrt(draws))
    np.testing.assert_allclose(samples.std(0), expected_std, rtol=0.03)
    centred = (samples - means) / expected_std
    assert np.sqrt((centred**2).mean()) == pytest.approx(1, abs=0.01)
    assert (centred**4).mean() == pytest.approx(3, abs=0.15)  # a normal distribution
    np.testing.assert_allclose(centred.T @ centred / draws, np.eye(9), atol=0.05)


@pytest.mark.parametrize("noise", NOISES)
def test_patches_share_their_noise_per_run_only(rng, noise):
    """Two pixels under 1x1 filters: with shared samples they covary by ``sum_j w1_j w2_j s_j^2``."""
    filters = grey_filters(rng, 5, (1, 1))
    image = np.asarray([0.3, 0.7], np.float32).reshape(1, 1, 2, 1)
    sampled = jit_sample(jax.random.key(2), filters, image, 8.0, 0.5, noise=noise, draws=8_000)
    covariance = np.cov(np.asarray(sampled, np.float64).reshape(-1, 2).T)
    weights = numpy_weights(filters, numpy_extract(image, (1, 1)), 8.0)[0]
    expected = weights @ np.diag((0.5 * np.asarray(filters.variances, np.float64)) ** 2) @ weights.T
    if noise == "per_patch":
        expected = np.diag(np.diag(expected))
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=0.05 * expected.max())


def test_a_run_is_the_explicit_mixture_of_one_set_of_samples(rng):
    """The samples behind a few images, found by least squares, predict other images and beta2 under the same key."""
    filters, beta1, key = grey_filters(rng, 5), 17.33, jax.random.key(3)
    seen, unseen = rng.uniform(0.2, 0.8, (2, 4, 10, 9, 1)).astype(np.float32)
    sampled = jit_sample(key, filters, seen, beta1, 1.0)
    noise = recover_noise(filters, seen, beta1, sampled[None])[0]
    means = np.asarray(filters.means, np.float64).reshape(5, 9)
    fitted = numpy_reconstruct(filters, seen, beta1, values=means + noise)
    np.testing.assert_allclose(sampled, fitted, rtol=0, atol=1e-6)
    # 360 equations for 45 unknowns leave no room for noise that differs between patches or images.
    for beta2 in (0.5, 2.0, 40.0):  # at the last the clip bites
        expected = np.clip(numpy_reconstruct(filters, unseen, beta1, values=means + beta2 * noise), 0, 1)
        np.testing.assert_allclose(jit_sample(key, filters, unseen, beta1, beta2), expected, rtol=0, atol=1e-3)
    assert ((expected == 0) | (expected == 1)).mean() > 0.2


@pytest.mark.parametrize("scale", ["variance", "sigma"])
def test_the_draws_of_a_run_are_independent_standard_normals(rng, scale):
    filters, beta1, beta2 = grey_filters(rng, 5), 17.33, 0.02
    images = rng.uniform(0.2, 0.8, (4, 10, 9, 1)).astype(np.float32)
    sampled = jit_sample(jax.random.key(4), filters, images, beta1, beta2, scale=scale, draws=40)
    assert sampled.shape == (40, *images.shape)
    v = np.asarray(filters.variances, np.float64)[:, None]
    std = beta2 * (v if scale == "variance" else np.sqrt(v))
    noise = recover_noise(filters, images, beta1, sampled) / std
    # 1,800 of them: the standard errors are .024 for the mean, .017 for the deviation, .04 for that of a filter, .16
    # for the correlation of two entries or draws.
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert noise.std() == pytest.approx(1, abs=0.07)
    np.testing.assert_allclose(noise.std((0, 2)), 1, atol=0.16)  # each filter has its own scale right
    between_draws = np.asarray(np.corrcoef(noise.reshape(40, -1)))[~np.eye(40, dtype=bool)]
    between_entries = np.asarray(np.corrcoef(noise.reshape(40, -1).T))[~np.eye(45, dtype=bool)]
    assert np.abs(between_draws).max() < 0.75
    assert np.abs(between_entries).max() < 0.75


def sample(keys, filters, images, beta2=1.75, *, noise):
    """Two draws for five images at beta1 = 17.33: one shape for the tests below."""
    drawn = jit_sample(keys, filters, images, 17.33, beta2, noise=noise, draws=2)
    assert (drawn.shape, drawn.dtype) == ((2, 5, 28, 28, 1), jnp.float32)
    return np.asarray(drawn)


def keys_from(seed, kind):
    return jax.random.key(seed) if kind == "single" else jax.random.split(jax.random.key(seed), 5)


def distances(one, other):
    """Largest difference of two batches of images, for each image."""
    return np.abs(one - other).max((-3, -2, -1))


def test_one_key_is_one_run_for_the_whole_batch(filters, digits):
    twins = np.repeat(digits[:1], 5, 0)
    per_run = sample(KEY, filters, twins, noise="per_run")
    assert distances(per_run[:, :1], per_run).max() < 1e-6
    per_patch = sample(KEY, filters, twins, noise="per_patch")
    assert min(distances(per_patch[:, i], per_patch[:, j]).min() for i in range(5) for j in range(i)) > 1e-3


@pytest.mark.parametrize("noise", NOISES)
def test_with_a_key_each_an_example_does_not_depend_on_the_batch_around_it(filters, digits, noise):
    keys, others = keys_from(6, "each"), keys_from(7, "each")
    whole = sample(keys, filters, digits[:5], noise=noise)
    order = np.asarray([3, 1, 4, 0, 2])
    assert distances(sample(keys[order], filters, digits[order], noise=noise), whole[:, order]).max() < 1e-6
    # The third example among four others.
    elsewhere = sample(others.at[2].set(keys[2]), filters, np.insert(digits[5:9], 2, digits[2], 0), noise=noise)
    assert distances(elsewhere[:, 2], whole[:, 2]).max() < 1e-6
    twins = sample(keys, filters, np.repeat(digits[:1], 5, 0), noise=noise)
    assert min(distances(twins[:, i], twins[:, j]).min() for i in range(5) for j in range(i)) > 1e-3


def test_a_key_of_its_own_makes_a_run_of_its_own(filters, digits):
    keys = keys_from(6, "each")
    whole = sample(keys, filters, digits[:5], noise="per_run")
    for i in (0, 3):
        assert distances(sample(keys[i], filters, digits[:5], noise="per_run")[:, i], whole[:, i]).max() < 1e-6


def test_a_batch_of_one_takes_either_form_of_key(filters, digits):
    keys = keys_from(6, "each")
    single = jit_sample(keys[2], filters, digits[2:3], 17.33, 1.75)
    assert distances(jit_sample(keys[2:3], filters, digits[2:3], 17.33, 1.75), single).max() < 1e-6


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", ["single", "each"])
def test_draws_differ_and_keys_decide(filters, digits, noise, kind):
    drawn = sample(keys_from(7, kind), filters, digits[:5], noise=noise)
    assert distances(drawn[0], drawn[1]).min() > 1e-3
    np.testing.assert_array_equal(drawn, sample(keys_from(7, kind), filters, digits[:5], noise=noise))
    assert distances(drawn, sample(keys_from(8, kind), filters, digits[:5], noise=noise)).min() > 1e-3


@pytest.mark.parametrize("noise", NOISES)
def test_samples_stay_in_the_box(filters, digits, noise):
    sampled = sample(KEY, filters, digits[:5], 100.0, noise=noise)
    assert (sampled.min(), sampled.max()) == (0, 1)


# --------------------------------------------------------------------------------------------------------- gradients


def test_the_exact_gradient_of_a_sample_is_that_of_float64_and_zero_where_the_clip_bites(rng):
    filters, beta1, beta2, key = grey_filters(rng, 5), 17.33, 40.0, jax.random.key(3)
    images = rng.uniform(0.2, 0.8, (4, 10, 9, 1)).astype(np.float32)
    noise = recover_noise(filters, images, beta1, jit_sample(key, filters, images, beta1, 1.0)[None])[0]
    values = np.asarray(filters.means, np.float64).reshape(5, 9) + beta2 * noise
    unclipped = numpy_reconstruct(filters, images, beta1, values=values)
    inside = (unclipped > 0) & (unclipped < 1)
    assert 0.2 < inside.mean() < 0.8
    cotangent = rng.normal(size=images.shape)

    @quick_jit
    def gradient(images, filters, cotangent):
        return jax.grad(lambda x: jnp.vdot(cotangent, sample_reconstruction(key, filters, x, beta1, beta2)))(images)

    expected, scales = numpy_gradients(filters, images, beta1, cotangent * inside, values=values)
    got = gradient(images, filters, cotangent.astype(np.float32))
    np.testing.assert_allclose(got, expected.images, rtol=0, atol=float(1e-3 * scales.images))
    biting = gradient(images, filters, (cotangent * ~inside).astype(np.float32))
    np.testing.assert_array_equal(biting, 0)


@pytest.mark.parametrize("noise", NOISES)
def test_sampled_gradients_are_finite_and_without_noise_the_static_ones(filters, digits, noise):
    images, cotangent = digits[:3], np.linspace(-1, 1, 28, dtype=np.float32).reshape(1, 28, 1, 1)

    @quick_jit
    def sample_and_gradients(filters, images, beta1, beta2):
        def total(*arguments):
            sampled = sample_reconstruction(KEY, *arguments, noise=noise)
            return (cotangent * sampled).sum(), sampled

        return jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(filters, images, beta1, beta2)

    spoiled = filters._replace(variances=filters.variances.at[2].set(0))
    for beta1 in BETA1:
        for beta2 in (0.0, 1.75):
            gradients = jax.tree.leaves(sample_and_gradients(spoiled, images, beta1, beta2)[1])
            assert all(jnp.isfinite(leaf).all() for leaf in gradients), (beta1, beta2)

    (_, sampled), (_, gradient, _, _) = sample_and_gradients(filters, images, 17.33, 0.0)
    np.testing.assert_allclose(sampled, numpy_reconstruct(filters, images, 17.33), rtol=0, atol=1e-6)
    expected, scales = numpy_gradients(filters, images, 17.33, np.broadcast_to(cotangent, images.shape))
    np.testing.assert_allclose(gradient, expected.images, rtol=0, atol=float(2e-5 * scales.images))


def test_bpda_is_the_sample_forward_and_the_static_gradient_backward(rng, filters, digits):
    images = digits[:3]
    cotangent = rng.normal(size=images.shape).astype(np.float32)

    @quick_jit
    def forward_and_gradient(filters, images):
        def total(images):
            sampled = sample_reconstruction(KEY, filters, images, 17.33, 100.0)
            out = bpda(reconstruct(filters, images, 17.33), sampled)
            return jnp.vdot(cotangent, out), (out, sampled)

        (_, outputs), gradient = jax.value_and_grad(total, has_aux=True)(images)
        return outputs, gradient

    (out, sampled), gradient = forward_and_gradient(filters, images)
    np.testing.assert_allclose(out, sampled, rtol=0, atol=1.2e-7)
    assert (out >= 0).all()
    assert (out <= 1).all()
    assert ((sampled == 0) | (sampled == 1)).mean() > 0.1
    expected, scales = numpy_gradients(filters, images, 17.33, cotangent.astype(np.float64))
    np.testing.assert_allclose(gradient, expected.images, rtol=0, atol=float(1e-5 * scales.images))


# ------------------------------------------------------------------------------------------------------------ memory


def gradient_of(function):
    return jax.grad(lambda images, *rest: jnp.square(function(images, *rest)).sum())


@pytest.mark.parametrize(
    ("kind", "pass_"),
    [
        ("static", "forward"),
        ("static", "gradient"),
        pytest.param("per_run", "forward", marks=pytest.mark.full),
        ("per_run", "gradient"),
        pytest.param("per_patch", "forward", marks=pytest.mark.full),
        pytest.param("per_patch", "gradient", marks=pytest.mark.full),
    ],
)
def test_memory_does_not_grow_with_batch_times_filters(rng, kind, pass_):
    filters, (height, width) = random_filters(rng, 240, channels=3), (32, 32)

    def function(images, filters, key):
        if kind == "static":
            return reconstruct(filters, images, 17.33)
        return sample_reconstruction(key, filters, images, 17.33, 1.75, noise=kind)

    def temporary_bytes(batch):
        images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
        jitted = quick_jit(function if pass_ == "forward" else gradient_of(function))
        analysis = jitted.lower(images, filters, KEY).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    small, large = (12, 132) if jax.default_backend() == "cpu" else (1024, 2048)
    # The (B, P, K) map of the 120 images more would be 104 MB on CPU; the images themselves are 1.5 MB.
    one_map = 4 * (large - small) * 30 * 30 * 240
    assert temporary_bytes(large) - temporary_bytes(small) < one_map / 10


# --------------------------------------------------------------------------------------------------------- arguments

BAD_IMAGES = {
    "rank": (IMAGES[0], r"images must have 4 dimensions \(B, H, W, C\), got shape \(5, 5, 1\)"),
    "list": (IMAGES.tolist(), "images must be an array .*, got list"),
    "uint8": (IMAGES.astype(np.uint8), "images must be float32 .*, got uint8"),
    "float16": (IMAGES.astype(np.float16), "images must be float32 .*, got float16"),
    "empty": (IMAGES[:0], r"images must not be empty, got shape \(0, 5, 5, 1\)"),
    "above-1": (IMAGES * 3, r"images must lie in \[0, 1\].*from 1\.5 to 1\.5"),
    "below-0": (IMAGES - 1, r"images must lie in \[0, 1\].*from -0\.5 to -0\.5"),
    "nan": (IMAGES * np.nan, r"images must lie in \[0, 1\].*nan"),
    "channels": (np.repeat(IMAGES, 3, -1), "filters of 1 channels do not fit images of 3"),
    "small": (IMAGES[:, :2], "a patch of 3x3 does not fit into an image of 2x5"),
}
BAD_BETA1 = {
    "zero": (0.0, "beta1 must be positive and finite in float32, got 0.0"),
    "negative": (-17.33, "beta1 must be positive and finite in float32, got -17.33"),
    "nan": (math.nan, "beta1 must be positive and finite in float32, got nan"),
    "inf": (math.inf, "beta1 must be positive and finite in float32, got inf"),
    "large": (100.5, "beta1 must be at most 100.0 .*, got 100.5"),
    "array": (np.float32(101), "beta1 must be at most 100.0 .*, got 101.0"),
}
BAD_SAMPLING = {
    "noise": ({"noise": "per_batch"}, "noise must be one of 'per_run', 'per_patch', got 'per_batch'"),
    "scale": ({"scale": "std"}, "scale must be one of 'variance', 'sigma', 'sqrt_sigma', got 'std'"),
    "constant": ({"constant": "eq3"}, "constant must be one of 'none', 'eq9', 'eq2', got 'eq3'"),
    "floor": ({"variance_floor": 0.0}, "variance_floor must be positive and finite in float32, got 0.0"),
    "no-draws": ({"draws": 0}, "draws must be a whole number of at least 1, got 0"),
    "half-draws": ({"draws": 2.5}, "draws must be a whole number of at least 1, got 2.5"),
    "beta2": ({"beta2": -1.75}, "beta2 must be at least 0 and finite, got -1.75"),
    "beta2-many": ({"beta2": np.zeros(5)}, r"beta2 must be one number, got shape \(5,\)"),
    "beta2-nan": ({"beta2": math.nan}, "beta2 must be at least 0 and finite, got nan"),
    "old-key": ({"key": np.zeros(2, np.uint32)}, "key must be a typed key from jax.random.key, got uint32"),
    "seed": ({"key": 3}, "key must be a typed key from jax.random.key, got int"),
    "keys": ({"key": jax.random.split(KEY, 3)}, r"a single key or one for each of 2 images, got shape \(3,\)"),
    "key-grid": ({"key": jax.random.split(KEY, (2, 2))}, r"one for each of 2 images, got shape \(2, 2\)"),
}


def table(cases):
    return pytest.mark.parametrize(("value", "message"), cases.values(), ids=cases.keys())


@table(BAD_IMAGES)
def test_bad_images_are_refused(filters, value, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(filters, value, 17.33)
    with pytest.raises(ValueError, match=message):
        sample_reconstruction(KEY, filters, value, 17.33, 1.75)


@table(BAD_BETA1)
def test_bad_beta1_is_refused(filters, value, message):
    for refuse in (
        lambda: reconstruct(filters, IMAGES, value),
        lambda: mixing_weights(filters, np.zeros((4, 9), np.float32), value),
        lambda: sample_reconstruction(KEY, filters, IMAGES, value, 1.75),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()


@table(BAD_SAMPLING)
def test_bad_sampling_is_refused(filters, value, message):
    arguments = {"key": KEY, "filters": filters, "images": IMAGES, "beta1": 17.33, "beta2": 1.75} | value
    with pytest.raises(ValueError, match=message):
        sample_reconstruction(**arguments)


@table({name: BAD_SAMPLING[name] for name in ("constant", "floor")})
def test_bad_options_of_the_scores_are_refused(filters, value, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(filters, IMAGES, 17.33, **value)
    with pytest.raises(ValueError, match=message):
        mixing_weights(filters, np.zeros((4, 9), np.float32), 17.33, **value)


def test_bad_filters_are_refused(filters):
    spoiled = filters._replace(variances=-filters.variances)
    with pytest.raises(ValueError, match=r"filter variances must be finite and at least 0, got .*-0"):
        reconstruct(spoiled, IMAGES, 17.33)
    with pytest.raises(ValueError, match=r"filter variances must be finite and at least 0, got .*-0"):
        sample_reconstruction(KEY, spoiled, IMAGES, 17.33, 1.75)


def test_traced_values_are_let_through(filters):
    """What is traced cannot be looked at, and the checks must not try."""

    def all_traced(key, filters, images, beta1, beta2, floor):
        patches = jnp.zeros((2, 9))
        return (
            mixing_weights(filters, patches, beta1, variance_floor=floor),
            reconstruct(filters, images, beta1, variance_floor=floor),
            sample_reconstruction(key, filters, images, beta1, beta2, variance_floor=floor),
        )

    for key in (KEY, jax.random.split(KEY, 2)):
        weights, static, sampled = jax.jit(all_traced).eval_shape(key, filters, IMAGES, 17.33, 1.75, 1e-12)
        assert (weights.shape, static.shape, sampled.shape) == ((2, 8), IMAGES.shape, IMAGES.shape)


@pytest.mark.parametrize("held", ["filters", "images", "beta1", "beta2", "variance_floor"])
def test_concrete_arrays_may_be_closed_over_under_jit(filters, held):
    arguments = {"filters": filters, "images": IMAGES, "beta1": 17.33, "beta2": 1.75, "variance_floor": 1e-12}
    closed = {held: jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), arguments.pop(held))}
    sampled = jax.jit(lambda rest: sample_reconstruction(KEY, **rest, **closed)).eval_shape(arguments)
    assert (sampled.shape, sampled.dtype) == (IMAGES.shape, jnp.float32)


def test_bad_values_closed_over_under_jit_are_refused(filters):
    images = jnp.asarray(IMAGES + 1)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        jax.jit(lambda filters: reconstruct(filters, images, 17.33)).eval_shape(filters)


def test_the_checks_let_grad_and_vmap_through(filters):
    def gradient(beta1, beta2):
        def total(filters, images):
            return sample_reconstruction(KEY, filters, images, beta1, beta2).sum()

        return jax.grad(total, 1)(filters, IMAGES)

    betas = jnp.asarray([2.0, 17.33])
    assert jax.eval_shape(jax.vmap(gradient), betas, betas).shape == (2, *IMAGES.shape)


def test_numpy_images_and_filters_are_taken(filters):
    as_numpy = RBFFilters(np.asarray(filters.means), np.asarray(filters.variances))
    expected = numpy_reconstruct(filters, IMAGES, 17)
    np.testing.assert_allclose(reconstruct(as_numpy, IMAGES, 17), expected, rtol=0, atol=1e-5)
