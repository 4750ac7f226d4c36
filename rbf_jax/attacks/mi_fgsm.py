"""Momentum iterative FGSM."""

import jax
import jax.numpy as jnp

from rbf_jax.attacks.driver import Best, better, fold_in, into_ball, no_best, result, spread_arguments
from rbf_jax.attacks.gradients import Estimator, exact
from rbf_jax.attacks.losses import Loss, cross_entropy
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_count, check_not_negative, check_positive
from rbf_jax.types import Array, Attack, AttackResult, Key, LogitsFn, Norm


def mi_fgsm(
    norm: Norm,
    *,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    loss: Loss = cross_entropy,
    gradient: Estimator = exact,
) -> Attack:
    """Steps along accumulated gradients: ``m <- decay m + g / |g|_1``, ``x <- clip(project(x + step direction(m)))``.

    Starts at the image; keeps the best iterate. An example whose gradient vanishes goes on along what it has
    accumulated.

    Args:
        norm: `Linf` or `L2`.
        epsilon: radius of the ball, at least 0.
        steps: gradient steps.
        step_size: length of a step; None for ``epsilon / steps`` of each example.
        decay: share of the accumulated gradient that is kept, at least 0.
        loss: maximised.
        gradient: `exact` or `eot(draws)`.

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range.

    Reference: Dong et al., CVPR 2018.
    """
    check_not_negative(epsilon, "epsilon")
    check_not_negative(decay, "decay")
    check_count(steps, "steps")
    if step_size is not None:
        check_positive(step_size, "step_size")
    own_epsilon = epsilon

    def attack(
        keys: Key,
        logits_fn: LogitsFn,
        images: Array,
        labels: Array,
        *,
        epsilon: Array | float | None = None,
        targets: Array | None = None,
    ) -> AttackResult:
        keys, radius = spread_arguments(keys, images, labels, own_epsilon if epsilon is None else epsilon, targets)
        length = per_example(radius / steps if step_size is None else jnp.full_like(radius, step_size), images)

        def step(number: Array, carry: tuple[Array, Array, Best]) -> tuple[Array, Array, Best]:
            x, momentum, best = carry
            seen = gradient.look(fold_in(keys, number), logits_fn, loss, x, labels, targets, with_gradient=True)
            best = better(best, x, seen.logits, seen.loss, labels, targets)
            # In two divisions: a sum of gradients near float32's least would vanish.
            largest = jnp.abs(seen.gradient).max((1, 2, 3), keepdims=True)
            scaled = seen.gradient / jnp.where(largest > 0, largest, 1)
            total = jnp.abs(scaled).sum((1, 2, 3), keepdims=True)
            momentum = decay * momentum + scaled / jnp.where(total > 0, total, 1)
            return into_ball(norm, images, x + length * norm.direction(momentum), radius), momentum, best

        start = jnp.asarray(images)
        x, _, best = jax.lax.fori_loop(0, steps, step, (start, jnp.zeros_like(start), no_best(start)))
        seen = gradient.look(fold_in(keys, steps), logits_fn, loss, x, labels, targets, with_gradient=False)
        best = better(best, x, seen.logits, seen.loss, labels, targets)
        forwards = (steps + 1) * gradient.draws
        return result(norm, images, best.images, best.success, forwards, steps * gradient.draws)

    return attack
