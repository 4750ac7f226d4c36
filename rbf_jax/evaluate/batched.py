"""Models and attacks over whole data sets, in batches of one shape, so that nothing is compiled twice."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rbf_jax.checks import check_count, check_images, check_key, check_labels
from rbf_jax.types import Array, Attack, AttackResult, Key, LogitsFn


def _batches(
    function: Callable[..., Any], arrays: tuple[Array, ...], batch_size: int, progress: str | None
) -> Iterator[Any]:
    """Applies the function to (rows, *slices); the last batch is filled up with its last row, then cut."""
    total = len(arrays[0])
    with tqdm(total=total, desc=progress, unit="image", disable=progress is None) as bar:
        for start in range(0, total, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), total - 1)
            used = min(batch_size, total - start)
            result = function(jnp.asarray(rows), *(jnp.asarray(array[rows]) for array in arrays))
            yield jax.tree.map(lambda value, used=used: np.asarray(value)[:used], result)
            bar.update(used)


def _joined(parts: Iterator[Any]) -> Any:
    return jax.tree.map(lambda *values: np.concatenate(values), *parts)


@jax.jit
def _apply(logits_fn: LogitsFn, key: Key, rows: Array, images: Array) -> Array:
    return logits_fn(jax.vmap(jax.random.fold_in, (None, 0))(key, rows), images)


def predict(
    key: Key, logits_fn: LogitsFn, images: Array, *, batch_size: int = 100, progress: str | None = None
) -> np.ndarray:
    """Logits of many images.

    Args:
        key: example i takes ``fold_in(key, i)``, so the result does not depend on the batches.
        logits_fn: the model, a ``jax.tree_util.Partial``.
        images: float32 ``(N, H, W, C)`` in [0, 1].
        batch_size: images at a time.
        progress: what the progress bar is called; None for no bar.

    Returns:
        Logits ``(N, classes)``.

    Raises:
        ValueError: an argument out of range.
    """
    check_key(key)
    check_images(images)
    check_count(batch_size, "batch_size")
    size = min(batch_size, len(images))
    return _joined(_batches(lambda rows, batch: _apply(logits_fn, key, rows, batch), (images,), size, progress))


def run_attack(
    key: Key,
    attack: Attack,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    batch_size: int = 100,
    progress: str | None = None,
) -> AttackResult:
    """An attack on many images.

    Args:
        key: example i takes ``fold_in(key, i)``, so the result does not depend on the batches.
        attack: from `rbf_jax.attacks`.
        logits_fn: the model, a ``jax.tree_util.Partial``.
        images: float32 ``(N, H, W, C)`` in [0, 1].
        labels: int32 ``(N,)``.
        batch_size: images at a time.
        progress: what the progress bar is called; None for no bar.

    Returns:
        The attack's result as NumPy arrays over all N.

    Raises:
        ValueError: an argument out of range.
    """
    check_key(key)
    check_images(images)
    check_labels(labels, len(images))
    check_count(batch_size, "batch_size")
    size = min(batch_size, len(images))

    @jax.jit
    def run(logits_fn: LogitsFn, key: Key, rows: Array, images: Array, labels: Array) -> AttackResult:
        return attack(jax.vmap(jax.random.fold_in, (None, 0))(key, rows), logits_fn, images, labels)

    return _joined(_batches(lambda *batch: run(logits_fn, key, *batch), (images, labels), size, progress))
