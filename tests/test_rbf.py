"""Match scores against float64, and filters on disk."""

import io
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import numpy_distances, numpy_extract, numpy_scores, quick_jit, random_filters, random_images
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rbf_jax.rbf import CONSTANTS, RBFFilters, check_filters, load, match_scores, save, squared_distances

jit_scores = jax.jit(match_scores, static_argnames="constant")
jit_distances = quick_jit(squared_distances)


def worst_error(filters, patches, *, variance_floor=1e-12, constant="none"):
    """Largest error of a score, relative to the terms it is the difference of (to 1 where they are smaller)."""
    got = jit_scores(filters, patches, variance_floor=variance_floor, constant=constant)
    assert got.dtype == jnp.float32
    expected = numpy_scores(filters, patches, variance_floor=variance_floor, constant=constant)
    v = np.maximum(np.asarray(filters.variances, np.float64), variance_floor)
    scale = np.maximum(numpy_distances(filters, patches) / (2 * v) + np.abs(np.log(v)) / 2, 1)
    return (np.abs(np.asarray(got, np.float64) - expected) / scale).max((0, 1))


def spoiled(base, step):
    """The flat patch with each of its pixels changed in turn, float32 (1, 9, 9)."""
    return np.abs(np.full((1, 9, 9), base) - step * np.eye(9)).astype(np.float32)


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("variance_floor", [1e-20, 1e-12, 1e-3, 0.1])
def test_scores_of_digits_are_those_of_float64(digits, filters, variance_floor, constant):
    patches = numpy_extract(digits[:8]).astype(np.float32)
    errors = worst_error(filters, patches, variance_floor=variance_floor, constant=constant)
    # All but the white filter, whose neighbourhood float32 does not resolve as finely as the black one's.
    assert np.delete(errors, 1).max() < 2e-6
    assert errors[1] < 1e-4


@pytest.mark.parametrize("constant", CONSTANTS)
def test_scores_of_coloured_patches_are_those_of_float64(rng, constant):
    patches = numpy_extract(random_images(rng, (4, 11, 10, 3)), (2, 4)).astype(np.float32)
    filters = random_filters(rng, 7, (2, 4), channels=3)
    assert worst_error(filters, patches, constant=constant).max() < 2e-5


@pytest.mark.parametrize(
    ("constant", "variance_floor", "peak"),
    [
        ("none", 1e-12, 13.815510558),  # 6 log 10
        ("none", 1e-20, 23.025850930),  # 10 log 10
        ("eq9", 1e-12, 13.815510558 - 0.918938533),
        ("eq9", 1e-20, 23.025850930 - 0.918938533),
        ("eq2", 1e-12, 13.815510558 / 2 - 0.918938533),
        ("eq2", 1e-20, 23.025850930 / 2 - 0.918938533),
    ],
)
def test_black_and_white_patches_reach_the_peak_of_their_filters(filters, constant, variance_floor, peak):
    patches = np.stack([np.zeros(9, np.float32), np.ones(9, np.float32)])
    scores = match_scores(filters, patches, variance_floor=variance_floor, constant=constant)
    np.testing.assert_allclose(np.diag(scores[:, :2]), peak, rtol=1e-6)
    assert scores[0, 1] < -1e11
    assert scores[1, 0] < -1e11


@pytest.mark.parametrize(
    ("base", "step", "tolerance"),
    [
        (0, 1 / 255, 1e-6),
        (0, 5e-4, 1e-6),
        (0, 1e-6, 1e-6),
        # The mean of a patch near 1 is known to 6e-8 only, which a change of 5e-4 / 9 feels.
        (1, 1 / 255, 5e-5),
        (1, 5e-4, 1e-3),
    ],
)
@pytest.mark.parametrize("variance_floor", [1e-20, 1e-12])
def test_nearly_flat_patches_score_as_in_float64(filters, base, step, tolerance, variance_floor):
    assert worst_error(filters, spoiled(base, step), variance_floor=variance_floor).max() < tolerance


def test_nearly_flat_grey_filters_of_tiny_variance_score_as_in_float64(rng):
    brightness = np.linspace(0.1, 0.9, 9)[:, None]
    means = (brightness + rng.normal(0, 1e-3, (9, 9))).reshape(9, 3, 3, 1)
    filters = RBFFilters(jnp.asarray(means, jnp.float32), jnp.full(9, 1e-4, jnp.float32))
    patches = (brightness[None] + rng.normal(0, 3e-3, (16, 9, 9))).astype(np.float32)
    assert numpy_scores(filters, patches).max() > 4  # near the peak, 4.6, where an error changes the weights
    assert worst_error(filters, patches).max() < 2e-5


def test_the_floor_leaves_larger_variances_alone_and_the_stored_ones_unchanged(filters):
    patches = np.linspace(0, 1, 18, dtype=np.float32).reshape(2, 9)
    low, high = (match_scores(filters, patches, variance_floor=floor) for floor in (1e-20, 1e-6))
    np.testing.assert_array_equal(low[:, 2:], high[:, 2:])
    assert (low[:, :2] < 0.999 * high[:, :2]).all()
    np.testing.assert_array_equal(filters.variances[:2], np.float32(1e-20))


def test_leading_dimensions_pass_through(rng, filters):
    patches = rng.uniform(0, 1, (2, 3, 4, 9)).astype(np.float32)
    scores = match_scores(filters, patches)
    assert scores.shape == (2, 3, 4, 8)
    np.testing.assert_allclose(scores, numpy_scores(filters, patches), rtol=1e-5)


# Values that a digit has, values close together, and values close to the ends.
pixels = st.one_of(
    st.integers(0, 255).map(lambda level: level / 255),
    st.floats(0, 1, width=32),
    st.sampled_from([0, 1e-7, 1 - 6e-8, 1]),
)


@given(arrays(np.float32, (5, 9), elements=pixels), arrays(np.float32, (4, 3, 3, 1), elements=pixels))
def test_distances_are_those_of_float64_and_never_negative(patches, means):
    filters = RBFFilters(jnp.asarray(np.concatenate([means, patches[:2].reshape(2, 3, 3, 1)])), jnp.ones(6))
    distances = np.asarray(jit_distances(filters, patches))
    assert (distances >= 0).all()
    np.testing.assert_allclose(distances, numpy_distances(filters, patches), rtol=2e-6, atol=2e-6)


@given(arrays(np.float32, (5, 9), elements=pixels))
def test_no_score_exceeds_the_peak(patches):
    filters = random_filters(np.random.default_rng(3), 6)
    peak = -np.log(np.maximum(np.asarray(filters.variances, np.float64), 1e-12)) / 2
    assert (jit_scores(filters, patches) <= peak + 1e-6 * np.abs(peak)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constant": "eq3"}, "constant must be one of 'none', 'eq9', 'eq2', got 'eq3'"),
        ({"variance_floor": 0.0}, "variance_floor must be positive and finite in float32, got 0.0"),
        ({"variance_floor": -1e-9}, "variance_floor must be positive and finite in float32, got -1e-09"),
        ({"variance_floor": 1e-40}, "variance_floor must be positive and finite in float32, got 1e-40"),
        ({"variance_floor": math.nan}, "variance_floor must be positive and finite in float32, got nan"),
        ({"variance_floor": math.inf}, "variance_floor must be positive and finite in float32, got inf"),
    ],
)
def test_bad_options_are_refused(filters, options, message):
    with pytest.raises(ValueError, match=message):
        match_scores(filters, np.zeros((2, 9), np.float32), **options)


def test_patches_of_another_size_are_refused(filters):
    with pytest.raises(ValueError, match=r"patches of D = 27 do not fit filters of \(3, 3, 1\)"):
        match_scores(filters, np.zeros((2, 27), np.float32))


GOOD = RBFFilters(np.full((4, 3, 3, 1), 0.5, np.float32), np.full(4, 0.1, np.float32))


def with_entry(array, value):
    array = array.copy()
    array.flat[1] = value
    return array


BAD_FILTERS = {
    "rank": ({"means": GOOD.means[..., 0]}, r"must have shape \(K, h, w, C\) and not be empty, got \(4, 3, 3\)"),
    "empty": ({"means": GOOD.means[:0], "variances": GOOD.variances[:0]}, r"not be empty, got \(0, 3, 3, 1\)"),
    "count": ({"variances": GOOD.variances[:3]}, r"filter variances must have shape \(4,\), got \(3,\)"),
    "mean-above-1": ({"means": with_entry(GOOD.means, 1.5)}, r"filter means must lie in \[0, 1\].* to 1\.5"),
    "mean-below-0": ({"means": with_entry(GOOD.means, -0.5)}, r"filter means must lie in \[0, 1\].*from -0\.5"),
    "mean-nan": ({"means": with_entry(GOOD.means, np.nan)}, r"filter means must lie in \[0, 1\].*nan"),
    "variance-below-0": ({"variances": with_entry(GOOD.variances, -0.5)}, "filter variances must be finite.*-0.5"),
    "variance-nan": ({"variances": with_entry(GOOD.variances, np.nan)}, "filter variances must be finite.*nan"),
    "variance-inf": ({"variances": with_entry(GOOD.variances, np.inf)}, "filter variances must be finite.*inf"),
}
bad_filters = pytest.mark.parametrize(("change", "message"), BAD_FILTERS.values(), ids=BAD_FILTERS.keys())


@bad_filters
def test_bad_filters_are_refused(change, message, tmp_path):
    filters = GOOD._replace(**{name: jnp.asarray(array) for name, array in change.items()})
    with pytest.raises(ValueError, match=message):
        check_filters(filters)
    with pytest.raises(ValueError, match=message):
        match_scores(filters, np.zeros((2, 9), np.float32))
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "filters.npz", filters)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["means", "variances"])
def test_filters_of_another_dtype_are_refused(name):
    with pytest.raises(ValueError, match=f"filters must be float32, got .*{name} float16"):
        check_filters(GOOD._replace(**{name: getattr(GOOD, name).astype(np.float16)}))


def test_patches_of_bytes_are_refused():
    """In uint8 the brightness that is split off would wrap round."""
    with pytest.raises(ValueError, match=r"patches must be float32 in \[0, 1\], got uint8"):
        match_scores(GOOD, jnp.zeros((4, 9), jnp.uint8))


def test_filters_of_other_channels_are_refused():
    check_filters(GOOD, channels=1)
    with pytest.raises(ValueError, match="filters of 1 channels do not fit images of 3"):
        check_filters(GOOD, channels=3)


def test_filters_may_be_closed_over_under_jit(filters):
    def checked(variances):
        check_filters(filters, channels=1)
        check_filters(filters._replace(variances=variances))
        return variances

    jax.jit(checked)(-filters.variances)  # a value that is traced cannot be looked at


@pytest.mark.parametrize("as_path", [str, pathlib.Path])
def test_saved_filters_come_back_bit_by_bit(tmp_path, filters, as_path):
    path = as_path(tmp_path / "new" / "folder" / "filters.npz")
    save(path, filters)
    loaded = load(path)
    for got, expected in zip(loaded, filters, strict=True):
        assert isinstance(got, jax.Array)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)
    with np.load(path) as stored:
        assert sorted(stored) == ["means", "variances"]


def test_a_name_without_suffix_is_kept(tmp_path, filters):
    save(tmp_path / "filters", filters)
    assert [path.name for path in tmp_path.iterdir()] == ["filters"]
    load(tmp_path / "filters")


def test_float64_files_are_cast(tmp_path, rng):
    means, variances = rng.uniform(0, 1, (5, 3, 3, 3)), rng.uniform(0, 1, 5)
    variances[0] = 1e-20
    np.savez(tmp_path / "authors.npz", means=means, variances=variances)
    loaded = load(tmp_path / "authors.npz")
    np.testing.assert_array_equal(loaded.means, means.astype(np.float32))
    np.testing.assert_array_equal(loaded.variances, variances.astype(np.float32))
    assert (loaded.means.dtype, loaded.variances.dtype) == (jnp.float32, jnp.float32)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, filters, monkeypatch):
    path = tmp_path / "filters.npz"
    save(path, filters)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half a fi")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(path, filters._replace(variances=filters.variances + 1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere.npz")


@bad_filters
def test_files_of_bad_filters_are_refused_by_name(tmp_path, change, message):
    np.savez(tmp_path / "spoiled.npz", **GOOD._replace(**change)._asdict())
    with pytest.raises(ValueError, match=rf"spoiled\.npz: .*{message}"):
        load(tmp_path / "spoiled.npz")


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def damaged(data, at, count=8):
    return data[:at] + bytes(byte ^ 0xFF for byte in data[at : at + count]) + data[at + count :]


def npz_compressed(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


WHOLE = npz(**GOOD._asdict())
DEFLATED = npz_compressed(means=np.random.default_rng(0).uniform(0, 1, (40, 3, 3, 1)).round(2), variances=np.ones(40))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not a zip file at all", id="text"),
        pytest.param(WHOLE[:100], id="truncated"),
        pytest.param(WHOLE[:-10], id="end-cut-off"),
        pytest.param(damaged(WHOLE, 200), id="damaged"),
        pytest.param(damaged(DEFLATED, 100), id="damaged-compressed"),
        pytest.param(damaged(DEFLATED, DEFLATED.index(b"PK\1\2") + 6, 1), id="unknown-zip-version"),
        pytest.param(npz(means=GOOD.means), id="no-variances"),
        pytest.param(npz(variances=GOOD.variances), id="no-means"),
        pytest.param(npz(mu=GOOD.means, sigma=GOOD.variances), id="other-names"),
        pytest.param(npy(GOOD.means), id="npy"),
        pytest.param(npz(means=np.array([[None]]), variances=GOOD.variances), id="objects"),
        pytest.param(npz(means=np.array([["a"]]), variances=GOOD.variances), id="strings"),
    ],
)
def test_files_that_hold_no_filters_are_refused_by_name(tmp_path, content):
    (tmp_path / "broken.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.npz is not a filter file \(\.npz with 'means'"):
        load(tmp_path / "broken.npz")


def test_a_folder_is_no_filter_file(tmp_path):
    with pytest.raises(ValueError, match="is not a filter file"):
        load(tmp_path)
