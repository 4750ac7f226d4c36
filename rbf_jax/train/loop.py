"""The training loop."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from rbf_jax.checks import check_count, check_images, check_key, check_labels
from rbf_jax.models import Classifier
from rbf_jax.models.classifier import Variables
from rbf_jax.train.losses import cross_entropy, smoothed_labels
from rbf_jax.types import Array, Key


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
        accuracy: share classified rightly, with dropout.
    """

    loss: Array
    accuracy: Array


def init(
    key: Key, classifier: Classifier, optimizer: optax.GradientTransformation, shape: tuple[int, ...]
) -> TrainState:
    """The first state, for images of shape ``(H, W, C)``."""
    variables = classifier.init(key, shape)
    return TrainState(variables, optimizer.init(variables["params"]), jnp.int32(0))


def make_step(
    classifier: Classifier, optimizer: optax.GradientTransformation
) -> Callable[[Key, TrainState, Array, Array], tuple[TrainState, TrainInfo]]:
    """One step of gradient descent on the label-smoothed cross-entropy, as a pure function.

    Returns:
        (key, state, images ``(B, H, W, C)``, labels ``(B,)``) -> (state, info). The key serves dropout.
    """

    def step(key: Key, state: TrainState, images: Array, labels: Array) -> tuple[TrainState, TrainInfo]:
        def loss(params: Variables) -> tuple[Array, tuple[Array, Variables]]:
            logits, extra = classifier.apply({**state.variables, "params": params}, images, train=True, key=key)
            return cross_entropy(logits, smoothed_labels(labels, logits.shape[-1])), (logits, extra)

        (value, (logits, extra)), gradient = jax.value_and_grad(loss, has_aux=True)(state.variables["params"])
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.variables["params"])
        params = optax.apply_updates(state.variables["params"], updates)
        info = TrainInfo(value, jnp.mean(logits.argmax(-1) == labels))
        return TrainState({**extra, "params": params}, opt_state, state.step + 1), info

    return step


def fit(
    key: Key,
    classifier: Classifier,
    images: Array,
    labels: Array,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int = 128,
    progress: str | None = "train",
) -> tuple[Variables, TrainInfo]:
    """Trains a classifier on images, each epoch in a new order; a last incomplete batch is left out of its epoch.

    Args:
        key: for the first weights, the order and dropout.
        classifier: the network.
        images: float32 ``(N, H, W, C)`` in [0, 1]; for an rCNN the reconstructions, computed once.
        labels: int32 ``(N,)``.
        optimizer: an optax transformation.
        epochs: passes over the images.
        batch_size: at most N.
        progress: what the progress bar is called; None for no bar.

    Returns:
        The variables, and each epoch's mean loss and accuracy, ``(epochs,)``.

    Raises:
        ValueError: an argument out of range.
        FloatingPointError: the loss became NaN or infinite.
    """
    check_key(key)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    check_images(images)
    check_labels(labels, images.shape[0])
    check_count(epochs, "epochs")
    check_count(batch_size, "batch_size")
    if batch_size > images.shape[0]:
        raise ValueError(f"batch_size must be at most the {images.shape[0]} images, got {batch_size}")

    def take(key: Key, state: TrainState, images: Array, labels: Array, rows: Array) -> tuple[TrainState, TrainInfo]:
        return make_step(classifier, optimizer)(key, state, images[rows], labels[rows])

    step = jax.jit(take, donate_argnums=1)
    init_key, order_key, dropout_key = jax.random.split(key, 3)
    state = init(init_key, classifier, optimizer, images.shape[1:])
    batches = images.shape[0] // batch_size
    history = []
    with tqdm(total=epochs * batches, desc=progress, unit="step", disable=progress is None) as bar:
        for epoch in range(epochs):
            order = jax.random.permutation(jax.random.fold_in(order_key, epoch), images.shape[0])
            infos = []
            for rows in order[: batches * batch_size].reshape(batches, batch_size):
                step_key = jax.random.fold_in(dropout_key, epoch * batches + len(infos))
                state, info = step(step_key, state, images, labels, rows)
                infos.append(info)
                bar.update()
            mean = jax.tree.map(lambda *values: jnp.stack(values).mean(), *infos)
            if not jnp.isfinite(mean.loss):
                raise FloatingPointError(f"the loss became {mean.loss} in epoch {epoch + 1}: lower the learning rate")
            bar.set_postfix(loss=f"{mean.loss:.3f}", accuracy=f"{mean.accuracy:.3f}")
            history.append(mean)
    return state.variables, jax.tree.map(lambda *values: jnp.stack(values), *history)
