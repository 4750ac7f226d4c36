"""Checks of arguments: static ones always, those of values only on concrete arrays (tracers are let through)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rbf_jax.types import Array, Key, Norm


def is_concrete(value: object) -> bool:
    """True where the value can be looked at now, False under tracing."""
    return not isinstance(value, Tracer)


def value_range(array: Array) -> tuple[float, float]:
    """Least and largest value of a concrete array, NaN if it holds one; also in the middle of a trace."""
    with jax.ensure_compile_time_eval():
        return float(array.min()), float(array.max())


def check_images(images: Array, name: str = "images") -> None:
    """Raises ValueError unless images are float32 ``(B, H, W, C)``, not empty, finite and in [0, 1]."""
    if not isinstance(images, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an array (B, H, W, C), got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions (B, H, W, C), got shape {images.shape}")
    if images.dtype != jnp.float32:
        made = "data.as_float" if images.dtype == jnp.uint8 else ".astype(np.float32)"
        raise ValueError(f"{name} must be float32 in [0, 1], got {images.dtype}: {made} makes it so")
    if 0 in images.shape:
        raise ValueError(f"{name} must not be empty, got shape {images.shape}")
    if is_concrete(images):
        low, high = value_range(images)
        # NaN makes both comparisons false, so it is caught as well.
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{name} must lie in [0, 1] and hold no NaN, got values from {low} to {high}")


def check_labels(labels: Array, batch: int, classes: int | None = None, name: str = "labels") -> None:
    """Raises ValueError unless labels are int32 (or int64, as NumPy has them) ``(batch,)`` in [0, classes)."""
    if not isinstance(labels, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an int32 array ({batch},), got {type(labels).__name__}")
    if labels.shape != (batch,) or labels.dtype not in (jnp.int32, jnp.int64):
        raise ValueError(f"{name} must be int32 of shape ({batch},), got {labels.dtype} of shape {labels.shape}")
    if is_concrete(labels):
        low, high = map(int, value_range(labels))
        if low < 0 or (classes is not None and high >= classes):
            allowed = "at least 0" if classes is None else f"in [0, {classes})"
            raise ValueError(f"{name} must be {allowed}, got values from {low} to {high}")


def check_logits(logits: Any, batch: int) -> None:
    """Raises ValueError unless it is what a model should return, an array ``(batch, classes)``."""
    if getattr(logits, "ndim", None) != 2 or logits.shape[0] != batch:
        found = f"shape {logits.shape}" if hasattr(logits, "shape") else type(logits).__name__
        raise ValueError(f"a model must return logits ({batch}, classes) for {batch} images, got {found}")


def check_norm(norm: Norm) -> None:
    """Raises ValueError unless it is a norm."""
    if not isinstance(norm, Norm):
        raise ValueError(f"norm must be attacks.Linf, attacks.L2 or attacks.L1, got {norm!r}")


def check_positive(value: Array | float, name: str) -> None:
    """Raises ValueError unless the value (every entry of it) is above 0 and finite in float32 (from 1.2e-38)."""
    if is_concrete(value):
        numbers, limits = np.asarray(value, np.float64), np.finfo(np.float32)
        if not np.all((numbers >= limits.tiny) & (numbers <= limits.max)):
            raise ValueError(f"{name} must be positive and finite in float32, got {value}")


def check_not_negative(value: Array | float, name: str) -> None:
    """Raises ValueError unless the value (every entry of it) is finite and at least 0."""
    if is_concrete(value) and not np.all((np.asarray(value) >= 0) & np.isfinite(np.asarray(value))):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def check_one_number(value: Array | float, name: str) -> None:
    """Raises ValueError unless it is a single number, which cannot be taken for one of each of several things."""
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be one number, got shape {jnp.shape(value)}")


def check_budget(epsilon: Array | float) -> None:
    """Raises ValueError unless epsilon is at least 0; inf, for no budget, is one number, not one of many."""
    if is_concrete(epsilon):
        numbers = np.asarray(epsilon)
        if not np.all((numbers >= 0) & ((numbers < np.inf) | (numbers.ndim == 0))):
            raise ValueError(f"epsilon must be at least 0, and finite but for one inf for no budget, got {epsilon}")


def check_fraction(value: float, name: str) -> None:
    """Raises ValueError unless the value is above 0 and below 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value}")


def check_count(value: int, name: str, least: int = 1) -> None:
    """Raises ValueError unless the value is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_choice(value: object, name: str, allowed: tuple[object, ...]) -> None:
    """Raises ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_norm_order(p: float) -> None:
    """Raises ValueError unless p >= 1 (infinity included)."""
    if math.isnan(p) or p < 1:
        raise ValueError(f"p must be at least 1 (math.inf for linf), got {p}")


def is_key(value: object) -> bool:
    """True for a typed key, or an array of them."""
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def check_key(key: Key) -> None:
    """Raises ValueError unless it is a typed key, or an array of them."""
    if not is_key(key):
        raise ValueError(
            f"key must be a typed key from jax.random.key, got {getattr(key, 'dtype', type(key).__name__)}"
        )


def split_keys(key: Key) -> tuple[Key, Key]:
    """Two keys, or two for each example: for a front end and for the classifier behind it."""
    check_key(key)
    pair = jax.vmap(jax.random.split)(key) if key.shape else jax.random.split(key)
    return pair[..., 0], pair[..., 1]


def check_single_key(key: Key) -> None:
    """Raises ValueError unless it is one typed key."""
    check_key(key)
    if key.shape:
        raise ValueError(f"key must be a single key, got shape {key.shape}")
