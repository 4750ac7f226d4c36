"""What a computation is, so that what is kept of one is not taken for another's."""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rbf_jax.checks import is_key


def fingerprint(*trees: Any) -> str:
    """sha256 over all arrays of the trees (typed keys included), their shapes and dtypes."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        array = _array(leaf)
        sha.update(f"{array.shape}{array.dtype}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def described(value: Any) -> str:
    """sha256 of what a function or an attack is: names, settings and what it closes over, the same in every process.

    Of a lambda also its code. Arrays count by their contents; an object of unknown make by its type alone.
    """
    return hashlib.sha256("\n".join(_parts(value, frozenset())).encode()).hexdigest()


def _array(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def _parts(value: Any, around: frozenset[int]) -> list[str]:
    """Lines that tell it from others; ``around`` are the objects that it is part of."""
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None or isinstance(value, str | bytes | bool | int | float | complex):
        return [f"{name} {value!r}"]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return [f"array {fingerprint(value)}"]
    if id(value) in around:
        return ["itself"]
    children: list[Any]
    if isinstance(value, functools.partial):
        children = [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        name = f"{value.__module__}.{value.__qualname__}"
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        code = value.__code__.co_code if "<lambda>" in name else b""
        children = [code, cells, value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, types.MethodType):
        children = [value.__func__, value.__self__]
    elif isinstance(value, type | types.BuiltinFunctionType):
        name, children = f"{value.__module__}.{value.__qualname__}", []
    elif hasattr(value, "__wrapped__"):
        children = [value.__wrapped__]
    elif isinstance(value, Mapping):
        children = [part for item in value.items() for part in item]
    elif isinstance(value, tuple | list):
        children = list(value)
    elif dataclasses.is_dataclass(value):
        children = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    else:
        children = []
    inside = around | {id(value)}
    return [name, "(", *(line for child in children for line in _parts(child, inside)), ")"]
