"""Fast gradient (sign) method."""

from rbf_jax.attacks.driver import fold_in, into_ball, is_misled, result, spread_arguments
from rbf_jax.attacks.gradients import Estimator, exact
from rbf_jax.attacks.losses import Loss, cross_entropy
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_not_negative
from rbf_jax.types import Array, Attack, AttackResult, Key, LogitsFn, Norm


def fgsm(norm: Norm, *, epsilon: float, loss: Loss = cross_entropy, gradient: Estimator = exact) -> Attack:
    """One step of full length along the steepest direction: ``clip(x + epsilon * direction(grad L(f(x), y)), 0, 1)``.

    For linf the direction is the gradient's sign. No random start.

    Args:
        norm: `Linf` or `L2`.
        epsilon: length of the step, at least 0.
        loss: maximised.
        gradient: `exact` or `eot(draws)`.

    Returns:
        The attack; its result holds the stepped image of every example, successful or not.

    Raises:
        ValueError: epsilon below 0.

    Reference: Goodfellow et al., ICLR 2015.
    """
    check_not_negative(epsilon, "epsilon")
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
        seen = gradient.look(fold_in(keys, 0), logits_fn, loss, images, labels, targets, with_gradient=True)
        stepped = images + per_example(radius, images) * norm.direction(seen.gradient)
        adversarial = into_ball(norm, images, stepped, radius)
        after = gradient.look(fold_in(keys, 1), logits_fn, loss, adversarial, labels, targets, with_gradient=False)
        success = is_misled(after.logits, labels, targets)
        return result(norm, images, adversarial, success, 2 * gradient.draws, gradient.draws)

    return attack
