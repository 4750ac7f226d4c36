"""The attacks of Carlini and Wagner: the least l2 or linf distance by Adam under a change of variables."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.driver import Best, Iterative, Problem, better, choose, handicapped, is_misled, no_best
from rbf_jax.attacks.gradients import Estimator, Look, exact, fold_in
from rbf_jax.attacks.losses import Loss, hinge
from rbf_jax.attacks.norms import L2, Linf, per_example
from rbf_jax.checks import check_budget, check_count, check_fraction, check_not_negative, check_positive
from rbf_jax.types import Array, LogitsFn

SCALE = 0.99
"""How far a pixel of 0 or 1 lies up the tanh: at 1 it would be at infinity, and its gradient 0."""


# What these attacks and EAD share


def judged(seen: Look, p: Problem, measure: Array, confidence: float) -> Look:
    """A look for `better`: the least measure is best, and misled is only what is so by the confidence."""
    return seen._replace(loss=-measure, logits=handicapped(seen.logits, p, confidence))


def look_at_clean(
    logits_fn: LogitsFn, p: Problem, gradient: Estimator, loss: Loss, confidence: float, number: int
) -> Best:
    """The best before the first step: what is misled already is at distance 0."""
    keys = fold_in(p.keys, number)
    seen = gradient.look(keys, logits_fn, loss, p.images, p.labels, p.targets, with_gradient=False)
    seen = judged(seen, p, jnp.zeros_like(seen.loss), confidence)
    return better(no_best(p.images), p.images, seen, p.labels, p.targets, 0, gradient.draws)


class Search(NamedTuple):
    """The binary search for the least constant that misleads; all ``(B,)``.

    Attributes:
        c: the constant of this round.
        lower: the largest that failed.
        upper: the least that worked, inf before there is one.
        found: whether this round has misled the model.
    """

    c: Array
    lower: Array
    upper: Array
    found: Array


def first_search(c: float, like: Array) -> Search:
    """The first round, for values like these, ``(B,)``."""
    zero = jnp.zeros_like(like)
    return Search(zero + c, zero, zero + jnp.inf, zero > 0)


def next_search(search: Search, repeat: Array) -> Search:
    """The next round: ten times the constant until one has worked, then halfway; to repeat, the least that worked."""
    upper = jnp.where(search.found, jnp.minimum(search.upper, search.c), search.upper)
    lower = jnp.where(search.found, search.lower, jnp.maximum(search.lower, search.c))
    bounded = jnp.isfinite(upper)
    c = jnp.where(bounded, 0.5 * (lower + upper), 10 * search.c)
    # Float32 would overflow after many failures.
    c = jnp.minimum(jnp.where(repeat & bounded, upper, c), 1e10)
    return Search(c, lower, upper, jnp.zeros_like(search.found))


def is_repeat(number: Array, steps: int, searches: int) -> Array:
    """Whether the round after this step is a last one that repeats: as published, where there are ten or more."""
    return ((number + 1) // steps == searches - 1) & (searches >= 10)


# The change of variables


class _Adam(NamedTuple):
    """The variable w and Adam's moments, ``(B, H, W, C)``."""

    w: Array
    mean: Array
    square: Array


def _start(images: Array) -> _Adam:
    w = jnp.arctanh(SCALE * (2 * images - 1))
    return _Adam(w, jnp.zeros_like(w), jnp.zeros_like(w))


def _image(w: Array) -> Array:
    return jnp.clip(0.5 + 0.5 / SCALE * jnp.tanh(w), 0, 1)


def _descend(adam: _Adam, slope: Array, number: Array, learning_rate: float) -> _Adam:
    """One step of Adam, its ``number``-th since the moments were 0, from the slope with respect to the image."""
    # A model that overflows must not poison the moments: the bound's square is finite.
    slope = jnp.clip(slope * 0.5 / SCALE * (1 - jnp.tanh(adam.w) ** 2), -1e18, 1e18)
    mean, square = 0.9 * adam.mean + 0.1 * slope, 0.999 * adam.square + 0.001 * slope**2
    passed = jnp.asarray(number, jnp.float32)
    step = mean / (1 - 0.9**passed) / (jnp.sqrt(square / (1 - 0.999**passed)) + 1e-8)
    limit = math.atanh(SCALE)
    return _Adam(jnp.clip(adam.w - learning_rate * step, -limit, limit), mean, square)


def _check(epsilon: float, steps: int, learning_rate: float, initial_c: float, confidence: float) -> None:
    check_budget(epsilon)
    check_count(steps, "steps")
    check_positive(learning_rate, "learning_rate")
    check_positive(initial_c, "initial_c")
    check_not_negative(confidence, "confidence")


class _L2State(NamedTuple):
    adam: _Adam
    search: Search
    best: Best


def cw_l2(
    *,
    epsilon: float = math.inf,
    steps: int = 1000,
    searches: int = 9,
    learning_rate: float = 0.01,
    initial_c: float = 1e-3,
    confidence: float = 0.0,
    gradient: Estimator = exact,
) -> Iterative:
    """Carlini and Wagner's l2 attack: minimises ``|x' - x|_2^2 + c max(confidence - margin(x'), 0)`` by Adam.

    ``x' = (1 + tanh(w) / s) / 2`` with ``|tanh(w)| <= s = 0.99`` is the box. The published attack has x at
    ``tanh(w) = 0.999999 (2 x - 1)`` instead, where a pixel of 0 or 1 first spends some 500 steps on a flat tanh, and
    where it is 5e-7 off; here it moves at once, and ``x' = x`` at the start. c is searched for each example: times 10
    until the model is misled, then by bisection; from ten searches on, the last is once more at the least c that
    misled it. The nearest misleading image over all steps is kept, the clean one included. There is no early stop.

    A randomised model is misled by luck before long, and the image of that look is kept: give `eot` and a confidence
    above 0, or take an attack within a ball.

    Args:
        epsilon: budget, at least 0; inf for none.
        steps: looks in each search, the first at the clean image, and so one more than of Adam; the paper has 10000.
        searches: values of c.
        learning_rate: of Adam, above 0.
        initial_c: the first c, above 0.
        confidence: the margin to reach, at least 0. Where it never is, the clean image is returned.
        gradient: `exact`, `eot(draws)`, ...

    Returns:
        The attack, of ``searches * steps`` steps.

    Raises:
        ValueError: a number out of range.

    Reference: Carlini and Wagner, IEEE S&P 2017.
    """
    _check(epsilon, steps, learning_rate, initial_c, confidence)
    check_count(searches, "searches")
    loss, count = hinge(confidence), searches * steps

    def begin(logits_fn: LogitsFn, p: Problem) -> _L2State:
        best = look_at_clean(logits_fn, p, gradient, loss, confidence, count + 1)
        return _L2State(_start(p.images), first_search(initial_c, best.loss), best)

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _L2State) -> _L2State:
        inner, search = number % steps, state.search
        adam = jax.tree.map(lambda new, old: jnp.where(inner == 0, new, old), _start(p.images), state.adam)
        x = _image(adam.w)
        seen = gradient.look(fold_in(p.keys, number), logits_fn, loss, x, p.labels, p.targets, with_gradient=True)
        seen = judged(seen, p, L2.distance(x - p.images), confidence)
        best = better(state.best, x, seen, p.labels, p.targets, 0, gradient.forwards, gradient.draws)
        adam = _descend(adam, 2 * (x - p.images) - per_example(search.c, x) * seen.gradient, inner + 1, learning_rate)
        # At the clean image a noisy model errs by luck: that says nothing of c.
        misled = is_misled(seen.logits, p.labels, p.targets) & (inner > 0)
        search = search._replace(found=search.found | misled)
        following = next_search(search, is_repeat(number, steps, searches))
        search = jax.tree.map(lambda new, old: jnp.where(inner == steps - 1, new, old), following, search)
        return _L2State(adam, search, best)

    return Iterative(L2, epsilon, count, begin, step, minimal=True)


class _LinfState(NamedTuple):
    adam: _Adam
    since: Array  # steps since Adam was reset, int32 ``(B,)``
    tried: Array  # of them, those at this c
    tau: Array
    c: Array
    best: Best


def cw_linf(
    *,
    epsilon: float = math.inf,
    steps: int = 10_000,
    patience: int = 200,
    learning_rate: float = 5e-3,
    initial_c: float = 1e-5,
    largest_c: float = 20.0,
    shrink: float = 0.9,
    smallest_tau: float = 1 / 256,
    confidence: float = 0.0,
    gradient: Estimator = exact,
) -> Iterative:
    """Carlini and Wagner's linf attack: minimises ``c max(confidence - margin, 0) + sum_i max(|x' - x|_i - tau, 0)``.

    In the variables of `cw_l2`, by Adam. Each example goes its own way through the steps: tau starts at 1. Once the
    model is misled within tau, tau becomes ``shrink`` times the distance reached, and Adam starts afresh from that very
    image. After each ``patience`` steps without success, c doubles. An example rests once tau is at most
    ``smallest_tau`` or c at least ``largest_c``, and the nearest misleading image over all steps is its result: about
    ``1 / shrink`` times the least distance at worst, where that is well above ``smallest_tau`` (1.3 to 1.5 times at
    0.003; there a ``learning_rate`` of 5e-4 and a ``smallest_tau`` of 1e-4 bring it to 1.1). On a randomised model as
    `cw_l2`.

    Args:
        epsilon: budget, at least 0; inf for none.
        steps: in all. The published attack takes as many as it needs, at most some 73000.
        patience: steps before c doubles; the published attack has 1000.
        learning_rate: of Adam, above 0.
        initial_c: the first c, above 0.
        largest_c: where an example gives up.
        shrink: factor of tau, in (0, 1).
        smallest_tau: where an example is done, above 0.
        confidence: the margin to reach, at least 0. Where it never is, the clean image is returned.
        gradient: `exact`, `eot(draws)`, ...

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range.

    Reference: Carlini and Wagner, IEEE S&P 2017, and their code.
    """
    _check(epsilon, steps, learning_rate, initial_c, confidence)
    check_count(patience, "patience")
    check_positive(largest_c, "largest_c")
    check_positive(smallest_tau, "smallest_tau")
    check_fraction(shrink, "shrink")
    loss = hinge(confidence)

    def begin(logits_fn: LogitsFn, p: Problem) -> _LinfState:
        best = look_at_clean(logits_fn, p, gradient, loss, confidence, steps + 1)
        none, one = jnp.zeros_like(best.restart), jnp.ones_like(best.loss)
        return _LinfState(_start(p.images), none, none, one, initial_c * one, best)

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _LinfState) -> _LinfState:
        x = _image(state.adam.w)
        delta = x - p.images
        distance = Linf.distance(delta)
        seen = gradient.look(fold_in(p.keys, number), logits_fn, loss, x, p.labels, p.targets, with_gradient=True)
        seen = judged(seen, p, distance, confidence)
        best = better(state.best, x, seen, p.labels, p.targets, 0, gradient.forwards, gradient.draws)

        excess = jnp.maximum(jnp.abs(delta) - per_example(state.tau, x), 0).sum((1, 2, 3))
        works = is_misled(seen.logits, p.labels, p.targets) & (excess <= 1e-4 * state.c)
        tau = jnp.where(works, shrink * jnp.minimum(state.tau, distance), state.tau)
        since, tried = jnp.where(works, 0, state.since) + 1, jnp.where(works, 0, state.tried) + 1
        moments = choose(works, jax.tree.map(jnp.zeros_like, state.adam), state.adam)
        outside = jnp.where(jnp.abs(delta) > per_example(tau, x), jnp.sign(delta), 0)
        adam = _descend(
            moments._replace(w=state.adam.w),
            outside - per_example(state.c, x) * seen.gradient,
            per_example(since, x),
            learning_rate,
        )
        c = jnp.where(tried == patience, 2 * state.c, state.c)
        moved = _LinfState(adam, since, tried % patience, tau, c, best)
        rests = (state.tau <= smallest_tau) | (state.c >= largest_c)
        return choose(rests, state, moved)._replace(best=best)

    return Iterative(Linf, epsilon, steps, begin, step, minimal=True)
