"""Auto-PGD: projected gradient ascent with momentum that sets its own step sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.attacks.driver import Best, better, fold_in, into_ball, no_best, result, spread_arguments
from rbf_jax.attacks.gradients import Estimator, Look, exact
from rbf_jax.attacks.losses import Loss, cross_entropy, dlr
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_count, check_not_negative
from rbf_jax.types import Array, Attack, AttackResult, Key, LogitsFn, Norm

MOMENTUM = 0.75
RISING = 0.75
"""The share of a window's steps that must have raised the loss for the step size to stay."""


class _State(NamedTuple):
    """What is carried from step to step; all but the first three per example ``(B,)``."""

    x: Array
    before: Array  # the iterate before x
    seen: Look
    top: Array  # the iterate of highest loss
    top_seen: Look
    step: Array  # step size
    last: Array  # loss of the last step, also where the example went back since
    rises: Array  # steps of this window that raised the loss
    kept: Array  # the step size was not changed at the last check
    checked: Array  # highest loss at the last check
    best: Best


def check_lengths(steps: int) -> np.ndarray:
    """By step, the length of the window that ends with it, 0 where none does, int ``(steps,)``.

    The first window has 22 % of the steps, each further one 3 % less, none under 6 %.
    """
    lengths = np.zeros(steps, np.int32)
    window, end = max(int(0.22 * steps), 1), 0
    while end + window <= steps:
        end += window
        lengths[end - 1] = window
        window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return lengths


def _choose(where: Array, chosen: Array, otherwise: Array) -> Array:
    return jnp.where(per_example(where, chosen), chosen, otherwise)


def apgd(
    norm: Norm,
    *,
    epsilon: float,
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = cross_entropy,
    gradient: Estimator = exact,
) -> Attack:
    """Auto-PGD: ``x' = project(x + a (project(x + s direction(g)) - x) + (1 - a) (x - x_before))``, a = 0.75.

    The step size s starts at ``2 epsilon``. At the end of each window of steps it is halved, and the example goes back
    to its point of highest loss, where at most 75 % of the window's steps raised the loss, or where neither the step
    size nor the highest loss changed since the last check. Keeps the best iterate.

    Args:
        norm: `Linf` or `L2`.
        epsilon: radius of the ball, at least 0.
        steps: gradient steps of each restart.
        restarts: runs from new starting points, drawn uniformly from the ball.
        loss: maximised; `dlr` makes it APGD-DLR.
        gradient: `exact` or `eot(draws)`.

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range.

    Reference: Croce and Hein, ICML 2020.
    """
    check_not_negative(epsilon, "epsilon")
    check_count(steps, "steps")
    check_count(restarts, "restarts")
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

        def restart(number: Array, best: Best) -> Best:
            run = _run(norm, steps, loss, gradient, logits_fn, images, labels, radius)
            return run(fold_in(keys, number), targets, targets, best)

        best = jax.lax.fori_loop(0, restarts, restart, no_best(jnp.asarray(images)))
        looks = restarts * (steps + 1) * gradient.draws
        return result(norm, images, best.images, best.success, looks, looks)

    return attack


def apgd_t(
    norm: Norm,
    *,
    epsilon: float,
    steps: int = 100,
    classes: int = 9,
    restarts: int = 1,
    loss: Loss = dlr,
    gradient: Estimator = exact,
) -> Attack:
    """Auto-PGD towards each of the most likely wrong classes in turn; any wrong class is a success.

    Args:
        norm: `Linf` or `L2`.
        epsilon: radius of the ball, at least 0.
        steps: gradient steps of each run.
        classes: wrong classes that are tried, by falling logit of the clean image; fewer than the model has.
        restarts: runs towards each class.
        loss: maximised, towards the class.
        gradient: `exact` or `eot(draws)`.

    Returns:
        The attack. It chooses its targets itself: none may be given to it.

    Raises:
        ValueError: a number out of range, or targets.

    Reference: Croce and Hein, ICML 2020.
    """
    check_not_negative(epsilon, "epsilon")
    for value, name in ((steps, "steps"), (classes, "classes"), (restarts, "restarts")):
        check_count(value, name)
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
        if targets is not None:
            raise ValueError("targets must be None: apgd_t tries the most likely wrong classes, apgd takes targets")
        keys, radius = spread_arguments(keys, images, labels, own_epsilon if epsilon is None else epsilon, None)
        clean = gradient.look(
            fold_in(keys, restarts * classes), logits_fn, cross_entropy, images, labels, None, with_gradient=False
        )
        if clean.logits.shape[-1] <= classes:
            raise ValueError(f"classes must be below the model's {clean.logits.shape[-1]}, got {classes}")
        own = labels[:, None] == jnp.arange(clean.logits.shape[-1])
        tried = jax.lax.top_k(jnp.where(own, -jnp.inf, clean.logits), classes)[1].astype(jnp.int32)
        run = _run(norm, steps, loss, gradient, logits_fn, images, labels, radius)

        def towards(number: Array, best: Best) -> Best:
            return run(fold_in(keys, number), tried[:, number % classes], None, best)

        start = better(no_best(jnp.asarray(images)), images, clean.logits, clean.loss, labels, None)
        best = jax.lax.fori_loop(
            0, restarts * classes, towards, start._replace(loss=jnp.full_like(start.loss, -jnp.inf))
        )
        looks = restarts * classes * (steps + 1) * gradient.draws
        return result(norm, images, best.images, best.success, looks + gradient.draws, looks)

    return attack


def _run(norm, steps, loss, gradient, logits_fn, images, labels, radius):
    """One run as a function (keys, targets of the loss, targets of the success, best so far) -> best."""
    lengths = check_lengths(steps)
    at_most = jnp.asarray(np.floor(RISING * lengths), jnp.int32)  # rises that halve the step size
    windows = jnp.asarray(lengths)

    def run(keys: Key, towards: Array | None, wanted: Array | None, best: Best) -> Best:
        def look(number: Array | int, x: Array) -> Look:
            return gradient.look(fold_in(keys, number), logits_fn, loss, x, labels, towards, with_gradient=True)

        def step(number: Array, s: _State) -> _State:
            moved = s.x + per_example(s.step, images) * norm.direction(s.seen.gradient)
            ahead = into_ball(norm, images, moved, radius)
            share = jnp.where(number == 0, 1.0, MOMENTUM)
            x = into_ball(norm, images, s.x + share * (ahead - s.x) + (1 - share) * (s.x - s.before), radius)
            seen = look(number + 1, x)
            best = better(s.best, x, seen.logits, seen.loss, labels, wanted)
            higher = seen.loss > s.top_seen.loss
            top = _choose(higher, x, s.top)
            top_seen = jax.tree.map(lambda new, old: _choose(higher, new, old), seen, s.top_seen)
            rises = jnp.where(seen.loss > s.last, s.rises + 1, s.rises)
            # At the end of a window.
            ends = windows[number] > 0
            stuck = s.kept & (top_seen.loss <= s.checked)
            halved = ends & ((rises <= at_most[number]) | stuck)
            return _State(
                _choose(halved, top, x),
                s.x,
                jax.tree.map(lambda new, old: _choose(halved, new, old), top_seen, seen),
                top,
                top_seen,
                jnp.where(halved, s.step / 2, s.step),
                seen.loss,
                jnp.where(ends, 0, rises),
                jnp.where(ends, ~halved, s.kept),
                jnp.where(ends, top_seen.loss, s.checked),
                best,
            )

        start = into_ball(norm, images, images + norm.sample(fold_in(keys, steps + 1), images.shape, radius), radius)
        seen = look(0, start)
        none = jnp.zeros_like(labels)
        state = _State(
            *(start, start, seen, start, seen, 2 * radius, seen.loss, none, none > 0, seen.loss),
            better(best, start, seen.logits, seen.loss, labels, wanted),
        )
        return jax.lax.fori_loop(0, steps, step, state).best

    return run
