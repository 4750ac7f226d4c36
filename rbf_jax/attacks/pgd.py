"""Projected gradient descent."""

import jax
import jax.numpy as jnp

from rbf_jax.attacks.driver import Best, better, fold_in, into_ball, no_best, result, spread_arguments
from rbf_jax.attacks.gradients import Estimator, Look, exact
from rbf_jax.attacks.losses import Loss, cross_entropy
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_count, check_not_negative, check_positive
from rbf_jax.types import Array, Attack, AttackResult, Key, LogitsFn, Norm


def pgd(
    norm: Norm,
    *,
    epsilon: float,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: Loss = cross_entropy,
    gradient: Estimator = exact,
) -> Attack:
    """Projected gradient descent: ``x <- clip(x0 + project(x + step_size * direction(grad) - x0), 0, 1)``.

    Keeps the best iterate over all steps and restarts, the last one included: a success before a failure, then the
    higher loss.

    Args:
        norm: `Linf` or `L2`.
        epsilon: radius of the ball, at least 0.
        steps: gradient steps of each restart.
        step_size: length of a step; None for ``2.5 * epsilon / steps`` of each example.
        restarts: runs from new starting points.
        random_start: start uniformly in the ball; without it a single run starts at the image itself.
        loss: maximised.
        gradient: `exact` or `eot(draws)`.

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range, or several restarts without a random start.

    Reference: Madry et al., ICLR 2018.
    """
    check_not_negative(epsilon, "epsilon")
    check_count(steps, "steps")
    check_count(restarts, "restarts")
    if step_size is not None:
        check_positive(step_size, "step_size")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts must be 1 without a random start (all would be the same), got {restarts}")
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
        length = per_example(2.5 * radius / steps if step_size is None else jnp.full_like(radius, step_size), images)

        def look(keys: Key, x: Array, *, with_gradient: bool) -> Look:
            return gradient.look(keys, logits_fn, loss, x, labels, targets, with_gradient=with_gradient)

        def restart(number: Array, best: Best) -> Best:
            run_keys = fold_in(keys, number)

            def step(number: Array, carry: tuple[Array, Best]) -> tuple[Array, Best]:
                x, best = carry
                seen = look(fold_in(run_keys, number + 1), x, with_gradient=True)
                best = better(best, x, seen.logits, seen.loss, labels, targets)
                return into_ball(norm, images, x + length * norm.direction(seen.gradient), radius), best

            start = images
            if random_start:
                start = images + norm.sample(fold_in(run_keys, 0), images.shape, radius)
                start = into_ball(norm, images, start, radius)
            x, best = jax.lax.fori_loop(0, steps, step, (start, best))
            seen = look(fold_in(run_keys, steps + 1), x, with_gradient=False)
            return better(best, x, seen.logits, seen.loss, labels, targets)

        best = jax.lax.fori_loop(0, restarts, restart, no_best(jnp.asarray(images)))
        forwards = restarts * (steps + 1) * gradient.draws
        return result(norm, images, best.images, best.success, forwards, restarts * steps * gradient.draws)

    return attack
