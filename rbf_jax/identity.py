"""What a computation is, so that what is kept of one is not taken for another's."""

import dataclasses
import functools
import hashlib
import os
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rbf_jax.checks import is_key

_PLAIN = (bool, int, float, complex, str, bytes, tuple, list, np.ndarray, np.generic, jax.Array)
_LIBRARIES = tuple(
    str(Path(path)) + os.sep
    for path in (Path(__file__).parent, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
)


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

    Of a function that is in no installed library also its code and the globals that it names, and of a class, or an
    object of it, the methods and plain attributes likewise: a model that reads its weights from a global is another one
    when they change. Arrays count by their contents, a pytree by its leaves, an object of one's own class (or a
    namespace) by its attributes, one of a library's class by that class and its name or items, if it has them. A
    function that looks things up as it runs (a file, say) is not seen through.
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
        children = [cells, value.__defaults__, value.__kwdefaults__]
        if not _is_library(value.__module__):
            read = sorted(_names(value.__code__) & value.__globals__.keys())
            children += [value.__code__, {name: value.__globals__[name] for name in read}]
        elif "<lambda>" in name:
            children.append(value.__code__)
    elif isinstance(value, types.CodeType):
        children = [value.co_code, value.co_names, value.co_consts]
    elif isinstance(value, types.ModuleType):
        name, children = value.__name__, []
    elif isinstance(value, types.MethodType):
        children = [value.__func__, value.__self__]
    elif isinstance(value, type | types.BuiltinFunctionType):
        name = f"{value.__module__}.{value.__qualname__}"
        children = [*_methods(value)] if isinstance(value, type) else []
    elif hasattr(value, "__wrapped__"):
        children = [value.__wrapped__]
    elif isinstance(value, Mapping):
        children = [part for item in value.items() for part in item]
    elif isinstance(value, tuple | list):
        children = list(value)
    elif isinstance(value, set | frozenset):
        children = sorted(value, key=repr)
    else:
        # A ufunc has a name alone.
        children = [getattr(value, "__name__", None), *_held(value), *_methods(type(value))]
    inside = around | {id(value)}
    return [name, "(", *(line for child in children for line in _parts(child, inside)), ")"]


def _held(value: Any) -> list[Any]:
    """What an object of no kind of Python's own consists of."""
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    leaves = jax.tree.leaves(value)
    if not (len(leaves) == 1 and leaves[0] is value):  # a pytree, as NNX modules are
        return leaves
    own = isinstance(value, types.SimpleNamespace) or not _is_library(type(value).__module__)
    if own:
        return [vars(value)] if hasattr(value, "__dict__") else []
    # A ConfigDict has items, but is no Mapping.
    return [list(value.items())] if callable(getattr(value, "items", None)) else []


def _is_library(module: str) -> bool:
    """Whether a module is of this package, of Python or installed: no work in progress."""
    if module == "__main__":  # a notebook; under `python -m pytest` its file is an installed one
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and file.startswith(_LIBRARIES)


def _names(code: types.CodeType) -> set[str]:
    """All names that a piece of code reads, with those of the functions within it."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _methods(cls: type) -> Iterator[Any]:
    """Methods of each kind, and attributes of the class that are plain data, with their names."""
    for base in cls.__mro__:
        if _is_library(base.__module__):
            continue
        for name, value in vars(base).items():
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(value, types.FunctionType):
                yield value
            elif not name.startswith("__") and isinstance(value, _PLAIN):
                yield name, value
