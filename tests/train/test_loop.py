"""Training: labels, one step against NumPy, and the loop."""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import marked_images
from jax.tree_util import Partial

from rbf_jax import attacks, train
from rbf_jax.models import Classifier, from_nnx
from rbf_jax.train import loop

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE = (4, 4, 1)


def linear_init(key, shape):
    return {"params": jax.random.normal(key, (int(np.prod(shape)), 3)) * 0.1, "seen": jnp.float32(0)}


def shaky_apply(variables, images, *, train=False, key=None):
    """Linear, with noise in training."""
    scale = 1 + jax.random.uniform(key) if train and key is not None else 1
    return linear_apply(variables, scale * images, train=train)


def linear_apply(variables, images, *, train=False, key=None, scale=1.0):
    seen = variables["seen"] + images.shape[0] if train else variables["seen"]
    return scale * images.reshape(images.shape[0], -1) @ variables["params"], {"seen": seen}


LINEAR = Classifier(linear_init, linear_apply)


@pytest.fixture
def examples():
    return marked_images(90, SHAPE, 0.5)


def test_smoothed_labels_are_the_released_codes():
    assert np.allclose(train.smoothed_labels(jnp.array([2]), 10), [[0.1 / 9, 0.1 / 9, 0.9] + [0.1 / 9] * 7], atol=1e-7)
    assert np.allclose(train.smoothed_labels(jnp.arange(3), 3).sum(-1), 1, atol=1e-6)
    assert np.array_equal(train.smoothed_labels(jnp.array([1]), 3, 0.0), [[0, 1, 0]])
    assert np.allclose(train.smoothed_labels(jnp.array([1]), 3, 0.5), [[0.25, 0.5, 0.25]])


def test_cross_entropy_against_numpy():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(5, 4)), rng.dirichlet(np.ones(4), 5)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(targets * log_softmax).sum(-1).mean()
    assert train.cross_entropy(jnp.float32(logits), jnp.float32(targets)) == pytest.approx(expected, rel=1e-5)


def test_a_step_of_gradient_descent_against_numpy(examples):
    images, labels = examples
    optimizer = optax.sgd(0.5)
    state = train.init(jax.random.key(0), LINEAR, optimizer, SHAPE)
    after, info = train.make_step(LINEAR, optimizer)(jax.random.key(1), state, images, labels)

    x, weights = images.reshape(90, -1).astype(np.float64), np.asarray(state.variables["params"], np.float64)
    logits = x @ weights
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    targets = np.clip(np.eye(3)[labels], 0.05, 0.9)
    targets_total = targets.sum(-1, keepdims=True)
    gradient = x.T @ (softmax * targets_total - targets) / 90
    assert np.allclose(after.variables["params"], weights - 0.5 * gradient, atol=1e-6)
    assert info.accuracy == pytest.approx((logits.argmax(-1) == labels).mean())
    assert (after.step, after.variables["seen"]) == (1, 90)


def fit(examples, classifier=LINEAR, **changes):
    """A short run: 90 images make two batches of 40 in each of 6 epochs."""
    arguments = {"optimizer": optax.adam(0.1), "epochs": 6, "batch_size": 40, "progress": None} | changes
    return train.fit(jax.random.key(0), classifier, *examples, **arguments)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_fit_learns_and_repeats_itself(examples):
    (variables, history), again = fit(examples, epochs=20), fit(examples, epochs=20)
    assert history.loss.shape == (20,)
    assert history.accuracy[-1] > 0.95 > history.accuracy[0]
    assert np.isnan(history.validation).all()
    assert variables["seen"] == 20 * 80
    assert_same((variables, history), again)


def test_fit_learns_from_labels_as_smooth_as_it_is_told(examples):
    """A linear model on few images is as sure as the labels allow: with hard ones its loss goes towards 0."""
    entropy = -(0.2 * np.log(0.1) + 0.8 * np.log(0.8))
    (_, hard), (_, smooth) = (fit(examples, epochs=200, smoothing=smoothing) for smoothing in (0.0, 0.2))
    assert hard.loss[-1] < 0.1
    assert smooth.loss[-1] == pytest.approx(entropy, abs=0.1)


def test_how_many_steps_a_call_makes_changes_nothing(examples, monkeypatch):
    results = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(loop, "CALL_SECONDS", seconds)
        results.append(fit(examples, batch_size=5))
    assert_same(*results)


def test_history_against_steps_by_hand(examples, monkeypatch):
    records = []
    monkeypatch.setattr(loop, "VALIDATION_BATCH", 30)  # 50 images: the second batch is filled up
    validation = (examples[0][:50], examples[1][:50])
    shaky = Classifier(linear_init, shaky_apply)
    variables, history = fit(examples, shaky, epochs=2, validation=validation, log=records.append)
    keys = jax.random.split(jax.random.key(0), 3)
    state = train.init(keys[0], shaky, optax.adam(0.1), SHAPE)
    infos = []
    for number in range(4):
        # Another order, and other noise, in each epoch.
        order = jax.random.permutation(jax.random.fold_in(keys[1], number // 2), 90)
        rows = order[number % 2 * 40 :][:40]
        key = jax.random.split(jax.random.fold_in(keys[2], number))[1]
        state, info = train.make_step(shaky, optax.adam(0.1))(key, state, examples[0][rows], examples[1][rows])
        infos.append(info)
    assert np.allclose(variables["params"], state.variables["params"], atol=1e-6)
    for epoch, parts in enumerate((infos[:2], infos[2:])):
        assert history.loss[epoch] == pytest.approx(np.mean([info.loss for info in parts]), rel=1e-5)
        assert history.accuracy[epoch] == pytest.approx(np.mean([info.accuracy for info in parts]))
    logits = examples[0][:50].reshape(50, -1) @ np.asarray(variables["params"])
    assert history.validation[1] == pytest.approx((logits.argmax(-1) == examples[1][:50]).mean())
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["validation"] == pytest.approx(float(history.validation[1]))
    assert records[0]["images_per_second"] > 0


def test_images_that_fill_up_a_validation_batch_count_for_nothing(monkeypatch):
    monkeypatch.setattr(loop, "VALIDATION_BATCH", 4)
    seen = [tuple(map(np.asarray, batch)) for batch in loop._validating(np.arange(6), np.arange(6))]
    np.testing.assert_array_equal(np.concatenate([images for images, _ in seen]), [0, 1, 2, 3, 4, 5, 5, 5])
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in seen]), [0, 1, 2, 3, 4, 5, -1, -1])


class StoppedError(Exception):
    pass


def test_a_run_that_was_stopped_ends_the_same(examples, tmp_path):
    def stop(record):
        if record["epoch"] == 4:
            raise StoppedError  # before the fourth epoch's checkpoint

    with pytest.raises(StoppedError):
        fit(examples, checkpoints=tmp_path, log=stop)
    seen = []
    resumed = fit(examples, checkpoints=tmp_path, log=lambda record: seen.append(record["epoch"]))
    assert seen == [4, 5, 6]
    assert_same(resumed, fit(examples))
    # A finished run is not done again.
    assert_same(fit(examples, checkpoints=tmp_path, log=seen.append), resumed)
    assert seen == [4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_an_epoch_takes_effect_after_a_checkpoint(examples, tmp_path, number, monkeypatch):
    monkeypatch.setattr(loop, "CALL_SECONDS", 0.0)
    came, checks, original = [], [], loop._check_finite

    def check(values, epoch):
        # After the first of the third epoch's two steps.
        checks.append(epoch)
        if checks.count(2) == 1 and not came:
            signal.raise_signal(number)
        original(values, epoch)

    monkeypatch.setattr(loop, "_check_finite", check)
    before = signal.signal(number, lambda *_: came.append(1))
    try:
        with pytest.raises(SystemExit) as exit_:
            fit(examples, checkpoints=tmp_path)
    finally:
        signal.signal(number, before)
    assert exit_.value.code == 128 + number
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 5]
    assert came == [1]
    assert_same(fit(examples, checkpoints=tmp_path), fit(examples))


def test_an_ignored_signal_stops_nothing(examples, tmp_path, monkeypatch):
    """A shell's script starts what is in its background so that Ctrl-C passes it by."""
    original = loop._check_finite

    def check(values, epoch):
        signal.raise_signal(signal.SIGINT)
        original(values, epoch)

    monkeypatch.setattr(loop, "_check_finite", check)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fit(examples, checkpoints=tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_numpys_numbers_are_numbers(examples, tmp_path):
    arguments = {"epochs": np.int64(1), "batch_size": np.int32(8), "smoothing": np.float32(0.1)}
    fit(examples, checkpoints=tmp_path, **arguments)


CHILD = """
import sys, numpy as np, optax
sys.path[:0] = {folders!r}
from helpers import marked_images
from test_loop import SHAPE, fit
examples = marked_images(90, SHAPE, 0.5)
print("begin", flush=True)
variables, _ = fit(examples, epochs=40, checkpoints={checkpoints!r})
np.save({result!r}, variables["params"])
"""


def test_killed_at_random_times_it_ends_the_same(examples, tmp_path):
    paths = {
        "folders": [str(Path(__file__).parent), str(Path(__file__).parents[1])],
        "checkpoints": str(tmp_path / "c"),
        "result": str(tmp_path / "r.npy"),
    }
    rng, killed, code = np.random.default_rng(), 0, None
    while code is None:
        with subprocess.Popen(
            [sys.executable, "-c", CHILD.format(**paths)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "begin\n"
            try:
                code = child.wait(rng.uniform(0.5, 2.5) if killed < 3 else None)
            except subprocess.TimeoutExpired:
                child.kill()
                killed += 1
    assert code == 0
    assert killed
    np.testing.assert_array_equal(np.load(paths["result"]), fit(examples, epochs=40)[0]["params"])


def test_checkpoints_of_another_training_are_refused(examples, tmp_path):
    fit(examples, epochs=1, checkpoints=tmp_path)
    changes: dict[str, dict[str, Any]] = {"epochs": {"epochs": 2}, "batch_size": {"epochs": 1, "batch_size": 30}}
    for name, change in changes.items():
        with pytest.raises(ValueError, match=f"of another training: its {name}"):
            fit(examples, checkpoints=tmp_path, **change)
    moved = examples[0] * np.float32(0.5)
    with pytest.raises(ValueError, match="of another training: its images"):
        fit((moved, examples[1]), epochs=1, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("smoothing", {"smoothing": 0.0}),
        ("optimizer", {"optimizer": optax.adam(0.2)}),
        ("attack", {"attack": attacks.fgsm(attacks.Linf, epsilon=0.1)}),
        ("network", {"classifier": LINEAR._replace(apply=partial(linear_apply, scale=2.0))}),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(examples, tmp_path, name, change):
    fit(examples, epochs=1, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=f"of another training: its {name}"):
        fit(examples, epochs=1, checkpoints=tmp_path, **change)


def test_classes_that_the_network_does_not_have_are_refused(examples):
    images, labels = examples
    with pytest.raises(ValueError, match=r"^labels must be in \[0, 3\)"):
        fit((images, labels + 1))
    with pytest.raises(ValueError, match=r"^validation labels must be in \[0, 3\)"):
        fit(examples, validation=(images, labels + 1))


def test_an_augmentation_replaces_the_batch(examples):
    def to_first_class(key, rows, images, labels):
        return images[:10], labels[:10] * 0

    variables, history = fit(examples, augment=lambda epoch, _: Partial(to_first_class) if epoch else None)
    assert variables["seen"] == 80 + 5 * 20
    assert history.accuracy[-1] == 1
    assert (examples[0].reshape(90, -1) @ np.asarray(variables["params"])).argmax(-1).tolist() == [0] * 90


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, images):
        return self.dense(self.dropout(images.reshape(images.shape[0], -1)))


def test_an_nnx_module_survives_its_training_and_resumes(examples, tmp_path):
    module = Net(nnx.Rngs(0))
    before = np.array(module.dense.kernel[...])

    def run(**changes):
        arguments = {"optimizer": optax.adam(0.1), "epochs": 3, "batch_size": 40, "progress": None} | changes
        return train.fit(jax.random.key(0), from_nnx(module), *examples, **arguments)

    whole = run()
    np.testing.assert_array_equal(module.dense.kernel[...], before)

    def stop(record):
        if record["epoch"] == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(checkpoints=tmp_path, log=stop)
    resumed = run(checkpoints=tmp_path)
    assert_same(jax.tree.map(plain, resumed), jax.tree.map(plain, whole))


def plain(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_new_augmentations_of_one_kind_compile_nothing(examples):
    traces = []

    def counted(scale, key, rows, images, labels):
        traces.append(1)
        return images * scale, labels

    fit(examples, augment=lambda epoch, _: Partial(counted, jnp.float32(epoch / 10)))
    assert len(traces) == 1


def test_nan_stops_with_a_message_and_keeps_the_checkpoint(examples, tmp_path):
    def poison(key, rows, images, labels):
        return images * jnp.nan, labels

    with pytest.raises(FloatingPointError, match="epoch 3"):
        fit(examples, checkpoints=tmp_path, augment=lambda epoch, _: Partial(poison) if epoch == 2 else None)
    assert_same(fit(examples, checkpoints=tmp_path), fit(examples))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, r"epochs must be .* got 0"),
        ({"batch_size": 91}, "at most the 90 images, got 91"),
        ({"smoothing": -0.1}, r"smoothing must be in \[0, 0\.666667\] for 3 classes, got -0\.1"),
        ({"smoothing": 0.7}, r"smoothing must be in \[0, 0\.666667\] for 3 classes, got 0\.7"),
        ({"images": np.zeros((90, *SHAPE), np.uint8)}, "float32"),
        ({"labels": np.zeros(5, np.int32)}, r"shape \(90,\)"),
        ({"validation": (np.zeros((2, *SHAPE), np.uint8), np.zeros(2, np.int32))}, "validation must be float32"),
        ({"augment": lambda epoch, _: lambda key, rows, x, y: (x, y)}, r"must be a jax\.tree_util\.Partial .*lambda"),
        ({"augment": lambda epoch, _: train.through(lambda x: 1 - x)}, r"and so must a front end in it.*lambda"),
        (
            {"validation": (np.zeros((2, 5, 5, 1), np.float32), np.zeros(2, np.int32))},
            r"validation must be images of .*, got \(5, 5, 1\)",
        ),
    ],
)
def test_bad_input(examples, change, message):
    arguments = {"images": examples[0], "labels": examples[1], "epochs": 1, "batch_size": 10} | change
    with pytest.raises(ValueError, match=message):
        train.fit(jax.random.key(0), LINEAR, optimizer=optax.sgd(0.1), progress=None, **arguments)
