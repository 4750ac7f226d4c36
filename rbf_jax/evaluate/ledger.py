"""The ledger of an evaluation: which example survived which attack under which redraw of the defence's noise.

Work is kept by batches while it runs, so that a killed evaluation goes on where it was; what comes out is a file for
each attacked model, its outcomes packed into bits.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rbf_jax.files import replacing

_UNREADABLE = (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile)


class Outcomes(NamedTuple):
    """How the examples fared.

    Attributes:
        rows: int64 ``(N,)``, their indices in the data set.
        selection: bool ``(S, N)``, where the prediction was right, on the redraws that pick an example's worst attack.
        scoring: bool ``(R, N)``, the same on the redraws that score it; a deterministic model has one.
        facts: how they came about; JSON values.
    """

    rows: np.ndarray
    selection: np.ndarray
    scoring: np.ndarray
    facts: dict[str, Any]


def fingerprint(*trees: Any) -> str:
    """sha256 over all arrays of the trees (typed keys included), their shapes and dtypes."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        sha.update(f"{array.shape}{array.dtype}".encode())
        sha.update(array.data)
    return sha.hexdigest()


def open_parts(directory: str | Path, inputs: str, batch_size: int) -> Path:
    """Opens the folder that keeps the batches of one computation.

    Args:
        directory: the folder, made where it is missing.
        inputs: fingerprint of what the computation depends on.
        batch_size: examples in a batch.

    Raises:
        ValueError: the folder holds batches of another computation.
    """
    directory = Path(directory)
    facts = {"inputs": inputs, "batch_size": batch_size}
    path = directory / "inputs.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): remove {directory} to compute it again") from error
        if found != facts:
            raise ValueError(
                f"{directory} holds results for other weights, images, keys or batches. Remove it to compute them "
                "again, or name another folder (WORKDIR)"
            )
    else:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(facts))
    return directory


def kept(directory: Path | None, start: int, compute: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Reads the batch that begins at ``start``, or computes and keeps it; without a folder computes it.

    Raises:
        ValueError: the batch's file is damaged.
    """
    if directory is None:
        return compute()
    path = directory / f"{start:06d}.npz"
    if path.exists():
        try:
            with np.load(path) as file:
                return tuple(file[name] for name in sorted(file.files))
        except _UNREADABLE as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and this batch is computed again") from error
    arrays = compute()
    with replacing(path) as temporary:
        named: dict[str, Any] = {f"array{i:02d}": array for i, array in enumerate(arrays)}
        np.savez(temporary, **named)
    return arrays


def save_outcomes(path: str | Path, outcomes: Outcomes) -> None:
    """Writes outcomes as ``.npz``, eight to a byte."""
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            rows=outcomes.rows.astype(np.int32),
            selection=np.packbits(outcomes.selection, axis=-1),
            scoring=np.packbits(outcomes.scoring, axis=-1),
            facts=np.array(json.dumps(outcomes.facts)),
        )


def load_outcomes(path: str | Path) -> Outcomes:
    """Reads what `save_outcomes` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or something else.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with np.load(path) as file:
            rows = file["rows"].astype(np.int64)
            selection, scoring = (
                np.unpackbits(file[name], axis=-1, count=len(rows)).astype(bool) for name in ("selection", "scoring")
            )
            return Outcomes(rows, selection, scoring, json.loads(str(file["facts"])))
    except _UNREADABLE as error:
        raise ValueError(f"{path} is damaged or no ledger ({error}): remove it to compute it again") from error


def worst_case(selection: np.ndarray, scoring: np.ndarray) -> np.ndarray:
    """Which examples survive their worst attack.

    For each example the attack that leaves it right least often on the selection redraws (the first of equals) is
    scored on the scoring redraws: fresh ones, or the least of several noisy scores would be too low.

    Args:
        selection: bool ``(attacks, S, N)``.
        scoring: bool ``(attacks, R, N)``.

    Returns:
        bool ``(R, N)``.
    """
    worst = selection.mean(1).argmin(0)
    return scoring[worst, :, np.arange(len(worst))].T
