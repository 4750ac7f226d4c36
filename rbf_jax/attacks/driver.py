"""What every attack does: arguments checked and spread over the examples, the best iterate kept, results counted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.attacks.gradients import RESULT, Look, fold_in, logits_at
from rbf_jax.attacks.norms import per_example
from rbf_jax.checks import check_budget, check_images, check_key, check_labels, check_not_negative
from rbf_jax.types import Array, AttackResult, Key, LogitsFn, Norm, one_for_each


class Problem(NamedTuple):
    """What an attack is asked, by example: all ``(B, ...)``, so that a part of the examples is a part of each.

    Attributes:
        keys: ``(B,)``.
        images: the clean images, ``(B, H, W, C)``.
        labels: int32 ``(B,)``.
        epsilon: float32 ``(B,)``; inf where an attack of least distance has no budget.
        targets: int32 ``(B,)``, or None.
        start: images ``(B, H, W, C)``, or None.
    """

    keys: Key
    images: Array
    labels: Array
    epsilon: Array
    targets: Array | None
    start: Array | None


class Best(NamedTuple):
    """The best iterate so far of each example, and what was spent: a success before a failure, then the higher loss.

    Attributes:
        images: ``(B, H, W, C)``.
        success: bool ``(B,)``.
        loss: ``(B,)``; minus the distance for attacks of least distance.
        restart: int32 ``(B,)``, the run it is of.
        forwards: int32 ``(B,)``, passes of all iterates so far.
        backwards: int32 ``(B,)``.
    """

    images: Array
    success: Array
    loss: Array
    restart: Array
    forwards: Array
    backwards: Array


def is_misled(logits: Array, labels: Array, targets: Array | None) -> Array:
    """Where the prediction is not the label, or is the target; bool ``(B,)``. Logits with a NaN predict nothing."""
    predicted = logits.argmax(-1)
    misled = predicted != labels if targets is None else predicted == targets
    return misled & ~jnp.isnan(logits).any(-1)


def handicapped(logits: Array, p: Problem, by: Array | float) -> Array:
    """The logits with the attack behind: the label's raised, or the target's lowered, by a margin, ``(B, 1)``."""
    aim, added = (p.labels, by) if p.targets is None else (p.targets, -by)
    return logits + jnp.where(aim[:, None] == jnp.arange(logits.shape[-1]), added, 0.0)


def no_best(images: Array) -> Best:
    """Before the first iterate: the images themselves, which anything replaces."""
    none = jnp.zeros(images.shape[:1], jnp.int32)
    return Best(images, none > 0, jnp.full(none.shape, -jnp.inf, jnp.float32), none, none, none)


def better(
    best: Best,
    images: Array,
    seen: Look,
    labels: Array,
    targets: Array | None,
    restart: Array | int = 0,
    forwards: int = 1,
    backwards: int = 0,
) -> Best:
    """The better of the best so far and an iterate, with the passes that its look took."""
    success = is_misled(seen.logits, labels, targets)
    wins = (success & ~best.success) | ((success == best.success) & (seen.loss > best.loss))
    return Best(
        jnp.where(per_example(wins, images), images, best.images),
        success | best.success,
        jnp.where(wins, seen.loss, best.loss),
        jnp.where(wins, restart, best.restart),
        best.forwards + forwards,
        best.backwards + backwards,
    )


def random_point(norm: Norm, keys: Key, images: Array, epsilon: Array) -> Array:
    """Images drawn uniformly from the ball, brought into the box."""
    return norm.confine(images, images + norm.sample(keys, images.shape, epsilon), epsilon)


def choose(where: Array, chosen: Any, otherwise: Any) -> Any:
    """By example, from two trees of arrays ``(B, ...)``."""
    return jax.tree.map(lambda a, b: jnp.where(per_example(where, a), a, b), chosen, otherwise)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Iterative:
    """An attack that goes in steps, and so can be interrupted between them: examples that are finished may leave.

    A state is a tree of arrays ``(B, ...)`` with an attribute ``best``. Calling the attack makes all steps.

    Attributes:
        norm: whose ball the images stay in.
        epsilon: its radius where a call gives none.
        count: how many steps there are, those of all restarts together.
        begin: (logits_fn, problem) -> state.
        step: (number, logits_fn, problem, state) -> state.
        takes_targets: whether targets may be given.
        takes_start: whether a start may be given.
        minimal: whether the attack looks for the least distance. Then epsilon is a budget, which may be inf.
        couples: whether the examples of a batch act on one another.
    """

    norm: Norm
    epsilon: float
    count: int
    begin: Callable[[LogitsFn, Problem], Any]
    step: Callable[[Array, LogitsFn, Problem, Any], Any]
    takes_targets: bool = True
    takes_start: bool = False
    minimal: bool = False
    couples: bool = False

    def __call__(
        self,
        keys: Key,
        logits_fn: LogitsFn,
        images: Array,
        labels: Array,
        *,
        epsilon: Array | float | None = None,
        targets: Array | None = None,
        start: Array | None = None,
    ) -> AttackResult:
        """Attacks the images, see `types.Attack`."""
        problem = self.pose(keys, images, labels, epsilon=epsilon, targets=targets, start=start)
        state = self.advance(0, self.count, logits_fn, problem, self.begin(logits_fn, problem))
        return self.finish(logits_fn, problem, state)

    def pose(
        self,
        keys: Key,
        images: Array,
        labels: Array,
        *,
        epsilon: Array | float | None = None,
        targets: Array | None = None,
        start: Array | None = None,
    ) -> Problem:
        """Checks the arguments and spreads them over the examples.

        Raises:
            ValueError: a wrong shape, dtype or range, or an argument that the attack does not take.
        """
        check_images(images)
        batch = images.shape[0]
        check_labels(labels, batch)
        if targets is not None:
            if not self.takes_targets:
                raise ValueError("targets must be None: this attack goes through the wrong classes itself")
            check_labels(targets, batch, name="targets")
        if start is not None:
            if not self.takes_start:
                raise ValueError("start must be None: this attack chooses its start itself")
            check_images(start, "start")
            if start.shape != images.shape:
                raise ValueError(f"start must have the images' shape {images.shape}, got {start.shape}")
        check_key(keys)
        epsilon = self.epsilon if epsilon is None else epsilon
        if self.minimal:
            check_budget(epsilon)
        else:
            check_not_negative(epsilon, "epsilon")
        if keys.shape not in ((), (batch,)):
            raise ValueError(f"keys must be a single key or one for each of {batch} images, got shape {keys.shape}")
        if jnp.shape(epsilon) not in ((), (batch,)):
            raise ValueError(
                f"epsilon must be a number or one for each of {batch} images, got shape {jnp.shape(epsilon)}"
            )
        keys = one_for_each(keys, batch)
        radius = jnp.broadcast_to(jnp.asarray(epsilon, jnp.float32), (batch,))
        images = jnp.asarray(images)
        start = None if start is None else self.norm.confine(images, jnp.asarray(start), radius)
        return Problem(keys, images, jnp.asarray(labels, jnp.int32), radius, targets, start)

    def advance(self, first: Array | int, last: Array | int, logits_fn: LogitsFn, problem: Problem, state: Any) -> Any:
        """The state after the steps from ``first`` to ``last - 1``; both may be traced."""
        return jax.lax.fori_loop(first, last, lambda n, state: self.step(n, logits_fn, problem, state), state)

    def broken(self, problem: Problem, state: Any) -> Array:
        """Which examples need no further steps where only success counts, bool ``(B,)``."""
        best: Best = state.best
        if self.minimal:
            return best.success & (-best.loss <= problem.epsilon) & jnp.isfinite(problem.epsilon)
        return best.success

    def finish(self, logits_fn: LogitsFn, problem: Problem, state: Any) -> AttackResult:
        """The result of a state."""
        best: Best = state.best
        images, success, forwards = best.images, best.success, best.forwards
        if self.minimal:
            # What lies beyond the budget comes back into the ball, and is looked at there once more.
            beyond = self.norm.distance(images - problem.images) > problem.epsilon
            confined = self.norm.confine(problem.images, images, problem.epsilon)
            images = jnp.where(per_example(beyond, images), confined, images)
            logits = logits_at(logits_fn, fold_in(problem.keys, RESULT), images)
            success, forwards = is_misled(logits, problem.labels, problem.targets), forwards + 1
        distance = self.norm.distance(images - problem.images)
        return AttackResult(images, success, distance, forwards, best.backwards, best.restart)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Composed:
    """An attack made of others, or one that cannot be interrupted.

    Attributes:
        norm: whose ball the images stay in.
        function: (models, keys, logits_fn, images, labels, epsilon=, targets=, start=) -> result.
        models: further LogitsFns that the attack uses; a tree, so that their weights can be new ones.
    """

    norm: Norm = field(metadata={"static": True})
    function: Callable[..., AttackResult] = field(metadata={"static": True})
    models: Any

    def __call__(
        self,
        keys: Key,
        logits_fn: LogitsFn,
        images: Array,
        labels: Array,
        *,
        epsilon: Array | float | None = None,
        targets: Array | None = None,
        start: Array | None = None,
    ) -> AttackResult:
        """Attacks the images, see `types.Attack`."""
        return self.function(
            self.models, keys, logits_fn, images, labels, epsilon=epsilon, targets=targets, start=start
        )


def success_at(result: AttackResult, budgets: Array | float) -> Array:
    """Which examples an attack of least distance misled within each of several budgets.

    Args:
        result: of an attack that was given no budget.
        budgets: ``(K,)``, or a single one.

    Returns:
        bool ``(K, B)``.
    """
    return jnp.asarray(result.success) & (jnp.asarray(result.distance) <= jnp.atleast_1d(jnp.asarray(budgets))[:, None])
