"""FAB, the fast adaptive boundary attack: the least distance at which the model is misled."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.boundary import linearise, to_hyperplane, wrong_classes
from rbf_jax.attacks.driver import Best, Iterative, Problem, better, handicapped, is_misled, no_best
from rbf_jax.attacks.gradients import Look, exact, fold_in, logits_at
from rbf_jax.attacks.losses import likely_classes, margin
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_budget, check_count, check_norm, check_positive
from rbf_jax.types import Array, Key, LogitsFn, Norm

SEARCHES = 3
BEYOND_ROUNDING = 1e-5
"""The least margin of a success, in units of the largest logit."""


class _State(NamedTuple):
    x: Array
    tried: Array  # classes, ``(B, K)``
    best: Best
    best_margin: Array  # at the best iterate
    inside: Array  # how far along the way to the best iterate the model is known not to be misled, in [0, 1]
    inside_margin: Array  # there


def _behind(logits: Array, p: Problem) -> Array:
    """The logits with the attack a bit behind: whoever scores the image again rounds in another way."""
    bit = BEYOND_ROUNDING * jnp.abs(logits.max(-1, keepdims=True))
    return handicapped(logits, p, bit)


def fab(
    norm: Norm,
    *,
    epsilon: float = math.inf,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Iterative:
    """Fast adaptive boundary attack: ``x <- clip((1 - a) (x + eta d(x)) + a (x0 + eta d(x0)))``, the least distance.

    ``d`` leads to the nearest of the boundaries of all wrong classes, made linear at x, within the box, from x and from
    the image x0; ``a = min(|d(x)| / (|d(x)| + |d(x0)|), alpha_max)``. Where the model is misled, the next step starts
    from ``(1 - beta) x0 + beta x``. Keeps the nearest misled iterate, and draws it nearer to the image at the end by
    three steps of false position. Of a randomised model it sees one draw at a time, and keeps what was lucky.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: budget, at least 0; only what is nearer counts as a success.
        steps: of each restart, each of a backward pass for every wrong class, or one towards a target.
        restarts: runs; the first starts at the image, the others uniformly in the ball of half the budget or half the
            least distance so far, whichever is less.
        alpha_max: the most that the step is drawn towards the image, in (0, 1].
        eta: how far a step goes beyond the boundary, at least 1.
        beta: how far to keep of the way from the image once misled, in (0, 1].

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range.

    Reference: Croce and Hein, ICML 2020 (Minimally distorted adversarial examples).
    """
    return _attack(norm, epsilon, steps, 0, restarts, alpha_max, eta, beta)


def fab_t(
    norm: Norm,
    *,
    epsilon: float = math.inf,
    steps: int = 100,
    classes: int = 9,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Iterative:
    """`fab` towards each of the most likely wrong classes in turn; any wrong class is a success.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: budget, at least 0; only what is nearer counts as a success.
        steps: of each run, each of one backward pass.
        classes: wrong classes that are tried, by falling logit of the clean image; fewer than the model has.
        restarts: runs towards each class; the first starts at the image.
        alpha_max: as for `fab`.
        eta: as for `fab`.
        beta: as for `fab`.

    Returns:
        The attack. It chooses its targets itself: none may be given to it.

    Raises:
        ValueError: a number out of range, or targets.

    Reference: Croce and Hein, ICML 2020 (Minimally distorted adversarial examples).
    """
    check_count(classes, "classes")
    return _attack(norm, epsilon, steps, classes, restarts, alpha_max, eta, beta)


def _attack(
    norm: Norm, epsilon: float, steps: int, classes: int, restarts: int, alpha_max: float, eta: float, beta: float
) -> Iterative:
    check_norm(norm)
    check_budget(epsilon)
    check_count(steps, "steps")
    check_count(restarts, "restarts")
    check_positive(eta, "eta")
    if eta < 1:
        raise ValueError(f"eta must be at least 1, got {eta}")
    for value, name in ((alpha_max, "alpha_max"), (beta, "beta")):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}")
    moves = restarts * max(classes, 1) * steps

    def record(state: _State, x: Array, logits: Array, p: Problem, run: Array | int, passes: tuple[int, int]) -> _State:
        """The state with the iterate x looked at."""
        seen = Look(-norm.distance(x - p.images), _behind(logits, p), jnp.zeros((0,)))
        best = better(state.best, x, seen, p.labels, p.targets, run, *passes)
        level = jnp.where(best.loss != state.best.loss, margin(logits, p.labels, p.targets), state.best_margin)
        return state._replace(best=best, best_margin=level)

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        clean = exact.look(fold_in(p.keys, 0), logits_fn, margin, p.images, p.labels, p.targets, with_gradient=False)
        if classes:
            tried = likely_classes(clean.logits, p.labels, classes)
        else:
            tried = wrong_classes(clean.logits, p.labels, p.targets, None)
        none = jnp.zeros_like(clean.loss)
        state = _State(p.images, tried, no_best(p.images), none, none, clean.loss)
        return record(state, p.images, clean.logits, p, 0, (1, 0))

    def start(run: Array, keys: Key, p: Problem, best: Best) -> Array:
        # Without a budget and a success so far, half the box's diagonal is the most that makes sense.
        most = jnp.minimum(p.epsilon, norm.distance(jnp.ones_like(p.images)))
        radius = 0.5 * jnp.where(best.success, jnp.minimum(most, -best.loss), most)
        drawn = jnp.clip(p.images + norm.sample(fold_in(keys, 2 * steps), p.images.shape, radius), 0, 1)
        return jnp.where(run < max(classes, 1), p.images, drawn)

    def move(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        run, number = number // steps, number % steps
        keys, home = fold_in(p.keys, run + 1), p.images
        x = jax.lax.cond(number == 0, lambda: start(run, keys, p, state.best), lambda: state.x)
        tried = state.tried[:, run % classes][:, None] if classes else state.tried
        _, gap, slope = linearise(norm, fold_in(keys, 2 * number), logits_fn, x, p.labels, p.targets, tried)
        here = to_hyperplane(norm, x, slope, -gap)
        there = to_hyperplane(norm, home, slope, (slope * (x - home)).sum((1, 2, 3)) - gap)
        away, away_home = (jnp.maximum(norm.distance(deltas), 1e-8) for deltas in (here, there))
        alpha = per_example(jnp.minimum(away / (away + away_home), alpha_max), x)
        x = jnp.clip((1 - alpha) * (x + eta * here) + alpha * (home + eta * there), 0, 1)
        logits = logits_at(logits_fn, fold_in(keys, 2 * number + 1), x)
        misled = is_misled(logits, p.labels, p.targets)
        state = record(state, x, logits, p, run, (2, tried.shape[1]))
        return state._replace(x=jnp.where(per_example(misled, x), (1 - beta) * home + beta * x, x))

    def search(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        """Looks between the best iterate and the last point before it that did not mislead."""
        low, inside = state.inside_margin, state.inside
        crossing = inside + (1 - inside) * -low / (state.best_margin - low)
        # A tenth of what is left beyond the crossing: at it, rounding would decide.
        share = jnp.where((crossing >= inside) & (crossing < 1), 0.9 * crossing + 0.1, 1)
        x = p.images + per_example(share, p.images) * (state.best.images - p.images)
        logits = logits_at(logits_fn, fold_in(fold_in(p.keys, moves), number), x)
        misled = is_misled(_behind(logits, p), p.labels, p.targets)
        state = record(state, x, logits, p, state.best.restart, (1, 0))
        return state._replace(
            inside=jnp.where(misled, jnp.minimum(inside / jnp.maximum(share, 1e-30), 1), share),
            inside_margin=jnp.where(misled, low, margin(logits, p.labels, p.targets)),
        )

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        return jax.lax.cond(
            number < moves, lambda: move(number, logits_fn, p, state), lambda: search(number, logits_fn, p, state)
        )

    return Iterative(norm, epsilon, moves + SEARCHES, begin, step, takes_targets=not classes, minimal=True)
