"""Corruptions against NumPy loops, slices and closed forms."""

import math

import numpy as np
import pytest
from helpers import float64

from experiments.corruptions import CORRUPTIONS, blur, brightness, noise, occlusion, rotation, translation

SHAPE = (64, 9, 7, 2)
DRAWN = ("rotation", "translation", "occlusion", "noise")
"""The corruptions that draw something."""


@pytest.fixture
def images(rng) -> np.ndarray:
    return rng.uniform(0, 1, SHAPE).astype(np.float32)


def generator(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


def turned(image: np.ndarray, degrees: float) -> np.ndarray:
    """Each pixel from the four around the point that it came from, the edge's pixels going on outside."""
    height, width, _ = image.shape
    middle, angle = np.array([height - 1, width - 1]) / 2, math.radians(degrees)
    result = np.zeros(image.shape)
    for row in range(height):
        for col in range(width):
            down, right = (row, col) - middle
            y = middle[0] + math.cos(angle) * down + math.sin(angle) * right
            x = middle[1] - math.sin(angle) * down + math.cos(angle) * right
            for near_y in (math.floor(y), math.floor(y) + 1):
                for near_x in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - near_y)) * (1 - abs(x - near_x))
                    result[row, col] += weight * image[min(max(near_y, 0), height - 1), min(max(near_x, 0), width - 1)]
    return result


def which(found: np.ndarray, candidates: list[np.ndarray], atol: float = 0) -> int:
    """The one candidate that was found."""
    (match,) = (i for i, candidate in enumerate(candidates) if np.allclose(found, candidate, rtol=0, atol=atol))
    return match


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(6, 28, 28, 1), (6, 32, 32, 3)], ids=str)
def test_images_stay_images(rng, name, shape):
    images = rng.uniform(0, 1, shape).astype(np.float32)
    images[0], images[1] = 0, 1  # no rounding may lead out of the box
    before = images.copy()
    _, apply, severities = CORRUPTIONS[name]
    distances = [0.0]
    for severity in severities:
        found = apply(images, severity, generator())
        assert found.shape == shape
        assert found.dtype == np.float32
        assert found.min() >= 0
        assert found.max() <= 1
        np.testing.assert_array_equal(found, apply(images, severity, generator()))
        np.testing.assert_array_equal(found, apply(images, np.float64(severity), generator()))
        distances.append(np.abs(found[2:] - images[2:]).mean())
    np.testing.assert_array_equal(images, before)
    assert list(severities) == sorted(set(severities))
    if name not in ("rotation", "translation"):  # of white noise, any move is as far as any other
        assert distances == sorted(set(distances))
    assert distances[1] > 0


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_0_is_the_identity_in_a_new_array(images, name):
    found = CORRUPTIONS[name].apply(images, 0, generator())
    np.testing.assert_array_equal(found, images)
    assert not np.shares_memory(found, images)


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_the_order_of_the_images_alone(images, name):
    _, apply, (severity, _, _) = CORRUPTIONS[name]
    found = apply(images, severity, generator())
    np.testing.assert_array_equal(apply(images[:9], severity, generator()), found[:9])
    other = images.copy()
    other[:9] = 1 - other[:9]
    np.testing.assert_array_equal(apply(other, severity, generator())[9:], found[9:])
    assert np.abs(apply(images, severity, generator(8)) - found).max() > 0.01


@pytest.mark.parametrize("apply", [blur, rotation, translation])
def test_an_even_image_has_no_border(apply):
    images = np.full((8, 9, 7, 2), 0.6, np.float32)
    np.testing.assert_allclose(apply(images, 3, generator()), images, atol=1e-6)


@pytest.mark.parametrize("std", [0.5, 1, 2])
def test_blur_is_a_separable_convolution(images, std):
    reach = round(4 * std)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * std**2))
    kernel /= kernel.sum()
    padded = np.pad(float64(images[:3]), ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    rows = np.sum([kernel[k] * padded[:, k : k + SHAPE[1]] for k in range(len(kernel))], 0)
    expected = np.sum([kernel[k] * rows[:, :, k : k + SHAPE[2]] for k in range(len(kernel))], 0)
    np.testing.assert_allclose(blur(images[:3], std, generator()), expected, atol=1e-6)


def test_blur_keeps_the_mean_and_adds_its_variance(rng):
    images = np.zeros((1, 31, 31, 1), np.float32)
    images[0, 15, 15] = 1
    found = float64(blur(images, 1.5, generator()))[0, :, :, 0]
    offsets = np.arange(31) - 15
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert (found.sum(1) * offsets**2).sum() == pytest.approx(1.5**2, rel=2e-3)  # cut off at 4 std


@pytest.mark.parametrize("added", [0.3, -0.3, 1, -1])
def test_brightness(images, added):
    expected = np.minimum(np.maximum(float64(images) + added, 0), 1)
    np.testing.assert_allclose(brightness(images, added, generator()), expected, atol=1e-7)


@pytest.mark.parametrize("degrees", [10, 33.3, 140])
def test_rotation_equals_the_loop_to_either_side(images, degrees):
    found = rotation(images[:16], degrees, generator())
    sides = {
        which(one, [turned(image, degrees), turned(image, -degrees)], atol=1e-5)
        for one, image in zip(found, images, strict=False)
    }
    assert sides == {0, 1}


def test_rotation_by_quarter_and_half(images):
    square = images[:, :7]
    quarter, half = (rotation(square, degrees, generator()) for degrees in (90, 180))
    sides = {which(one, [np.rot90(image), np.rot90(image, -1)]) for one, image in zip(quarter, square, strict=True)}
    assert sides == {0, 1}
    np.testing.assert_array_equal(half, square[:, ::-1, ::-1])


def translations(image: np.ndarray, severity: int) -> list[np.ndarray]:
    """In all 8 directions, cut from the image with its edge carried on."""
    height, width, _ = image.shape
    padded = np.pad(image, ((severity, severity), (severity, severity), (0, 0)), mode="edge")
    starts = [(i, j) for i in (0, 1, 2) for j in (0, 1, 2) if (i, j) != (1, 1)]
    return [padded[i * severity :, j * severity :][:height, :width] for i, j in starts]


def test_translation_equals_slices_in_all_8_directions_at_every_severity(images):
    directions = []
    for severity in (1, 3, 6):
        found = translation(images, severity, generator())
        directions.append([which(one, translations(image, severity)) for one, image in zip(found, images, strict=True)])
    assert set(directions[0]) == set(range(8))
    assert directions[0] == directions[1] == directions[2]


@pytest.mark.parametrize("side", [1, 4, 7])
def test_occlusion_is_a_grey_square_of_each_image(side):
    images = np.zeros((400, 9, 7, 2), np.float32)
    found = occlusion(images, side, generator())
    corners = set()
    for one in found:
        rows, cols = (np.flatnonzero(one.any((axis, 2))) for axis in (1, 0))
        expected = np.zeros((9, 7, 2))
        expected[rows[0] : rows[0] + side, cols[0] : cols[0] + side] = 0.5
        np.testing.assert_array_equal(one, expected)
        assert np.count_nonzero(one[..., 0]) == np.count_nonzero(one[..., 1]) == side**2
        corners.add((rows[0], cols[0]))
    everywhere = {(row, col) for row in range(9 - side + 1) for col in range(7 - side + 1)}
    assert corners <= everywhere
    assert len(corners) >= 0.95 * len(everywhere)


def test_occlusion_leaves_the_rest(images):
    found = occlusion(images, 3, generator())
    assert ((found == images) | (found == 0.5)).all()
    assert ((found != images).sum((1, 2)) == 9).all()


def test_noise_is_normal_and_clipped():
    grey = np.full((200, 9, 7, 2), 0.5, np.float32)
    weak, strong = (float64(noise(grey, std, generator())) - 0.5 for std in (0.05, 0.1))
    np.testing.assert_allclose(strong, 2 * weak, atol=1e-6)
    assert abs(strong.mean()) < 4 * 0.1 / math.sqrt(strong.size)
    assert strong.std() == pytest.approx(0.1, rel=0.02)
    for beyond in (1, 2):
        share = math.erfc(beyond / math.sqrt(2))
        assert (np.abs(strong) > beyond * 0.1).mean() == pytest.approx(share, abs=0.01)
    white = noise(np.ones_like(grey), 0.1, generator())
    np.testing.assert_allclose(white, np.minimum(1 + strong, 1), atol=1e-6)
    covariance = (strong[..., 0] * strong[..., 1]).mean()
    assert abs(covariance) < 0.04 * 0.1**2  # each channel has its own


BAD = {
    "blur": (-0.1, 7.5, math.nan, math.inf),
    "brightness": (-1.1, 1.1, math.nan),
    "rotation": (-10, 181, math.nan, math.inf),
    "translation": (-1, 8, 1.5, math.nan, math.inf),
    "occlusion": (-1, 8, 2.5, math.nan, math.inf),
    "noise": (-0.1, 1.1, math.nan),
}


@pytest.mark.parametrize(("name", "severity"), [(name, bad) for name, all_bad in BAD.items() for bad in all_bad])
def test_severity_out_of_range_is_quoted(images, name, severity):
    with pytest.raises(ValueError, match=rf"^severity must be a .*number from -?\d+ to \d+, got {severity}$"):
        CORRUPTIONS[name].apply(images, severity, generator())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_bad_images_are_named(images, name):
    for bad, message in ((images[0], "4 dimensions"), (2 * images, r"in \[0, 1\]"), (float64(images), "float64")):
        with pytest.raises(ValueError, match=message):
            CORRUPTIONS[name].apply(bad, 0, generator())
