"""What is learned from what: the parts of the data, filters, what each recipe trains on, optimizers, forms."""

import json
from functools import partial
from hashlib import sha256
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import float64, numpy_reconstruct, quick_jit, random_filters, random_images
from scipy.ndimage import uniform_filter

from experiments import learn
from experiments.configs import cifar10, mnist, quickstart
from experiments.recipes import RECIPES
from experiments.rundir import Run
from rbf_jax import PRESETS, attacks, data, defend, rbf
from rbf_jax.evaluate import fingerprint
from rbf_jax.train.loop import History

KEY = jax.random.key(0)
SHARP, SOFT = 86.64, 17.33
"""beta1 of the preset `code`, in training and in the test."""


def test_the_last_training_images_validate():
    config = quickstart.get_config("smoke")
    parts, whole = learn.load(config, None), data.load_embedded()
    total, last = config.examples.train, config.examples.train - config.examples.validation
    joined = np.concatenate([parts.train.images, parts.validation.images])
    np.testing.assert_array_equal(joined, data.as_float(whole["train"].images[:total]))
    np.testing.assert_array_equal(parts.validation.labels, whole["train"].labels[last:total])
    np.testing.assert_array_equal(parts.test.labels, whole["test"].labels[: config.examples.test])


# Optimizers.


def step_lengths(optimizer, at):
    """Length of the update of a parameter of gradient 1, at some steps."""
    params = {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}

    @jax.jit
    def step(state):
        return optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)

    state, lengths = optimizer.init(params), []
    for number in range(max(at) + 1):
        updates, state = step(state)
        if number in at:
            lengths.append(-float(updates["kernel"][0, 0]))
    return lengths


@pytest.mark.usefixtures("standard_promotion")
def test_learning_rates_follow_their_schedules():
    # Adam's step is the learning rate where the gradient stays the same: a cosine over 4 epochs of 10 steps, those that
    # the model is trained, not the configuration's.
    found = step_lengths(learn.optimizer(mnist.get_config("cpu"), batches=10, epochs=4), [0, 20, 39])
    assert found == pytest.approx([1e-3, 5e-4, 1e-3 * 0.5 * (1 + np.cos(np.pi * 39 / 40))], rel=1e-3)
    config = mnist.get_config("cpu")
    config.train.warm_up = 0.25
    found = step_lengths(learn.optimizer(config, batches=10, epochs=4), [0, 5, 10, 25])
    assert found == pytest.approx([0, 5e-4, 1e-3, 5e-4], rel=1e-3)
    config = mnist.get_config("paper")
    config.train.halve_every = 2
    found = step_lengths(learn.optimizer(config, batches=10, epochs=5), [0, 19, 20, 41])
    assert found == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4], rel=1e-3)


@pytest.mark.usefixtures("standard_promotion")
def test_weight_decay_spares_biases_and_batch_norm():
    config = cifar10.get_config("cpu")
    config.train.warm_up = 0.0
    optimizer = learn.optimizer(config, batches=1, epochs=1)
    params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.full(1, 2.0)}
    updates: Any = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]
    # Nesterov's first step is 1.9 times the rate.
    decay = config.train.learning_rate * config.train.weight_decay * 1.9 * 2
    assert float(updates["kernel"][0, 0]) == pytest.approx(-decay, rel=1e-5)
    assert float(updates["bias"][0]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "config.train.optimizer must be one of 'adam', 'sgd', got 'adamw'"),
        ({"schedule": "constant"}, "config.train.schedule must be one of 'cosine', 'halving', got 'constant'"),
        ({"optimizer": "adam"}, "config.train.weight_decay must be 0 with adam, got 0.0005"),
    ],
)
def test_optimizers_that_are_not_there_are_refused(changes, message):
    config = cifar10.get_config("cpu")
    config.train.update(changes)
    with pytest.raises(ValueError, match=message):
        learn.optimizer(config, batches=1, epochs=1)


def test_a_model_is_trained_as_long_as_its_name_says_or_as_all():
    config = mnist.get_config("cpu")
    config.epochs.rcnn_at = 5
    assert [learn.epochs(config, name) for name in ("cnn", "rcnn", "rcnn_at", "rcnn_seed1")] == [8, 8, 5, 3]
    config.epochs.cnn_plus = 40
    assert [learn.bank_epoch(config, name) for name in ("cnn_plus", "rcnn_plus")] == [10, 2]
    # A quarter of 3 epochs is none: an untrained network would make the bank, as in one epoch it must.
    config.epochs.cnn_plus, config.epochs.rcnn_plus = 3, 1
    assert [learn.bank_epoch(config, name) for name in ("cnn_plus", "rcnn_plus")] == [1, 0]


def test_a_snapshot_is_of_the_end_of_its_epoch(tmp_path, monkeypatch):
    """A run that goes on in the middle of an epoch calls the hook again, with weights that have gone on."""
    config = cifar10.get_config("smoke")
    config.snapshots, config.train.epochs = {"cnn": (1, 2)}, 3
    run, shades = Run(tmp_path, config), {0: 0.0, 1: 0.25, 2: 0.5}

    def fit(key, network, images, labels, *, augment, **options):
        for epoch, shade in [*shades.items(), (1, 0.75), (2, 1.0)]:
            augment(epoch, {"params": {"bias": np.full(2, shade, np.float32)}})
        raise KeyboardInterrupt

    monkeypatch.setattr(learn.train, "fit", fit)
    part = learn.Examples(np.zeros((64, 32, 32, 3), np.float32), np.zeros(64, np.int32))

    def train_and_stop():
        with pytest.raises(KeyboardInterrupt):
            learn.train_model(run, learn.Data(part, part, part), "cnn")

    train_and_stop()
    assert sorted(path.name for path in tmp_path.glob("models/snapshots/*")) == ["cnn-1.npz", "cnn-2.npz"]
    for epoch in (1, 2):
        assert learn.snapshot(run, "cnn", epoch)["params"]["bias"].tolist() == [shades[epoch]] * 2
    # A model that is trained again keeps none of the training before.
    config.train.epochs = 2
    with pytest.raises(ValueError, match=r"cnn-1\.npz is of a training of 3 epochs, not of 2\. Remove"):
        learn.snapshot(run, "cnn", 1)
    shades |= {1: 2.0, 2: 3.0}
    train_and_stop()
    assert learn.snapshot(run, "cnn", 1)["params"]["bias"].tolist() == [2.0] * 2


# A run on tiny images with a tiny network.


class Tiny(nn.Module):
    """One dense layer."""

    dropout: float

    @nn.compact
    def __call__(self, images, *, train=False):
        flat = images.reshape(images.shape[0], -1)
        return nn.Dense(10)(nn.Dropout(0.2 * self.dropout, deterministic=not train)(flat))


def linear(variables, images):
    """The same in NumPy."""
    layer = variables["params"]["Dense_0"]
    return float64(images).reshape(len(images), -1) @ float64(layer["kernel"]) + float64(layer["bias"])


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run(tmp_path, filters, monkeypatch, quick_compilation, standard_promotion):
    """A run whose filters are there; two epochs of two batches of 8 images."""
    monkeypatch.setitem(learn.NETWORKS, "cnn", Tiny)
    config = quickstart.get_config("smoke")
    config.train.epochs, config.train.batch_size, config.em.steps, config.em.growth_steps = 2, 8, 6, 6
    config.adversarial.steps, config.adversarial.ramp_epochs = 2, 1
    config.noise.update(count=5, bank_share=0.5, bank_examples=6, bank_steps=2)
    config.attack.batch_size, config.attack.beta2 = 6, (1.0,)
    rbf.save(tmp_path / "filters.npz", filters)
    return Run(tmp_path, config)


@pytest.fixture
def examples(rng):
    images, labels = random_images(rng, (24, 8, 8, 1)), np.arange(24, dtype=np.int32) % 10
    parts = (slice(0, 16), slice(16, 20), slice(20, 24))
    return learn.Data(*(learn.Examples(images[rows], labels[rows]) for rows in parts))


# Filters.


def test_filters_are_fitted_once(run, examples, monkeypatch):
    learn.filters_path(run).unlink()
    found = learn.fit_filters(run, examples)
    assert found.means.shape == (len(found.variances), 3, 3, 1)
    monkeypatch.setattr(learn.em, "fit", None)
    np.testing.assert_array_equal(learn.fit_filters(run, examples).means, found.means)
    (record,) = run.records()
    assert (record["stage"], record["kind"], record["count"]) == ("filters", "own", len(found.variances))


def test_each_front_has_the_filters_that_its_recipe_names(run, examples, filters, rng):
    def of(name) -> Any:
        return learn.filters_of(run, examples, name)

    np.testing.assert_array_equal(of("rcnn").means, filters.means)
    assert not any(map(of, ("cnn", "threshold", "mean", "madry")))
    # As many by k-means as the EM found, and none of the EM's.
    codebook = of("kmeans")
    assert codebook.means.shape == filters.means.shape
    assert not np.isclose(codebook.variances[:, None], filters.variances).any()
    with pytest.raises(FileNotFoundError, match=r"filters-released\.npz is missing: .*FILTERS"):
        of("rcnn_released")
    released = random_filters(rng, 3)
    rbf.save(learn.filters_path(run, "released"), released)
    np.testing.assert_array_equal(of("rcnn_released").means, released.means)


# Snapshots.


def test_a_snapshot_is_the_model_that_was_validated_after_its_epoch(run, examples):
    run.config.snapshots, run.config.train.epochs = {"cnn": (1, 3)}, 4
    every = learn.Examples(*(np.concatenate(arrays) for arrays in zip(*examples, strict=True)))
    final = learn.train_model(run, examples._replace(validation=every), "cnn")
    history = json.loads((run.directory / "models" / "cnn.json").read_text())["history"]
    for epoch, variables in ((1, learn.snapshot(run, "cnn", 1)), (3, learn.snapshot(run, "cnn", 3)), (4, final)):
        right = linear(variables, every.images).argmax(-1) == every.labels
        assert history["validation"][epoch - 1] == pytest.approx(right.mean(), abs=1e-4), epoch
    assert len(set(history["validation"])) > 1


def test_before_the_first_epoch_there_is_nothing_to_keep(run, examples):
    run.config.snapshots = {"cnn": (0, 1)}
    with pytest.raises(ValueError, match=r"config\.snapshots\.cnn must be epochs from 1, got \(0, 1\)"):
        learn.train_model(run, examples, "cnn")


# What each recipe hands to the training loop.


@pytest.fixture
def fitted(run, examples, monkeypatch):
    """name -> the arguments of the training loop, which is left out."""

    def arguments(name):
        seen = {}

        def fit(key, classifier, images, labels, **options):
            seen.update(options, key=key, classifier=classifier, images=images, labels=labels)
            epochs = options["epochs"]
            for epoch in range(epochs):
                # The first was gone on with in its middle.
                options["log"]({"epoch": epoch + 1, "seconds": 0.5 if epoch == 0 else 2.0, "images_per_second": 40.0})
            return classifier.init(key, images.shape[1:]), History(*(jnp.zeros(epochs) for _ in range(3)))

        monkeypatch.setattr(learn.train, "fit", fit)
        seen["variables"] = learn.train_model(run, examples, name)
        return seen

    return arguments


@pytest.mark.parametrize(
    ("name", "beta1"),
    [("rcnn", SHARP), ("rcnn_v2", SOFT), ("kmeans", SHARP)],
)
def test_an_rcnn_learns_from_reconstructions_of_the_training_sharpness(run, examples, fitted, name, beta1):
    found, filters = fitted(name), learn.filters_of(run, examples, name)
    assert filters is not None
    for seen, part in ((found["images"], examples.train), (found["validation"][0], examples.validation)):
        np.testing.assert_allclose(seen, numpy_reconstruct(filters, part.images, beta1), atol=2e-4)
    np.testing.assert_array_equal(found["labels"], examples.train.labels)
    np.testing.assert_array_equal(found["validation"][1], examples.validation.labels)
    assert found["attack"] is found["epsilon"] is None


@pytest.mark.parametrize(("name", "smoothing"), [("rcnn", 0.1), ("cnn_hard", 0.0), ("rcnn_hard", 0.0)])
def test_labels_are_smoothed_but_for_the_hard_ones(fitted, name, smoothing):
    assert fitted(name)["smoothing"] == smoothing


def test_controls_learn_from_what_they_see(examples, fitted):
    images = examples.train.images
    np.testing.assert_array_equal(fitted("threshold")["images"], images > 0.5)
    smooth = uniform_filter(float64(images), 3, mode="nearest", axes=(1, 2))
    np.testing.assert_allclose(fitted("mean")["images"], smooth, atol=1e-6)


@pytest.mark.parametrize("name", ["cnn", "cnn_plus", "gaussian_02", "madry", "rcnn_at"])
def test_the_others_learn_from_the_images_as_they_come(examples, fitted, name):
    found = fitted(name)
    np.testing.assert_array_equal(found["images"], examples.train.images)
    np.testing.assert_array_equal(found["validation"][0], examples.validation.images)


def test_adversarial_training_attacks_through_the_front_of_the_test(run, examples, fitted, filters):
    run.config.adversarial.update(epsilon=0.2, ramp_epochs=2)
    images = examples.train.images[:3]
    for name, seen in (("madry", images), ("rcnn_at", numpy_reconstruct(filters, images, SOFT))):
        found = fitted(name)
        logits, _ = found["classifier"].apply(found["variables"], images)
        np.testing.assert_allclose(logits, linear(found["variables"], seen), atol=2e-3)
        assert (found["attack"].norm, found["attack"].epsilon) == (attacks.Linf, 0.2)
        # From 0 to the radius in two epochs of two batches, then it stays there.
        radii = [float(found["epsilon"](step)) for step in (0, 1, 2, 4, 40)]
        assert radii == pytest.approx([0, 0.05, 0.1, 0.2, 0.2])
    # Without a rise it is the attack's own from the first step.
    run.config.adversarial.ramp_epochs = 0
    learn.weights_path(run, "madry").unlink()
    assert fitted("madry")["epsilon"] is None


def test_training_and_its_schedule_last_the_epochs_of_the_model(run, fitted, monkeypatch):
    lengths = []
    monkeypatch.setattr(learn, "optimizer", lambda config, batches, epochs: lengths.append((batches, epochs)))
    run.config.epochs = {"rcnn": 5}
    assert [fitted(name)["epochs"] for name in ("rcnn", "cnn")] == [5, 2]
    assert lengths == [(2, 5), (2, 2)]


def test_seeds_are_other_keys(fitted):
    keys = [
        jax.random.key_data(fitted(name)["key"]) for name in ("cnn", "cnn_plus", "cnn_plus_seed1", "cnn_plus_seed2")
    ]
    expected = [jax.random.key_data(jax.random.key(seed)) for seed in (0, 0, 1, 2)]
    np.testing.assert_array_equal(keys, expected)


apply = quick_jit(lambda function, *arguments: function(*arguments))


def augmented(found, epoch, rows):
    rows = np.asarray(rows)
    augment = found["augment"](epoch, found["variables"])
    inputs, labels = apply(augment, KEY, rows, found["images"][rows], found["labels"][rows])
    return np.asarray(inputs), np.asarray(labels)


@pytest.mark.parametrize("name", ["cnn", "rcnn", "madry", "rcnn_at", "threshold"])
def test_most_learn_without_augmentation(fitted, name):
    found = fitted(name)
    assert found["augment"](0, found["variables"]) is None


@pytest.mark.parametrize(("name", "std"), [("gaussian_02", 0.2), ("gaussian_03", 0.3)])
def test_the_baseline_of_smoothing_learns_from_gaussian_noise(examples, fitted, name, std):
    inputs, labels = augmented(fitted(name), 0, np.arange(16))
    assert (inputs - examples.train.images).std() == pytest.approx(std, rel=0.1)
    np.testing.assert_array_equal(labels, examples.train.labels)


def nearest(found, candidates):
    """How far each image is from the nearest candidate, and which that is."""
    distances = np.abs(found[:, None] - candidates[None]).max((2, 3, 4))
    return distances.min(1), distances.argmin(1)


@pytest.mark.parametrize("name", ["cnn_plus", "rcnn_plus"])
def test_noisy_images_join_and_adversarial_ones_after_a_share_of_the_epochs(
    run, examples, filters, fitted, monkeypatch, name
):
    run.config.epochs, made = {name: 8}, []
    run.config.noise.update(std=1e-7, limit=1e-7, bank_share=0.25)

    def bank(run, examples, filters, name, variables, *, make):
        made.append(make)
        return np.full((2, 8, 8, 1), 2, np.float32)  # makes any image white

    monkeypatch.setattr(learn, "noise_bank", bank)
    found, clean = fitted(name), examples.train.images
    white = np.ones((1, 8, 8, 1), np.float32)
    if name == "rcnn_plus":
        clean, white = (numpy_reconstruct(filters, x, SHARP) for x in (clean, white))
    for epoch, total in ((1, 5), (2, 10), (7, 10)):
        inputs, labels = augmented(found, epoch, [4, 2])
        np.testing.assert_allclose(inputs[:2], clean[[4, 2]], atol=2e-4)
        joined, targets = inputs[2:], labels[2:]
        assert len(joined) == len(targets) == total
        distance, which = nearest(joined[:5], clean)
        assert distance.max() < 2e-3
        np.testing.assert_array_equal(targets[:5], examples.train.labels[which])
        np.testing.assert_allclose(joined[5:], white.repeat(total - 5, 0), atol=2e-3)
    # Made in the epoch in which it is first needed, then only read.
    assert made == [True, False]


@pytest.mark.parametrize(("name", "more"), [("cnn", 0), ("rcnn", 0), ("rcnn_plus", 5), ("rcnn_at", 0)])
def test_moved_images_are_rebuilt_after_that(run, examples, filters, fitted, name, more):
    run.config.train.update(flips=True, shift=1)
    run.config.noise.update(std=1e-7, limit=1e-7, bank_share=1.0)
    found, images = fitted(name), examples.train.images
    np.testing.assert_array_equal(found["images"], images)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    views = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    # What is attacked is rebuilt behind the attack.
    see = partial(numpy_reconstruct, filters, beta1=SHARP) if name in ("rcnn", "rcnn_plus") else np.asarray
    forms = np.stack([see(view[:, :, ::turn]) for view in views for turn in (1, -1)], 1)
    parities = []
    for epoch in range(2):
        inputs, labels = augmented(found, epoch, np.arange(16))
        assert len(inputs) == len(labels) == 16 + more
        distances = np.abs(inputs[:16, None] - forms).max((2, 3, 4))
        assert distances.min(1).max() < 2e-3
        which = distances.argmin(1)
        assert len(set(which // 2)) > 3
        parities.append(which % 2)
        np.testing.assert_array_equal(labels[:16], examples.train.labels)
        if more:
            # Those that join are mirrored, but not moved.
            still = forms[:, 8:10].reshape(-1, *images.shape[1:])
            distance, joined = nearest(inputs[16:], still)
            assert distance.max() < 2e-3
            np.testing.assert_array_equal(labels[16:], examples.train.labels[joined // 2])
    np.testing.assert_array_equal(parities[0], 1 - parities[1])
    assert 0 < parities[0].sum() < 16


# Whole trainings.


@pytest.mark.parametrize(
    "name",
    [
        *("rcnn_at", "gaussian_02"),
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("cnn", "rcnn", "cnn_plus", "rcnn_plus", "madry", "threshold", "mean", "kmeans")
        ),
    ],
)
def test_every_kind_of_recipe_is_trained(run, examples, monkeypatch, name):
    run.log({"stage": "filters", "kind": "own", "seconds": 4.0})  # theirs were there before
    variables = learn.train_model(run, examples, name)
    record = json.loads((run.directory / "models" / f"{name}.json").read_text())
    assert record["recipe"] == RECIPES[name]._asdict()
    assert (record["model"], record["epochs"], record["config"]["train"]["epochs"]) == (name, 2, 2)
    filters = learn.filters_of(run, examples, name)
    assert record["filters"] == (fingerprint(filters) if filters else None)
    assert record["sha256"] == sha256(learn.weights_path(run, name).read_bytes()).hexdigest()
    history = record["history"]
    assert all(len(values) == 2 and np.isfinite(values).all() for values in history.values())
    epochs = [line for line in run.records() if line.get("stage") == "train"]
    assert [(line["model"], line["epoch"]) for line in epochs] == [(name, 1), (name, 2)]
    # From a rate of one digit, which on a busy machine is of few images a second.
    seconds = np.mean([line["seconds"] for line in epochs])
    assert record["seconds an epoch"] == pytest.approx(seconds, rel=0.05, abs=0.06)
    # What came before is kept with the model, where the log may go.
    assert set(record["overheads"]) == {"filters"} | ({f"bank {name}"} if RECIPES[name].noise else set())
    assert record["overheads"]["filters"] == 4.0
    (run.directory / "log.jsonl").unlink()
    assert run.overheads() == record["overheads"]
    # What is returned is what lies in the file, and nothing is trained again.
    monkeypatch.setattr(learn.train, "fit", None)
    again = learn.train_model(run, examples, name)
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    logits = learn.forms(run.config, filters, name, variables)["static"](KEY, examples.test.images)
    assert np.isfinite(logits).all()


def test_the_seconds_of_an_epoch_are_those_of_a_whole_one_of_this_training(run, examples, fitted):
    """The log also has epochs that a kill cut short, and trainings of before."""
    for _ in range(5):
        run.log({"stage": "train", "model": "cnn", "epoch": 1, "seconds": 90.0, "images_per_second": 1.0})
    fitted("cnn")
    record = json.loads(learn.weights_path(run, "cnn").with_suffix(".json").read_text())
    batches = len(examples.train.labels) // run.config.train.batch_size
    assert record["seconds an epoch"] == round(batches * run.config.train.batch_size / 40.0, 1)


def test_a_finished_training_whose_log_is_gone_gives_its_weights(run, examples):
    variables = learn.train_model(run, examples, "cnn")
    learn.weights_path(run, "cnn").unlink()
    (run.directory / "log.jsonl").unlink()
    jax.tree.map(np.testing.assert_array_equal, learn.train_model(run, examples, "cnn"), variables)
    record = json.loads((run.directory / "models" / "cnn.json").read_text())
    assert record["seconds an epoch"] is None


def test_a_model_of_another_training_is_refused(run, examples, fitted, rng):
    fitted("rcnn")
    path = learn.weights_path(run, "rcnn")
    run.config.epochs = {"cnn": 3}
    learn.train_model(run, examples, "rcnn")  # another model's epochs are none of its
    run.config.epochs = {"rcnn": 3}
    with pytest.raises(ValueError, match=r"its epochs differ .*\(2, not 3\)\. Remove it") as error:
        learn.train_model(run, examples, "rcnn")
    assert str(path) in str(error.value)
    run.config.epochs = {}
    rbf.save(learn.filters_path(run), random_filters(rng, 5))
    with pytest.raises(ValueError, match="its filters differ"):
        learn.train_model(run, examples, "rcnn")


def test_the_bank_holds_noises_within_the_limit_and_is_made_once(run, examples, filters, monkeypatch):
    config = run.config
    config.noise.limit = 0.1
    variables = learn.classifier(config).init(KEY, (8, 8, 1))
    arguments = (run, examples, None, "cnn_plus", variables)
    with pytest.raises(ValueError, match=r"cnn_plus-bank\.npz is gone, .* Remove .*checkpoints/cnn_plus and .*bank\*"):
        learn.noise_bank(*arguments, make=False)
    bank = learn.noise_bank(*arguments, make=True)
    assert bank.shape == (6, 8, 8, 1)
    assert jnp.abs(bank).max() <= 0.1 + 1e-6
    images, labels = examples.train.images[:6], examples.train.labels[:6]
    assert (images + bank).min() > -1e-6
    assert (images + bank).max() < 1 + 1e-6
    # It is noise against this network.
    rows = np.arange(6)
    before, after = (jax.nn.log_softmax(linear(variables, x))[rows, labels] for x in (images, images + bank))
    assert np.all(after < before - 0.01)
    monkeypatch.setattr(learn.evaluate, "run_attack", None)
    np.testing.assert_array_equal(learn.noise_bank(*arguments, make=False), bank)
    # That of a training of another length, or through other filters, is not taken for its own.
    with pytest.raises(ValueError, match=r"of another training: its filters is None, not '.*bank\* to train the model"):
        learn.noise_bank(run, examples, filters, "cnn_plus", variables, make=True)
    config.epochs = {"cnn_plus": 7}
    with pytest.raises(ValueError, match=r"bank\.npz is of another training: its epochs is 2, not 7\. Remove .*bank\*"):
        learn.noise_bank(*arguments, make=True)


# Forms.


@pytest.fixture
def variables(run):
    return learn.classifier(run.config).init(KEY, (8, 8, 1))


@pytest.mark.parametrize(
    ("name", "preset", "beta1"), [("rcnn", "code", SOFT), ("rcnn_at", "code", SOFT), ("rcnn_paper", "paper", 25.0)]
)
def test_a_defended_model_has_all_forms_at_each_level_of_noise(run, examples, filters, variables, name, preset, beta1):
    found = learn.forms(run.config, filters, name, variables)
    names = ("static", "draw", "bpda", "predict")
    assert list(found) == [*names, *(f"{form}@1" for form in names)]
    expected = linear(variables, numpy_reconstruct(filters, examples.test.images, beta1))
    np.testing.assert_allclose(found["static"](KEY, examples.test.images), expected, atol=2e-3)
    plain = learn.forms(run.config, None, "cnn", variables)["static"]
    for level, beta2 in (("", 1.75), ("@1", 1.0)):
        defense = defend(filters, plain, beta1=PRESETS[preset].test, beta2=beta2)
        for form in names:
            assert fingerprint(found[form + level]) == fingerprint(getattr(defense, form))


def test_a_plain_model_has_one_form(run, variables, examples):
    for name in ("cnn", "cnn_plus", "madry", "gaussian_03"):
        (found,) = learn.forms(run.config, None, name, variables).items()
        assert found[0] == "static"
        np.testing.assert_allclose(
            found[1](KEY, examples.test.images), linear(variables, examples.test.images), atol=1e-4
        )


def test_before_the_threshold_the_gradient_is_taken_as_if_it_were_not_there(run, variables, examples):
    found, images = learn.forms(run.config, None, "threshold", variables), jnp.asarray(examples.test.images)
    assert set(found) == {"static", "bpda"}
    for form in found.values():
        np.testing.assert_allclose(form(KEY, images), linear(variables, examples.test.images > 0.5), atol=1e-4)

    def gradient(form):
        return jax.grad(lambda images: found[form](KEY, images)[:, 3].sum())(images)

    assert not np.any(gradient("static"))
    kernel = variables["params"]["Dense_0"]["kernel"][:, 3]
    np.testing.assert_allclose(gradient("bpda"), np.tile(np.reshape(kernel, (1, 8, 8, 1)), (4, 1, 1, 1)), atol=1e-6)


def test_before_the_mean_the_gradient_is_its_own(run, variables, examples):
    found, images = learn.forms(run.config, None, "mean", variables), examples.test.images
    assert set(found) == {"static"}
    smooth = uniform_filter(float64(images), 3, mode="nearest", axes=(1, 2))
    np.testing.assert_allclose(found["static"](KEY, images), linear(variables, smooth), atol=1e-4)
    assert np.any(jax.grad(lambda images: found["static"](KEY, images)[:, 3].sum())(images))


def test_a_shift_that_would_be_left_out_is_refused(run, examples):
    run.config.train.shift = 2
    with pytest.raises(ValueError, match=r"config\.train\.shift must be 0 without config\.train\.flips, got 2"):
        learn.train_model(run, examples, "cnn")
