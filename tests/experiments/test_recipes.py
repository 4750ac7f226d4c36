"""Models as recipes: what stands before the network, by NumPy and SciPy, and the codebook by k-means."""

import jax
import numpy as np
import pytest
from helpers import float64, numpy_distances, numpy_extract, numpy_reconstruct, random_images
from scipy.cluster.vq import kmeans
from scipy.ndimage import uniform_filter

from experiments.recipes import RECIPES, front_end, kmeans_filters


@pytest.fixture
def images(rng):
    found = random_images(rng, (3, 7, 9, 2))
    found[0, 0, 0], found[0, 0, 1] = 0.5, np.nextafter(np.float32(0.5), np.float32(1))  # on the threshold, and above
    return found


def test_the_threshold_is_at_a_half(images):
    front = front_end(RECIPES["threshold"], "code", None, testing=True)
    assert front is not None
    np.testing.assert_array_equal(front(images), np.where(images > 0.5, 1, 0))


def test_the_mean_is_of_9_pixels_and_repeats_the_edge(images):
    front = front_end(RECIPES["mean"], "code", None, testing=False)
    assert front is not None
    expected = uniform_filter(float64(images), 3, mode="nearest", axes=(1, 2))
    np.testing.assert_allclose(front(images), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "preset", "testing", "beta1"),
    [
        (RECIPES["rcnn"], "code", True, 17.33),
        (RECIPES["rcnn"], "code", False, 86.64),
        (RECIPES["kmeans"], "paper", False, 25.0),
        # A recipe's preset goes before the configuration's.
        (RECIPES["rcnn_v2"], "code", False, 17.33),
        (RECIPES["rcnn_paper"], "code", True, 25.0),
    ],
)
def test_the_rbf_front_is_the_reconstruction_of_its_preset(filters, digits, recipe, preset, testing, beta1):
    front = front_end(recipe, preset, filters, testing=testing)
    found = jax.jit(lambda front, images: front(images))(front, digits[:2, 4:20, 4:20])
    np.testing.assert_allclose(found, numpy_reconstruct(filters, digits[:2, 4:20, 4:20], beta1), atol=1e-4)


def test_the_plain_network_has_no_front():
    for name in ("cnn", "cnn_plus", "madry", "gaussian_02"):
        assert front_end(RECIPES[name], "code", None, testing=True) is None


def test_names_and_titles_tell_the_models_apart():
    # The titles are columns of tables. The name is what a ledger's file is called by, up to the first dash.
    assert len({recipe.title for recipe in RECIPES.values()}) == len(RECIPES)
    assert all(name.replace("_", "").isalnum() for name in RECIPES)
    assert {recipe.front for recipe in RECIPES.values()} == {"", "rbf", "threshold", "mean"}
    # Seeds and ablations differ from their model in the one thing that they are called by.
    for name, recipe in RECIPES.items():
        base, _, last = name.rpartition("_")
        changed = {"seed": int(last[4:])} if last.startswith("seed") else {}
        changed = {"v2": {"preset": "v2"}, "paper": {"preset": "paper"}}.get(last, changed)
        if changed:
            assert recipe == RECIPES[base]._replace(title=recipe.title, **changed)


def test_only_the_rbf_front_draws_noise():
    for name in ("cnn", "cnn_plus", "madry", "gaussian_03", "threshold", "mean"):
        assert not RECIPES[name].defended
    for name in ("rcnn", "rcnn_plus", "rcnn_at", "kmeans", "rcnn_released", "rcnn_seed2"):
        assert RECIPES[name].defended


# k-means.


def nearest(filters, images):
    """Of each patch the squared distance to its nearest centre, and which that is."""
    patches = numpy_extract(images).reshape(-1, 9 * images.shape[-1])
    distances = numpy_distances(filters, patches)
    return distances.min(-1), distances.argmin(-1)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_codebook_is_as_good_as_scipys(digits, channels):
    count, images = 12, digits[:20]
    if channels == 3:
        images = np.concatenate([images, images[:, :, ::-1], images[:, ::-1]], -1)
    filters = kmeans_filters(images, count, seed=0)
    assert filters.means.shape == (count, 3, 3, channels)
    assert filters.means.dtype == filters.variances.dtype == np.float32
    found, which = nearest(filters, images)
    patches = numpy_extract(images).reshape(-1, 9 * channels)
    # Another implementation, from other first centres: different patches, so that no cluster is empty.
    first = np.random.default_rng(1).choice(np.unique(patches, axis=0), count, replace=False)
    codebook, _ = kmeans(patches, first)
    expected, _ = nearest(filters._replace(means=codebook.reshape(count, 3, 3, channels)), images)
    assert found.mean() == pytest.approx(expected.mean(), rel=0.1)
    # Each variance is the mean squared distance of its own patches, summed over the pixels.
    means = np.bincount(which, found, count) / np.bincount(which, minlength=count)
    np.testing.assert_allclose(filters.variances, means, rtol=0.02)


def test_patches_are_drawn_from_the_first_thousand_images(rng):
    images = rng.uniform(0, 0.3, (1300, 3, 3, 1)).astype(np.float32)
    images[1000:] = 1
    assert np.asarray(kmeans_filters(images, 4, seed=0).means).max() < 0.4
    # As many patches as centres: each is its own centre.
    filters = kmeans_filters(images, 4, seed=0, patches=4)
    distances = numpy_distances(filters, images[:1000].reshape(1000, 9))
    assert np.sum(distances.min(-1) < 1e-9) == 4
    np.testing.assert_allclose(filters.variances, 0, atol=1e-9)


def test_the_seed_decides(digits):
    one, same, other = (kmeans_filters(digits[:4], 5, seed, patches=300) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.means, same.means)
    assert not np.allclose(np.sort(one.variances), np.sort(other.variances))


def test_models_behind_the_filters_of_the_em():
    """The others need none, or bring others: publishing one of them must not bring filters along."""
    own = {name for name, recipe in RECIPES.items() if recipe.own_filters}
    assert {"rcnn", "rcnn_plus", "rcnn_at", "rcnn_hard", "rcnn_v2"} <= own
    assert not own & {"cnn", "cnn_plus", "madry", "threshold", "mean", "kmeans", "rcnn_released"}
