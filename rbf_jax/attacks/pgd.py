"""Projected gradient descent."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.driver import Best, Iterative, Problem, better, no_best, random_point
from rbf_jax.attacks.gradients import Estimator, exact, fold_in
from rbf_jax.attacks.losses import Loss, cross_entropy
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_count, check_norm, check_not_negative, check_positive
from rbf_jax.types import Array, Key, LogitsFn, Norm


class _State(NamedTuple):
    x: Array
    best: Best


def pgd(
    norm: Norm,
    *,
    epsilon: float,
    steps: int,
    step_size: float | Callable[[Array], Array] | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: Loss = cross_entropy,
    gradient: Estimator = exact,
    direction: Callable[[Array, Array], Array] | None = None,
) -> Iterative:
    """Projected gradient descent: ``x <- project(x + step_size * direction(grad L(f(x), y)))``, ball and box.

    Keeps the best iterate over all steps and restarts, the last one included: a success before a failure, then the
    higher loss.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius of the ball, at least 0.
        steps: gradient steps of each restart.
        step_size: length of a step, or its schedule: a function of the step's number, as optax has them. None for
            ``2.5 * epsilon / steps`` of each example.
        restarts: runs from new starting points.
        random_start: start uniformly in the ball; without it a single run starts at the image itself.
        loss: maximised.
        gradient: `exact`, `eot(draws)`, ...
        direction: None for that of the norm (in l1 ``sparse(0.01)``, which makes it SLIDE); in l1 also `dense` or
            ``sparse(share)``.

    Returns:
        The attack. A start that it is given is where the first restart begins.

    Raises:
        ValueError: a number out of range, or several restarts without a random start.

    Reference: Madry et al., ICLR 2018; for l1 Tramer and Boneh, NeurIPS 2019.
    """
    check_norm(norm)
    check_not_negative(epsilon, "epsilon")
    check_count(steps, "steps")
    check_count(restarts, "restarts")
    if step_size is not None and not callable(step_size):
        check_positive(step_size, "step_size")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts must be 1 without a random start (all would be the same), got {restarts}")
    towards = norm.direction if direction is None else direction

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        del logits_fn
        return _State(p.images, no_best(p.images))

    def length(number: Array, p: Problem) -> Array:
        if step_size is None:
            return 2.5 * p.epsilon / steps
        return jnp.full_like(p.epsilon, step_size(number) if callable(step_size) else step_size)

    def first(keys: Key, restart: Array, p: Problem) -> Array:
        if not random_start:
            return p.images if p.start is None else p.start
        drawn = random_point(norm, fold_in(keys, 0), p.images, p.epsilon)
        return drawn if p.start is None else jnp.where(restart == 0, p.start, drawn)

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        restart, number = number // (steps + 1), number % (steps + 1)
        keys = fold_in(p.keys, restart)
        x = jax.lax.cond(number == 0, lambda: first(keys, restart, p), lambda: state.x)
        draw_keys = fold_in(keys, number + 1)

        def go_on() -> _State:
            seen = gradient.look(draw_keys, logits_fn, loss, x, p.labels, p.targets, with_gradient=True)
            moved = x + per_example(length(number, p), x) * towards(seen.gradient, x)
            passes = gradient.forwards, gradient.draws
            best = better(state.best, x, seen, p.labels, p.targets, restart, *passes)
            return _State(norm.confine(p.images, moved, p.epsilon), best)

        def end() -> _State:
            seen = gradient.look(draw_keys, logits_fn, loss, x, p.labels, p.targets, with_gradient=False)
            return _State(x, better(state.best, x, seen, p.labels, p.targets, restart, gradient.draws))

        return jax.lax.cond(number < steps, go_on, end)

    return Iterative(norm, epsilon, restarts * (steps + 1), begin, step, takes_start=True)
