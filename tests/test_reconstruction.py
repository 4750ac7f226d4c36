"""Reconstructions and their gradients against float64, the noise against its closed form."""

import functools
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
    random_filters,
    random_images,
    recover_noise,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rbf_jax.rbf import CONSTANTS, RBFFilters, tile_images
from rbf_jax.reconstruction import (
    NOISES,
    PRESETS,
    SCALES,
    bpda,
    mixing_weights,
    reconstruct,
    sample_reconstruction,
    sample_std,
)

KEY = jax.random.key(0)
IMAGES = np.full((2, 5, 5, 1), 0.5, np.float32)
BETA1 = [2.0, 17.33, 86.64, 160.0]
betas = pytest.mark.parametrize("beta1", BETA1)
channels_1_and_3 = pytest.mark.parametrize("channels", [1, 3])

# Compiled once for all tests; what is not jitted is traced and compiled anew on every call.
jit_reconstruct = jax.jit(reconstruct, static_argnames="constant")
jit_weights = jax.jit(mixing_weights, static_argnames="constant")
jit_sample = jax.jit(sample_reconstruction, static_argnames=("noise", "scale", "draws", "constant"))


@functools.partial(jax.jit, static_argnames="constant")
def jit_gradients(filters, images, beta1, cotangent, **options):
    def total(images, filters, beta1):
        return jnp.vdot(cotangent, reconstruct(filters, images, beta1, **options))

    images, filters, beta1 = jax.grad(total, (0, 1, 2))(images, filters, beta1)
    return Gradients(images, filters.means, filters.variances, beta1)


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


@betas
@channels_1_and_3
def test_reconstruction_is_that_of_float64(rng, digits, channels, beta1):
    filters, images, _ = inputs(rng, digits, channels)
    rebuilt = jit_reconstruct(filters, images, beta1)
    assert (rebuilt.shape, rebuilt.dtype) == (images.shape, jnp.float32)
    np.testing.assert_allclose(rebuilt, numpy_reconstruct(filters, images, beta1), rtol=0, atol=tolerance(beta1))


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
    expected = numpy_reconstruct(filters, images, 17.33, **options)
    np.testing.assert_allclose(jit_reconstruct(filters, images, 17.33, **options), expected, rtol=0, atol=1e-5)
    patches = numpy_extract(images).astype(np.float32)
    weights = numpy_weights(filters, patches, 17.33, **options)
    np.testing.assert_allclose(jit_weights(filters, patches, 17.33, **options), weights, rtol=0, atol=1e-5)
    # At beta2 = 0 a sample is the static reconstruction, under the same options.
    sampled = jit_sample(KEY, filters, images, 17.33, 0.0, **options)
    np.testing.assert_allclose(sampled, expected, rtol=0, atol=1e-5)
    check_gradients(filters, images, 17.33, cotangent, **options)


def check_gradients(filters, images, beta1, cotangent, **options):
    got = jit_gradients(filters, images, beta1, cotangent, **options)
    expected, scales = numpy_gradients(filters, images, beta1, np.asarray(cotangent, np.float64), **options)
    errors = {
        name: float(np.abs(np.asarray(getattr(got, name), np.float64) - getattr(expected, name)).max() / scale)
        for name, scale in scales._asdict().items()
    }
    assert all(error < tolerance(beta1) for error in errors.values()), errors  # NaN fails as well


@betas
@channels_1_and_3
def test_gradients_are_those_of_float64(rng, digits, channels, beta1):
    filters, images, cotangent = inputs(rng, digits, channels)
    check_gradients(filters, images, beta1, cotangent)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4])
@pytest.mark.parametrize("beta1", [17.33, 86.64, 160.0])
def test_gradients_of_any_size_are_those_of_float64(rng, beta1, scale):
    """A loss averaged over a batch and a confident classifier hand back cotangents of 1e-8."""
    filters, images, cotangent = inputs(rng, None, 3)
    check_gradients(filters, images, beta1, scale * cotangent)


@pytest.mark.parametrize("variance_floor", [1e-20, 1e-12, 1e-3])
def test_gradients_are_finite_at_any_floor(filters, digits, variance_floor):
    filters = filters._replace(variances=filters.variances.at[2].set(0))
    gradients = jit_gradients(filters, digits[:3], 17.33, np.ones_like(digits[:3]), variance_floor=variance_floor)
    assert {name: bool(np.isfinite(leaf).all()) for name, leaf in gradients._asdict().items()} == dict.fromkeys(
        Gradients._fields, True
    )


def test_gradients_are_the_finite_differences_of_float64(rng):
    filters, beta1, step = grey_filters(rng, 6), 17.33, 1e-5
    images = rng.uniform(0.05, 0.95, (2, 6, 7, 1)).astype(np.float32)
    cotangent = rng.normal(size=images.shape).astype(np.float32)
    point = [np.asarray(x, np.float64) for x in (images, filters.means, filters.variances, beta1)]
    exact, _ = numpy_gradients(filters, images, beta1, cotangent.astype(np.float64))
    traced = jit_gradients(filters, images, beta1, cotangent)

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
            scale = np.abs(getattr(exact, name) * direction).sum()
            assert (getattr(exact, name) * direction).sum() == pytest.approx(slope, abs=1e-6 * scale), name
            assert (np.asarray(getattr(traced, name)) * direction).sum() == pytest.approx(slope, abs=2e-5 * scale), name


@pytest.mark.parametrize("batch", [1, 7, 8, 19])
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
    alone = jnp.concatenate([jit_reconstruct(filters, image[None], 86.64) for image in digits[:4]])
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(jit_reconstruct(filters, digits[order], 86.64), alone[jnp.array(order)], atol=1e-6)


unit = st.one_of(st.floats(0, 1, width=32, allow_subnormal=False), st.sampled_from([0, 1 - 2**-24, 1]))


@given(
    arrays(np.float32, (4, 3, 3, 1), elements=unit),
    arrays(np.float32, (4,), elements=st.floats(0, 10, width=32, allow_subnormal=False)),
    arrays(np.float32, (2, 5, 5, 1), elements=unit),
    st.sampled_from(BETA1),
)
def test_static_reconstructions_stay_in_the_box_and_have_finite_gradients(means, variances, images, beta1):
    filters = RBFFilters(jnp.asarray(means), jnp.asarray(variances))
    rebuilt = jit_reconstruct(filters, images, beta1)
    assert (rebuilt >= 0).all()
    assert (rebuilt <= 1).all()
    gradients = jit_gradients(filters, images, beta1, np.ones_like(images))
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize("value", [0, 0.1, 0.7, 1 - 2**-24, 1])
@pytest.mark.parametrize("count", [3, 24, 240])
def test_filters_of_one_value_rebuild_it_and_stay_in_the_box(rng, value, count):
    means = np.full((count, 3, 3, 1), value, np.float32)
    filters = RBFFilters(jnp.asarray(means), jnp.asarray(rng.uniform(0.01, 1, count), jnp.float32))
    rebuilt = jit_reconstruct(filters, rng.uniform(0, 1, (2, 9, 9, 1)).astype(np.float32), 86.64)
    np.testing.assert_allclose(rebuilt, np.float32(value), rtol=3e-7)
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


@pytest.mark.parametrize(("scale", "beta2"), [("variance", 0.2), ("sigma", 0.05), ("sqrt_sigma", 5e-4)])
@pytest.mark.parametrize("noise", NOISES)
def test_the_noise_of_one_patch_has_its_closed_form(rng, noise, scale, beta2):
    """An image as large as a patch is rebuilt as ``N(sum_j w_j mu_j, sum_j w_j^2 s_j^2 I)``, whatever is drawn when."""
    filters = grey_filters(rng, 6)
    image = rng.uniform(0.3, 0.7, (1, 3, 3, 1)).astype(np.float32)
    draws = 20_000
    sampled = jit_sample(jax.random.key(1), filters, image, 4.0, beta2, noise=noise, scale=scale, draws=draws)
    samples = np.asarray(sampled, np.float64).reshape(draws, 9)

    weights = numpy_weights(filters, numpy_extract(image), 4.0)[0, 0]
    v = np.asarray(filters.variances, np.float64)
    std = {"variance": beta2 * v, "sigma": beta2 * np.sqrt(v), "sqrt_sigma": np.sqrt(beta2 * np.sqrt(v))}[scale]
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
    sampled = jit_sample(jax.random.key(2), filters, image, 8.0, 0.5, noise=noise, draws=20_000)
    covariance = np.cov(np.asarray(sampled, np.float64).reshape(-1, 2).T)
    weights = numpy_weights(filters, numpy_extract(image, (1, 1)), 8.0)[0]
    expected = weights @ np.diag((0.5 * np.asarray(filters.variances, np.float64)) ** 2) @ weights.T
    if noise == "per_patch":
        expected = np.diag(np.diag(expected))
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=0.05 * expected.max())


def test_a_run_is_the_explicit_mixture_of_one_set_of_samples(rng):
    """The samples behind a few images, found by least squares, predict other images and other beta2 under the same key."""
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


@pytest.mark.parametrize("scale", SCALES)
def test_the_draws_of_a_run_are_independent_standard_normals(rng, scale):
    filters, beta1, beta2 = grey_filters(rng, 5), 17.33, 0.02
    images = rng.uniform(0.2, 0.8, (4, 10, 9, 1)).astype(np.float32)
    sampled = jit_sample(jax.random.key(4), filters, images, beta1, beta2, scale=scale, draws=40)
    assert sampled.shape == (40, *images.shape)
    std = np.asarray(sample_std(filters, beta2, scale), np.float64)[:, None]
    noise = recover_noise(filters, images, beta1, sampled) / std
    # 1,800 of them: the standard errors are .024 for the mean, .017 for the deviation, .16 for a filter's correlation.
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert noise.std() == pytest.approx(1, abs=0.07)
    np.testing.assert_allclose(noise.std((0, 2)), 1, atol=0.16)  # each filter has its own scale right
    between_draws = np.corrcoef(noise.reshape(40, -1))[~np.eye(40, dtype=bool)]
    between_entries = np.corrcoef(noise.reshape(40, -1).T)[~np.eye(45, dtype=bool)]
    assert np.abs(between_draws).max() < 0.75
    assert np.abs(between_entries).max() < 0.75


def test_one_key_is_one_run_for_the_whole_batch(filters, digits):
    twins = np.repeat(digits[:1], 3, 0)
    per_run = jit_sample(jax.random.key(5), filters, twins, 17.33, 1.75)
    np.testing.assert_allclose(per_run, np.broadcast_to(per_run[:1], per_run.shape), rtol=0, atol=1e-6)
    per_patch = jit_sample(jax.random.key(5), filters, twins, 17.33, 1.75, noise="per_patch")
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert jnp.abs(per_patch[i] - per_patch[j]).max() > 0.01


@pytest.mark.parametrize("noise", NOISES)
def test_with_a_key_each_an_example_does_not_depend_on_the_batch_around_it(filters, digits, noise):
    keys = jax.random.split(jax.random.key(6), 5)
    sample = functools.partial(jit_sample, noise=noise, draws=2)
    whole = np.asarray(sample(keys, filters, digits[:5], 17.33, 1.75))
    for i in range(5):
        alone = sample(keys[i : i + 1], filters, digits[i : i + 1], 17.33, 1.75)
        np.testing.assert_allclose(whole[:, i : i + 1], alone, rtol=0, atol=1e-6)
        if noise == "per_run":  # a run of its own, the same as under this single key
            single = sample(keys[i], filters, digits[i : i + 1], 17.33, 1.75)
            np.testing.assert_allclose(whole[:, i : i + 1], single, rtol=0, atol=1e-6)
    order = np.asarray([3, 1, 4, 0, 2])
    permuted = sample(keys[order], filters, digits[order], 17.33, 1.75)
    np.testing.assert_allclose(permuted, whole[:, order], rtol=0, atol=1e-6)
    twins = np.asarray(sample(keys, filters, np.repeat(digits[:1], 5, 0), 17.33, 1.75))
    assert np.abs(np.diff(twins, axis=1)).max((2, 3, 4)).min() > 0.01


@pytest.mark.parametrize("noise", NOISES)
def test_one_draw_is_the_first_of_one(filters, digits, noise):
    one = jit_sample(KEY, filters, digits[:2], 17.33, 1.75, noise=noise, draws=1)
    np.testing.assert_array_equal(one[0], jit_sample(KEY, filters, digits[:2], 17.33, 1.75, noise=noise))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("keys", ["single", "each"])
def test_draws_differ_and_keys_decide(filters, digits, noise, keys):
    def keys_from(seed):
        return jax.random.key(seed) if keys == "single" else jax.random.split(jax.random.key(seed), 4)

    sample = functools.partial(jit_sample, noise=noise, draws=3)
    drawn = sample(keys_from(7), filters, digits[:4], 17.33, 1.75)
    assert (drawn.shape, drawn.dtype) == ((3, 4, 28, 28, 1), jnp.float32)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (jnp.abs(drawn[i] - drawn[j]).max((1, 2, 3)) > 0.01).all()
    np.testing.assert_array_equal(drawn, sample(keys_from(7), filters, digits[:4], 17.33, 1.75))
    assert (jnp.abs(drawn - sample(keys_from(8), filters, digits[:4], 17.33, 1.75)).max((2, 3, 4)) > 0.01).all()


@pytest.mark.parametrize("noise", NOISES)
def test_without_noise_a_sample_is_the_static_reconstruction(filters, digits, noise):
    images = digits[:3]

    @jax.jit
    def value_and_gradient(images, filters, beta2):
        def total(images):
            sampled = sample_reconstruction(KEY, filters, images, 17.33, beta2, noise=noise)
            return jnp.square(sampled).sum(), sampled

        return jax.value_and_grad(total, has_aux=True)(images)

    (_, sampled), gradient = value_and_gradient(images, filters, 0.0)
    static = numpy_reconstruct(filters, images, 17.33)
    np.testing.assert_allclose(sampled, static, rtol=0, atol=1e-6)
    expected, scales = numpy_gradients(filters, images, 17.33, 2 * static)
    np.testing.assert_allclose(gradient, expected.images, rtol=0, atol=1e-5 * scales.images)


@pytest.mark.parametrize("noise", NOISES)
def test_samples_stay_in_the_box(filters, digits, noise):
    sampled = jit_sample(KEY, filters, digits[:4], 17.33, 100.0, noise=noise)
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

    @jax.jit
    def gradient(images, filters, cotangent):
        return jax.grad(lambda x: jnp.vdot(cotangent, sample_reconstruction(key, filters, x, beta1, beta2)))(images)

    expected, scales = numpy_gradients(filters, images, beta1, cotangent * inside, values=values)
    got = gradient(images, filters, cotangent.astype(np.float32))
    np.testing.assert_allclose(got, expected.images, rtol=0, atol=1e-3 * scales.images)
    biting = gradient(images, filters, (cotangent * ~inside).astype(np.float32))
    np.testing.assert_array_equal(biting, 0)


@pytest.mark.parametrize("noise", NOISES)
def test_bpda_is_the_sample_forward_and_the_static_gradient_backward(rng, filters, digits, noise):
    key, images = jax.random.key(9), digits[:3]
    cotangent = rng.normal(size=images.shape).astype(np.float32)

    @jax.jit
    def forward_and_gradient(filters, images):
        def total(images):
            sampled = sample_reconstruction(key, filters, images, 17.33, 100.0, noise=noise)
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
    np.testing.assert_allclose(gradient, expected.images, rtol=0, atol=1e-5 * scales.images)


@pytest.mark.parametrize("noise", NOISES)
def test_sampled_gradients_are_finite_in_everything(filters, digits, noise):
    filters = filters._replace(variances=filters.variances.at[2].set(0))

    @jax.jit
    def gradients(filters, images, beta1, beta2):
        def total(*arguments):
            return sample_reconstruction(KEY, *arguments, noise=noise).sum()

        return jax.grad(total, (0, 1, 2, 3))(filters, images, beta1, beta2)

    for beta1 in BETA1:
        for beta2 in (0.0, 1.75):
            leaves = jax.tree.leaves(gradients(filters, digits[:2], beta1, beta2))
            assert all(jnp.isfinite(leaf).all() for leaf in leaves), (beta1, beta2)


# ------------------------------------------------------------------------------------------------------------ memory


def gradient_of(function):
    return jax.grad(lambda images, *rest: jnp.square(function(images, *rest)).sum())


@pytest.mark.parametrize("pass_", ["forward", "gradient"])
@pytest.mark.parametrize("kind", ["static", *NOISES])
def test_memory_does_not_grow_with_batch_times_filters(rng, kind, pass_):
    filters, (height, width) = random_filters(rng, 240, channels=3), (32, 32)

    def function(images, filters, key):
        if kind == "static":
            return reconstruct(filters, images, 17.33)
        return sample_reconstruction(key, filters, images, 17.33, 1.75, noise=kind)

    def temporary_bytes(batch):
        images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
        compiled = jax.jit(function if pass_ == "forward" else gradient_of(function))
        return compiled.lower(images, filters, KEY).compile().memory_analysis().temp_size_in_bytes

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
    "zero": (0.0, "beta1 must be positive and finite, got 0.0"),
    "negative": (-17.33, "beta1 must be positive and finite, got -17.33"),
    "nan": (math.nan, "beta1 must be positive and finite, got nan"),
    "inf": (math.inf, "beta1 must be positive and finite, got inf"),
    "large": (160.5, "beta1 must be at most 160.0 .*, got 160.5"),
    "array": (np.float32(161), "beta1 must be at most 160.0 .*, got 161.0"),
}
BAD_SAMPLING = {
    "noise": ({"noise": "per_batch"}, "noise must be one of 'per_run', 'per_patch', got 'per_batch'"),
    "scale": ({"scale": "std"}, "scale must be one of 'variance', 'sigma', 'sqrt_sigma', got 'std'"),
    "constant": ({"constant": "eq3"}, "constant must be one of 'none', 'eq9', 'eq2', got 'eq3'"),
    "floor": ({"variance_floor": 0.0}, "variance_floor must be positive and finite, got 0.0"),
    "no-draws": ({"draws": 0}, "draws must be a whole number of at least 1, got 0"),
    "half-draws": ({"draws": 2.5}, "draws must be a whole number of at least 1, got 2.5"),
    "beta2": ({"beta2": -1.75}, "beta2 must be at least 0 and finite, got -1.75"),
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
    with pytest.raises(ValueError, match="filter variances must be finite and at least 0, got .*-0"):
        reconstruct(spoiled, IMAGES, 17.33)
    with pytest.raises(ValueError, match="filter variances must be finite and at least 0, got .*-0"):
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
@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_concrete_arrays_may_be_closed_over_under_jit(filters, held, kind):
    arguments = {"filters": filters, "images": IMAGES, "beta1": 17.33, "beta2": 1.75, "variance_floor": 1e-12}
    closed = {held: jax.tree.map(lambda value: kind(value, np.float32), arguments.pop(held))}
    sampled = jax.jit(lambda rest: sample_reconstruction(KEY, **rest, **closed)).eval_shape(arguments)
    assert (sampled.shape, sampled.dtype) == (IMAGES.shape, jnp.float32)


def test_bad_values_closed_over_under_jit_are_refused(filters):
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        jax.jit(lambda filters: reconstruct(filters, jnp.asarray(IMAGES + 1), 17.33)).eval_shape(filters)


def test_grad_and_vmap_go_without_jit(filters):
    def gradient(beta1):
        return jax.grad(lambda images: reconstruct(filters, images, beta1).sum())(IMAGES)

    for got, beta1 in zip(jax.vmap(gradient)(jnp.asarray([2.0, 17.33])), (2.0, 17.33), strict=True):
        expected, scales = numpy_gradients(filters, IMAGES, beta1, np.ones_like(IMAGES))
        np.testing.assert_allclose(got, expected.images, rtol=0, atol=1e-5 * scales.images)


def test_numpy_images_and_filters_are_taken(filters):
    as_numpy = RBFFilters(np.asarray(filters.means), np.asarray(filters.variances))
    expected = numpy_reconstruct(filters, IMAGES, 17)
    np.testing.assert_allclose(reconstruct(as_numpy, IMAGES, 17), expected, rtol=0, atol=1e-5)
