"""Fast gradient (sign) method."""

from typing import NamedTuple

from rbf_jax.attacks.driver import Best, Iterative, Problem, better, no_best
from rbf_jax.attacks.gradients import Estimator, exact, fold_in
from rbf_jax.attacks.losses import Loss, cross_entropy
from rbf_jax.checks import check_norm, check_not_negative
from rbf_jax.types import Array, LogitsFn, Norm


class _State(NamedTuple):
    best: Best


def fgsm(norm: Norm, *, epsilon: float, loss: Loss = cross_entropy, gradient: Estimator = exact) -> Iterative:
    """One step to the ball's best point to first order: ``clip(x + argmax_{|d| <= epsilon} <d, grad L(f(x), y)>)``.

    For linf that is ``epsilon sign(grad)``, for l2 ``epsilon grad / |grad|_2``; for l1 pixels are filled up to the box,
    the largest gradient first. No random start.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: length of the step, at least 0.
        loss: maximised.
        gradient: `exact`, `eot(draws)`, ...

    Returns:
        The attack; its result holds the stepped image of every example, successful or not.

    Raises:
        ValueError: epsilon below 0.

    Reference: Goodfellow et al., ICLR 2015.
    """
    check_norm(norm)
    check_not_negative(epsilon, "epsilon")

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        del logits_fn
        return _State(no_best(p.images))

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        del number
        seen = gradient.look(fold_in(p.keys, 0), logits_fn, loss, p.images, p.labels, p.targets, with_gradient=True)
        x = norm.confine(p.images, p.images + norm.steepest(seen.gradient, p.images, p.epsilon), p.epsilon)
        after = gradient.look(fold_in(p.keys, 1), logits_fn, loss, x, p.labels, p.targets, with_gradient=False)
        forwards = gradient.forwards + gradient.draws
        return _State(better(state.best, x, after, p.labels, p.targets, 0, forwards, gradient.draws))

    return Iterative(norm, epsilon, 1, begin, step)
