"""Simple corruptions of images: what a camera or a hand does to them, with no adversary.

A corruption is ``(images, severity, rng) -> images``, on float32 ``(N, H, W, C)`` in [0, 1]; it raises ValueError where
images or severity are out of range. What is random is drawn for each image, in their order, in one call to ``rng``
that depends on the number of images alone (for noise, on their shape): neither on the pixels nor on the severity. A
new generator of the same seed thus moves an image in the same direction at every severity, and for every model.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from rbf_jax.checks import check_images

BORDER = "nearest"
"""What lies outside an image, wherever a corruption looks there: the pixel of the edge that is nearest.

On MNIST that is black, but for the digits that touch the edge (about 2 %); on CIFAR-10 black would add a frame.
"""

DIRECTIONS = np.array([(row, col) for row in (-1, 0, 1) for col in (-1, 0, 1) if (row, col) != (0, 0)])


def _check(images: np.ndarray, severity: float, most: float | None, *, least: float = 0, whole: bool = False) -> None:
    check_images(images)
    limit: float = min(images.shape[1:3]) if most is None else most  # None: an image's shorter side
    # NaN makes the comparisons false, so it is caught as well.
    if not least <= severity <= limit or (whole and severity != int(severity)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"severity must be {kind} from {least:g} to {limit:g}, got {severity}")


def blur(images: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian filter of standard deviation ``severity`` pixels, up to an image's shorter side; within a channel."""
    del rng
    _check(images, severity, None)
    return ndimage.gaussian_filter(images, (0, severity, severity, 0), mode=BORDER)  # an average: in the box


def brightness(images: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """``clip(x + severity)``, severity in [-1, 1]."""
    del rng
    _check(images, severity, 1, least=-1)
    return np.clip(images + np.float32(severity), 0, 1)


def rotation(images: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """By ``severity`` degrees, up to 180, about the centre, to the left or the right; bilinear."""
    _check(images, severity, 180)
    angles = severity * rng.choice((-1, 1), len(images))
    turned = [
        ndimage.rotate(image, angle, reshape=False, order=1, mode=BORDER)
        for image, angle in zip(images, angles, strict=True)
    ]
    return np.stack(turned)


def translation(images: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """By ``severity`` whole pixels in one of 8 directions; along a diagonal, by so many in both axes."""
    _check(images, severity, None, whole=True)
    _, height, width, _ = images.shape
    steps = int(severity) * DIRECTIONS[rng.integers(len(DIRECTIONS), size=len(images))]
    rows = np.clip(np.arange(height) - steps[:, :1], 0, height - 1)
    cols = np.clip(np.arange(width) - steps[:, 1:], 0, width - 1)
    return images[np.arange(len(images))[:, None, None], rows[:, :, None], cols[:, None, :]]


def occlusion(images: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """A grey (0.5) square of side ``severity`` whole pixels, anywhere within the image."""
    _check(images, severity, None, whole=True)
    _, height, width, _ = images.shape
    place = rng.random((len(images), 2))  # not the corner itself, whose range depends on the severity
    first = np.floor(place * (np.array([height, width]) - severity + 1))
    rows, cols = (np.arange(size) - first[:, axis, None] for axis, size in enumerate((height, width)))
    inside = ((rows >= 0) & (rows < severity))[:, :, None] & ((cols >= 0) & (cols < severity))[:, None, :]
    return np.where(inside[..., None], 0.5, images)


def noise(images: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """``clip(x + N(0, severity^2))``, independent for each value; severity in [0, 1]."""
    _check(images, severity, 1)
    return np.clip(images + np.float32(severity) * rng.standard_normal(images.shape, np.float32), 0, 1)


class Corruption(NamedTuple):
    """A corruption, the unit of its severity, and three severities for images of 28x28 and 32x32 pixels."""

    unit: str
    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    severities: tuple[float, float, float]


CORRUPTIONS = {
    "blur": Corruption("std in pixels", blur, (0.5, 1, 2)),
    "brightness": Corruption("added", brightness, (0.1, 0.2, 0.4)),
    "rotation": Corruption("degrees", rotation, (10, 20, 40)),
    "translation": Corruption("pixels", translation, (1, 2, 4)),
    "occlusion": Corruption("side in pixels", occlusion, (4, 8, 16)),
    "noise": Corruption("std", noise, (0.05, 0.1, 0.2)),
}
