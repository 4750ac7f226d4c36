"""Auto-PGD: projected gradient ascent that sets its own step sizes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.apgd_rules import Track, halving, sparse_rule
from rbf_jax.attacks.driver import Best, Iterative, Problem, better, choose, is_misled, no_best, random_point
from rbf_jax.attacks.gradients import Estimator, exact, fold_in
from rbf_jax.attacks.losses import Loss, cross_entropy, dlr, likely_classes
from rbf_jax.checks import check_count, check_norm, check_not_negative
from rbf_jax.types import Array, Key, LogitsFn, Norm


class _State(NamedTuple):
    track: Track
    carried: Any  # by the rule
    tried: Array  # classes of `apgd_t`, ``(B, classes)``, else ``(B, 0)``
    best: Best


def apgd(
    norm: Norm,
    *,
    epsilon: float,
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = cross_entropy,
    gradient: Estimator = exact,
) -> Iterative:
    """Auto-PGD: ``x' = project(x + a (project(x + s direction(g)) - x) + (1 - a) (x - x_before))``, a = 0.75.

    The step size s starts at ``2 epsilon``. At the end of each window of steps it is halved, and the example goes back
    to its point of highest loss, where at most 75 % of the window's steps raised the loss, or where neither the step
    size nor the highest loss changed since the last check. Keeps the best iterate. In l1 steps follow another rule, see
    `apgd_rules.sparse_rule`.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius of the ball, at least 0.
        steps: gradient steps of each restart.
        restarts: runs from new starting points, drawn uniformly from the ball.
        loss: maximised; `dlr` makes it APGD-DLR.
        gradient: `exact`, `eot(draws)`, ...

    Returns:
        The attack. A start that it is given is where the first restart begins.

    Raises:
        ValueError: a number out of range.

    Reference: Croce and Hein, ICML 2020; for l1 Croce and Hein, ICML 2021.
    """
    return _attack(norm, epsilon, steps, 0, restarts, loss, gradient)


def apgd_t(
    norm: Norm,
    *,
    epsilon: float,
    steps: int = 100,
    classes: int = 9,
    restarts: int = 1,
    loss: Loss = dlr,
    gradient: Estimator = exact,
) -> Iterative:
    """Auto-PGD towards each of the most likely wrong classes in turn; any wrong class is a success.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius of the ball, at least 0.
        steps: gradient steps of each run.
        classes: wrong classes that are tried, by falling logit of the clean image; fewer than the model has.
        restarts: runs towards each class.
        loss: maximised, towards the class.
        gradient: `exact`, `eot(draws)`, ...

    Returns:
        The attack. It chooses its targets itself: none may be given to it.

    Raises:
        ValueError: a number out of range, or targets.

    Reference: Croce and Hein, ICML 2020.
    """
    check_count(classes, "classes")
    return _attack(norm, epsilon, steps, classes, restarts, loss, gradient)


def _attack(
    norm: Norm, epsilon: float, steps: int, classes: int, restarts: int, loss: Loss, gradient: Estimator
) -> Iterative:
    check_norm(norm)
    check_not_negative(epsilon, "epsilon")
    check_count(steps, "steps")
    check_count(restarts, "restarts")
    rule = (sparse_rule if norm.name == "l1" else halving)(norm, steps)
    looks = len(rule.schedule.fresh)
    fresh, scale, windows = map(jnp.asarray, rule.schedule)

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        x, best = p.images, no_best(p.images)
        tried = jnp.zeros((len(x), 0), jnp.int32)
        if classes:
            keys = fold_in(p.keys, restarts * classes)
            clean = gradient.look(keys, logits_fn, cross_entropy, x, p.labels, None, with_gradient=False)
            tried = likely_classes(clean.logits, p.labels, classes)
            # What is misled already counts as that from the start, though not as the best image.
            best = best._replace(
                success=is_misled(clean.logits, p.labels, None), forwards=best.forwards + gradient.draws
            )
        track = Track(x, x, best.loss, jnp.zeros_like(x), x, best.loss, jnp.zeros_like(x))
        return _State(track, rule.begin(p, p.epsilon, track), tried, best)

    def start(run: Array, keys: Key, radius: Array, p: Problem) -> Array:
        drawn = random_point(norm, fold_in(keys, looks), p.images, radius)
        return drawn if p.start is None else jnp.where(run < max(classes, 1), p.start, drawn)

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        run, number = number // looks, number % looks
        keys, radius, anew = fold_in(p.keys, run), scale[number] * p.epsilon, fresh[number]
        track, carried = state.track, state.carried
        x = jax.lax.switch(
            jnp.where(number == 0, 0, jnp.where(anew, 1, 2)),
            [
                lambda: start(run, keys, radius, p),
                lambda: norm.confine(p.images, track.top, radius),
                lambda: rule.move(p, radius, fresh[number - 1], track, carried),
            ],
        )
        towards = state.tried[:, run % classes] if classes else p.targets
        seen = gradient.look(fold_in(keys, number), logits_fn, loss, x, p.labels, towards, with_gradient=True)
        looked = better(state.best, x, seen, p.labels, p.targets, run, gradient.forwards, gradient.draws)
        # Only a ball of the radius itself can hold the result.
        best = jax.tree.map(lambda new, old: jnp.where(scale[number] == 1, new, old), looked, state.best)
        best = best._replace(forwards=looked.forwards, backwards=looked.backwards)
        level = jnp.where(jnp.isnan(seen.loss), -jnp.inf, seen.loss)  # above a NaN nothing would ever be
        here = x, level, seen.gradient
        top = choose(anew | (level > track.top_loss), here, (track.top, track.top_loss, track.top_gradient))
        track = Track(x, track.x, level, seen.gradient, *top)
        adapted, back = rule.adapt(p, radius, windows[number], track, carried)
        carried = jax.tree.map(lambda a, b: jnp.where(anew, a, b), rule.begin(p, radius, track), adapted)
        x, level, slope = choose(back & ~anew, top, here)
        return _State(track._replace(x=x, loss=level, gradient=slope), carried, state.tried, best)

    runs = restarts * max(classes, 1)
    return Iterative(norm, epsilon, runs * looks, begin, step, takes_targets=not classes, takes_start=True)
