"""The nearest decision boundary of a model made linear, and the shortest way there within the box."""

import jax
import jax.numpy as jnp

from rbf_jax.attacks.driver import choose
from rbf_jax.attacks.gradients import logits_at
from rbf_jax.attacks.losses import likely_classes, pick
from rbf_jax.attacks.norms import L1, L2, Linf, per_example
from rbf_jax.types import Array, Key, LogitsFn, Norm

DUAL = {"linf": L1.distance, "l2": L2.distance, "l1": Linf.distance}
"""By what a step of length 1 raises a linear function at most, for each norm's name."""


def wrong_classes(logits: Array, labels: Array, targets: Array | None, most: int | None) -> Array:
    """The targets alone, or the likeliest wrong classes, all of them where ``most`` is None; int32 ``(B, K)``."""
    if targets is not None:
        return targets[:, None]
    others = logits.shape[-1] - 1
    return likely_classes(logits, labels, others if most is None else min(most, others))


def linearise(
    norm: Norm, keys: Key, logits_fn: LogitsFn, x: Array, labels: Array, targets: Array | None, tried: Array
) -> tuple[Array, Array, Array]:
    """The nearest of the linearised boundaries ``z_k(x) - z_y(x) + w_k . (x' - x) = 0``.

    Towards a target, y is the likeliest of the other classes: all of them stand in its way, not the label alone.

    Args:
        norm: in which the distance ``|z_k - z_y| / |w_k|_dual`` counts.
        keys: ``(B,)``.
        logits_fn: the model; one forward pass, and one backward pass for each class that is tried.
        x: images ``(B, H, W, C)``.
        labels: int32 ``(B,)``.
        targets: int32 ``(B,)``, or None.
        tried: int32 ``(B, K)``, the classes k.

    Returns:
        logits ``(B, classes)``; the gap ``z_k - z_y``, ``(B,)``; its gradient w, ``(B, H, W, C)``, in which what is
        infinite counts as the steepest finite entry, as 1 if there is none (a boundary at distance 0 would be no way to
        go). Gap and gradient are 0 where no class has a usable gradient.
    """
    logits, pull_back = jax.vjp(lambda x: logits_at(logits_fn, keys, x), x)
    classes = jnp.arange(logits.shape[-1])
    own = labels if targets is None else jnp.where(targets[:, None] == classes, -jnp.inf, logits).argmax(-1)
    gaps = jnp.take_along_axis(logits, tried, -1) - pick(logits, own)[:, None]

    def nearer(k: Array, nearest: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        towards = jax.nn.one_hot(tried[:, k], len(classes), dtype=logits.dtype)
        slope = pull_back(towards - jax.nn.one_hot(own, len(classes), dtype=logits.dtype))[0]
        finite = jnp.where(jnp.isfinite(slope), jnp.abs(slope), 0)
        limit = Linf.distance(finite)
        limit = per_example(jnp.where(limit > 0, limit, 1), slope)
        slope = jnp.clip(jnp.where(jnp.isnan(slope), 0, slope), -limit, limit)
        steepness = DUAL[norm.name](slope)
        # Without a slope there is no boundary; a NaN of the logits is no distance below infinity either.
        away = jnp.where(steepness > 0, jnp.abs(gaps[:, k]) / jnp.maximum(steepness, 1e-30), jnp.inf)
        return choose(away < nearest[0], (away, gaps[:, k], slope), nearest)

    # One class after the other, so that memory is that of one gradient.
    none = jnp.zeros_like(gaps[:, 0])
    _, gap, slope = jax.lax.fori_loop(0, tried.shape[1], nearer, (none + jnp.inf, none, jnp.zeros_like(x)))
    return logits, gap, slope


def to_hyperplane(norm: Norm, x: Array, slope: Array, rise: Array) -> Array:
    """The shortest deltas with ``slope . delta = rise`` and ``x + delta`` in the box [0, 1].

    A pixel moves the way that helps, by ``min(t u_i, room_i)`` up to its side of the box, with ``u_i = 1`` in linf and
    ``|slope_i|`` in l2: the gain is piecewise linear in t, and sorting the pixels by where they hit the box finds the
    piece. In l1 the pixels of the steepest slopes go all the way, one after the other. Where even the corner of the box
    does not reach the hyperplane, the deltas lead to that corner.

    Args:
        norm: `Linf`, `L2` or `L1`.
        x: images ``(B, H, W, C)`` in [0, 1].
        slope: ``(B, H, W, C)``, finite.
        rise: ``(B,)``.

    Reference: Croce and Hein, ICML 2020, Section 3.1 and Appendix A.
    """
    flat, w = x.reshape(len(x), -1), slope.reshape(len(x), -1)
    largest = jnp.abs(w).max(-1, keepdims=True)
    # In units of the largest slope: squares of slopes below 1e-19 would vanish. What is far smaller gains nothing.
    w = w / jnp.where(largest > 0, largest, 1)
    w = jnp.where(jnp.abs(w) > 1e-12, w, 0)
    gain = jnp.where(jnp.isnan(rise), 0, rise)[:, None] / jnp.where(largest > 0, largest, 1)
    way, size, gain = jnp.sign(w) * jnp.sign(gain), jnp.abs(w), jnp.abs(gain)
    room = jnp.where(way > 0, 1 - flat, jnp.where(way < 0, flat, 0))
    if norm.name == "l1":
        moved = _steepest_first(size, room, gain)
    else:
        moved = _all_together(size, room, gain, jnp.where(size > 0, 1.0, 0.0) if norm.name == "linf" else size)
    return (way * moved).reshape(x.shape)


def _steepest_first(size: Array, room: Array, gain: Array) -> Array:
    order = jnp.argsort(-size, -1)
    most = jnp.take_along_axis(size * room, order, -1)
    taken = jnp.clip(gain - (jnp.cumsum(most, -1) - most), 0, most)
    taken = jnp.take_along_axis(taken, jnp.argsort(order, -1), -1)
    return jnp.minimum(taken / jnp.where(size > 0, size, 1), room)


def _all_together(size: Array, room: Array, gain: Array, unit: Array) -> Array:
    ends = room / jnp.where(unit > 0, unit, 1)
    order = jnp.argsort(ends, -1)
    ends, most, rate = (jnp.take_along_axis(values, order, -1) for values in (ends, size * room, size * unit))
    # Before pixel k hits its side: what the pixels before it gain for good, and what the others gain for each t.
    fixed = jnp.cumsum(most, -1) - most
    rates = jnp.cumsum(rate[:, ::-1], -1)[:, ::-1]
    reached = fixed + ends * rates >= gain
    piece = jnp.where(reached.any(-1), reached.argmax(-1), reached.shape[-1] - 1)[:, None]
    end, fixed, rates = (jnp.take_along_axis(values, piece, -1) for values in (ends, fixed, rates))
    t = jnp.clip((gain - fixed) / jnp.where(rates > 0, rates, 1), 0, end)
    t = jnp.where(reached.any(-1, keepdims=True), t, ends[:, -1:])
    return jnp.minimum(t * unit, room)
