"""Distributionally adversarial attack: PGD whose particles, the examples of a batch, act on one another."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.driver import Best, Iterative, Problem, better, no_best, random_point
from rbf_jax.attacks.gradients import Estimator, exact, fold_in
from rbf_jax.attacks.losses import Loss, cross_entropy
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_count, check_norm, check_not_negative, check_positive
from rbf_jax.types import Array, LogitsFn, Norm

RESHUFFLE = 10
"""Steps after which the groups are drawn anew."""

ROUNDING = 1e-6
"""Squared distances below so much of the largest squared length are rounding."""

COINCIDING = 1e-30
"""The bandwidth of particles most of which coincide."""

Interaction = Callable[[Array, Array], Array]
"""(particles ``(G, D)``, gradients ``(G, D)``) -> the ascent directions of a group, ``(G, D)``."""


def _scaled_squares(particles: Array, count: int) -> tuple[Array, Array]:
    """``d_ij^2 / (2 h^2)`` and ``h^2 = median(d^2) / (2 log count)``, the median over all pairs, own ones included."""
    centred = particles - particles.mean(0)
    lengths = (centred**2).sum(-1)
    squares = lengths[:, None] + lengths - 2 * centred @ centred.T
    squares = jnp.where(squares > ROUNDING * lengths.max(), squares, 0)
    bandwidth = jnp.maximum(0.5 * jnp.median(squares) / math.log(count), COINCIDING)
    return squares / (2 * bandwidth), bandwidth


def _push(kernel: Array, particles: Array, bandwidth: Array) -> Array:
    """``sum_j K_ij (x_i - x_j)``; 0 where most particles coincide, as copies that fill up a batch: all is rounding."""
    push = kernel.sum(1)[:, None] * particles - kernel @ particles
    return jnp.where(bandwidth > COINCIDING, push, 0)


def blob(c: float = 1.1) -> Interaction:
    """``g + c (K g - dK) / G``, ``K_ij = exp(-d_ij^2 / 2 h^2)``, ``dK_i = sum_j K_ij (x_i - x_j) / h^2``.

    The published c is 1.1 for the cross-entropy and 10 for the margin.
    """

    def direction(particles: Array, gradients: Array) -> Array:
        scaled, bandwidth = _scaled_squares(particles, len(particles))
        kernel = jnp.exp(-scaled)
        push = _push(kernel, particles, bandwidth) / bandwidth
        return gradients + c * (kernel @ gradients - push) / len(particles)

    return direction


def dgf(c: float = -0.001) -> Interaction:
    """``g + c dK`` with ``K_ij = (s - 1) exp(-s)``, ``s = d_ij^2 / 2 h^2``, ``dK_i = sum_j K_ij (x_i - x_j)``.

    The published c is -0.001 for the cross-entropy and -0.01 for the margin.
    """

    def direction(particles: Array, gradients: Array) -> Array:
        scaled, bandwidth = _scaled_squares(particles, len(particles) + 1)
        kernel = (scaled - 1) * jnp.exp(-scaled)
        return gradients + c * _push(kernel, particles, bandwidth)

    return direction


class _State(NamedTuple):
    x: Array
    best: Best


def daa(
    norm: Norm,
    *,
    epsilon: float,
    steps: int = 200,
    step_size: float | None = None,
    restarts: int = 1,
    interaction: Interaction | None = None,
    group: int | None = None,
    loss: Loss = cross_entropy,
    gradient: Estimator = exact,
) -> Iterative:
    """Distributionally adversarial attack: PGD along directions that a whole group of examples determines.

    ``x <- project(x + step_size * direction(interaction(x, grad L(f(x), y))))``, `blob` or `dgf`. Groups are drawn anew
    from the batch every ten steps, as published. **Results depend on the batch**: on which examples are in it, on their
    order and their number. Keeps the best iterate of each example.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius of the ball, at least 0.
        steps: of each restart.
        step_size: length of a step; None for ``2.5 * epsilon / steps``. Published for MNIST: 0.01 at epsilon 0.3.
        restarts: runs from new random starts.
        interaction: ``blob(c)`` or ``dgf(c)``; None for ``blob()``.
        group: examples in a group, a divisor of the batch's size of at least 2 (published: 200); None for the batch.
        loss: maximised.
        gradient: `exact`, `eot(draws)`, ...

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range, or a batch that cannot be divided into groups.

    Reference: Zheng et al., AAAI 2019, and its authors' code.
    """
    check_norm(norm)
    check_not_negative(epsilon, "epsilon")
    for value, name in ((steps, "steps"), (restarts, "restarts")):
        check_count(value, name)
    if group is not None:
        check_count(group, "group", 2)
    if step_size is not None:
        check_positive(step_size, "step_size")
    interact = blob() if interaction is None else interaction

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        del logits_fn
        size = len(p.images) if group is None else group
        if size < 2 or len(p.images) % size:
            raise ValueError(f"daa needs a batch of at least 2 that divides into groups of {size}, got {len(p.images)}")
        return _State(p.images, no_best(p.images))

    def directions(number: Array, p: Problem, x: Array, gradients: Array) -> Array:
        batch = len(x)
        order = jax.random.permutation(jax.random.fold_in(p.keys[0], number // RESHUFFLE), batch)
        shape = (-1, batch if group is None else group, math.prod(x.shape[1:]))
        grouped = jax.lax.map(lambda pair: interact(*pair), (x[order].reshape(shape), gradients[order].reshape(shape)))
        return jnp.zeros_like(x).at[order].set(grouped.reshape(x.shape).astype(x.dtype))

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        restart, within = number // (steps + 1), number % (steps + 1)
        keys = fold_in(p.keys, number)

        x = jax.lax.cond(
            within == 0, lambda: random_point(norm, fold_in(keys, 0), p.images, p.epsilon), lambda: state.x
        )

        def go_on() -> _State:
            seen = gradient.look(fold_in(keys, 1), logits_fn, loss, x, p.labels, p.targets, with_gradient=True)
            best = better(state.best, x, seen, p.labels, p.targets, restart, gradient.forwards, gradient.draws)
            length = 2.5 * p.epsilon / steps if step_size is None else jnp.full_like(p.epsilon, step_size)
            towards = norm.direction(directions(number, p, x, seen.gradient), x)
            return _State(norm.confine(p.images, x + per_example(length, x) * towards, p.epsilon), best)

        def end() -> _State:
            seen = gradient.look(fold_in(keys, 1), logits_fn, loss, x, p.labels, p.targets, with_gradient=False)
            return _State(x, better(state.best, x, seen, p.labels, p.targets, restart, gradient.draws))

        return jax.lax.cond(within < steps, go_on, end)

    return Iterative(norm, epsilon, restarts * (steps + 1), begin, step, couples=True)
