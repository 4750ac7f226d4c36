"""How an attack looks at the model: loss, logits and gradient of each example, exact or averaged over draws."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from rbf_jax.attacks.driver import fold_in
from rbf_jax.attacks.losses import Loss
from rbf_jax.checks import check_count, check_labels
from rbf_jax.types import Array, Key, LogitsFn


class Look(NamedTuple):
    """What was seen at some images.

    Attributes:
        loss: ``(B,)``.
        logits: ``(B, classes)``; over several draws the log of the mean softmax.
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
        draws: forward passes that one look takes.
    """

    look: LookFn
    draws: int


def _look_once(keys, logits_fn, loss, images, labels, targets, /, *, with_gradient) -> Look:
    def total(images: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = logits_fn(keys, images)
        check_labels(labels, images.shape[0], logits.shape[-1])
        if targets is not None:
            check_labels(targets, images.shape[0], logits.shape[-1], name="targets")
        values = loss(logits, labels, targets)
        return values.sum(), (values, logits)

    if not with_gradient:
        return Look(*total(images)[1], jnp.zeros((0,)))
    (_, (values, logits)), gradient = jax.value_and_grad(total, has_aux=True)(images)
    # A model that overflows must not poison the images; an example without a usable gradient stays where it is.
    return Look(values, logits, jnp.where(jnp.isfinite(gradient), gradient, 0))


exact = Estimator(_look_once, 1)
"""One look: the gradient of a deterministic model, or of one draw of a randomised one."""


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

        total = jax.lax.fori_loop(1, draws, lambda i, sums: jax.tree.map(jnp.add, sums, one(i)), one(jnp.int32(0)))
        mean = jax.tree.map(lambda value: value / draws, total)
        return mean._replace(logits=jnp.log(jnp.maximum(mean.logits, 1e-30)))

    return Estimator(look, draws)
