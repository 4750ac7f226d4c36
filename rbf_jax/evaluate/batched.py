"""Models and attacks over whole data sets, in batches of one shape, so that nothing is compiled twice.

Under a mesh (`rbf_jax.parallel`) every device works on a batch of its own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from tqdm import tqdm

from rbf_jax import attacks, parallel
from rbf_jax.attacks import Composed, Iterative
from rbf_jax.attacks.driver import Problem
from rbf_jax.checks import (
    check_budget,
    check_count,
    check_images,
    check_labels,
    check_logits,
    check_not_negative,
    check_single_key,
)
from rbf_jax.evaluate.ledger import Parts
from rbf_jax.evaluate.live import run_live
from rbf_jax.identity import described, fingerprint
from rbf_jax.types import Array, Attack, AttackResult, Key, LogitsFn, as_it_is, renewed


def indices(rows: Array | None, total: int) -> np.ndarray:
    """The examples' indices in their data set, by default 0 to ``total - 1``; ValueError on another number of them."""
    rows = np.arange(total) if rows is None else np.asarray(rows)
    if rows.shape != (total,):
        raise ValueError(f"rows must be the {total} examples' indices, got shape {rows.shape}")
    return rows


def _in_batches(
    function: Callable[..., Any],
    rows: Array | None,
    arrays: tuple[Array, ...],
    batch_size: int,
    progress: str | bool | None,
    parts: Parts | None = None,
    inputs: Any = (),
) -> tuple[np.ndarray, ...]:
    """Applies function (advance, rows, *slices) -> arrays ``(B, ...)`` batch by batch, and joins what comes out.

    The last batch is filled up with its last example, then cut. As many batches as there are devices go together, and
    make the B of the function. ``advance``, which the function may call, takes how many more examples' worth of work is
    done. With parts every batch is kept there; ``inputs`` is what else the result depends on: functions, attacks, keys.
    """
    total = len(arrays[0])
    rows = indices(rows, total)
    check_count(batch_size, "batch_size")
    devices = parallel.count()
    # Whatever the devices, so that a run may go on with more or fewer of them.
    size = min(batch_size, total)
    each = min(size, -(-total // devices))  # few examples are spread over all devices
    if parts is not None:
        parts.open(fingerprint(rows, arrays) + described(inputs), size)
    arrays = tuple(np.asarray(array) for array in arrays)

    def compute(start: int) -> tuple[np.ndarray, ...]:
        taken = np.minimum(np.arange(start, start + each * devices), total - 1)
        reached = float(start)

        def advance(amount: float) -> None:
            nonlocal reached
            reached += amount
            bar.update(min(int(reached), total) - bar.n)

        result = function(advance, *parallel.take((rows, *arrays), taken))
        return tuple(parallel.fetch(array)[: total - start] for array in result)

    done = []
    named = progress if isinstance(progress, str) else None
    with tqdm(total=total, desc=named, unit="image", disable=not progress) as bar:
        for start in range(0, total, size * devices):
            together = functools.cache(functools.partial(compute, start))
            for first in range(start, min(start + size * devices, total), size):

                def cut(first: int = first - start, together: Callable[[], Any] = together) -> tuple[np.ndarray, ...]:
                    return tuple(array[first : first + size] for array in together())

                done.append(cut() if parts is None else parts.kept(first, cut))
                bar.update(max(min(first + size, total) - bar.n, 0))
    return tuple(np.concatenate(arrays) for arrays in zip(*done, strict=True))


def check_attack(attack: Attack, name: str) -> None:
    """Raises ValueError unless it is an attack: what is not called, or makes attacks, is none."""
    if not callable(attack) or any(attack is maker for maker in vars(attacks).values()):
        raise ValueError(f"{name} must be an attack, as attacks.pgd(attacks.Linf, epsilon=0.3) is, got {attack}")


def _misfit(error: Exception, shape: tuple[int, ...]) -> ValueError:
    """What is said of a model that fails on images of a shape."""
    return ValueError(
        f"the model fails on keys {shape[:1]} and images {shape}: {error}. It is called as (key, images) -> logits, "
        "with one key for each image; one that takes no key is wrapped: lambda key, images: model(images)"
    )


def _check(key: Key, logits_fn: LogitsFn, images: Array, **classes: Array | None) -> None:
    """What the compiled functions cannot look at: values, and classes that the model does not have."""
    check_single_key(key)
    check_images(images)
    if not classes:
        return
    first = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    keys = jax.eval_shape(lambda key: _fold_in(key, np.zeros(1, np.int32)), key)
    try:
        logits = jax.eval_shape(lambda *arguments: logits_fn(*arguments), keys, first)
    except Exception as error:
        raise _misfit(error, first.shape) from error
    for name, given in classes.items():
        if given is not None:
            check_logits(logits, 1)
            check_labels(given, len(images), logits.shape[1], name)


def _fold_in(key: Key, rows: Array) -> Key:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


@jax.jit
def _apply(logits_fn: LogitsFn, key: Key, rows: Array, images: Array) -> tuple[Array]:
    return (parallel.per_device(lambda rows, images: logits_fn(_fold_in(key, rows), images))(rows, images),)


def predict(
    key: Key, logits_fn: LogitsFn, images: Array, *, batch_size: int = 100, progress: str | bool | None = None
) -> np.ndarray:
    """Logits of many images.

    Args:
        key: example i takes ``fold_in(key, i)``, so the result does not depend on the batches.
        logits_fn: the model; as a ``jax.tree_util.Partial`` over its weights new ones compile nothing.
        images: float32 ``(N, H, W, C)`` in [0, 1].
        batch_size: images at a time on each device.
        progress: what the progress bar is called, or whether there is one.

    Returns:
        Logits ``(N, classes)``.

    Raises:
        ValueError: an argument out of range.
    """
    logits_fn = as_it_is(logits_fn)
    _check(key, logits_fn, images)

    def apply(_: Any, rows: Array, batch: Array) -> tuple[Array]:
        try:
            return _apply(logits_fn, key, rows, batch)
        except TypeError as error:  # so that it need not be traced before, as in `_check`
            raise _misfit(error, batch.shape) from error

    return _in_batches(apply, None, (images,), batch_size, progress)[0]


@jax.jit
def _attack(attack: Any, logits_fn: LogitsFn, key: Key, rows: Array, arguments: dict[str, Array]) -> AttackResult:
    def on_device(rows: Array, arguments: dict[str, Array]) -> AttackResult:
        return attack(_fold_in(key, rows), logits_fn, **arguments)

    return parallel.per_device(on_device)(rows, arguments)


@jax.jit
def _pose(attack: Iterative, key: Key, rows: Array, arguments: dict[str, Array]) -> Problem:
    def on_device(rows: Array, arguments: dict[str, Array]) -> Problem:
        return attack.pose(_fold_in(key, rows), **arguments)

    return parallel.per_device(on_device)(rows, arguments)


POOL = 4
"""Batches whose examples move together where the finished ones leave."""


def run_attack(
    key: Key,
    attack: Attack,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    epsilon: Array | float | None = None,
    targets: Array | None = None,
    start: Array | None = None,
    rows: Array | None = None,
    leave: bool = False,
    batch_size: int = 100,
    parts: Parts | None = None,
    progress: str | bool | None = None,
) -> AttackResult:
    """An attack on many images.

    Args:
        key: example i takes ``fold_in(key, rows[i])``, so the result does not depend on the batches.
        attack: from `rbf_jax.attacks`.
        logits_fn: the model; as a ``jax.tree_util.Partial`` over its weights new ones compile nothing.
        images: float32 ``(N, H, W, C)`` in [0, 1].
        labels: int32 or int64 ``(N,)``.
        epsilon: radius, or one for each example, ``(N,)``; None for the attack's own.
        targets: int32 ``(N,)``, the classes to reach; None for any wrong class.
        start: images ``(N, H, W, C)`` to start from; None for the attack's own start.
        rows: the examples' indices in their data set, ``(N,)``; None for 0 to N - 1.
        leave: an example that is broken leaves, and its batch is filled up with others: for deterministic models, where
            it is only asked whether an example can be broken. Its loss is then not driven on.
        batch_size: images at a time on each device.
        parts: where finished batches are kept, so that a run that was stopped goes on; None for nowhere.
        progress: what the progress bar is called, or whether there is one.

    Returns:
        The attack's result as NumPy arrays over all N.

    Raises:
        ValueError: an argument out of range, or parts of another attack.
    """
    check_attack(attack, "attack")
    logits_fn = as_it_is(logits_fn)
    _check(key, logits_fn, images, labels=labels, targets=targets)
    labels = np.asarray(labels, np.int32)
    if epsilon is not None:
        if isinstance(attack, Iterative) and attack.minimal:
            check_budget(epsilon)
        else:
            check_not_negative(epsilon, "epsilon")
        if np.shape(epsilon) not in ((), (len(images),)):
            raise ValueError(f"epsilon must be a number or of shape ({len(images)},), got shape {np.shape(epsilon)}")
        epsilon = np.broadcast_to(np.asarray(epsilon, np.float32), len(images))
    if start is not None:
        check_images(start, "start")
        if start.shape != images.shape:
            raise ValueError(f"start must have the images' shape {images.shape}, got {start.shape}")
    given = {"images": images, "labels": labels, "epsilon": epsilon, "targets": targets, "start": start}
    given = {name: array for name, array in given.items() if array is not None}
    leaving = attack if leave and isinstance(attack, Iterative) and not attack.couples else None
    # What jit takes as an argument: the same attack then compiles once.
    argument = renewed(attack) if isinstance(attack, Iterative | Composed) else Partial(attack)

    def apply(advance: Callable[[float], None], rows: Array, *batch: Array) -> AttackResult:
        arguments = dict(zip(given, batch, strict=True))
        if leaving is None:
            return _attack(argument, logits_fn, key, rows, arguments)
        return run_live(
            leaving, logits_fn, _pose(leaving, key, rows, arguments), batch_size=batch_size, progress=advance
        )

    size = batch_size * POOL if leaving else batch_size
    arrays = tuple(given.values())
    return AttackResult(
        *_in_batches(apply, rows, arrays, size, progress, parts, inputs=(key, attack, leave, logits_fn))
    )


@jax.jit
def _survives(logits_fn: LogitsFn, keys: Key, rows: Array, images: Array, labels: Array) -> tuple[Array]:
    def on_device(rows: Array, images: Array, labels: Array) -> Array:
        def once(key: Key) -> Array:
            logits = logits_fn(_fold_in(key, rows), images)
            return (logits.argmax(-1) == labels) & ~jnp.isnan(logits).any(-1)

        return jax.lax.map(once, keys).T

    return (parallel.per_device(on_device)(rows, images, labels),)


def survival(
    key: Key,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    redraws: int,
    rows: Array | None = None,
    batch_size: int = 100,
    parts: Parts | None = None,
    progress: str | bool | None = None,
) -> np.ndarray:
    """Which images a model classifies rightly, under several redraws of its noise.

    Args:
        key: redraw r of example i takes ``fold_in(fold_in(key, r), rows[i])``.
        logits_fn: the model, see `run_attack`; for a defence its ``predict``.
        images: float32 ``(N, H, W, C)`` in [0, 1].
        labels: int32 or int64 ``(N,)``.
        redraws: how many; 1 for a deterministic model.
        rows: the examples' indices in their data set, ``(N,)``; None for 0 to N - 1.
        batch_size: images at a time on each device.
        parts: where finished batches are kept, so that a run that was stopped goes on; None for nowhere.
        progress: what the progress bar is called, or whether there is one.

    Returns:
        bool ``(redraws, N)``. Logits with a NaN are never right.

    Raises:
        ValueError: an argument out of range, or parts of another computation.
    """
    logits_fn = as_it_is(logits_fn)
    _check(key, logits_fn, images, labels=labels)
    labels = np.asarray(labels, np.int32)
    check_count(redraws, "redraws")
    keys = _fold_in(key, jnp.arange(redraws))

    def apply(_: Any, *batch: Array) -> tuple[Array]:
        return _survives(logits_fn, keys, *batch)

    return _in_batches(apply, rows, (images, labels), batch_size, progress, parts, inputs=(keys, logits_fn))[0].T
