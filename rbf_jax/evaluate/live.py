"""Attacks over many examples in which the finished ones leave, and the others move together and go on."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from rbf_jax.attacks import Iterative
from rbf_jax.attacks.driver import Problem
from rbf_jax.types import Array, AttackResult, LogitsFn

FIRST_SEGMENT = 5
"""Steps after which finished examples leave for the first time; each further segment is twice as long."""

SEGMENTS = 20
"""No segment is longer than this part of the steps."""

LEAST_BATCH = 8


@jax.jit
def _begin(attack: Iterative, logits_fn: LogitsFn, problem: Problem) -> Any:
    return attack.begin(logits_fn, problem)


@jax.jit
def _advance(
    attack: Iterative, first: Array, last: Array, logits_fn: LogitsFn, problem: Problem, state: Any
) -> tuple[Any, Array]:
    state = attack.advance(first, last, logits_fn, problem, state)
    return state, attack.broken(problem, state)


@jax.jit
def _finish(attack: Iterative, logits_fn: LogitsFn, problem: Problem, state: Any) -> AttackResult:
    return attack.finish(logits_fn, problem, state)


def _batches(rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of the rows, each with itself filled up to the batch size or, at the end, to a power of two.

    So there are few shapes to compile, however many examples are left.
    """
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        size = min(max(LEAST_BATCH, 1 << (len(part) - 1).bit_length()), batch_size)
        yield part, np.concatenate([part, np.full(size - len(part), part[-1])])


def run_live(
    attack: Iterative,
    logits_fn: LogitsFn,
    problem: Problem,
    *,
    batch_size: int,
    progress: Callable[[float], object] = lambda _: None,
) -> AttackResult:
    """Runs an attack in segments of steps; between them the examples that are broken leave.

    An example's steps are those that the attack would make on it alone, up to the end of the segment in which it is
    broken. States are kept in the host's memory, those of a batch at a time on the device.

    Args:
        attack: whose examples do not act on one another.
        logits_fn: the model, a ``jax.tree_util.Partial``.
        problem: from ``attack.pose``, N examples.
        batch_size: examples at a time.
        progress: is told how many more examples are done; parts of one count.

    Returns:
        The result as NumPy arrays over all N.
    """
    keys, rest = problem.keys, jax.tree.map(np.asarray, problem._replace(keys=None))
    total = len(problem.labels)

    def posed(rows: np.ndarray) -> Problem:
        return jax.tree.map(lambda array: array[rows], rest)._replace(keys=keys[rows])

    def gather(function: Callable[[np.ndarray], Any], rows: np.ndarray, kept: Any) -> Any:
        """Puts function(rows) -> tree of arrays, batch by batch, into the rows of the kept tree."""
        for part, filled in _batches(rows, batch_size):
            found = jax.tree.map(np.asarray, function(filled))
            if kept is None:
                kept = jax.tree.map(lambda array: np.empty((total, *array.shape[1:]), array.dtype), found)
            for into, array in zip(jax.tree.leaves(kept), jax.tree.leaves(found), strict=True):
                into[part] = array[: len(part)]
        return kept

    live = np.arange(total)
    state = gather(lambda rows: _begin(attack, logits_fn, posed(rows)), live, None)
    first, length = 0, FIRST_SEGMENT
    while first < attack.count and len(live):
        last = min(first + length, attack.count)

        def segment(rows: np.ndarray, first: int = first, last: int = last) -> Any:
            here = jax.tree.map(lambda array: array[rows], state)
            return _advance(attack, np.int32(first), np.int32(last), logits_fn, posed(rows), here)

        _, broken = gather(segment, live, (state, np.zeros(total, bool)))
        left = live[broken[live]]
        progress((len(live) * (last - first) + len(left) * (attack.count - last)) / attack.count)
        live, first = live[~broken[live]], last
        length = min(2 * length, max(FIRST_SEGMENT, attack.count // SEGMENTS))

    def finished(rows: np.ndarray) -> AttackResult:
        return _finish(attack, logits_fn, posed(rows), jax.tree.map(lambda array: array[rows], state))

    return gather(finished, np.arange(total), None)
