"""Square Attack: random search with windows of falling size, from the loss alone."""

import math
from bisect import bisect_left
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.attacks.driver import Best, Iterative, Problem, better, no_best
from rbf_jax.attacks.gradients import Estimator, exact, fold_in
from rbf_jax.attacks.losses import Loss, margin
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_choice, check_count, check_norm, check_not_negative
from rbf_jax.types import Array, Key, LogitsFn, Norm

HALVINGS = 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000
"""After which of 10,000 proposals the share of the pixels that a window covers is halved."""

_ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


class _State(NamedTuple):
    run: Best  # of this restart: where the search stands
    best: Best


class _Window(NamedTuple):
    rows: Array  # of each pixel, counted from the window's corner, ``(B, H, 1)``
    columns: Array  # ``(B, 1, W)``
    inside: Array  # bool ``(B, H, W, 1)``


def share(p_init: float, number: int, horizon: int) -> float:
    """The share of the pixels that the window of a proposal covers, ``p_init / 2**halvings``.

    Args:
        p_init: of the first proposals.
        number: of the proposal, from 0.
        horizon: proposals over which the published schedule, made for 10,000, is spread.

    Reference: Andriushchenko et al., ECCV 2020, section 5.
    """
    return p_init / 2 ** bisect_left(HALVINGS, int(number / horizon * 10_000))


def side(covered: float, height: int, width: int, *, odd: bool) -> int:
    """Side of a window that covers a share of the image; with ``odd``, as bumps need it, odd and at least 3."""
    fits = min(height, width)
    length = max(round(math.sqrt(covered * height * width)), 3 if odd else 1)
    if odd:
        length += length % 2 == 0
        fits -= fits % 2 == 0
    return min(length, fits)


def bump(side: int, order: float) -> np.ndarray:
    """The published perturbation of a window, ``(side, side)``, of length 1: a peak above, its negative below.

    At Chebyshev distance d from its centre a peak is ``sum_{k > d} 1 / k^2``; in l1, order 1, ``sum_{k > d} 1 / k^4``.
    """

    def peak(height: int, width: int) -> np.ndarray:
        rows, columns = np.arange(height) - height // 2, np.arange(width) - width // 2
        away = np.maximum(np.abs(rows)[:, None], np.abs(columns))
        heights = np.cumsum(1 / np.arange(max(height, width) // 2 + 1, 0, -1) ** (4.0 if order == 1 else 2.0))
        heights = heights[::-1][away]
        return heights / max(np.linalg.norm(heights.ravel(), order), 1e-30)

    both = np.concatenate([peak(side // 2, side), -peak(side - side // 2, side)])
    return (both / np.linalg.norm(both.ravel(), order)).astype(np.float32)


def _signs(key: Key, shape: tuple[int, ...]) -> Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def _window(keys: Key, length: Array, height: int, width: int) -> _Window:
    """A window of one size for each example, anywhere in its image."""
    room = jnp.asarray([height, width]) - length + 1
    corners = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, room))(keys)
    rows = jnp.arange(height)[None, :, None] - corners[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] - corners[:, 1, None, None]
    inside = (rows >= 0) & (rows < length) & (columns >= 0) & (columns < length)
    return _Window(rows, columns, inside[..., None])


def _stripes(keys: Key, p: Problem) -> Array:
    """Start in linf: columns of one sign by channel."""
    _, _, width, channels = p.images.shape
    return jax.vmap(lambda key: _signs(key, (1, width, channels)))(keys) * per_example(p.epsilon, p.images)


def _tiles(keys: Key, p: Problem, norm: Norm) -> Array:
    """Start in l2 and l1: bumps all over the image, each of random signs by channel and lying or standing."""
    _, height, width, channels = p.images.shape
    length = max(min(height, width) // 5, 1)
    down, across = height // length, width // length
    one = jnp.asarray(bump(length, _ORDER[norm.name]))
    standing, lying = (jnp.tile(tile, (down, across))[..., None] for tile in (one, one.T))

    def spread(values: Array) -> Array:
        return values.repeat(length, 0).repeat(length, 1)

    def draw(key: Key) -> Array:
        sign_key, turn_key = jax.random.split(key)
        turned = spread(jax.random.bernoulli(turn_key, shape=(down, across, 1)))
        field = jnp.where(turned, lying, standing) * spread(_signs(sign_key, (down, across, channels)))
        margins = [(rest // 2, rest - rest // 2) for rest in (height % length, width % length)]
        return jnp.pad(field, (*margins, (0, 0)))

    field = jax.vmap(draw)(keys)
    return field * per_example(p.epsilon / norm.distance(field), field)


def _flip(keys: Key, length: Array, p: Problem, x: Array) -> Array:
    """Proposal in linf: a window of ``+-epsilon``, one sign by channel."""
    _, height, width, channels = x.shape
    window = _window(fold_in(keys, 0), length, height, width)
    signs = jax.vmap(lambda key: _signs(key, (1, 1, channels)))(fold_in(keys, 1))
    return jnp.where(window.inside, p.images + per_example(p.epsilon, x) * signs, x)


def _shift(keys: Key, length: Array, pattern: Array, p: Problem, x: Array, order: float) -> Array:
    """Proposal in l2 and l1: what two windows hold and what the ball has left goes into the first, towards a bump."""
    _, height, width, channels = x.shape
    delta = x - p.images
    first, second = (_window(fold_in(keys, i), length, height, width) for i in (0, 1))
    signs = jax.vmap(lambda key: _signs(key, (1, 1, channels)))(fold_in(keys, 2))
    turned = jax.vmap(jax.random.bernoulli)(fold_in(keys, 3))[:, None, None]
    rows, columns = jnp.where(turned, first.columns, first.rows), jnp.where(turned, first.rows, first.columns)
    # Indices out of the window are out of the mask as well.
    added = jnp.asarray(pattern).at[rows, columns].get(mode="clip")[..., None] * signs

    def mass(values: Array) -> Array:
        return (jnp.abs(values) ** order).sum((1, 2), keepdims=True)

    def unit(values: Array) -> Array:
        return values / (1e-12 + mass(values) ** (1 / order))

    held = mass(jnp.where(first.inside | second.inside, delta, 0))
    left = jnp.maximum(per_example(p.epsilon, x) ** order - mass(delta).sum(-1, keepdims=True), 0)
    new = unit(jnp.where(first.inside, added + unit(jnp.where(first.inside, delta, 0)), 0))
    new = new * (held + left / channels) ** (1 / order)
    return p.images + jnp.where(first.inside, new, jnp.where(second.inside, 0, delta))


def square(
    norm: Norm,
    *,
    epsilon: float,
    queries: int = 5000,
    restarts: int = 1,
    p_init: float = 0.8,
    horizon: int | None = None,
    loss: Loss = margin,
    gradient: Estimator = exact,
) -> Iterative:
    """Square Attack: proposes ``x`` changed in random square windows and keeps it where the loss rises.

    In linf a window becomes ``+-epsilon``, starting from vertical stripes. In l2 and l1 the length that two windows
    hold, and what the ball has left, goes into the first: ``|new_c|^q = |delta_c|^q in both + left^q / channels``,
    starting from tiles of bumps. The windows shrink with the proposals, see `share`. Keeps the best proposal: a
    success before a failure, then the higher loss.

    Unlike in the published code, windows reach the last row and column, each example draws its own, and a channel of
    the l1 window takes its own length, not that of all channels, so that the projection has nothing to cut back.

    Args:
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius of the ball, at least 0.
        queries: looks at the model in each restart, the start among them.
        restarts: runs from new starting points.
        p_init: share of the pixels that the first windows cover, in (0, 1].
        horizon: proposals over which the schedule of window sizes is spread; None for ``queries``, as the paper has it.
            AutoAttack stays with 10000 however few its queries are.
        loss: maximised.
        gradient: how the model is looked at: `exact`, `eot(draws)`, ...; no gradients are taken.

    Returns:
        The attack.

    Raises:
        ValueError: a number out of range, or another norm.

    Reference: Andriushchenko et al., ECCV 2020; for l1 Croce and Hein, ICML 2021.
    """
    check_norm(norm)
    check_choice(norm.name, "norm", tuple(_ORDER))
    check_not_negative(epsilon, "epsilon")
    check_count(queries, "queries")
    check_count(restarts, "restarts")
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init must be in (0, 1], got {p_init}")
    if horizon is not None:
        check_count(horizon, "horizon")
    order = _ORDER[norm.name]

    def begin(logits_fn: LogitsFn, p: Problem) -> _State:
        del logits_fn
        return _State(no_best(p.images), no_best(p.images))

    def propose(number: Array, keys: Key, p: Problem, x: Array) -> Array:
        _, height, width, _ = x.shape
        covered = [share(p_init, i, horizon or queries) for i in range(queries)]
        sides = [side(part, height, width, odd=norm.name != "linf") for part in covered]
        length = jnp.asarray(sides, jnp.int32)[number - 1]
        if norm.name == "linf":
            return _flip(keys, length, p, x)
        # The few sizes there are, each a static pattern, in one table as large as the largest.
        distinct = sorted(set(sides))
        table = np.stack([np.pad(bump(s, order), (0, distinct[-1] - s)) for s in distinct])
        pattern = jnp.asarray(table)[jnp.asarray(np.searchsorted(distinct, sides))[number - 1]]
        return _shift(keys, length, pattern, p, x, order)

    def step(number: Array, logits_fn: LogitsFn, p: Problem, state: _State) -> _State:
        restart, number = number // queries, number % queries
        keys = fold_in(fold_in(p.keys, restart), number)
        draw_keys, look_keys = fold_in(keys, 0), fold_in(keys, 1)
        run = jax.tree.map(lambda a, b: jnp.where(number == 0, a, b), no_best(p.images), state.run)

        def start() -> Array:
            return p.images + (_stripes(draw_keys, p) if norm.name == "linf" else _tiles(draw_keys, p, norm))

        x = jax.lax.cond(number == 0, start, lambda: propose(number, draw_keys, p, run.images))
        x = norm.confine(p.images, x, p.epsilon)
        seen = gradient.look(look_keys, logits_fn, loss, x, p.labels, p.targets, with_gradient=False)
        run, best = (
            better(so_far, x, seen, p.labels, p.targets, restart, gradient.draws) for so_far in (run, state.best)
        )
        return _State(run, best)

    return Iterative(norm, epsilon, restarts * queries, begin, step)
