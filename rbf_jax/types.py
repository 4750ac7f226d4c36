"""Types and conventions shared by the whole package.

Images are float32 ``(B, H, W, C)`` in [0, 1], labels int32 ``(B,)``, random keys are typed (``jax.random.key``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jax.tree_util import Partial

Array = jax.Array | np.ndarray
"""Functions take NumPy arrays as well; what they return is JAX's, but NumPy's of `evaluate`, `certify` and `data`."""

Key = jax.Array
"""A typed random key, or a ``(B,)`` array of them: one for each example."""


class LogitsFn(Protocol):
    """Maps a key and images ``(B, H, W, C)`` to logits ``(B, classes)``.

    A deterministic model ignores the key. A randomised one takes a single key or one key per example, ``(B,)``. One
    that crosses a ``jit`` boundary is a ``jax.tree_util.Partial(apply, variables)``: new weights then cost no
    recompilation.
    """

    def __call__(self, key: Key, images: Array, /) -> Array:
        """Logits of the images."""
        ...


@dataclass(frozen=True)
class _Plain:
    """A function that is no Partial: what it reads may be something else at the next call, see `as_it_is`."""

    function: Callable[..., Array]

    def __call__(self, *arguments: Array) -> Array:
        return self.function(*arguments)


def as_partial(function: Callable[..., Array]) -> Partial:
    """A function as what may cross a ``jit`` boundary; a plain one compiles anew for each function object.

    Raises:
        ValueError: it cannot be called.
    """
    if not callable(function):
        raise ValueError(f"a model must be a function (key, images) -> logits, got {type(function).__name__}")
    return function if isinstance(function, Partial) else Partial(_Plain(function))


Tree = TypeVar("Tree")


def renewed(tree: Tree) -> Tree:
    """A tree of models in which what `as_partial` made of plain functions compiles anew, with what they read now.

    What was compiled for a function object keeps the weights of its first call; those of NNX modules change in place.
    """

    def plain(node: object) -> _Plain | None:
        return node.func if isinstance(node, Partial) and isinstance(node.func, _Plain) else None

    def renew(node: object) -> object:
        found = plain(node)
        return node if found is None else Partial(lambda *arguments: found.function(*arguments))

    return jax.tree.map(renew, tree, is_leaf=lambda node: plain(node) is not None)


def as_it_is(function: LogitsFn) -> Partial:
    """`as_partial` of a model, `renewed`: with the weights that it reads now."""
    return renewed(as_partial(function))


def one_for_each(keys: Key, count: int) -> Key:
    """Keys of so many examples: as they are given, or split from a single one."""
    return keys if keys.shape else jax.random.split(keys, count)


class Norm(NamedTuple):
    """The geometry of one threat model; each function treats every example of a batch by itself.

    Attributes:
        name: the field's name, ``"linf"``, ``"l2"`` or ``"l1"``.
        distance: deltas ``(B, ...)`` -> ``(B,)``, their norm.
        direction: (gradients ``(B, ...)``, images) -> the step of length 1 that iterative attacks take from the images,
            0 where the gradient is 0.
        steepest: (gradients, images, epsilon ``(B,)``) -> deltas of the ball that gain most to first order.
        project: (deltas ``(B, ...)``, epsilon ``(B,)``) -> the nearest deltas in the ball of radius epsilon.
        confine: (images, moved, epsilon) -> the moved images, brought into the ball around the images and the box.
        sample: (keys ``(B,)``, deltas' shape, epsilon ``(B,)``) -> deltas drawn uniformly from that ball.
    """

    name: str
    distance: Callable[[Array], Array]
    direction: Callable[[Array, Array], Array]
    steepest: Callable[[Array, Array, Array], Array]
    project: Callable[[Array, Array], Array]
    confine: Callable[[Array, Array, Array], Array]
    sample: Callable[[Key, tuple[int, ...], Array], Array]


class AttackResult(NamedTuple):
    """What an attack returns.

    Attributes:
        images: float32 ``(B, H, W, C)`` in [0, 1]: the best adversarial image of each example, successful or not.
        success: bool ``(B,)``: the attack saw the model misled on that image (under the attack's own draws; a
            randomised model is scored on fresh ones). Attacks of least distance and `apgd_t` look at the clean image,
            too; of the others some fail where that alone is misclassified.
        distance: float32 ``(B,)``: the attack's norm of ``images`` minus the clean images.
        forwards: int32 ``(B,)``: forward passes spent on each example.
        backwards: int32 ``(B,)``: backward passes spent on each example.
        restart: int32 ``(B,)``: the restart, or the run towards one target, that found the image.
    """

    images: Array
    success: Array
    distance: Array
    forwards: Array
    backwards: Array
    restart: Array


class Attack(Protocol):
    """An attack, ready to run: a pure function, safe under ``jit``."""

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
        """Attack the images.

        Args:
            keys: one key (split by position), or one key for each example, ``(B,)``: then an example's result does not
                depend on the batch around it (with JAX's own threefry keys; ``rbg`` keys draw otherwise in a batch).
            logits_fn: the model.
            images: float32 ``(B, H, W, C)`` in [0, 1].
            labels: int32 ``(B,)``, the true classes.
            epsilon: radius of the ball, a number or ``(B,)``; None takes the attack's own.
            targets: int32 ``(B,)``, the classes to reach; None for any wrong class.
            start: images ``(B, H, W, C)`` to start from instead of the attack's own start, brought into the ball.

        Raises:
            ValueError: an argument of a wrong shape, dtype or range, or one that this attack does not take. Under
                ``jit`` values cannot be looked at: labels, images and radii out of range pass, and what comes out means
                nothing. `evaluate.run_attack` compiles and checks them all.
        """
        ...
