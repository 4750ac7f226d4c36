"""SPSA: ascent along gradients estimated from losses."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.driver import Best, Iterative, Problem, better, no_best, random_point
from rbf_jax.attacks.gradients import Estimator, exact, fold_in
from rbf_jax.attacks.losses import Loss, margin
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_count, check_norm, check_not_negative, check_positive
from rbf_jax.types import Array, Key, LogitsFn, Norm

_DECAYS = 0.9, 0.999
"""Adam's, of its means of the gradient and of the gradient's square."""


class _State(NamedTuple):
    x: Array
    mean: Array
    square: Array
    best: Best


def estimate(
    keys: Key, losses: Callable[[Key, Array], Array], x: Array, *, directions: int, chunk: int, delta: Array | float
) -> Array:
    """Simultaneous perturbation: ``mean_i v_i (L(x + delta v_i) - L(x - delta v_i)) / (2 delta)``, v random signs.

    Args:
        keys: ``(B,)``; an example's directions are its own. The two sides of a pair are seen under the same key.
        losses: (keys ``(chunk, B)``, images ``(chunk, B, ...)``) -> ``(chunk, B)``.
        x: ``(B, ...)``.
        directions: how many are averaged.
        chunk: directions at once, a divisor of ``directions``.
        delta: length of the perturbation of a pixel, a number or ``(B,)``.

    Returns:
        The estimate, like x; pairs whose losses are not finite count as flat.

    Reference: Spall, IEEE Transactions on Automatic Control, 1992.
    """
    width = jnp.broadcast_to(jnp.asarray(delta, x.dtype), x.shape[:1])

    def add(number: Array, total: Array) -> Array:
        numbers = number * chunk + jnp.arange(chunk)
        pair_keys = jax.vmap(fold_in, (None, 0))(keys, numbers)
        draw = jax.vmap(jax.vmap(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype)))
        signs = draw(jax.vmap(fold_in, (0, None))(pair_keys, 0))
        look_keys = jax.vmap(fold_in, (0, None))(pair_keys, 1)
        aside = per_example(width, x) * signs
        slope = (losses(look_keys, x + aside) - losses(look_keys, x - aside)) / (2 * width)
        slope = jnp.where(jnp.isfinite(slope), slope, 0) / directions
        return total + jnp.einsum("kb,kb...->b...", slope, signs)

    return jax.lax.fori_loop(0, directions // chunk, add, jnp.zeros_like(x))


def spsa(
    norm: Norm,
    *,
    epsilon: float,
    steps: int = 100,
    directions: int = 128,
    chunk: int | None = None,
    delta: float | None = None,
    learning_rate: float | None = None,
    restarts: int = 1,
    loss: Loss = margin,
    gradient: Estimator = exact,
) -> Iterative:
    """SPSA: Adam on gradients estimated from differences of the loss, see `estimate`, then the ball and the box.

    Keeps the best iterate over all steps and restarts: a success before a failure, then the higher loss. The
    perturbed images that the estimate sees may leave the box, and the ball, by ``delta``.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius of the ball, at least 0.
        steps: of each restart; each takes ``2 * directions + 1`` looks at the model.
        directions: pairs of looks in a step; the paper has up to 4096.
        chunk: pairs at once, a divisor of ``directions``: the model sees ``chunk`` times the batch in one pass. None
            for the largest power of two up to 32.
        delta: length of the perturbation of a pixel. None for a third of what the ball leaves each pixel: ``epsilon /
            3`` in linf, ``epsilon / (3 sqrt(D))`` in l2, ``epsilon / (3 D)`` in l1. In linf that is about the published
            0.01, which was chosen for 8/255; at 0.3 on MNIST 0.01 sees a saturated front end as flat.
        learning_rate: Adam's, the length of a step in each pixel; None for the same.
        restarts: the first begins at the image, the others uniformly in the ball.
        loss: maximised.
        gradient: how the model is looked at: `exact`, `eot(draws)`, ...; no gradients are taken.

    Returns:
        The attack. A start that it is given is where the first restart begins.

    Raises:
        ValueError: a number out of range, or a chunk that does not divide the directions.

    Reference: Uesato et al., ICML 2018.
    """
    check_norm(norm)
    check_not_negative(epsilon, "epsilon")
    check_count(steps, "steps")
    check_count(directions, "directions")
    check_count(restarts, "restarts")
    for value, name in ((delta, "delta"), (learning_rate, "learning_rate")):
        if value is not None:
            check_positive(value, name)
    if chunk is not None:
        check_count(chunk, "chunk")
    together = math.gcd(directions, 32) if chunk is None else chunk
    if directions % together:
        raise ValueError(f"chunk must divide the {directions} directions, got {chunk}")

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        del logits_fn
        return _State(p.images, jnp.zeros_like(p.images), jnp.zeros_like(p.images), no_best(p.images))

    def start(restart: Array, keys: Key, p: Problem) -> Array:
        drawn = random_point(norm, keys, p.images, p.epsilon)
        return jnp.where(restart == 0, p.images if p.start is None else p.start, drawn)

    def scaled(value: float | None, p: Problem) -> Array:
        """A length by example, ``(B,)``."""
        share = p.epsilon / (3 * norm.distance(jnp.ones_like(p.images)))
        return share if value is None else jnp.full_like(share, value)

    def slope(keys: Key, logits_fn: LogitsFn, p: Problem, x: Array) -> Array:
        labels = jnp.tile(p.labels, together)
        targets = None if p.targets is None else jnp.tile(p.targets, together)

        def losses(keys: Key, images: Array) -> Array:
            rows = images.reshape(-1, *images.shape[2:])
            seen = gradient.look(keys.ravel(), logits_fn, loss, rows, labels, targets, with_gradient=False)
            return seen.loss.reshape(images.shape[:2])

        return estimate(keys, losses, x, directions=directions, chunk=together, delta=scaled(delta, p))

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        restart, number = number // (steps + 1), number % (steps + 1)
        keys = fold_in(fold_in(p.keys, restart), number)
        fresh = number == 0
        x = jax.lax.cond(fresh, lambda: start(restart, fold_in(keys, 0), p), lambda: state.x)
        mean, square = (jnp.where(fresh, 0, moment) for moment in (state.mean, state.square))
        seen = gradient.look(fold_in(keys, 1), logits_fn, loss, x, p.labels, p.targets, with_gradient=False)
        best = better(state.best, x, seen, p.labels, p.targets, restart, gradient.draws)

        def go_on() -> _State:
            ascent = slope(fold_in(keys, 2), logits_fn, p, x)
            taken = jnp.asarray(number, jnp.float32) + 1
            moments = [
                decay * moment + (1 - decay) * value
                for decay, moment, value in zip(_DECAYS, (mean, square), (ascent, ascent**2), strict=True)
            ]
            first, second = (moment / (1 - decay**taken) for decay, moment in zip(_DECAYS, moments, strict=True))
            rate = per_example(scaled(learning_rate, p), x)
            moved = norm.confine(p.images, x + rate * first / (jnp.sqrt(second) + 1e-8), p.epsilon)
            spent = best.forwards + 2 * directions * gradient.draws
            return _State(moved, moments[0], moments[1], best._replace(forwards=spent))

        return jax.lax.cond(number < steps, go_on, lambda: _State(x, mean, square, best))

    return Iterative(norm, epsilon, restarts * (steps + 1), begin, step, takes_start=True)
