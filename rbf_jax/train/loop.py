"""The training loop: steps in a compiled loop, a checkpoint after each epoch and on a signal, exact resume."""

import functools
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from rbf_jax import parallel
from rbf_jax.checks import check_count, check_images, check_key, check_labels
from rbf_jax.identity import described
from rbf_jax.models import Classifier, logits_fn
from rbf_jax.models.classifier import Variables
from rbf_jax.train import checkpoint
from rbf_jax.train.augmentation import Augmentation, check_augmentation
from rbf_jax.train.losses import cross_entropy, smoothed_labels
from rbf_jax.train.signals import delayed_signals
from rbf_jax.types import Array, Attack, Key, LogitsFn

VALIDATION_BATCH = 500
CALL_SECONDS = 1.0
"""How long one call of the compiled loop lasts: what a signal or the progress bar waits for."""


class TrainState(NamedTuple):
    """What is carried from step to step.

    Attributes:
        variables: of the classifier.
        opt_state: of the optimizer.
        step: int32, steps done.
    """

    variables: Variables
    opt_state: optax.OptState
    step: Array


class TrainInfo(NamedTuple):
    """What a step reports, on its batch before the update.

    Attributes:
        loss: mean label-smoothed cross-entropy, nats.
        accuracy: share classified rightly, with dropout; of the attacked images where an attack is given.
    """

    loss: Array
    accuracy: Array


class History(NamedTuple):
    """What training reports, by epoch, each ``(epochs,)``.

    Attributes:
        loss: mean of the steps' losses.
        accuracy: mean of the steps' accuracies.
        validation: accuracy on the validation images after the epoch; NaN without them.
    """

    loss: Array
    accuracy: Array
    validation: Array


class _Run(NamedTuple):
    """All that a checkpoint holds: with the arguments of `fit` it determines the rest of the run."""

    state: TrainState
    history: History
    sums: TrainInfo  # of the running epoch


def init(
    key: Key, classifier: Classifier, optimizer: optax.GradientTransformation, shape: tuple[int, ...]
) -> TrainState:
    """The first state, for images of shape ``(H, W, C)``."""
    variables = classifier.init(key, shape)
    return TrainState(variables, optimizer.init(variables["params"]), jnp.int32(0))


def make_step(
    classifier: Classifier,
    optimizer: optax.GradientTransformation,
    *,
    attack: Attack | None = None,
    epsilon: optax.Schedule | None = None,
    smoothing: float = 0.1,
) -> Callable[[Key, TrainState, Array, Array], tuple[TrainState, TrainInfo]]:
    """One gradient step on the label-smoothed cross-entropy, as a pure function; arguments and errors as in `fit`.

    Returns:
        (key, state, images ``(B, H, W, C)``, labels ``(B,)``) -> (state, info). The key serves the attack and dropout.
    """
    if epsilon is not None and attack is None:
        raise ValueError(f"epsilon must be None without an attack, whose radius it is, got {epsilon}")

    def step(key: Key, state: TrainState, images: Array, labels: Array) -> tuple[TrainState, TrainInfo]:
        if attack is not None:
            attack_key, key = jax.random.split(key)
            radius = None if epsilon is None else jnp.float32(epsilon(state.step))
            images = _attacked(attack, attack_key, logits_fn(classifier, state.variables), images, labels, radius)

        def loss(params: Variables) -> tuple[Array, tuple[Array, Variables]]:
            logits, extra = classifier.apply({**state.variables, "params": params}, images, train=True, key=key)
            return cross_entropy(logits, smoothed_labels(labels, logits.shape[-1], smoothing)), (logits, extra)

        (value, (logits, extra)), gradient = jax.value_and_grad(loss, has_aux=True)(state.variables["params"])
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.variables["params"])
        params = optax.apply_updates(state.variables["params"], updates)
        info = TrainInfo(value, jnp.mean(logits.argmax(-1) == labels))
        return TrainState({**extra, "params": params}, opt_state, state.step + 1), info

    return step


def _attacked(
    attack: Attack, key: Key, logits_fn: LogitsFn, images: Array, labels: Array, epsilon: Array | None
) -> Array:
    def on_device(keys: Key, images: Array, labels: Array) -> Array:
        return attack(keys, logits_fn, images, labels, epsilon=epsilon).images

    return parallel.per_device(on_device)(jax.random.split(key, len(images)), images, labels)


def fit(
    key: Key,
    classifier: Classifier,
    images: Array,
    labels: Array,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int = 128,
    augment: Callable[[int, Variables], Augmentation | None] | None = None,
    attack: Attack | None = None,
    epsilon: optax.Schedule | None = None,
    smoothing: float = 0.1,
    validation: tuple[Array, Array] | None = None,
    checkpoints: str | Path | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: str | bool | None = "train",
) -> tuple[Variables, History]:
    """Trains a classifier on images, each epoch in a new order; a last incomplete batch is left out of its epoch.

    With a folder of checkpoints a run that was stopped goes on when `fit` is called with the same arguments, and ends
    with the same variables. It writes one after each epoch, and one before SIGTERM or SIGINT takes effect.

    Args:
        key: for the first weights, the order, augmentation, the attack and dropout.
        classifier: the network.
        images: float32 ``(N, H, W, C)`` in [0, 1]; for an rCNN the reconstructions, computed once; where
            ``augment`` moves them the images as they come, with `through` behind that, and where they are attacked
            with `models.behind` for the front end.
        labels: int32 ``(N,)``.
        optimizer: an optax transformation.
        epochs: passes over the images.
        batch_size: at most N; of all devices together, and a multiple of their number.
        augment: (epoch, variables) -> the epoch's augmentation or None; called before each epoch, and again when a run
            goes on in the middle of one; see `rbf_jax.train.augmentation`.
        attack: for adversarial training (Madry et al., ICLR 2018): each batch, augmented, is replaced by what the
            attack makes of it against the network as it stands, in evaluation mode. None for none.
        epsilon: optax schedule, step -> the attack's radius, to raise it from 0; None for the attack's own radius.
        smoothing: what `smoothed_labels` takes from the true class, in [0, 1 - 1 / classes]; 0 for hard labels.
        validation: images and labels whose accuracy, without attack, is taken after each epoch.
        checkpoints: folder of this training's checkpoints; None for none. Those of other images, settings, attack,
            optimizer or network are refused (`identity.described`); of ``augment`` and ``validation`` nothing is known.
        log: takes a record after each epoch: epoch, loss, accuracy, validation, seconds, images_per_second.
        progress: what the progress bar is called, or whether there is one.

    Returns:
        The variables, and the history.

    Raises:
        ValueError: an argument out of range; epsilon without attack; a checkpoint damaged or of another training.
        OSError: a checkpoint cannot be written.
        FloatingPointError: the loss became NaN or infinite; the last checkpoint is from before.
    """
    check_key(key)
    images, labels = parallel.fetch((images, labels))
    check_images(images)
    check_count(epochs, "epochs")
    check_count(batch_size, "batch_size")
    if batch_size > images.shape[0]:
        raise ValueError(f"batch_size must be at most the {images.shape[0]} images, got {batch_size}")
    if batch_size % parallel.count():
        raise ValueError(f"batch_size must be a multiple of the {parallel.count()} devices, got {batch_size}")
    if validation is not None:
        check_images(validation[0], "validation")
        if validation[0].shape[1:] != images.shape[1:]:
            raise ValueError(f"validation must be images of {images.shape[1:]}, got {validation[0].shape[1:]}")

    init_key, order_key, step_key = jax.random.split(key, 3)
    first_state = init(init_key, classifier, optimizer, images.shape[1:])
    logits, _ = jax.eval_shape(classifier.apply, first_state.variables, images[:1])
    classes = logits.shape[-1]
    check_labels(labels, images.shape[0], classes)
    if not 0 <= smoothing <= 1 - 1 / classes:
        raise ValueError(f"smoothing must be in [0, {1 - 1 / classes:g}] for {classes} classes, got {smoothing}")
    if validation is not None:
        check_labels(validation[1], len(validation[0]), classes, "validation labels")
    batches = images.shape[0] // batch_size
    training_step = make_step(classifier, optimizer, attack=attack, epsilon=epsilon, smoothing=smoothing)
    advance = _make_advance(training_step, step_key)
    count_hits = jax.jit(lambda variables, x, y: (classifier.apply(variables, x)[0].argmax(-1) == y).sum())
    history = History(*(jnp.full(epochs, jnp.nan) for _ in History._fields))
    run = _Run(first_state, history, _no_info())
    settings = {
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "images": [*images.shape, zlib.crc32(np.ascontiguousarray(images).data)],
        "labels": zlib.crc32(np.ascontiguousarray(labels).data),
        "epochs": int(epochs),  # NumPy's numbers are none of JSON's
        "batch_size": int(batch_size),
        "smoothing": float(smoothing),
    }
    if checkpoints is not None:
        how = {"network": classifier.apply, "optimizer": optimizer, "attack": attack, "epsilon": epsilon}
        settings |= {name: described(value) for name, value in how.items()}
        run = checkpoint.restore(checkpoints, run, settings) or run

    def save() -> None:
        if checkpoints is not None:
            checkpoint.save(checkpoints, int(run.state.step), run, settings)

    step, calls = int(run.state.step), 1
    run = jax.tree.map(jnp.copy, run)  # the loop donates its buffers; the classifier's first ones may be the caller's
    named = progress if isinstance(progress, str) else None
    with tqdm(total=epochs * batches, initial=step, desc=named, unit="step", disable=not progress) as bar:
        for epoch in range(step // batches, epochs):
            order = np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), images.shape[0]))
            order = order[: batches * batch_size].reshape(batches, batch_size)
            # Each device is handed its part of the epoch's batches.
            data = parallel.take((np.arange(len(images)), images, labels), order, axis=1)
            # Signals act at once while this lasts: the checkpoint before is all that there is to keep.
            augmentation = parallel.everywhere(augment and check_augmentation(augment(epoch, run.state.variables)))
            began, first, last = time.perf_counter(), step, (epoch + 1) * batches
            with delayed_signals(checkpoints is not None) as interrupted:
                while step < last and not interrupted():
                    count = min(calls, last - step)
                    call_began = time.perf_counter()
                    run = advance(run, data, augmentation, step - epoch * batches, count)
                    _check_finite(run.sums.loss, epoch)
                    step += count
                    bar.update(count)
                    # The first call compiles: its time says nothing.
                    if step > first + 1:
                        calls = max(1, round(CALL_SECONDS / (time.perf_counter() - call_began) * count))
                        calls = parallel.largest(calls)
                if step < last:
                    save()
                    continue  # never: the signal takes effect first
                for leaf in jax.tree.leaves(run.state.variables["params"]):
                    _check_finite(leaf, epoch)
                hits = jnp.nan
                if validation is not None:
                    hits = sum(int(count_hits(run.state.variables, *batch)) for batch in _validating(*validation))
                    hits /= len(validation[0])
                done = History(run.sums.loss / batches, run.sums.accuracy / batches, jnp.float32(hits))
                history = jax.tree.map(lambda values, value, at=epoch: values.at[at].set(value), run.history, done)
                run = _Run(run.state, history, _no_info())
                record = {"epoch": epoch + 1} | {name: float(value) for name, value in done._asdict().items()}
                bar.set_postfix({name: f"{value:.3f}" for name, value in record.items() if value == value})
                if log is not None:
                    seconds = time.perf_counter() - began
                    rate = (step - first) * batch_size / seconds
                    log(record | {"seconds": round(seconds, 2), "images_per_second": round(rate, 1)})
                save()
                interrupted()  # so that all processes end here where one of them was told to in the meantime
    return run.state.variables, run.history


def _validating(images: Array, labels: Array) -> Iterator[tuple[Array, Array]]:
    """Batches over the devices, the last one filled up with images that no answer is right for."""
    total = len(images)
    size = parallel.filled(min(VALIDATION_BATCH, total))
    images, labels = np.asarray(images), np.append(labels, np.int32(-1))
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        yield parallel.take(images, np.minimum(rows, total - 1)), parallel.take(labels, np.minimum(rows, total))


def _check_finite(values: Array, epoch: int) -> None:
    if not jnp.isfinite(values).all():
        raise FloatingPointError(
            f"loss or weights became NaN or infinite in epoch {epoch + 1}: begin anew with a lower learning rate"
        )


def _no_info() -> TrainInfo:
    return TrainInfo(jnp.float32(0), jnp.float32(0))


def _make_advance(step: Callable[..., tuple[TrainState, TrainInfo]], key: Key) -> Callable[..., _Run]:
    """Several steps as one compiled loop; how many is not part of what is compiled."""

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(
        run: _Run,
        data: tuple[Array, Array, Array],
        augmentation: Augmentation | None,
        first: Array | int,
        count: Array | int,
    ) -> _Run:
        def body(batch: Array, run: _Run) -> _Run:
            augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, run.state.step))
            rows, inputs, targets = (array[batch] for array in data)
            if augmentation is not None:
                inputs, targets = parallel.split(augmentation(augment_key, rows, inputs, targets))
            state, info = step(dropout_key, run.state, inputs, targets)
            return _Run(state, run.history, jax.tree.map(jnp.add, run.sums, info))

        return jax.lax.fori_loop(first, first + count, body, run)

    return advance
