"""Checkpoints of training, by orbax, and the weights of finished models."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.checks import is_key
from rbf_jax.files import as_path, check_facts, is_remote, read_npz, write_npz
from rbf_jax.models.classifier import Variables

KEEP = 2


def _plain(tree: Any) -> Any:
    """The tree with its typed keys (an NNX module's dropout has some) as the integers behind them."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def _with_keys(tree: Any, template: Any) -> Any:
    def one(leaf: Any, like: Any) -> Any:
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like)) if is_key(like) else leaf

    return jax.tree.map(one, tree, template)


def _digest(tree: Any) -> str:
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def _absolute(directory: str | Path) -> Path:
    return as_path(directory) if is_remote(directory) else as_path(directory).absolute()


@contextlib.contextmanager
def _checkpointer(directory: Path) -> Iterator[Any]:
    from orbax.checkpoint import v1  # a second of import time, which `import rbf_jax` shall not cost

    training: Any = v1.training
    # What a killed process left half-written is removed at the next opening.
    latest = training.preservation_policies.LatestN(KEEP)
    with training.Checkpointer(directory, preservation_policy=latest, cleanup_tmp_directories=True) as opened:
        yield opened


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from printing the tracebacks of its threads and tasks: what went wrong is raised as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def save(directory: str | Path, step: int, tree: Any, settings: dict[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all; the last two stay.

    Args:
        directory: of all checkpoints of one training.
        step: number of the checkpoint, above the last one's.
        tree: a pytree of arrays.
        settings: what the training is determined by besides; JSON values.

    Raises:
        OSError: the checkpoint cannot be written; those before it stay.
        jax.errors.JaxRuntimeError: one of several processes that write it together is gone.
    """
    directory, tree = _absolute(directory), _plain(tree)
    metadata = {"settings": settings, "sha256": _digest(tree)}
    try:
        with _quiet(), _checkpointer(directory) as opened:
            opened.save(step, tree, custom_metadata=metadata)
    except Exception as error:  # of any class: tensorstore reports a full disk as ValueError
        cause = _innermost(error)
        if isinstance(cause, jax.errors.JaxRuntimeError):
            raise cause from error
        reason = f"cannot write checkpoint {directory / str(step)} ({_first_line(error)})"
        raise OSError(f"{reason}. Make room there; the same command goes on from the checkpoint before it") from error


def restore(directory: str | Path, template: Any, settings: dict[str, Any]) -> Any | None:
    """Reads the last checkpoint.

    Args:
        directory: of all checkpoints of one training.
        template: a pytree of arrays of the same structure, shapes and dtypes.
        settings: must equal those it was saved with.

    Returns:
        The pytree; None where there is no checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or of another training.
    """
    directory = _absolute(directory)
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ValueError(f"{directory} must be a folder of checkpoints, it is a file: remove it or name another folder")
    with _checkpointer(directory) as opened:
        if opened.latest is None:
            return None
        path = directory / str(opened.latest.step)
        way_out = (
            f"Remove {path} to go on from the checkpoint before it, or {directory} to begin anew, or name another "
            "folder (WORKDIR)."
        )
        try:
            metadata = opened.metadata().custom_metadata or {}
            saved = metadata.get("settings")
        except Exception as error:  # of any class, here and below: each layer under orbax has its own
            raise ValueError(f"checkpoint {path} is damaged or foreign ({_first_line(error)}). {way_out}") from error
        if saved is None:
            raise ValueError(f"checkpoint {path} is damaged or foreign: it has no settings. {way_out}")
        check_facts(f"checkpoint {path} is of another training", saved, settings, way_out)
        try:
            with _quiet():
                tree = opened.load(None, _plain(template))
        except Exception as error:
            raise ValueError(f"checkpoint {path} cannot be read ({_first_line(error)}). {way_out}") from error
    if _digest(tree) != metadata["sha256"]:
        raise ValueError(f"checkpoint {path} is damaged: its arrays are not those that were saved. {way_out}")
    return _with_keys(tree, template)


def _innermost(error: BaseException) -> BaseException:
    """What happened, under what was made of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    error = _innermost(error)
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error) else type(error).__name__


def save_weights(path: str | Path, variables: Variables, recipe: dict[str, Any]) -> Variables:
    """Writes a finished model as float16 ``.npz``.

    Args:
        path: the file.
        variables: nested dictionaries of float arrays.
        recipe: how it was trained and what it reached; JSON values.

    Returns:
        The variables as they are read back: rounded to float16, as float32. Evaluate these, so that the file holds the
        model that was measured.

    Raises:
        ValueError: a weight beyond float16's range, or variables of another kind, as those of NNX modules are.
        OSError: the file cannot be written.
    """
    flat = jax.tree_util.tree_flatten_with_path(variables)[0]
    for path_of, _ in flat:
        if not all(isinstance(key, jax.tree_util.DictKey) for key in path_of):
            name = jax.tree_util.keystr(path_of)
            raise ValueError(f"variables must be nested dictionaries, as those of models.from_linen, got {name}")
    with np.errstate(over="ignore"):
        half: dict[str, Any] = {"/".join(key.key for key in path): np.asarray(x, np.float16) for path, x in flat}
    for name, value in half.items():
        if not np.isfinite(value).all():
            raise ValueError(f"variables must be finite in float16, {name} is not")
    write_npz(path, {"recipe": np.array(json.dumps(recipe))} | half, compressed=True)
    return load_weights(path)[0]


def load_weights(path: str | Path) -> tuple[Variables, dict[str, Any]]:
    """Reads what `save_weights` wrote.

    Returns:
        The variables, float32, and the recipe.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or something else.
    """
    way_out = "Name another file, or remove it where the model is to be trained again"
    stored = read_npz(path, "a file of weights", way_out)
    if "recipe" not in stored:
        raise ValueError(f"{path} is not a file of weights: it has no recipe. {way_out}")
    try:
        recipe = json.loads(str(stored.pop("recipe")))
    except ValueError as error:
        raise ValueError(f"{path} is not a file of weights: its recipe is no JSON ({error}). {way_out}") from error
    flat = {name: np.asarray(value, np.float32) for name, value in stored.items()}
    variables: Variables = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        inner = variables
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = jnp.asarray(value)
    return variables, recipe
