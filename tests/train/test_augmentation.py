"""Augmentations: what they add to a batch, what they leave alone, and what they compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rbf_jax import train

KEY = jax.random.key(3)
TOTAL, BATCH, JOIN = 7, 5, 400
SHAPE = (4, 4, 1)
ROWS = jnp.array([6, 0, 3, 3, 1])
TINY = 1e-6
"""Noise too weak to hide which image it was added to."""


@pytest.fixture
def images():
    """All training images, asymmetric, clearly apart and so far from 0 and 1 that weak noise is not clipped."""
    return np.random.default_rng(0).uniform(0.2, 0.8, (TOTAL, *SHAPE)).astype(np.float32)


@pytest.fixture
def labels():
    """Each image its own label."""
    return np.arange(TOTAL, dtype=np.int32) + 10


@pytest.fixture
def batch(images, labels):
    """What the network sees of the rows: not the images themselves, so that a mix-up shows."""
    return jnp.asarray(1 - images[ROWS]), jnp.asarray(labels[ROWS])


def joined(augmentation, batch, key=KEY, rows=ROWS):
    """The images and labels that joined the batch, as float64 and int; the batch itself must come first, untouched."""
    inputs, targets = augmentation(key, rows, *batch)
    assert inputs.dtype == jnp.float32
    assert targets.dtype == jnp.int32
    assert len(inputs) == len(targets)
    assert np.array_equal(inputs[: len(batch[0])], batch[0])
    assert np.array_equal(targets[: len(batch[1])], batch[1])
    return np.asarray(inputs[len(batch[0]) :], np.float64), np.asarray(targets[len(batch[1]) :])


def distances(found, candidates):
    """Greatest difference of each found image to each candidate, ``(found, candidates)``."""
    return np.abs(found[:, None] - np.asarray(candidates, np.float64)[None]).max((2, 3, 4))


def nearest(found, candidates, atol=1e-5):
    """Which candidate each found image is; it must be exactly one of them."""
    close = distances(found, candidates) < atol
    assert np.all(close.sum(1) == 1)
    return close.argmax(1)


def recorder(calls):
    """An augmentation that takes note of what it is called with and adds 1 to the images."""

    def augment(key, rows, images, labels):
        calls.append((key, rows, images, labels))
        return images + 1, labels

    return augment


# flip_and_shift, through.


def epochs_of(batch, epochs, seed=3, **options):
    """What becomes of the batch in each epoch."""
    found = []
    for epoch in range(epochs):
        augmentation = train.flip_and_shift(jax.random.key(seed), TOTAL, epoch, **options)
        inputs, targets = augmentation(jax.random.fold_in(KEY, epoch), ROWS, *batch)
        assert inputs.shape == batch[0].shape
        assert inputs.dtype == jnp.float32
        assert np.array_equal(targets, batch[1])
        found.append(np.asarray(inputs))
    return found


def test_each_image_is_mirrored_in_every_other_epoch(batch):
    mirrored, seen = batch[0][:, :, ::-1], set()
    for seed in range(10):
        found = epochs_of(batch, 3, seed)
        turned = [[np.array_equal(image, form) for image, form in zip(x, mirrored, strict=True)] for x in found]
        for x, flags in zip(found, turned, strict=True):
            assert np.array_equal(x, np.where(np.reshape(flags, (-1, 1, 1, 1)), mirrored, batch[0]))
        assert np.array_equal(turned[0], turned[2])
        assert not np.any(np.equal(turned[0], turned[1]))
        # An image that stands twice in the batch is one and the same.
        assert turned[0][2] == turned[0][3]
        seen |= set(enumerate(turned[0]))
    assert len(seen) == 2 * BATCH


def test_half_of_the_images_are_mirrored_first():
    size = 4000
    images = np.zeros((size, 1, 2, 1), np.float32)
    images[:, :, 1] = 1
    moved, _ = train.flip_and_shift(KEY, size, 0)(KEY, jnp.arange(size), images, np.zeros(size, np.int32))
    turned = np.asarray(moved)[:, 0, 0, 0]
    assert turned.mean() == pytest.approx(0.5, abs=0.04)
    # Neighbours do not share a coin: four standard deviations.
    assert np.mean(turned[1:] == turned[:-1]) == pytest.approx(0.5, abs=0.032)


@pytest.mark.parametrize("pixels", [1, 3])
def test_images_move_every_way_over_a_reflected_border(batch, pixels):
    moved = set()
    for epoch in range(80):
        augmentation = train.flip_and_shift(jax.random.key(0), TOTAL, 2 * epoch, pixels=pixels)
        still = train.flip_and_shift(jax.random.key(0), TOTAL, 0)(KEY, ROWS, *batch)[0]
        around = np.pad(still, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
        x, _ = augmentation(jax.random.fold_in(KEY, epoch), ROWS, *batch)
        corners = [
            [
                (i, j)
                for i, j in np.ndindex(2 * pixels + 1, 2 * pixels + 1)
                if np.array_equal(image, wide[i : i + 4, j : j + 4])
            ]
            for image, wide in zip(np.asarray(x), around, strict=True)
        ]
        assert all(corners)
        moved |= {corner for found in corners for corner in found}
        # Each image goes its own way.
        assert epoch or len({found[0] for found in corners}) > 1
    assert len(moved) > 0.9 * (2 * pixels + 1) ** 2


@pytest.mark.parametrize(("arguments", "message"), [((0, 0), "total .*0"), ((4, 0, -1), "pixels .*-1")])
def test_what_cannot_be_moved_is_refused(arguments, message):
    total, epoch, *pixels = arguments
    with pytest.raises(ValueError, match=message):
        train.flip_and_shift(KEY, total, epoch, pixels=pixels[0] if pixels else 0)


def test_through_a_front_end(batch):
    inputs, targets = train.through(Partial(lambda scale, x: scale * x, jnp.float32(0.5)))(KEY, ROWS, *batch)
    np.testing.assert_array_equal(inputs, 0.5 * batch[0])
    np.testing.assert_array_equal(targets, batch[1])


# gaussian.


@pytest.mark.parametrize(("std", "value"), [(0.2, 0.5), (0.02, 0.9), (1.0, 0.0)])
def test_gaussian_noise_has_its_moments_and_no_clip(std, value):
    inputs, targets = train.gaussian(std)(KEY, jnp.arange(JOIN), *grey(JOIN, value))
    assert inputs.shape == (JOIN, *SHAPE)
    assert inputs.dtype == jnp.float32
    np.testing.assert_array_equal(targets, np.zeros(JOIN))
    noise = (np.asarray(inputs, np.float64) - value).reshape(JOIN, 16) / std
    # 6,400 numbers: five standard deviations of each moment.
    assert noise.mean() == pytest.approx(0, abs=5 / 80)
    assert noise.std() == pytest.approx(1, abs=5 / 80 / np.sqrt(2))
    assert np.mean(noise**4) == pytest.approx(3, abs=5 * np.sqrt(96) / 80)
    assert np.abs(noise).max() > 3
    # Neither images nor pixels share theirs.
    assert np.abs(np.corrcoef(noise.T) - np.eye(16)).max() < 0.25
    assert np.abs(noise.mean(1)).max() < 1.25
    assert (inputs.min() < 0) == (std * 3 > value)
    assert (inputs.max() > 1) == (std * 3 > 1 - value)


def test_gaussian_noise_is_added_to_every_image_and_leaves_the_labels(batch):
    inputs, targets = train.gaussian(TINY)(KEY, ROWS, *batch)
    np.testing.assert_allclose(inputs, batch[0], atol=1e-5)
    assert np.all(np.any(inputs != batch[0], (1, 2, 3)))
    np.testing.assert_array_equal(targets, batch[1])


@pytest.mark.parametrize("std", [0, -0.1, np.nan, np.inf])
def test_gaussian_noise_needs_a_width(std):
    with pytest.raises(ValueError, match="std"):
        train.gaussian(std)


# add_noisy.


@pytest.mark.parametrize(("count", "bank_size", "mirror"), [(JOIN, None, False), (JOIN, 4, True), (1, 2, False)])
def test_how_many_join(images, labels, batch, count, bank_size, mirror):
    bank = None if bank_size is None else np.zeros((bank_size, *SHAPE), np.float32)
    augmentation = train.add_noisy(images, labels, std=0.1, limit=0.2, count=count, bank=bank, mirror=mirror)
    found, targets = joined(augmentation, batch)
    assert found.shape == (count * (1 if bank is None else 2), *SHAPE)
    assert targets.shape == found.shape[:1]


def test_another_size_of_batch(images, labels):
    batch = jnp.asarray(images[:2]), jnp.asarray(labels[:2])
    found, _ = joined(train.add_noisy(images, labels, std=0.1, limit=0.2, count=JOIN), batch, rows=jnp.arange(2))
    assert found.shape == (JOIN, *SHAPE)


@pytest.mark.parametrize(("kind", "mirror"), [(np.asarray, False), (jnp.asarray, True)])
def test_labels_follow_their_images(images, labels, batch, kind, mirror):
    augmentation = train.add_noisy(kind(images), kind(labels), std=TINY, limit=TINY, count=JOIN, mirror=mirror)
    found, targets = joined(augmentation, batch)
    forms = np.concatenate([images, images[:, :, ::-1]])
    which = nearest(found, forms)
    assert np.array_equal(targets, labels[which % TOTAL])
    # All images are drawn, about equally often; mirrored half of the time or never.
    assert np.bincount(which % TOTAL, minlength=TOTAL) / JOIN == pytest.approx(1 / TOTAL, abs=0.08)
    assert np.mean(which >= TOTAL) == pytest.approx(0.5 if mirror else 0, abs=0.12 if mirror else 0)


def test_labels_follow_the_bank_too(images, labels, batch):
    bank = np.random.default_rng(2).uniform(-0.2, 0.2, (4, *SHAPE)).astype(np.float32)
    found, targets = joined(train.add_noisy(images, labels, std=TINY, limit=TINY, count=JOIN, bank=bank), batch)
    sums = np.concatenate([images, *(images + noise for noise in bank)])
    assert np.array_equal(targets, labels[nearest(found, sums) % TOTAL])


def grey(total, value=0.5):
    return np.full((total, *SHAPE), value, np.float32), np.zeros(total, np.int32)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.3])
def test_the_noise_is_a_clipped_gaussian(std):
    limit = 0.2
    found, _ = joined(train.add_noisy(*grey(TOTAL), std=std, limit=limit, count=JOIN), grey(BATCH))
    got = found.ravel() - 0.5
    # Many draws by NumPy; the quantiles of our 6400 lie within a few hundredths of std.
    expected = np.clip(std * np.random.default_rng(4).normal(size=100_000), -limit, limit)
    assert np.abs(got).max() <= limit + 1e-7
    assert np.mean(np.abs(got) > limit - 1e-6) == pytest.approx(np.mean(np.abs(expected) == limit), abs=0.025)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.quantile(got, share) == pytest.approx(np.quantile(expected, share), abs=0.1 * std)


def test_pixels_and_images_have_noise_of_their_own():
    found, _ = joined(train.add_noisy(*grey(TOTAL), std=0.1, limit=0.4, count=JOIN), grey(BATCH))
    noise = found.reshape(JOIN, 16) - 0.5
    assert np.abs(np.corrcoef(noise.T) - np.eye(16)).max() < 0.25
    assert np.abs(np.corrcoef(noise[:30]) - np.eye(30)).max() < 0.95
    # A noise that all pixels share would have means up to 0.3.
    assert np.abs(noise.mean(1)).max() < 0.15


@pytest.mark.parametrize("limit", [0.01, 0.1, 0.25])
def test_the_limit_is_linf(images, labels, batch, limit):
    # Clipping to the box only brings images nearer: they are inside [0.2, 0.8].
    found, targets = joined(train.add_noisy(images, labels, std=10.0, limit=limit, count=JOIN), batch)
    moved = np.abs(found - images[targets - 10]).max((1, 2, 3))
    assert np.all(moved <= limit + 1e-6)
    # Some pixel of every image gets as far: noise this strong is nearly always clipped, and 0.2 below 0.2 is room.
    assert np.all(moved > min(limit, 0.2) - 1e-6)


@pytest.mark.parametrize("value", [0.0, 0.03, 0.97, 1.0])
def test_noise_is_clipped_to_the_box(value):
    bank = np.stack([np.full(SHAPE, sign * 5, np.float32) for sign in (-1, 1, -1, 1)])
    augmentation = train.add_noisy(*grey(TOTAL, value), std=0.5, limit=0.4, count=JOIN, bank=bank)
    found, _ = joined(augmentation, grey(BATCH, value))
    assert (found.min(), found.max()) == (0, 1)
    # The bank's noises pass the limit of the Gaussian ones, which never get across: half of them end there.
    across = np.all(found == (0.0 if value > 0.5 else 1.0), (1, 2, 3))
    assert np.sum(across) / JOIN == pytest.approx(0.5, abs=0.12)
    assert np.mean(found == (1.0 if value > 0.5 else 0.0)) > 0.4


def test_without_a_bank_nothing_leaves_the_gaussians_range():
    found, _ = joined(train.add_noisy(*grey(TOTAL), std=1.0, limit=0.1, count=JOIN), grey(BATCH))
    assert found.min() == pytest.approx(0.4, abs=1e-6)
    assert found.max() == pytest.approx(0.6, abs=1e-6)


@pytest.mark.parametrize("mirror", [False, True])
def test_every_bank_noise_meets_every_image(images, labels, batch, mirror):
    bank = np.random.default_rng(2).uniform(-0.2, 0.2, (4, *SHAPE)).astype(np.float32)
    augmentation = train.add_noisy(images, labels, std=TINY, limit=TINY, count=JOIN, bank=bank, mirror=mirror)
    found, _ = joined(augmentation, batch)
    forms = np.concatenate([images, images[:, :, ::-1]])
    # The noises are never mirrored, the images before them are.
    noises = np.concatenate([np.zeros((1, *SHAPE)), bank])
    which = nearest(found, (forms[None] + noises[:, None]).reshape(-1, *SHAPE))
    noise, form = np.divmod(which, len(forms))
    assert np.sum(noise == 0) == np.sum(noise > 0) == JOIN
    pairs = np.zeros((4, TOTAL))
    np.add.at(pairs, (noise[noise > 0] - 1, form[noise > 0] % TOTAL), 1)
    # 28 pairs, 14 expected of each with a standard deviation of 4.
    assert pairs.min() > 0
    assert pairs.max() < 35
    assert np.mean(form[noise > 0] >= TOTAL) == pytest.approx(0.5 if mirror else 0, abs=0.1 if mirror else 0)


def see(weights, images):
    """What a network sees of grey images: two channels, far outside of the box."""
    return jnp.concatenate([3 + images * weights[0], -3 - images * weights[1]], -1)


@pytest.mark.parametrize("bank_size", [None, 4])
def test_the_front_sees_the_noisy_images_only(images, labels, bank_size):
    limit, weights = 0.1, jnp.float32([2, 4])
    bank = None if bank_size is None else np.full((bank_size, *SHAPE), 5, np.float32)
    augmentation = train.add_noisy(
        images, labels, std=0.2, limit=limit, count=JOIN, bank=bank, front=Partial(see, weights)
    )
    batch = see(weights, images[ROWS]), jnp.asarray(labels[ROWS])
    found, targets = joined(augmentation, batch)
    assert found.shape == (JOIN if bank is None else 2 * JOIN, 4, 4, 2)
    first, second = (found[..., 0] - 3) / 2, (-found[..., 1] - 3) / 4
    # Both channels tell of one noisy image, which was clipped to the box before the front.
    assert np.allclose(first, second, atol=1e-5)
    assert np.all((first > -1e-5) & (first < 1 + 1e-5))
    moved = np.abs(first - images[targets - 10, ..., 0]).max((1, 2))
    white = np.all(first > 1 - 1e-5, (1, 2))
    assert np.sum(white) == (0 if bank is None else JOIN)
    assert np.all(moved[~white] <= limit + 1e-5)
    assert np.all(moved[~white] > limit / 2)


def test_the_front_gets_no_image_of_the_batch(images, labels, batch):
    seen = []

    def front(noisy):
        seen.append(np.asarray(noisy))
        return noisy

    joined(train.add_noisy(images, labels, std=TINY, limit=TINY, count=JOIN, front=Partial(front)), batch)
    (noisy,) = seen
    assert noisy.shape == (JOIN, *SHAPE)
    nearest(noisy.astype(np.float64), images)


@pytest.mark.parametrize("name", ["std", "limit", "count"])
@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_numbers_out_of_range(images, labels, name, value):
    arguments = {"std": 0.1, "limit": 0.2, "count": 3} | {name: value}
    with pytest.raises(ValueError, match=name):
        train.add_noisy(images, labels, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 1.5}, "count"),
        ({"count": True}, "count"),
        ({"images": np.zeros((TOTAL, *SHAPE), np.uint8)}, "images .* uint8"),
        ({"images": np.full((TOTAL, *SHAPE), 1.5, np.float32)}, "images .* 1.5"),
        ({"images": np.zeros((TOTAL, 4, 4), np.float32)}, "images"),
        ({"labels": np.zeros(TOTAL - 1, np.int32)}, rf"labels .* \({TOTAL},\)"),
        ({"labels": np.zeros(TOTAL, np.float32)}, "labels .* int32"),
        ({"labels": np.full(TOTAL, -1, np.int32)}, "labels .* at least 0"),
        ({"bank": np.zeros((0, *SHAPE), np.float32)}, "bank"),
        ({"bank": np.zeros(SHAPE, np.float32)}, "bank"),
        ({"bank": np.zeros((3, 4, 1, 4), np.float32)}, "bank"),
        ({"bank": np.zeros((3, 4, 4, 3), np.float32)}, "bank"),
    ],
)
def test_bad_input(images, labels, change, message):
    arguments = {"images": images, "labels": labels, "std": 0.1, "limit": 0.2, "count": 3} | change
    with pytest.raises(ValueError, match=message):
        train.add_noisy(arguments.pop("images"), arguments.pop("labels"), **arguments)


# chain.


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_second_sees_what_the_first_returned(batch, order):
    def twice(key, rows, images, labels):
        return 2 * images, labels + 1

    def more(key, rows, images, labels):
        return jnp.concatenate([images, images[:1] + 1]), jnp.concatenate([labels, labels[:1]])

    inputs, targets = train.chain(*(Partial((twice, more)[i]) for i in order))(KEY, ROWS, *batch)
    x, y = np.asarray(batch[0]), np.asarray(batch[1])
    last = 2 * x[:1] + 1 if order == (0, 1) else 2 * (x[:1] + 1)
    assert np.allclose(inputs, np.concatenate([2 * x, last]), atol=1e-6)
    assert np.array_equal(targets, np.concatenate([y, y[:1]]) + 1)


def test_each_of_a_chain_has_its_own_key_and_the_rows(batch):
    calls = []
    links = [Partial(recorder(calls)) for _ in range(3)]
    inputs, _ = train.chain(train.chain(*links[:2]), links[2])(KEY, ROWS, *batch)
    assert np.allclose(inputs, batch[0] + 3, atol=1e-6)
    assert [float(images[0, 0, 0, 0] - batch[0][0, 0, 0, 0]) for _, _, images, _ in calls] == pytest.approx([0, 1, 2])
    keys = {np.asarray(jax.random.key_data(key)).tobytes() for key, _, _, _ in calls}
    assert len(keys) == 3
    assert np.asarray(jax.random.key_data(KEY)).tobytes() not in keys
    for _, rows, _, labels in calls:
        assert np.array_equal(rows, ROWS)
        assert np.array_equal(labels, batch[1])


def test_flipped_then_noisy(images, labels, batch):
    noisy = train.add_noisy(images, labels, std=TINY, limit=TINY, count=JOIN)
    inputs, targets = train.chain(train.flip_and_shift(KEY, TOTAL, 0), noisy)(KEY, ROWS, *batch)
    assert inputs.shape == (BATCH + JOIN, *SHAPE)
    for i, image in enumerate(batch[0]):
        assert np.array_equal(inputs[i], image) != np.array_equal(inputs[i], image[:, ::-1])
    assert np.array_equal(targets[:BATCH], batch[1])
    which = nearest(np.asarray(inputs[BATCH:], np.float64), images)
    assert np.array_equal(targets[BATCH:], labels[which])


# Of all augmentations.


def shift(weights, images):
    return images + weights


def make(kind, images, labels, scale=1.0, count=JOIN):
    """An augmentation; another scale is another of the same shapes."""
    moved = train.flip_and_shift(KEY, TOTAL, int(2 * scale), pixels=2)
    bank = np.random.default_rng(2).uniform(-0.2, 0.2, (4, *SHAPE)).astype(np.float32) * np.float32(scale)
    noisy = {"std": 0.1 * scale, "limit": 0.2 * scale, "count": count}
    rich = noisy | {"bank": bank, "front": Partial(shift, jnp.float32(scale)), "mirror": True}
    match kind:
        case "moved":
            return moved
        case "gaussian":
            return train.gaussian(0.1 * scale)
        case "noisy":
            return train.add_noisy(images, labels, **noisy)
        case "rich":
            return train.add_noisy(images, labels, **rich)
    return train.chain(moved, train.add_noisy(images, labels, **rich))


KINDS = ["moved", "gaussian", "noisy", "rich", "chain"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_key_gives_the_same_result(images, labels, batch, kind):
    one, two = (make(kind, images, labels)(KEY, ROWS, *batch) for _ in range(2))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    other = make(kind, images, labels)(jax.random.key(4), ROWS, *batch)
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize("kind", ["moved", "gaussian", "noisy", "chain"])
def test_made_anew_it_compiles_nothing(images, labels, batch, kind):
    traces = []

    @jax.jit
    def run(augmentation, key, rows, inputs, targets):
        traces.append(1)
        return augmentation(key, rows, inputs, targets)

    results = []
    for scale in (1.0, 0.5):
        for seed in (0, 1):
            arguments = jax.random.key(seed), ROWS, *batch
            got = run(make(kind, np.float32(scale) * images, labels, scale), *arguments)
            expected = make(kind, np.float32(scale) * images, labels, scale)(*arguments)
            assert np.allclose(got[0], expected[0], atol=1e-6)
            assert np.array_equal(got[1], expected[1])
            results.append(np.asarray(got[0]))
    assert len(traces) == 1
    # The arrays are arguments: none is left over from the first call.
    assert not np.allclose(results[0], results[2], atol=1e-3)


def test_other_settings_compile_anew(images, labels, batch):
    run = jax.jit(lambda augmentation, key, rows, x, y: augmentation(key, rows, x, y))
    lengths = [len(run(make("noisy", images, labels, count=count), KEY, ROWS, *batch)[0]) for count in (1, JOIN, 1)]
    assert lengths == [BATCH + 1, BATCH + JOIN, BATCH + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_changed_in_place(images, labels, kind):
    inputs, targets = images[np.asarray(ROWS)].copy(), labels[np.asarray(ROWS)].copy()
    before = [array.copy() for array in (images, labels, inputs, targets)]
    make(kind, images, labels)(KEY, ROWS, inputs, targets)
    for array, copy in zip((images, labels, inputs, targets), before, strict=True):
        assert np.array_equal(array, copy)
