"""Momentum iterative FGSM."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.driver import Best, Iterative, Problem, better, no_best
from rbf_jax.attacks.gradients import Estimator, exact, fold_in
from rbf_jax.attacks.losses import Loss, cross_entropy
from rbf_jax.attacks.norms import l1_unit, per_example
from rbf_jax.checks import check_count, check_norm, check_not_negative, check_positive
from rbf_jax.types import Array, LogitsFn, Norm


class _State(NamedTuple):
    x: Array
    momentum: Array
    best: Best


def mi_fgsm(
    norm: Norm,
    *,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    loss: Loss = cross_entropy,
    gradient: Estimator = exact,
) -> Iterative:
    """Steps along accumulated gradients: ``m <- decay m + g / |g|_1``, ``x <- project(x + step direction(m))``.

    Starts at the image; keeps the best iterate. An example whose gradient vanishes goes on along what it has
    accumulated.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius of the ball, at least 0.
        steps: gradient steps.
        step_size: length of a step; None for ``epsilon / steps`` of each example.
        decay: share of the accumulated gradient that is kept, at least 0.
        loss: maximised.
        gradient: `exact`, `eot(draws)`, ...

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range.

    Reference: Dong et al., CVPR 2018.
    """
    check_norm(norm)
    check_not_negative(epsilon, "epsilon")
    check_not_negative(decay, "decay")
    check_count(steps, "steps")
    if step_size is not None:
        check_positive(step_size, "step_size")

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        del logits_fn
        start = p.images if p.start is None else p.start
        return _State(start, jnp.zeros_like(start), no_best(p.images))

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        x, keys = state.x, fold_in(p.keys, number)

        def go_on() -> _State:
            seen = gradient.look(keys, logits_fn, loss, x, p.labels, p.targets, with_gradient=True)
            best = better(state.best, x, seen, p.labels, p.targets, 0, gradient.forwards, gradient.draws)
            momentum = decay * state.momentum + l1_unit(seen.gradient)
            length = p.epsilon / steps if step_size is None else jnp.full_like(p.epsilon, step_size)
            moved = x + per_example(length, x) * norm.direction(momentum, x)
            return _State(norm.confine(p.images, moved, p.epsilon), momentum, best)

        def end() -> _State:
            seen = gradient.look(keys, logits_fn, loss, x, p.labels, p.targets, with_gradient=False)
            return _State(x, state.momentum, better(state.best, x, seen, p.labels, p.targets, 0, gradient.draws))

        return jax.lax.cond(number < steps, go_on, end)

    return Iterative(norm, epsilon, steps + 1, begin, step, takes_start=True)
