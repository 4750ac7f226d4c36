"""RayS: the nearest decision boundary along rays of signs, from the predicted label alone."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from rbf_jax.attacks.driver import Best, Iterative, Problem, better, is_misled, no_best
from rbf_jax.attacks.gradients import exact, fold_in
from rbf_jax.attacks.losses import margin
from rbf_jax.attacks.norms import ROUNDING, Linf, per_example
from rbf_jax.checks import check_budget, check_count, check_positive
from rbf_jax.types import Array, LogitsFn


class _State(NamedTuple):
    signs: Array  # of the best ray, ``(B, D)``
    radius: Array  # where it misleads, inf if none is known
    level: Array  # of the block that is turned
    block: Array  # its number in that level
    low: Array  # the search along the ray in trial
    high: Array
    searching: Array  # else the ray in trial still has to mislead at `radius`
    best: Best


def rays(*, epsilon: float = math.inf, queries: int = 10_000, tolerance: float = 1e-3) -> Iterative:
    """RayS, for the least linf distance: ``min_v min {r: f(clip(x + r v)) misled}`` over sign vectors v.

    Turns the signs of one block after the other, all pixels first and then halves, quarters, ... of them. A turned ray
    that does not mislead at the best radius so far is dropped after that one query; along any other the boundary is
    found by bisection. Each query is a step of its own, so that each example goes at its own pace. Seen are predicted
    labels only.

    Args:
        epsilon: budget: what is found farther away is brought into the ball and looked at once more. inf for none.
        queries: looks at the model, the first of them at the image itself.
        tolerance: the bisection ends within this l2 distance, ``tolerance / sqrt(D)`` in linf.

    Returns:
        The attack. Where nothing misled, its images are the clean ones.

    Raises:
        ValueError: a number out of range.

    Reference: Chen and Gu, KDD 2020.
    """
    check_budget(epsilon)
    check_count(queries, "queries")
    check_positive(tolerance, "tolerance")

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        del logits_fn
        batch, size = len(p.images), math.prod(p.images.shape[1:])
        one, none = jnp.ones(batch, jnp.float32), jnp.zeros(batch, jnp.int32)
        return _State(
            jnp.ones((batch, size), jnp.float32), jnp.inf * one, none, none, 0 * one, one, none > 0, no_best(p.images)
        )

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        size = state.signs.shape[-1]
        last = math.ceil(math.log2(size))
        length = jnp.asarray([math.ceil(size / 2**level) for level in range(last + 1)], jnp.int32)[state.level]
        first = state.block * length
        pixels = jnp.arange(size, dtype=jnp.int32)
        turned = (pixels >= first[:, None]) & (pixels < (first + length)[:, None])
        trial = jnp.where(turned, -state.signs, state.signs)
        middle = 0.5 * (state.low + state.high)
        # A radius of 1 reaches the corner of the box from everywhere.
        radius = jnp.where(state.searching, middle, jnp.minimum(state.radius, 1))
        clean = jnp.asarray(number) == 0
        radius = jnp.where(clean, 0, radius)
        x = jnp.clip(p.images + per_example(radius, p.images) * trial.reshape(p.images.shape), 0, 1)
        seen = exact.look(fold_in(p.keys, number), logits_fn, margin, x, p.labels, p.targets, with_gradient=False)
        misled = is_misled(seen.logits, p.labels, p.targets)
        # What did not mislead is of no use, however near.
        seen = seen._replace(loss=jnp.where(misled, -Linf.distance(x - p.images), -jnp.inf))
        best = better(state.best, x, seen, p.labels, p.targets)

        low = jnp.where(state.searching, jnp.where(misled, state.low, middle), 0)
        high = jnp.where(misled, radius, state.high)
        going = state.searching | misled
        ended = going & (high - low <= max(tolerance / math.sqrt(size), ROUNDING * 8))
        taken = ended & (high < state.radius)
        go_on = (ended | ~going) & ~clean
        level_ends = first + length >= size
        block = jnp.where(level_ends, 0, state.block + 1)
        return _State(
            jnp.where((taken & ~clean)[:, None], trial, state.signs),
            jnp.where(taken, high, state.radius),
            jnp.where(go_on & level_ends, jnp.minimum(state.level + 1, last), state.level),
            jnp.where(go_on, block, state.block),
            low,
            high,
            going & ~ended,
            best,
        )

    return Iterative(Linf, epsilon, queries, begin, step, minimal=True)
