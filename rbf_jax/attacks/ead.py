"""Elastic-net attack: small in l1, hence on few pixels."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.cw import Search, first_search, is_repeat, judged, look_at_clean, next_search
from rbf_jax.attacks.driver import Best, Iterative, Problem, better, is_misled
from rbf_jax.attacks.gradients import Estimator, exact, fold_in
from rbf_jax.attacks.losses import hinge
from rbf_jax.attacks.norms import L1, per_example
from rbf_jax.checks import check_budget, check_count, check_not_negative, check_positive
from rbf_jax.types import Array, LogitsFn


def l1_rule(deltas: Array, beta: float) -> Array:
    """``|d|_1``."""
    del beta
    return L1.distance(deltas)


def elastic_net(deltas: Array, beta: float) -> Array:
    """``|d|_2^2 + beta |d|_1``."""
    return (deltas**2).sum((1, 2, 3)) + beta * L1.distance(deltas)


class _State(NamedTuple):
    x: Array
    slack: Array
    search: Search
    best: Best


def ead(
    *,
    epsilon: float = math.inf,
    steps: int = 1000,
    searches: int = 9,
    learning_rate: float = 0.01,
    initial_c: float = 1e-3,
    beta: float = 1e-3,
    confidence: float = 0.0,
    rule: Callable[[Array, float], Array] = l1_rule,
    gradient: Estimator = exact,
) -> Iterative:
    """EAD: minimises ``c max(confidence - margin(x'), 0) + |x' - x|_2^2`` and l1 by shrinkage (FISTA).

    With ``g`` the gradient of that sum at the slack ``y``, and ``k`` from 0 on:
    ``x_k+1 = shrink(y - learning_rate sqrt(1 - k / steps) g)``, ``y = x_k+1 + k / (k + 3) (x_k+1 - x_k)``. (The
    authors' code has k one higher in the momentum.) `shrink` takes each pixel back towards the clean one by beta, not
    by beta times the step as FISTA would: so does the authors' code. c is searched as by `cw_l2`. Success is that of x,
    not of the slack; the best image over all steps by the rule is kept, the clean one included. There is no early stop.
    On a randomised model as `cw_l2`.

    Args:
        epsilon: l1 budget, at least 0; inf for none. For a finite one keep `l1_rule`: the best by another may lie
            outside where some other image did not.
        steps: in each search, each of two looks: with gradient at the slack, without at x. The paper has 1000.
        searches: values of c.
        learning_rate: of the first step, above 0.
        initial_c: the first c, above 0.
        beta: by how much each step shrinks, at least 0.
        confidence: the margin to reach, at least 0. Where it never is, the clean image is returned.
        rule: what the best image has least of: (deltas, beta) -> ``(B,)``; `l1_rule` or `elastic_net`. What is
            reported as distance is l1 under any rule.
        gradient: `exact`, `eot(draws)`, ...

    Returns:
        The attack, of ``searches * steps`` steps.

    Raises:
        ValueError: a number out of range.

    Reference: Chen et al., AAAI 2018.
    """
    check_budget(epsilon)
    check_count(steps, "steps")
    check_count(searches, "searches")
    check_positive(learning_rate, "learning_rate")
    check_positive(initial_c, "initial_c")
    check_not_negative(beta, "beta")
    check_not_negative(confidence, "confidence")
    loss, count = hinge(confidence), searches * steps

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        best = look_at_clean(logits_fn, p, gradient, loss, confidence, count + 1)
        return _State(p.images, p.images, first_search(initial_c, best.loss), best)

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        inner, search, keys = number % steps, state.search, fold_in(p.keys, number)
        before, slack = (jnp.where(inner == 0, p.images, old) for old in (state.x, state.slack))
        passed = jnp.asarray(inner, jnp.float32)

        seen = gradient.look(fold_in(keys, 0), logits_fn, loss, slack, p.labels, p.targets, with_gradient=True)
        slope = 2 * (slack - p.images) - per_example(search.c, slack) * seen.gradient
        delta = slack - learning_rate * jnp.sqrt(1 - passed / steps) * slope - p.images
        x = jnp.clip(p.images + jnp.sign(delta) * jnp.maximum(jnp.abs(delta) - beta, 0), 0, 1)
        slack = x + passed / (passed + 3) * (x - before)

        seen = gradient.look(fold_in(keys, 1), logits_fn, loss, x, p.labels, p.targets, with_gradient=False)
        seen = judged(seen, p, rule(x - p.images, beta), confidence)
        passes = gradient.forwards + gradient.draws, gradient.draws
        # The rule chooses, but the driver reads the loss of the best as a distance.
        best = state.best._replace(loss=-rule(state.best.images - p.images, beta))
        best = better(best, x, seen, p.labels, p.targets, 0, *passes)
        best = best._replace(loss=-L1.distance(best.images - p.images))

        search = search._replace(found=search.found | is_misled(seen.logits, p.labels, p.targets))
        following = next_search(search, is_repeat(number, steps, searches))
        search = jax.tree.map(lambda new, old: jnp.where(inner == steps - 1, new, old), following, search)
        return _State(x, slack, search, best)

    return Iterative(L1, epsilon, count, begin, step, minimal=True)
