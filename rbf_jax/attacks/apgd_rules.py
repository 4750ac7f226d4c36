"""How Auto-PGD steps: by halving its step size in linf and l2, by the sparsity of its best iterate in l1."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.attacks.driver import Problem
from rbf_jax.attacks.norms import per_example
from rbf_jax.types import Array, Norm


class Schedule(NamedTuple):
    """What is fixed for each look of a run; NumPy arrays ``(looks,)``.

    Attributes:
        fresh: a stage begins here, from the run's start or from the best iterate of the stage before.
        scale: the ball's radius in units of epsilon; only iterates at scale 1 can be results.
        window: looks since the last check, 0 where none is made.
    """

    fresh: np.ndarray
    scale: np.ndarray
    window: np.ndarray


class Track(NamedTuple):
    """Where a run stands.

    Attributes:
        x: the iterate.
        before: the one before it.
        loss: at x.
        gradient: at x.
        top: the iterate of highest loss in this stage.
        top_loss: at it.
        top_gradient: at it.
    """

    x: Array
    before: Array
    loss: Array
    gradient: Array
    top: Array
    top_loss: Array
    top_gradient: Array


class Rule(NamedTuple):
    """A way to step.

    Attributes:
        schedule: of a run.
        begin: (problem, radius, track) -> what the rule carries, at the first look of a stage.
        move: (problem, radius, whether the stage's first step, track, carried) -> next iterate.
        adapt: (problem, radius, window, track, carried) -> (carried, where to go back to the best iterate).
    """

    schedule: Schedule
    begin: Callable[[Problem, Array, Track], Any]
    move: Callable[[Problem, Array, Array, Track, Any], Array]
    adapt: Callable[[Problem, Array, Array, Track, Any], tuple[Any, Array]]


MOMENTUM = 0.75
RISING = 0.75
"""The share of a window's steps that must have raised the loss for the step size to stay."""


def check_lengths(steps: int) -> np.ndarray:
    """By step, the length of the window that ends with it, 0 where none does, int ``(steps,)``.

    The first window has 22 % of the steps, each further one 3 % less, none under 6 %.
    """
    lengths = np.zeros(steps, np.int32)
    window, end = max(int(0.22 * steps), 1), 0
    while end + window <= steps:
        end += window
        lengths[end - 1] = window
        window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return lengths


class _Halving(NamedTuple):
    step: Array  # step size
    last: Array  # loss of the last step, also where the example went back since
    rises: Array  # steps of this window that raised the loss
    kept: Array  # the step size was not changed at the last check
    checked: Array  # highest loss at the last check


def halving(norm: Norm, steps: int) -> Rule:
    """The rule for linf and l2, see `apgd`."""

    def begin(p: Problem, radius: Array, track: Track) -> _Halving:
        none, loss = jnp.zeros_like(p.labels), track.loss
        return _Halving(2 * radius, loss, none, none > 0, loss)

    def move(p: Problem, radius: Array, first: Array, track: Track, carried: _Halving) -> Array:
        x = track.x
        moved = x + per_example(carried.step, x) * norm.direction(track.gradient, x)
        ahead = norm.confine(p.images, moved, radius)
        share = jnp.where(first, 1.0, MOMENTUM)
        return norm.confine(p.images, x + share * (ahead - x) + (1 - share) * (x - track.before), radius)

    def adapt(p: Problem, radius: Array, window: Array, track: Track, carried: _Halving) -> tuple[_Halving, Array]:
        del p, radius
        step, last, rises, kept, checked = carried
        loss, highest = track.loss, track.top_loss
        rises = jnp.where(loss > last, rises + 1, rises)
        ends = window > 0
        halved = ends & (
            (rises.astype(jnp.float32) <= RISING * window.astype(jnp.float32)) | (kept & (highest <= checked))
        )
        carried = _Halving(
            jnp.where(halved, step / 2, step),
            loss,
            jnp.where(ends, 0, rises),
            jnp.where(ends, ~halved, kept),
            jnp.where(ends, highest, checked),
        )
        return carried, halved

    windows = np.concatenate([[0], check_lengths(steps)])
    return Rule(Schedule(np.arange(steps + 1) == 0, np.ones(steps + 1, np.float32), windows), begin, move, adapt)


FIRST_SHARE = 0.2
"""Of the pixels that the first l1 steps change."""

REDUCTION = 1.5
"""The share of pixels that steps change is that of the best iterate over this; step sizes shrink by it."""

LEAST_STEP = 0.1
STAGES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""The balls that an l1 run goes through: radius in epsilons, and share of the steps."""


class _Sparse(NamedTuple):
    step: Array  # step size
    share: Array  # of the pixels that a step changes
    changed: Array  # pixels that the best iterate of the last check changed


def sparse_rule(norm: Norm, steps: int) -> Rule:
    """The rule for l1: signs of the largest gradients, as many as the best iterate's sparsity says.

    A run goes through balls of 3, 2 and 1 epsilon. At each check (every 4 % of a stage's steps), where the best iterate
    changes at least 5 % fewer pixels than at the last, the step size is the ball's radius again and the example goes
    back to that iterate; elsewhere the step size shrinks by 1.5, to a tenth of the radius at least.

    Unlike in the published code a run starts uniformly in the ball, not from normal noise projected onto it, and its
    first steps change a fifth of the pixels, not the share of those that the start changes over 1.5.

    Reference: Croce and Hein, ICML 2021.
    """

    def changed(p: Problem, x: Array) -> Array:
        return (x != p.images).sum((1, 2, 3)).astype(jnp.float32)

    def begin(p: Problem, radius: Array, track: Track) -> _Sparse:
        size = float(np.prod(p.images.shape[1:]))
        count, opening = changed(p, track.x), radius > 2.5 * p.epsilon
        return _Sparse(
            radius,
            jnp.where(opening, FIRST_SHARE, count / size / REDUCTION),
            jnp.where(opening, size, count),
        )

    def move(p: Problem, radius: Array, first: Array, track: Track, carried: _Sparse) -> Array:
        del first
        gradient = track.gradient
        size = jnp.abs(gradient).reshape(gradient.shape[0], -1)
        pixels = size.shape[-1]
        # Rounded down: the published code rounds up, and so never gets from two pixels to one.
        place = pixels - jnp.clip((carried.share * pixels).astype(jnp.int32), 1, pixels)
        least = jnp.take_along_axis(jnp.sort(size, -1), place[:, None], -1)
        signs = jnp.where((size >= least).reshape(gradient.shape), jnp.sign(gradient), 0)
        length = carried.step / jnp.maximum(jnp.abs(signs).sum((1, 2, 3)), 1.0)
        return norm.confine(p.images, track.x + per_example(length, signs) * signs, radius)

    def adapt(p: Problem, radius: Array, window: Array, track: Track, carried: _Sparse) -> tuple[_Sparse, Array]:
        count, ends = changed(p, track.top), window > 0
        sparser = ends & (count < 0.95 * carried.changed)
        shrunk = jnp.maximum(carried.step / REDUCTION, LEAST_STEP * radius)
        size = float(np.prod(p.images.shape[1:]))
        new = _Sparse(jnp.where(sparser, radius, shrunk), count / size / REDUCTION, count)
        return jax.tree.map(lambda a, b: jnp.where(ends, a, b), new, carried), sparser

    parts = []
    done = 0
    for number, (scale, share) in enumerate(STAGES):
        length = steps - done if number == len(STAGES) - 1 else int(share * steps)
        done += length
        every = max(int(0.04 * length), 1)
        looks = np.arange(length + 1)
        window = np.where((looks > 0) & (looks % every == 0), every, 0)
        parts.append((looks == 0, np.full(length + 1, scale, np.float32), window))
    return Rule(Schedule(*(np.concatenate(column) for column in zip(*parts, strict=True))), begin, move, adapt)
