"""Patches against windows cut one by one."""

import jax
import numpy as np
import pytest
from helpers import numpy_count, numpy_extract, numpy_overlap_sum, numpy_stitch, quick_jit

from rbf_jax.patches import extract_patches, overlap_count, overlap_sum, patch_grid, stitch_patches

# One function to compile per geometry instead of dozens of operations.
extract = quick_jit(extract_patches, static_argnums=(1, 2))
stitch = quick_jit(stitch_patches, static_argnums=(1, 2, 3))

SIZES = [(2, 2), (3, 3), (4, 4), (5, 5), (2, 3), (5, 2)]
GEOMETRIES = [
    pytest.param((9, 8, channels), size, stride, id=f"{size[0]}x{size[1]}x{channels}-stride{stride}")
    for channels, stride in [(1, 1), (3, 2)]
    for size in SIZES
] + [pytest.param((7, 9, 3), (3, 4), 1, id="3x4x3-stride1")]
geometries = pytest.mark.parametrize(("shape", "size", "stride"), GEOMETRIES)


def uniform(rng, *shape):
    return rng.uniform(0, 1, shape).astype(np.float32)


@geometries
def test_extract_cuts_the_windows_of_a_loop(rng, shape, size, stride):
    images = uniform(rng, 2, *shape)
    np.testing.assert_array_equal(extract(images, size, stride), numpy_extract(images, size, stride))


@geometries
def test_stitch_averages_the_overlaps_of_a_loop(rng, shape, size, stride):
    rows, cols = patch_grid(shape, size, stride)
    patches = uniform(rng, 2, rows * cols, size[0] * size[1] * shape[-1])
    expected = numpy_stitch(patches.astype(np.float64), shape, size, stride)
    np.testing.assert_allclose(stitch(patches, shape, size, stride), expected, rtol=3e-7, atol=0)


@geometries
def test_stitch_inverts_extract_on_the_covered_area(rng, shape, size, stride):
    images = uniform(rng, 2, *shape)
    stitched = stitch(extract(images, size, stride), shape, size, stride)
    covered = numpy_count(shape, size, stride) > 0
    np.testing.assert_allclose(stitched, np.where(covered, images, 0), rtol=3e-7, atol=0)


@geometries
def test_stitch_is_the_adjoint_of_extract_up_to_the_count(rng, shape, size, stride):
    images = uniform(rng, 2, *shape)
    patches = np.asarray(extract(images, size, stride), np.float64)
    other = rng.normal(size=patches.shape).astype(np.float32)
    stitched = np.asarray(stitch(other, shape, size, stride), np.float64)
    left, right = (patches * other).sum(), (images * numpy_count(shape, size, stride) * stitched).sum()
    assert left == pytest.approx(right, abs=1e-6 * np.abs(patches * other).sum())


@pytest.mark.parametrize(("size", "stride"), [((3, 3), 1), ((5, 2), 2)])
def test_overlaps_are_summed_and_counted(rng, size, stride):
    shape = (9, 8, 3)
    rows, cols = patch_grid(shape, size, stride)
    patches = uniform(rng, 2, rows * cols, size[0] * size[1] * 3)
    count, got = quick_jit(lambda p: (overlap_count(shape, size, stride), overlap_sum(p, shape, size, stride)))(patches)
    assert (count.shape, count.dtype) == ((9, 8, 1), np.float32)
    np.testing.assert_array_equal(count, numpy_count(shape, size, stride))
    total = numpy_overlap_sum(patches.astype(np.float64), shape, size, stride)
    np.testing.assert_allclose(got, total, rtol=3e-7, atol=0)


def test_the_autodiff_transpose_of_extract_is_the_sum_of_overlaps(rng):
    images, cotangent = uniform(rng, 2, 6, 7, 3), uniform(rng, 2, 15, 36)
    (gradient,) = quick_jit(lambda x, ct: jax.vjp(lambda x: extract_patches(x, (4, 3)), x)[1](ct))(images, cotangent)
    np.testing.assert_allclose(gradient, numpy_overlap_sum(cotangent, (6, 7, 3), (4, 3)), rtol=1e-6)


def test_entries_run_over_row_then_column_then_channel():
    row, col, channel = np.meshgrid(range(4), range(5), range(2), indexing="ij")
    image = (100 * row + 10 * col + channel).astype(np.float32)
    patches = extract_patches(image, (2, 3), 1)
    # The second patch of the first row starts at column 1, the patch below the first one is number 3.
    assert np.asarray(patches[1]).tolist() == [10, 11, 20, 21, 30, 31, 110, 111, 120, 121, 130, 131]
    assert np.asarray(patches[3]).tolist() == [100, 101, 110, 111, 120, 121, 200, 201, 210, 211, 220, 221]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_leading_dimensions_pass_through(rng, lead):
    images = uniform(rng, *lead, 6, 5, 3)
    flat = images.reshape(-1, 6, 5, 3)
    patches = extract(images, (2, 3), 2)
    assert patches.shape == (*lead, 6, 18)
    np.testing.assert_array_equal(patches.reshape(-1, 6, 18), numpy_extract(flat, (2, 3), 2))
    stitched = stitch(patches, (6, 5, 3), (2, 3), 2)
    assert stitched.shape == images.shape
    np.testing.assert_allclose(stitched, images, rtol=3e-7)


@pytest.mark.parametrize(
    ("shape", "size", "stride", "grid"),
    [
        ((28, 28, 1), (3, 3), 1, (26, 26)),
        ((32, 32, 3), (3, 3), 1, (30, 30)),
        ((7, 32, 32, 3), (5, 2), 2, (14, 16)),
        ((5, 4, 1), (5, 4), 3, (1, 1)),
    ],
)
def test_grid_counts_the_windows(shape, size, stride, grid):
    assert patch_grid(shape, size, stride) == grid


def test_patches_in_which_sums_do_not_fit_are_refused(rng):
    patches = extract_patches(rng.integers(0, 256, (2, 6, 5, 1)).astype(np.uint8))
    with pytest.raises(ValueError, match="patches must be of a float dtype, in which sums fit, got uint8"):
        stitch_patches(patches, (6, 5, 1))


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [
        ((6, 3), 1, "a patch of 6x3 does not fit into an image of 5x4"),
        ((3, 5), 1, "a patch of 3x5 does not fit into an image of 5x4"),
        ((0, 3), 1, "size must be a whole number of at least 1, got 0"),
        ((3, -1), 1, "size must be a whole number of at least 1, got -1"),
        ((3, 2.0), 1, "size must be a whole number of at least 1, got 2.0"),
        ((3, 3), 0, "stride must be a whole number of at least 1, got 0"),
        ((3, 3), 1.5, "stride must be a whole number of at least 1, got 1.5"),
        ((3, 3), True, "stride must be a whole number of at least 1, got True"),
    ],
)
def test_windows_that_do_not_fit_are_refused(size, stride, message):
    with pytest.raises(ValueError, match=message):
        extract_patches(np.zeros((1, 5, 4, 1), np.float32), size, stride)
    with pytest.raises(ValueError, match=message):
        stitch_patches(np.zeros((1, 6, 9), np.float32), (5, 4, 1), size, stride)


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"images must have shape \(\.\.\., H, W, C\), got \(28, 28\)"):
        extract_patches(np.zeros((28, 28), np.float32))


@pytest.mark.parametrize(
    "shape", [(1, 8, 9), (1, 6, 18), (1, 5, 9), (9, 6)], ids=["patches", "channels", "fewer", "swapped"]
)
@pytest.mark.parametrize("assemble", [stitch_patches, overlap_sum])
def test_patches_of_another_grid_are_refused(assemble, shape):
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 6, 9\)") as error:
        assemble(np.zeros(shape, np.float32), (5, 4, 1), (3, 3))
    assert str(shape) in str(error.value)
