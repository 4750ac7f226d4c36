"""Attacks over many examples in which the finished ones leave, and the others move together and go on."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from rbf_jax import parallel
from rbf_jax.attacks import Iterative
from rbf_jax.attacks.driver import Problem
from rbf_jax.types import Array, AttackResult, LogitsFn

FIRST_SEGMENT = 5
"""Steps after which finished examples leave for the first time; each further segment is twice as long."""

SEGMENTS = 20
"""No segment is longer than this part of the steps."""

LEAST_BATCH = 8
"""Smaller batches are filled up to this: each size is compiled anew."""

LONG = 200
"""With so many steps to go the last few examples are worth sizes of their own on CPU, where small batches are fast."""


@jax.jit
def _begin(attack: Iterative, logits_fn: LogitsFn, problem: Problem) -> Any:
    return parallel.per_device(lambda problem: attack.begin(logits_fn, problem))(problem)


@jax.jit
def _advance(
    attack: Iterative, first: Array, last: Array, logits_fn: LogitsFn, problem: Problem, state: Any
) -> tuple[Any, Array]:
    def on_device(problem: Problem, state: Any) -> tuple[Any, Array]:
        state = attack.advance(first, last, logits_fn, problem, state)
        return state, attack.broken(problem, state)

    return parallel.per_device(on_device)(problem, state)


@jax.jit
def _finish(attack: Iterative, logits_fn: LogitsFn, problem: Problem, state: Any) -> AttackResult:
    return parallel.per_device(lambda *of_device: attack.finish(logits_fn, *of_device))(problem, state)


def _batches(rows: np.ndarray, batch_size: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of the rows, each filled up to the batch size or, at the end, to a power of two on each device.

    So there are few shapes to compile, however many examples are left.
    """
    devices = parallel.count()
    least = 1 if steps >= LONG and jax.default_backend() == "cpu" else LEAST_BATCH
    for start in range(0, len(rows), batch_size * devices):
        part = rows[start : start + batch_size * devices]
        most = -(-len(part) // devices)
        size = devices * min(max(least, 1 << (most - 1).bit_length()), batch_size)
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
        batch_size: examples at a time on each device.
        progress: is told how many more examples are done; parts of one count.

    Returns:
        The result as NumPy arrays over all N.
    """
    kind, total = jax.random.key_impl(problem.keys), len(problem.labels)
    posed_all = parallel.fetch(problem._replace(keys=jax.random.key_data(problem.keys)))

    def posed(rows: np.ndarray) -> Problem:
        here = parallel.take(posed_all, rows)
        return here._replace(keys=jax.random.wrap_key_data(here.keys, impl=kind))

    def gather(function: Callable[[np.ndarray], Any], rows: np.ndarray, kept: Any, steps: int = 1) -> Any:
        """Puts function(rows) -> tree of arrays, batch by batch, into the rows of the kept tree."""
        for part, filled in _batches(rows, batch_size, steps):
            found = parallel.fetch(function(filled))
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
            return _advance(attack, np.int32(first), np.int32(last), logits_fn, posed(rows), parallel.take(state, rows))

        _, broken = gather(segment, live, (state, np.zeros(total, bool)), attack.count - first)
        left = live[broken[live]]
        progress((len(live) * (last - first) + len(left) * (attack.count - last)) / attack.count)
        live, first = live[~broken[live]], last
        length = min(2 * length, max(FIRST_SEGMENT, attack.count // SEGMENTS))

    def finished(rows: np.ndarray) -> AttackResult:
        return _finish(attack, logits_fn, posed(rows), parallel.take(state, rows))

    return gather(finished, np.arange(total), None)
