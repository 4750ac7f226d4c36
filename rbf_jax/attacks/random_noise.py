"""Random noise: the baseline that every attack must beat."""

from typing import NamedTuple

import jax.numpy as jnp

from rbf_jax.attacks.driver import Best, Iterative, Problem, better, no_best
from rbf_jax.attacks.gradients import Estimator, exact, fold_in
from rbf_jax.attacks.losses import Loss, margin
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_count, check_norm, check_not_negative
from rbf_jax.types import Array, LogitsFn, Norm


class _State(NamedTuple):
    best: Best


def random_noise(
    norm: Norm, *, epsilon: float, samples: int = 10_000, loss: Loss = margin, gradient: Estimator = exact
) -> Iterative:
    """The best of many random perturbations: ``x + d``, d uniform in the ball, clipped to the box.

    In linf every second one is a corner of the ball instead, ``d = epsilon * signs``: it reaches further.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius of the ball, at least 0.
        samples: perturbations tried.
        loss: the best is the success, or else the failure, where it is highest.
        gradient: how the model is looked at: `exact`, `eot(draws)`, ...; no gradients are taken.

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range.

    Reference: Carlini et al., On Evaluating Adversarial Robustness, 2019.
    """
    check_norm(norm)
    check_not_negative(epsilon, "epsilon")
    check_count(samples, "samples")

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        del logits_fn
        return _State(no_best(p.images))

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        keys = fold_in(p.keys, number)
        deltas = norm.sample(fold_in(keys, 0), p.images.shape, p.epsilon)
        if norm.name == "linf":
            corners = per_example(p.epsilon, deltas) * jnp.sign(deltas)
            deltas = jnp.where(number % 2 == 1, corners, deltas)
        x = norm.confine(p.images, p.images + deltas, p.epsilon)
        seen = gradient.look(fold_in(keys, 1), logits_fn, loss, x, p.labels, p.targets, with_gradient=False)
        return _State(better(state.best, x, seen, p.labels, p.targets, forwards=gradient.draws))

    return Iterative(norm, epsilon, samples, begin, step)
