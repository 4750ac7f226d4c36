"""How an attack looks at the model: loss, logits and gradient of each example, exact or over draws of its noise."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from rbf_jax.attacks.losses import Loss
from rbf_jax.attacks.norms import open_gradient, per_example
from rbf_jax.checks import check_count, check_labels, check_logits
from rbf_jax.types import Array, Key, LogitsFn


def fold_in(keys: Key, number: Array | int) -> Key:
    """The same number folded into every key, ``(B,)``."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


RESULT = 2**31 - 1
"""Folded into the keys where a result is looked at once more: no step of an attack has this number."""


def logits_at(logits_fn: LogitsFn, keys: Key, images: Array) -> Array:
    """The model's logits in float32: in half precision most gains of an attack's steps would be lost."""
    logits = logits_fn(keys, images)
    check_logits(logits, len(images))
    return logits.astype(jnp.float32)


class Look(NamedTuple):
    """What was seen at some images.

    Attributes:
        loss: ``(B,)``.
        logits: ``(B, classes)``; over several draws the log of the mean softmax, or the mean.
        gradient: d loss / d images, ``(B, H, W, C)``; empty, ``(0,)``, where it was not asked for.
    """

    loss: Array
    logits: Array
    gradient: Array


class LookFn(Protocol):
    """Looks at the model."""

    def __call__(
        self,
        keys: Key,
        logits_fn: LogitsFn,
        loss: Loss,
        images: Array,
        labels: Array,
        targets: Array | None,
        /,
        *,
        with_gradient: bool,
    ) -> Look:
        """Loss, logits and, if wanted, gradient of each example under its own key, ``(B,)``."""
        ...


class Estimator(NamedTuple):
    """A way to look at the model.

    Attributes:
        look: the function.
        draws: forward passes that a look without gradient takes, and backward passes of one with it.
        forwards: forward passes of a look with gradient.
    """

    look: LookFn
    draws: int
    forwards: int


def _check_classes(labels: Array, targets: Array | None, logits: Array) -> None:
    batch, classes = logits.shape
    check_labels(labels, batch, classes)
    if targets is not None:
        check_labels(targets, batch, classes, name="targets")


STEEPEST = 1e15
"""The largest entry of a gradient: sums over draws and squares of it stay finite."""


def _usable(gradient: Array, images: Array) -> Array:
    # A model that overflows must not poison the images: a NaN says nothing. Where the gradient is infinite, as that of
    # a root or a logarithm is on black pixels, it is the steepest, unless it leads out of the box.
    gradient = jnp.where(jnp.isnan(gradient), 0, gradient)
    gradient = jnp.where(jnp.isinf(gradient), open_gradient(gradient, images), gradient)
    return jnp.clip(gradient, -STEEPEST, STEEPEST)


def _pull(pull_back: Callable[[Array], tuple[Array]], slope: Array) -> Array:
    """What a slope of the logits, ``(B, classes)``, is in the images.

    It goes back in units of its largest entry: a small one would be rounded to 0 in a model of half precision.
    """
    size = jnp.maximum(jnp.abs(slope).max(-1, keepdims=True), 1e-37)
    (gradient,) = pull_back(slope / size)
    return gradient * per_example(size, gradient)


def _look_once(keys, logits_fn, loss, images, labels, targets, /, *, with_gradient) -> Look:
    model = partial(logits_at, logits_fn, keys)
    logits, pull_back = jax.vjp(model, images) if with_gradient else (model(images), None)
    _check_classes(labels, targets, logits)
    if pull_back is None:
        return Look(loss(logits, labels, targets), logits, jnp.zeros((0,)))
    values, to_logits = jax.vjp(lambda logits: loss(logits, labels, targets), logits)
    return Look(values, logits, _usable(_pull(pull_back, *to_logits(jnp.ones_like(values))), images))


exact = Estimator(_look_once, 1, 1)
"""One look: the gradient of a deterministic model, or of one draw of a randomised one."""


def _summed(draws: int, one: Callable[[Array], Any]) -> Any:
    """The sum over the draws, one after the other, so that memory is that of one."""
    return jax.lax.fori_loop(1, draws, lambda i, total: jax.tree.map(jnp.add, total, one(i)), one(jnp.int32(0)))


def eot(draws: int) -> Estimator:
    """Expectation over transformations: loss and gradient averaged over fresh draws of the model.

    ``(1 / n) sum_i grad L(f_i(x), y)``, Athalye et al., ICML 2018. The draws run one after the other, so memory is that
    of one.

    Args:
        draws: n, at least 1.

    Raises:
        ValueError: draws below 1.
    """
    check_count(draws, "draws")

    def look(keys, logits_fn, loss, images, labels, targets, /, *, with_gradient) -> Look:
        def one(index: Array) -> Look:
            seen = _look_once(
                fold_in(keys, index), logits_fn, loss, images, labels, targets, with_gradient=with_gradient
            )
            return seen._replace(logits=jax.nn.softmax(seen.logits))

        mean = jax.tree.map(lambda value: value / draws, _summed(draws, one))
        return mean._replace(logits=jnp.log(jnp.maximum(mean.logits, 1e-30)))

    return Estimator(look, draws, draws)


def _of_mean(draws: int, *, of_softmax: bool) -> Estimator:
    """Looks at the mean over the draws: one pass over them for it, one for its gradient.

    The mean of the probabilities is taken in their logarithms, where none is too small to have a gradient.
    """
    check_count(draws, "draws")

    def look(keys, logits_fn, loss, images, labels, targets, /, *, with_gradient) -> Look:
        def of_draw(index: Array, images: Array) -> Array:
            return logits_at(logits_fn, fold_in(keys, index), images)

        one = jax.nn.log_softmax if of_softmax else lambda logits: logits

        def added(index: Array, total: Array) -> Array:
            return (jnp.logaddexp if of_softmax else jnp.add)(total, one(of_draw(index, images)))

        total = jax.lax.fori_loop(1, draws, added, one(of_draw(jnp.int32(0), images)))
        mean = total - jnp.log(draws) if of_softmax else total / draws
        _check_classes(labels, targets, mean)
        if not with_gradient:
            return Look(loss(mean, labels, targets), mean, jnp.zeros((0,)))
        values, to_mean = jax.vjp(lambda mean: loss(mean, labels, targets), mean)
        (slope,) = to_mean(jnp.ones_like(values))

        def pulled_back(index: Array) -> Array:
            logits, to_images = jax.vjp(partial(of_draw, index), images)
            value, to_logits = jax.vjp(one, logits)
            return _pull(to_images, *to_logits(slope * jnp.exp(value - mean) if of_softmax else slope))

        return Look(values, mean, _usable(_summed(draws, pulled_back) / draws, images))

    return Estimator(look, draws, 2 * draws)


def mean_softmax(draws: int) -> Estimator:
    """The loss of the averaged probabilities, as a defence predicts: ``grad L(log mean_i softmax f_i(x), y)``.

    Takes twice the forward passes of `eot`: the mean comes first, then its gradient under the same draws.

    Raises:
        ValueError: draws below 1.
    """
    return _of_mean(draws, of_softmax=True)


def mean_logits(draws: int) -> Estimator:
    """The loss of the averaged logits, ``grad L(mean_i f_i(x), y)``; otherwise as `mean_softmax`.

    Raises:
        ValueError: draws below 1.
    """
    return _of_mean(draws, of_softmax=False)
