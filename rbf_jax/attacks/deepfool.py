"""DeepFool: from one linearised boundary to the next until the model is misled."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.boundary import DUAL, linearise, wrong_classes
from rbf_jax.attacks.driver import Best, Iterative, Problem, better, is_misled, no_best
from rbf_jax.attacks.gradients import Look, exact, fold_in, logits_at
from rbf_jax.attacks.losses import margin
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_budget, check_count, check_norm, check_not_negative
from rbf_jax.types import Array, LogitsFn, Norm

NUDGE = 1e-4
"""What is added to each step's length, as published: close to the boundary a step would be lost in rounding."""


class _State(NamedTuple):
    x: Array
    tried: Array  # classes, ``(B, K)``
    best: Best


def deepfool(
    norm: Norm,
    *,
    epsilon: float = math.inf,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int | None = 10,
) -> Iterative:
    """DeepFool: ``x <- clip(x + (1 + overshoot) (|z_k - z_y| / |w_k|_dual + 1e-4) direction(w_k))``, k the nearest.

    ``w_k`` is the gradient of ``z_k - z_y`` at x, and k the class whose linearised boundary is nearest. Stops where the
    model is misled. In l1 a step fills pixels up to the box, the largest gradient first. Of a randomised model it sees
    one draw at a time, and keeps what was lucky.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: budget, at least 0; only what is nearer counts as a success.
        steps: at most.
        overshoot: how far beyond the boundary, in parts of the step; at least 0.
        classes: that are looked at, the label's among them, by falling logit of the clean image, at least 2; None for
            all. Towards a target, its boundary with the likeliest other class is the only one.

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range.

    Reference: Moosavi-Dezfooli et al., CVPR 2016.
    """
    check_norm(norm)
    check_budget(epsilon)
    check_count(steps, "steps")
    check_not_negative(overshoot, "overshoot")
    if classes is not None:
        check_count(classes, "classes", 2)

    def record(best: Best, x: Array, logits: Array, p: Problem, backwards: int) -> Best:
        seen = Look(-norm.distance(x - p.images), logits, jnp.zeros((0,)))
        return better(best, x, seen, p.labels, p.targets, backwards=backwards)

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        clean = exact.look(fold_in(p.keys, 0), logits_fn, margin, p.images, p.labels, p.targets, with_gradient=False)
        tried = wrong_classes(clean.logits, p.labels, p.targets, None if classes is None else classes - 1)
        return _State(p.images, tried, record(no_best(p.images), p.images, clean.logits, p, 0))

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        keys, x = fold_in(p.keys, number + 1), state.x

        def go_on() -> _State:
            logits, gap, slope = linearise(norm, keys, logits_fn, x, p.labels, p.targets, state.tried)
            steepness = DUAL[norm.name](slope)
            away = jnp.where(steepness > 0, jnp.abs(gap) / jnp.maximum(steepness, 1e-30), 0)
            # No way within the box is longer than the number of pixels; infinity times 0 would be NaN.
            length = (1 + overshoot) * (jnp.minimum(away, x[0].size) + NUDGE)
            moved = jnp.clip(x + norm.steepest(slope, x, length), 0, 1)
            stays = is_misled(logits, p.labels, p.targets)
            best = record(state.best, x, logits, p, state.tried.shape[1])
            return state._replace(x=jnp.where(per_example(stays, x), x, moved), best=best)

        def end() -> _State:
            return state._replace(best=record(state.best, x, logits_at(logits_fn, keys, x), p, 0))

        return jax.lax.cond(number < steps, go_on, end)

    return Iterative(norm, epsilon, steps + 1, begin, step, minimal=True)
